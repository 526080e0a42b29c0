"""`python -m maxscale.evaluate`: the perplexity of a text against the log-softmax of the plain model's logits."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from maxscale import assemble, evaluate, resume
from maxscale.checkpoint.restore import restore
from maxscale.generate import on_this_machine, read_config
from maxscale.models import plain
from tests import runs

TEXT = "def load(path):\n  # ünïcode 漢字\n  return open(path).read()\n" * 3 + "x"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  folder = runs.copy(runs.reference(), tmp_path_factory.mktemp("evaluate") / "run", runs.STEPS)
  config = json.loads((folder / "config.json").read_text())
  config["run"]["compile_cache"] = ""  # the setting is one of the whole process, and other tests share it
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@pytest.fixture
def say(capsys):
  """(arguments of evaluate) -> (exit code, what it printed as a dict, stderr)."""

  def call(*arguments):
    code = evaluate.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, dict(line.rsplit(maxsplit=1) for line in out.splitlines()), err

  return call


@pytest.fixture(scope="module")
def logits(run_dir):
  """(ids [T], step) -> float64 [T, V]: the plain model, one sequence, nothing packed."""
  config = on_this_machine(read_config(str(run_dir)))
  program = assemble.build(config, assemble.vocabulary(config)[1], sampling=True)
  forward = jax.jit(lambda params, batch: plain.logits(config, params, batch)[0])

  def run(ids, step):
    params = restore(str(run_dir), resume.leaves(program, "params/"), step).state["params"]
    tokens = np.asarray(ids, np.int32)[None]
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": np.arange(len(ids))[None]}
    return np.asarray(forward(params, batch), np.float64)

  return run


def nats(logits, ids, length, step):
  """-sum log p of every id: pieces of `length`, each after the byte tokenizer's begin token."""
  total = 0.0
  for start in range(0, len(ids), length):
    piece = ids[start : start + length]
    z = logits([256, *piece[:-1]], step)[:, :258]
    total += (np.log(np.exp(z).sum(-1)) - z[np.arange(len(piece)), piece]).sum()
  return total


@pytest.mark.parametrize("length, step", [(None, None), (50, 40), (1000, None)])
def test_perplexity_is_that_of_plain_logits(tmp_path, run_dir, say, logits, monkeypatch, length, step):
  monkeypatch.setattr(evaluate, "TOKENS", 200)  # 4 rows of 64 tokens are 2 batches of 3, the last with 2 empty rows
  (tmp_path / "text").write_text(TEXT)
  options = [*(("--length", length) if length else ()), *(("--step", step) if step else ())]
  code, said, err = say("--run", run_dir, "--text", tmp_path / "text", *options)
  ids = list(TEXT.encode())
  want = nats(logits, ids, length or 64, step)
  assert (code, err) == (0, "") and said["tokens"] == str(len(ids)) and said["step"] == str(step or runs.STEPS)
  assert float(said["nats a token"]) == pytest.approx(want / len(ids), rel=1e-4)
  assert float(said["perplexity"]) == pytest.approx(math.exp(want / len(ids)), rel=2e-4)
  assert float(said["bits a byte"]) == pytest.approx(want / len(ids) / math.log(2), rel=1e-4)


def test_several_devices_share_the_rows(tmp_path, run_dir, say):
  (tmp_path / "text").write_text(TEXT)
  ask = ["--run", str(run_dir), "--text", str(tmp_path / "text"), "--length", "50"]
  environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
  command = [sys.executable, "-m", "maxscale.evaluate", *ask]
  done = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, check=True)
  split, (_, one, _) = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()), say(*ask)
  assert split.keys() == one.keys() and split["tokens"] == one["tokens"]
  assert float(split["nats a token"]) == pytest.approx(float(one["nats a token"]), abs=3e-6)


@pytest.mark.parametrize("number, length, size", [(1, 4, 2), (7, 4, 1), (8, 4, 2), (9, 4, 4), (40, 4, 3)])
def test_every_token_is_a_target_once(number, length, size):
  ids = np.arange(100, 100 + number)
  made = list(evaluate.batches(ids, 7, length, size))
  assert all(batch["tokens"].shape == (size, length) and batch["rows"].tolist() == list(range(size)) for batch in made)
  arrays = [np.concatenate([batch[key] for batch in made]) for key in ("tokens", "segments", "targets")]
  rows = [(t[s > 0].tolist(), y[y >= 0].tolist()) for t, s, y in zip(*arrays)]
  pieces = [ids[i : i + length].tolist() for i in range(0, number, length)]
  assert [y for _, y in rows if y] == pieces
  for tokens, y in rows:
    assert tokens[:length] == ([7, *y][:length] if y else [])


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path, run_dir, say):
  (tmp_path / "text").write_text(TEXT)
  damaged = runs.copy(run_dir, tmp_path / "run", runs.STEPS)
  array = runs.flip(damaged, runs.STEPS)
  code, said, err = say("--run", damaged, "--text", tmp_path / "text")
  assert code == 0 and said["step"] == "60"
  assert f"the checkpoint of step {runs.STEPS} is damaged and was not used: {array}: " in err


def test_what_cannot_be_evaluated_is_refused(tmp_path, run_dir, say):
  text = tmp_path / "text"
  text.write_text(TEXT)
  empty, binary = tmp_path / "empty", tmp_path / "binary"
  empty.write_text("")
  binary.write_bytes(b"ab\xff")
  for arguments, code, message in (
    ((tmp_path, text), 2, f"{tmp_path} holds no run"),
    ((run_dir, tmp_path / "none"), 2, f"there is no file {tmp_path / 'none'}"),
    ((run_dir, empty), 2, f"{empty} has no text"),
    ((run_dir, binary), 2, "is not UTF-8 (byte 2)"),
    ((run_dir, text, "--length", 0), 2, "--length 0 must be at least 1"),
    ((run_dir, text, "--step", 41), 1, "no checkpoint of step 41"),
  ):
    got, said, err = say("--run", arguments[0], "--text", *arguments[1:])
    assert (got, said) == (code, {}) and message in err


def test_another_tokenizer_than_the_models_is_refused(tmp_path, run_dir, say):
  (tmp_path / "text").write_text(TEXT)
  config = json.loads((run_dir / "config.json").read_text())
  config["model"]["vocab_size"] = 128
  (tmp_path / "config.json").write_text(json.dumps(config))
  code, _, err = say("--run", tmp_path, "--text", tmp_path / "text")
  assert code == 2 and "has tokens above model.vocab_size=128" in err
