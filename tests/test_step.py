"""The step on one device: microbatches, clipping, steps that are not taken, metrics, growth, and a task it must learn."""

import functools

import jax
import numpy as np
import pytest

from maxscale.data.batches import Batches
from maxscale.data.tokenizers import load_tokenizer
from tests.models import reference as ref

PLAIN = {"optimizer.clip_norm": 0.0, "optimizer.warmup_steps": 0, "optimizer.schedule": "constant"}


def uneven():
  """A batch of 8 rows with from 32 to no tokens."""
  batch = ref.batch(8, full=True)
  for row, used in enumerate((32, 3, 32, 2, 0, 17, 5, 32)):
    batch["tokens"][row, used:] = 0
    batch["targets"][row, max(0, used - 1) :] = -1
    batch["segments"][row, used:] = 0
  return batch


@functools.cache
def compiled(family, **options):
  """The program of a family and its compiled step."""
  program = ref.program({**ref.FAMILIES[family], **PLAIN}, **options)
  return program, program.train()


@functools.cache
def start(family):
  return jax.tree.map(np.asarray, ref.initial(ref.program(ref.FAMILIES[family])))


@functools.cache
def direct(family):
  """Loss, sums and gradients of the uneven batch, without a step."""
  return ref.loss_and_gradients(compiled(family)[0], start(family)["params"], uneven())


def run(family, *batches, state=None, **options):
  """(state, metrics) after each of the batches, numpy by path."""
  _, train = compiled(family, **options)
  state, out = jax.tree.map(jax.numpy.array, state or start(family)), []
  for batch in batches:
    state, metrics = train(state, batch)
    out.append((ref.host(state), {key: float(value) for key, value in metrics.items()}))
  return out


def first_gradients(family, batch, **options):
  """The gradients of a first step, which are its first moments over 1 - b1, and its metrics."""
  ((state, metrics),) = run(family, batch, **options)
  return {p.removeprefix("optimizer/mu/"): m / 0.1 for p, m in state.items() if "/mu/" in p}, metrics


# ---- microbatches


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_microbatches_of_very_uneven_rows_give_the_gradients_of_the_whole(family):
  whole, metrics = first_gradients(family, uneven())
  ref.assert_close(whole, direct(family)[2], 1e-5, "the step against its loss")
  for m in (2, 4) if family == "dense" else (4,):
    grads, metrics_of_parts = first_gradients(family, uneven(), sharding__microbatches=m)
    ref.assert_close(grads, whole, 1e-5, f"{m} microbatches")
    assert metrics_of_parts == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def test_microbatches_have_the_dropout_masks_of_the_whole():
  drop = {"model__dropout": 0.3, "remat__policy": "full"}
  whole, metrics = first_gradients("dense", uneven(), **drop)
  parts, metrics_of_parts = first_gradients("dense", uneven(), sharding__microbatches=2, **drop)
  ref.assert_close(parts, whole, 1e-5)
  assert metrics_of_parts == pytest.approx(metrics, rel=1e-5, abs=1e-7)
  assert abs(metrics["loss"] - first_gradients("dense", uneven())[1]["loss"]) > 1e-3


# ---- clipping and metrics


def test_clipping_by_hand():
  grads, metrics = first_gradients("dense", uneven())
  norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
  clipped, metrics = first_gradients("dense", uneven(), optimizer__clip_norm=0.25 * float(norm))
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
  ref.assert_close(clipped, {path: 0.25 * g for path, g in grads.items()}, 1e-5)
  same, _ = first_gradients("dense", uneven(), optimizer__clip_norm=2 * float(norm))
  ref.assert_close(same, grads, 1e-6)


def test_metrics_by_hand():
  program, (loss, sums, _) = compiled("moe")[0], direct("moe")
  _, metrics = first_gradients("moe", uneven())
  targets, counts = (uneven()["targets"] >= 0).sum(), np.asarray(sums["layers"]["expert_tokens"])
  assert metrics["targets"] == targets
  assert metrics["loss"] == pytest.approx(float(sums["nll"]) / targets, rel=1e-5)
  assert metrics["objective"] == pytest.approx(loss, rel=1e-5)
  assert metrics["objective"] > metrics["loss"] + 0.1  # z-losses and balance loss are in it
  assert metrics["expert_load"] == pytest.approx(max(c.max() / c.mean() for c in counts), rel=1e-5)
  assert metrics["balance_loss"] == pytest.approx(float(sums["layers"]["balance_loss"].sum()) / targets / 2, rel=1e-5)
  assert metrics["learning_rate"] == pytest.approx(program.config.optimizer.learning_rate)
  assert metrics["skipped"] == 0


def test_an_evaluation_is_the_plain_loss():
  program, _ = compiled("moe")
  nll, targets = program.evaluate()(start("moe")["params"], uneven())
  assert float(nll) == pytest.approx(float(direct("moe")[1]["nll"]), rel=1e-6)
  assert int(targets) == (uneven()["targets"] >= 0).sum()


def test_a_batch_without_targets_moves_nothing_but_the_decay():
  batch = {**uneven(), "targets": np.full((8, 32), -1, np.int32)}
  ((state, metrics),) = run("dense", batch)
  assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0
  before, o = ref.host(start("dense")), compiled("dense")[0].config.optimizer
  decay = 1 - o.learning_rate * o.weight_decay
  ref.assert_close(state["params/embedding"], before["params/embedding"] * decay, 1e-6)
  np.testing.assert_array_equal(state["params/final_norm/scale"], before["params/final_norm/scale"])


# ---- steps that are not taken

BAD = ref.VOCAB - 1  # a token whose embedding is not a number


def without_bad(seed):
  batch = ref.batch(8, seed=seed)
  batch["tokens"] %= BAD
  return batch


def with_bad(row):
  """A batch in which only one row has the bad token."""
  batch = without_bad(7)
  batch["tokens"][row, 0] = BAD
  return batch


def poisoned():
  state = jax.tree.map(np.array, start("dense"))
  state["params"]["embedding"][BAD] = np.nan
  return state


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_that_is_not_finite_is_not_taken_and_the_next_one_is(microbatches):
  options = {"sharding__microbatches": microbatches}
  bad = with_bad(row=1)  # the second of two microbatches
  first, skipped, after = run("dense", without_bad(0), bad, without_bad(1), state=poisoned(), **options)
  assert np.isfinite(first[1]["objective"]) and first[1]["skipped"] == 0
  assert not np.isfinite(skipped[1]["objective"]) and skipped[1]["skipped"] == 1
  for path, value in first[0].items():
    if path not in ("step", "skipped"):
      np.testing.assert_array_equal(skipped[0][path], value, path)
  assert (skipped[0]["step"], after[0]["step"], after[0]["skipped"]) == (2, 3, 1)
  assert ref.different(after[0]["params/head"], first[0]["params/head"], 1e-5)
  # the run goes on as if the step had not been there (the learning rate is constant)
  _, without = run("dense", without_bad(0), without_bad(1), state=poisoned(), **options)
  for path, value in without[0].items():
    if path not in ("step", "skipped"):
      np.testing.assert_array_equal(after[0][path], value, path)


def test_an_infinite_gradient_norm_is_not_taken_either():
  state = jax.tree.map(np.array, start("dense"))
  state["params"]["final_norm"]["scale"][:] = 1e-25  # tiny logits: a finite loss
  state["params"]["head"] *= 1e22  # and a gradient of 1e22 behind the norm
  ((after, metrics),) = run("dense", uneven(), state=state)
  assert np.isfinite(metrics["objective"]) and not np.isfinite(metrics["grad_norm"])
  assert after["skipped"] == 1
  np.testing.assert_array_equal(after["params/head"], state["params"]["head"])


# ---- growth


def test_the_program_does_not_grow_with_the_layers():
  def instructions(layers):
    program = ref.program(ref.DENSE, model__layers=layers, remat__policy="full")
    compiled = program.train().lower(program.abstract_state(), program.abstract_batch(8, 32)).compile()
    return compiled.as_text().count(" = ")

  four, sixteen = instructions(4), instructions(16)
  assert sixteen <= 1.02 * four, (four, sixteen)


# ---- learning


def test_the_copy_task_is_learned():
  """The second half of a row repeats random bytes: only attention to the first half predicts it (chance is 5.5)."""
  options = {
    **ref.DENSE, "model.embed": 128, "model.mlp": 64, "model.vocab_multiple": 2, "loss.z_loss": 1e-4,
    "data.sources": {"copy": {"kind": "copy"}}, "data.batch_size": 32, "run.steps": 120,
    "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 20, "optimizer.weight_decay": 0.0,
  }  # fmt: skip
  tokenizer = load_tokenizer("bytes")
  program = ref.program(options, vocab=tokenizer.vocab_size)
  batches, heldout = (Batches(program.config, tokenizer, split) for split in ("train", "heldout"))
  state, train = ref.initial(program), program.train()
  for step in range(program.config.run.steps):
    state, metrics = train(state, batches.batch(step))
    if step == 0:
      assert 5 < float(metrics["loss"]) < 7
      assert int(metrics["targets"]) == 32 * 16, "the loss counts the repeated half only"
  assert float(metrics["loss"]) < 0.1
  nll, targets = program.evaluate()(state["params"], heldout.batch(0))
  assert float(nll) / int(targets) < 0.1, "learned by heart"
