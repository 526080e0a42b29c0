"""`python -m maxscale.generate`: a run of 8 devices sampled in this process, which has one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale import assemble, generate, resume
from maxscale.checkpoint.restore import restore
from maxscale.models import sample
from tests import runs

TOKENS = 48


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate") / "run"
  mesh = {"run.simulated_devices": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  runs.train(folder, {**mesh, "run.steps": 150, "checkpoint.every": 75, "optimizer.learning_rate": 1e-2})
  file = folder / "config.json"
  config = json.loads(file.read_text())
  config["run"]["compile_cache"] = ""  # the setting is one of the whole process, and other tests share it
  file.write_text(json.dumps(config))
  return folder


@pytest.fixture
def say(capsys):
  """(arguments of generate) -> (exit code, stdout, stderr)."""

  def call(*arguments):
    code = generate.main([str(a) for a in arguments])
    return code, *capsys.readouterr()

  return call


@pytest.fixture
def sampled(monkeypatch):
  """The tokens of each call of the sampler."""
  calls, original = [], sample.sample

  def spy(*args):
    calls.append(original(*args))
    return calls[-1]

  monkeypatch.setattr(sample, "sample", spy)
  return calls


def greedy(run_dir, prompt, tokens):
  """The most likely tokens, each by a forward pass over the whole text: no cache of keys and values."""
  config = generate.on_this_machine(generate.read_config(str(run_dir)))
  tokenizer, vocab = assemble.vocabulary(config)
  program = assemble.build(config, vocab)
  params = restore(str(run_dir), resume.leaves(program, "params/")).state["params"]

  @jax.jit
  def logits(params, ids):
    model = program.skeleton.merge(params)
    batch = {"tokens": ids, "segments": jnp.ones_like(ids), "positions": jnp.arange(ids.shape[1])[None]}
    x, _, _ = model.run_layers(model.embed(batch)[0], jnp.arange(model.shape.L), batch)
    return model.logits(x)[0]

  text = [tokenizer.bos, *tokenizer.encode(prompt)]
  ids = np.zeros((1, len(text) + tokens), np.int32)  # what comes later is not seen: attention is causal
  ids[0, : len(text)] = text
  for i in range(len(text), ids.shape[1]):
    ids[0, i] = int(np.argmax(logits(params, ids)[i - 1]))
  new = ids[0, len(text) :]
  ends = np.flatnonzero(new == tokenizer.eos)
  return new[: ends[0]] if len(ends) else new, tokenizer


def test_greedy_text_is_that_of_plain_forward_passes(run_dir, say, sampled):
  prompt = "def load("
  code, out, err = say("--run", run_dir, "--prompt", prompt, "--tokens", TOKENS, "--temperature", 0)
  expected, tokenizer = greedy(run_dir, prompt, TOKENS)
  assert (code, err) == (0, "") and len(expected) > 5
  assert sampled[0].tolist() == expected.tolist()
  assert out == prompt + tokenizer.decode(expected) + "\n"


def test_the_seed_decides(run_dir, say):
  texts = [say("--run", run_dir, "--tokens", TOKENS, "--temperature", 1.5, "--seed", seed)[1] for seed in (3, 3, 4)]
  assert texts[0] == texts[1] != texts[2]


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path, run_dir, say, sampled):
  damaged = runs.copy(run_dir, tmp_path / "run", 150)
  array = runs.flip(damaged, 150)
  ask = ("--tokens", TOKENS, "--temperature", 0, "--prompt", "def load(")
  code, out, err = say("--run", damaged, *ask)
  assert code == 0 and f"the checkpoint of step 150 is damaged and was not used: {array}: " in err
  assert out == say("--run", run_dir, *ask, "--step", 75)[1]
  say("--run", run_dir, *ask)
  assert sampled[0].tolist() == sampled[1].tolist() != sampled[2].tolist()


def test_what_is_no_run_or_no_step_is_refused(tmp_path, run_dir, say):
  code, out, err = say("--run", tmp_path)
  assert (code, out) == (2, "") and f"{tmp_path} holds no run" in err
  code, out, err = say("--run", run_dir, "--step", 41)
  assert (code, out) == (1, "") and "no checkpoint of step 41" in err
  code, _, err = say("--run", run_dir, "--tokens", 0)
  assert code == 2 and "--tokens" in err
