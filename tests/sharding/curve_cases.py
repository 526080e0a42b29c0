"""Training curves on 8 simulated devices (tests/multidevice.py runs them): twenty optimizer steps under a layout are those
of one device, dense and with experts, from the same initial values on the same batches.
"""

import functools
import sys
from unittest import mock

import jax
import numpy as np

from maxscale import check
from maxscale import config as config_lib
from maxscale.models import module, plain
from maxscale.sharding import layouts
from maxscale.step import Program
from tests.models import reference as ref

STEPS = 20
metrics_of = Program._metrics


def with_counts(self, step, total, sums, *rest):
  """The metrics of a step, and the tokens of each expert of each layer."""
  return {
    **metrics_of(self, step, total, sums, *rest),
    "tokens": sums.get("layers", {}).get("expert_tokens", np.zeros((self.shape.L, 1))),
  }


@functools.cache
def config(family):
  options = {"run.steps": STEPS, "optimizer.warmup_steps": 2, "data.batch_size": 8, "data.length": 32,
             "sharding.microbatches": 1}  # fmt: skip
  return layouts.apply(check.shrink(config_lib.load(f"configs/{family}.py")), options)


@functools.cache
def batches():
  """Four of them again and again, so that the loss falls."""
  return [check.make_batch(config("tiny"), step % 4, packed=True) for step in range(STEPS)]


@functools.cache
def train(family, layout):
  """Of every step: the loss [S], the tokens of each expert [S, L, E], and the parameters before it, by path."""
  program = check.build(config(family), layouts.fitted(config(family), layouts.parse(layout)))
  state, losses, tokens, params = initial(program), [], [], []
  with mock.patch.object(Program, "_metrics", with_counts):
    step = program.train().lower(state, ref.place(program, batches()[0])).compile()
  rows = program.schedule.rows(config(family).model.layers)
  for batch in batches():
    if not layout:
      params.append({p: check.logical(program.skeleton.specs[p], v) for p, v in ref.host(state["params"]).items()})
    state, metrics = step(state, ref.place(program, batch))
    losses.append(float(metrics["loss"]))
    tokens.append(np.asarray(metrics["tokens"])[np.argsort(rows)])
  return np.array(losses), np.array(tokens), params


def initial(program):
  """The state at step 0 of a layout; how it is initialised otherwise is not the subject here."""
  params = {f"params/{path}": value for path, value in check.parameters(program.config).items()}
  values = {p: check.physical(s, params.get(p, np.zeros(s.logical, s.dtype))) for p, s in program.specs.items()}
  return module.map_specs(lambda s: jax.device_put(values[s.path], program.sharding(s)), program.specs)


@functools.cache
def one_device(family):
  """Losses, tokens of each expert, and the smallest margin of a router along the way."""
  losses, tokens, params = train(family, "")
  f = jax.jit(lambda p, b: plain.loss(config(family), p, b)[1])
  found = [f(module.nest(p), b) for p, b in zip(params, batches())]
  np.testing.assert_allclose([float(nll) for nll, _ in found], losses, rtol=1e-5)
  assert losses[-4:].mean() < losses[:4].mean() - 0.1, losses
  return losses, tokens, min(float(margins.min()) for _, margins in found)


def compare(layout):
  for family in ("tiny", "tiny_moe"):
    expected, counts, margin = one_device(family)
    losses, tokens, _ = train(family, layout if family == "tiny_moe" else layout.replace("expert", "data"))
    error = np.max(np.abs(losses - expected) / expected)
    moved = int(np.abs(tokens - counts).sum() // 2)
    print(f"curve {family} {layout}: error {error:.1e}, tokens of experts that differ {moved} of {int(counts.sum())}, "
          f"smallest margin {margin:.1e}", file=sys.stderr)  # fmt: skip
    assert error < 1e-4, f"{family}: {losses} is not {expected}"


def case_fsdp():
  compare("fsdp=8")


def case_data_fsdp_tensor():
  compare("data=2,fsdp=2,tensor=2")


def case_context():
  compare("context=4,tensor=2")


def case_pipeline():
  compare("pipeline=2,fsdp=2,tensor=2")


def case_circular_pipeline():
  compare("pipeline=2,data=2,fsdp=2,sharding.repeats=2")


def case_experts():
  compare("expert=4,tensor=2")


def case_two_slices():
  compare("slices=2,dcn.data=2,fsdp=2,tensor=2")


def case_zero1():
  compare("data=4,fsdp=2,sharding.state.embed=fsdp+data")
