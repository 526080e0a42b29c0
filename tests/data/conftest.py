import dataclasses
import json

import numpy as np
import pytest

from maxscale import config as config_lib


@pytest.fixture
def make_config(tmp_path):
  """(seed, vocab_size, options of data) -> a Config whose cache is the test's own."""

  def make(seed=0, vocab_size=0, **data):
    config = config_lib.Config()
    data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"), **data)
    run = dataclasses.replace(config.run, seed=seed)
    return dataclasses.replace(
      config, run=run, data=data, model=dataclasses.replace(config.model, vocab_size=vocab_size)
    )

  return make


@pytest.fixture
def write_jsonl(tmp_path):
  """Texts -> the spec of a source of them."""

  def write(name, texts, heldout=0.0):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "jsonl", "path": str(path), "heldout": heldout}

  return write


@pytest.fixture
def random_texts():
  """n -> that many texts of 0 to 300 letters."""

  def make(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh"), rng.integers(0, 300))) for _ in range(n)]

  return make
