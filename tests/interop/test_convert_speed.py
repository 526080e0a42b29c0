"""What a conversion costs beside saving the same arrays through Orbax."""

import time

import ml_dtypes
import numpy as np
import pytest

from maxscale.checkpoint import Checkpointer, Meta, restore
from maxscale.interop import importing
from tests.interop import checkpoints as hf


@pytest.mark.slow
def test_135m_parameters_are_converted_about_as_fast_as_they_are_saved(tmp_path, capsys):
  sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
  config = {**hf.LLAMA, **sizes}
  source = hf.write(tmp_path / "hf", config, {n: np.ones(s, ml_dtypes.bfloat16) for n, s in hf.shapes(config).items()})
  converted, saved = [], []
  for i in range(3):  # one after the other, so that both meet the same machine
    report = importing.from_hf(str(source), str(tmp_path / f"ours-{i}"))
    converted.append(report.written / report.seconds)
    leaves = hf.leaves(tmp_path / f"ours-{i}")
    state = restore(str(tmp_path / f"ours-{i}"), leaves).state
    checkpointer, start = Checkpointer(str(tmp_path / f"saved-{i}"), 1, 0, 600.0), time.perf_counter()
    checkpointer.save(0, state, leaves, Meta())
    checkpointer.close()
    saved.append(report.written / (time.perf_counter() - start))
  with capsys.disabled():
    print(
      f"\nconverted at {max(converted) / 1e6:.0f} MB/s, saved through Orbax at {max(saved) / 1e6:.0f} MB/s; {report}"
    )
  assert max(converted) > 0.6 * max(saved)
