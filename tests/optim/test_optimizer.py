"""Optimizers and learning rates against plain numpy and hand formulas, and what their states are."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.config import Optimizer
from maxscale.models.module import flatten, nest
from maxscale.optim import optimizer
from tests.models import reference as ref
from tests.optim import trees

PEAK = 0.02


def rate(step, **options):
  """The learning rate of a step in a run of 100 steps that warms up for 10."""
  values = {"learning_rate": PEAK, "warmup_steps": 10, "final_fraction": 0.1, **options}
  return float(optimizer.schedule(dataclasses.replace(Optimizer(), **values), 100)(jnp.int32(step)))


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_by_equal_steps_and_the_first_step_learns(shape):
  for step in range(10):
    assert rate(step, schedule=shape) == pytest.approx(PEAK * (step + 1) / 10, rel=1e-5)
  assert rate(10, schedule=shape) == pytest.approx(PEAK, rel=1e-5)
  assert rate(0, schedule=shape, warmup_steps=0) == pytest.approx(PEAK, rel=1e-5)
  assert rate(0, schedule=shape, warmup_steps=1) == pytest.approx(PEAK, rel=1e-5)


@pytest.mark.parametrize("step", [10, 11, 40, 77, 99])
def test_rates_after_the_warm_up(step):
  done = (step - 10) / (99 - 10)  # 0 at the first step after it, 1 at the last step
  cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
  assert rate(step, schedule="cosine") == pytest.approx(PEAK * cosine, rel=1e-5)
  assert rate(step, schedule="linear") == pytest.approx(PEAK * (1 - 0.9 * done), rel=1e-5)
  assert rate(step, schedule="constant") == pytest.approx(PEAK, rel=1e-6)


def test_wsd_holds_the_peak_and_decays_in_its_last_steps():
  for step, left in ((60, 1.0), (79, 1.0), (80, 19 / 20), (89, 10 / 20), (98, 1 / 20), (99, 0.0)):
    expected = PEAK * (0.1 + 0.9 * left)
    assert rate(step, schedule="wsd", decay_steps=20) == pytest.approx(expected, rel=1e-5), step
  assert rate(89, schedule="wsd") == pytest.approx(PEAK, rel=1e-5)  # decay_steps=0: a tenth of the run
  assert rate(94, schedule="wsd") == pytest.approx(PEAK * (0.1 + 0.9 * 5 / 10), rel=1e-5)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_fraction(shape, final):
  assert rate(99, schedule=shape, final_fraction=final) == pytest.approx(PEAK * final, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_has_rates(shape):
  schedule = optimizer.schedule(Optimizer(schedule=shape, learning_rate=PEAK, warmup_steps=10), 3)
  assert [float(schedule(jnp.int32(s))) for s in range(3)] == pytest.approx([0.1 * PEAK, 0.2 * PEAK, 0.3 * PEAK])


# ---- updates, against plain numpy, matrix by matrix

VALUES = {"learning_rate": PEAK, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.3}
STEPS = 4


def started(name, **options):
  values = {**VALUES, "name": name, **options}
  padded = {"heads": 80, "vocab": 16}  # more than the width, which is larger than the heads without padding
  return trees.Run(padded=padded, **{f"optimizer__{key}": value for key, value in values.items()})


def gradients(step):
  return trees.values(step + 1, scale=10.0 ** (step - 2))


def adam(g, s, t):
  s["mu"] = 0.8 * s.get("mu", 0) + 0.2 * g
  s["nu"] = 0.9 * s.get("nu", 0) + 0.1 * g**2
  return s["mu"] / (1 - 0.8**t) / (np.sqrt(s["nu"] / (1 - 0.9**t)) + 1e-3)


def lion(g, s, t):
  update = np.sign(0.8 * s.get("mu", 0) + 0.2 * g)
  s["mu"] = 0.9 * s.get("mu", 0) + 0.1 * g
  return update


def adafactor(g, s, t):
  """Of one matrix or vector."""
  decay = min(0.9, 1 - t**-0.8)
  if g.ndim == 2:
    s["v_row"] = decay * s.get("v_row", 0) + (1 - decay) * (g**2).mean(1)
    s["v_col"] = decay * s.get("v_col", 0) + (1 - decay) * (g**2).mean(0)
    v = np.outer(s["v_row"], s["v_col"]) / s["v_row"].mean()
  else:
    v = s["v"] = decay * s.get("v", 0) + (1 - decay) * g**2
  update = g / np.sqrt(v)
  update /= max(1, np.sqrt((update**2).mean()))
  s["ema"] = 0.8 * s.get("ema", 0) + 0.2 * update
  return s["ema"] / (1 - 0.8**t)


def muon(g, s, t):
  """Of one matrix."""
  s["trace"] = 0.8 * s.get("trace", 0) + g
  x = g + 0.8 * s["trace"]
  x = (x if len(x) < len(x.T) else x.T) / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
  return 0.2 * np.sqrt(max(g.shape)) * (x if x.shape == g.shape else x.T)


def matrices(path, x):
  """(key, matrix or vector) for each layer and expert of a parameter."""
  names, shape, inputs = trees.SHAPES[path]
  experts = names[0] == "experts"
  split = x.reshape(-1, *shape[experts:]) if inputs else x.reshape(-1, np.prod(shape))
  for i, one in enumerate(split):
    yield i, one.reshape(np.prod(one.shape[:inputs]), -1) if inputs else one


RULES = {"adamw": adam, "lion": lion, "adafactor": adafactor, "muon": muon}


@pytest.mark.parametrize("name", RULES)
def test_updates_against_numpy(name):
  """Padding changes no number, and stays zero; matrices are decayed, vectors are not."""
  run, params, states = started(name), {p: np.float64(x) for p, x in trees.values(0).items()}, {}
  for step in range(STEPS):
    run.take(gradients(step))
    for path, g in gradients(step).items():
      rule = adam if name == "muon" and path not in trees.MUON else RULES[name]
      updates = [rule(one, states.setdefault((path, i), {}), step + 1) for i, one in matrices(path, np.float64(g))]
      update = np.stack(updates).reshape(g.shape) + 0.3 * params[path] * (path in trees.MATRICES)
      params[path] = params[path] - PEAK * update
    got = {path: run.whole[f"params/{path}"] for path in params}
    ref.assert_close(trees.logical(got, run.params), params, 1e-5, f"{name}, step {step}")
    for path, x in run.whole.items():
      assert not trees.padding(x, run.specs[path]).any(), path
  moments = {(kind, path) for (path, _), state in states.items() for kind in state}
  assert {f"{kind}/{path}" for kind, path in moments} | {"count"} == set(run.optimizer.specs)
  for kind, path in moments:
    got = trees.logical(run.whole, run.specs)[f"optimizer/{kind}/{path}"]
    want = np.stack([states[path, i][kind] for i, _ in matrices(path, trees.values(0)[path])]).reshape(got.shape)
    ref.assert_close(got, want, 1e-5, f"{kind}/{path}")
  assert int(run.state["count"]) == STEPS


def test_muon_orthogonalises():
  """Singular values of an update are near 1, whatever the gradient's (Newton-Schulz leaves them in 0.6 to 1.2)."""
  run = started("muon", learning_rate=1.0, weight_decay=0.0, b1=0.0)
  before = np.asarray(run.tree["layers"]["mlp"]["up"])
  run.take(gradients(0))
  after = np.asarray(run.tree["layers"]["mlp"]["up"])
  values = np.linalg.svd((before - after) / (0.2 * trees.D**0.5), compute_uv=False)
  assert values.shape == (trees.L, trees.E, trees.F) and 0.6 < values.min() < values.max() < 1.25


def test_adafactor_without_a_first_moment_has_no_memory_for_it():
  run = started("adafactor", b1=0.0)
  assert {path.split("/")[0] for path in run.optimizer.specs} == {"count", "v", "v_row", "v_col"}
  run.take(gradients(0))
  assert all(np.isfinite(x).all() for x in run.whole.values())


# ---- the state

COMBINATIONS = [(name, dtype) for name in RULES for dtype in ("float32", "bfloat16", "int8")]


@pytest.mark.parametrize(("name", "dtype"), COMBINATIONS)
def test_the_state_has_a_path_a_spec_and_names_for_every_leaf(name, dtype):
  params = trees.specs()
  made = optimizer.make(ref.config({"optimizer.name": name, "optimizer.state_dtype": dtype}), params)
  abstract = nest({path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in params.items()})
  specs, state = made.specs, flatten(jax.eval_shape(made.init, abstract))
  assert specs.keys() == state.keys()
  for path, spec in specs.items():
    assert (path, spec.shape, spec.dtype) == (spec.path, state[path].shape, str(state[path].dtype))
    assert len(spec.shape) == len(spec.logical) == len(spec.names)
    kind, _, parameter = path.partition("/")
    if parameter:
      like = params[parameter]
      assert spec.rows == like.rows and (not spec.rows or spec.names[0] == "layers")
      # names are those of the parameter, in its order, and sizes go with names
      sizes = dict(zip(like.names, like.shape))
      kept = [n for n in spec.names if n]
      assert kept == [n for n in like.names if n in kept] and len(kept) >= len(spec.names) - 1
      assert "scale" in kind or all(sizes[n] == size for n, size in zip(spec.names, spec.shape) if n)
      low = parameter in trees.MATRICES and kind in ("mu", "nu", "trace", "ema")
      assert spec.dtype == ({"int8": "uint8" if kind == "nu" else "int8"}.get(dtype, dtype) if low else "float32")
  assert not [path for path, x in state.items() if x.shape == (1,)], "a placeholder of Optax"


def test_factored_moments_have_the_dimensions_of_rows_and_columns():
  specs = optimizer.make(ref.config({"optimizer.name": "adafactor"}), trees.specs()).specs
  for path, shape, names in (
    ("v_row/layers/attention/out", (4, 4, 4), ("layers", "heads", "head_dim")),
    ("v_col/layers/attention/out", (4, 256), ("layers", "embed")),
    ("v_row/layers/mlp/up", (4, 4, 256), ("layers", "experts", "embed")),
    ("v_col/layers/mlp/up", (4, 4, 24), ("layers", "experts", "mlp")),
    ("v_row/embedding", (16,), ("vocab",)),
  ):
    assert (specs[path].shape, specs[path].names) == (shape, names), path
