"""AdamW and the learning rates against plain numpy and hand formulas."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.config import Optimizer
from maxscale.models.module import ParamSpec, flatten, nest
from maxscale.optim import optimizer
from tests.models import reference as ref

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


# ---- AdamW

SHAPES = {"layers/w": ((3, 4, 5), ("layers", "embed", "mlp")), "layers/norm": ((3, 4), ("layers", "norm")),
          "table": ((7, 4), ("vocab", "embed"))}  # fmt: skip
SPECS = {p: ParamSpec(p, shape, shape, names, "float32", 1.0, p[0] == "l") for p, (shape, names) in SHAPES.items()}
VALUES = {"learning_rate": PEAK, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.3}


def make(**options):
  return optimizer.make(ref.config({f"optimizer.{key}": value for key, value in {**VALUES, **options}.items()}), SPECS)


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return {path: rng.normal(size=shape) for path, (shape, _) in SHAPES.items()}


def as_jax(flat):
  return nest({path: jnp.asarray(value, jnp.float32) for path, value in flat.items()})


def test_adamw_against_numpy_for_five_steps():
  adamw = make(schedule="linear", warmup_steps=2)
  params = random_tree(0)
  state, mu, nu = adamw.init(as_jax(params)), *({p: 0.0 for p in params} for _ in range(2))
  tree = as_jax(params)
  for step in range(5):
    grads = {path: g * 10.0 ** (step - 2) for path, g in random_tree(step + 1).items()}
    tree, state = adamw.update(as_jax(grads), state, tree, jnp.int32(step))
    for path, g in grads.items():
      mu[path] = 0.8 * mu[path] + 0.2 * g
      nu[path] = 0.9 * nu[path] + 0.1 * g**2
      update = mu[path] / (1 - 0.8 ** (step + 1)) / (np.sqrt(nu[path] / (1 - 0.9 ** (step + 1))) + 1e-3)
      update = update + (0.0 if path == "layers/norm" else 0.3) * params[path]
      params[path] = params[path] - float(adamw.learning_rate(jnp.int32(step))) * update
    ref.assert_close(flatten(tree), params, 1e-5, f"parameters after step {step}")
    ref.assert_close(flatten(state["mu"]), mu, 1e-5, f"mu after step {step}")
    ref.assert_close(flatten(state["nu"]), nu, 1e-5, f"nu after step {step}")
  assert int(state["count"]) == 5


def test_norms_are_not_decayed_and_matrices_are():
  adamw, params = make(warmup_steps=0), random_tree(0)
  zero = as_jax({path: np.zeros_like(value) for path, value in params.items()})
  after = flatten(adamw.update(zero, adamw.init(as_jax(params)), as_jax(params), jnp.int32(0))[0])
  np.testing.assert_array_equal(after["layers/norm"], np.float32(params["layers/norm"]))
  for path in ("layers/w", "table"):
    ref.assert_close(after[path], params[path] * (1 - PEAK * 0.3), 1e-6, path)


def test_the_norms_of_the_model_are_those_not_decayed():
  program = ref.program(ref.MOE)
  exempt = {path for path, spec in program.skeleton.specs.items() if "norm" in spec.names}
  assert exempt == {"layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"}


def test_the_state_has_a_path_a_spec_and_names_for_every_leaf():
  adamw = make()
  assert set(adamw.specs) == {"count", *(f"{m}/{p}" for m in ("mu", "nu") for p in SPECS)}
  for path, leaf in flatten(adamw.init(as_jax(random_tree(0)))).items():
    spec = adamw.specs[path]
    assert (spec.shape, spec.dtype) == (leaf.shape, str(leaf.dtype)), path
    assert path == "count" or spec.names == SPECS[path.split("/", 1)[1]].names
