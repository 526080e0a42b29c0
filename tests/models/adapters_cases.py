"""Cases on 8 simulated devices: adapters are the weights that they stand for (tests/multidevice.py runs them)."""

import re

import jax
import numpy as np

from maxscale.models import module
from tests.models import reference as ref

LORA = {
  "model.vocab_multiple": 8,
  "lora.rank": 3,
  "lora.alpha": 6.0,
  "lora.targets": "layers/(attention/(query|out|value)|mlp/(up|down))",
}
LATENT = {**ref.DENSE, "model.mla.kv_rank": 16, "model.mla.q_rank": 24, "model.mla.nope_dim": 8,
          "model.mla.rope_dim": 4, "model.mla.v_dim": 8, "model.kv_heads": 0}  # fmt: skip
# model -> its options, what is adapted, and how many weights that are
MODELS = {
  "grouped": (ref.DENSE, LORA["lora.targets"], 5),
  "latent": (LATENT, ".*", 8),
}
SCALE = 2.0  # alpha / rank
LAYOUTS = {
  "one device": ({}, 1),
  "fsdp and tensor": ({"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 2}, 8),
  "sequences whole between blocks": ({"mesh.fsdp": 2, "mesh.tensor": 2,
                                      "sharding.compute": {"residual_length": "context"}}, 4),
  "pipeline": ({"mesh.pipeline": 2, "mesh.tensor": 2, "sharding.microbatches": 2}, 4),
}  # fmt: skip


def parameters(program):
  """Random logical values by path, adapters included."""
  rng = np.random.default_rng(3)
  return {path: 0.2 * rng.standard_normal(s.logical).astype(np.float32) + ("norm" in path)
          for path, s in program.skeleton.specs.items()}  # fmt: skip


def loss_and_gradients(program, params):
  pad = lambda x, s: np.pad(x, [(0, n - m) for n, m in zip(s.shape, s.logical)])  # noqa: E731
  specs = program.skeleton.specs
  placed = {path: jax.device_put(pad(params[path], s), program.sharding(s)) for path, s in specs.items()}
  batch = ref.place(program, ref.batch())
  loss, _, grads = ref.loss_and_gradients(program, module.nest(placed), batch)
  return loss, grads


def expected(params, base, targets, count):
  """Loss, and gradients of the adapters from those of the weights W + 2 A B in the decoder without adapters."""
  plain = ref.program(base)
  weights = {path: x for path, x in params.items() if not path.endswith(module.ADAPTERS)}
  inputs = {path: params[f"{path}_a"].ndim - 2 for path in weights if f"{path}_a" in params}
  assert len(inputs) == count and all(re.fullmatch(targets, path) for path in inputs)
  flat = lambda x, n: x.reshape(len(x), int(np.prod(x.shape[1 : 1 + n])), -1)  # noqa: E731  [L, in, out]
  for path, n in inputs.items():
    a, b = flat(params[f"{path}_a"], n), flat(params[f"{path}_b"], 1)
    weights[path] = weights[path] + SCALE * (a @ b).reshape(weights[path].shape)
  loss, grads = loss_and_gradients(plain, weights)
  out = {}
  for path, n in inputs.items():
    dw, a, b = flat(grads[path], n), flat(params[f"{path}_a"], n), flat(params[f"{path}_b"], 1)
    out[f"{path}_a"] = SCALE * (dw @ b.swapaxes(1, 2)).reshape(params[f"{path}_a"].shape)
    out[f"{path}_b"] = SCALE * (a.swapaxes(1, 2) @ dw).reshape(params[f"{path}_b"].shape)
  return loss, out


def compare(model):
  base, targets, count = MODELS[model]
  wanted = None
  for name, (layout, devices) in LAYOUTS.items():
    program = ref.program({**base, **LORA, "lora.targets": targets, **layout}, devices)
    params = parameters(program)
    wanted = wanted or expected(params, base, targets, count)
    loss, grads = loss_and_gradients(program, params)
    assert abs(loss - wanted[0]) < 1e-5 * abs(loss), (name, loss, wanted[0])
    ref.assert_close(grads, wanted[1], 2e-5, name)


def case_adapters_are_the_weights_that_they_stand_for():
  compare("grouped")


def case_adapters_of_latent_attention():
  compare("latent")


def case_only_adapters_change_and_have_a_state():
  program = ref.program({**ref.DENSE, **LORA, "mesh.fsdp": 2, "mesh.tensor": 2}, 4)
  state = ref.initial(program)
  before = ref.host(state["params"])
  state, _ = program.train()(state, ref.place(program, ref.batch()))
  after = ref.host(state["params"])
  changed = {path for path in before if (before[path] != after[path]).any()}
  # b starts as zeros, so that a has no gradient in the first step, and decay changes what is not zero
  assert changed == {path for path in before if path.endswith(module.ADAPTERS)}, changed
  moments = {path.partition("/")[2] for path in ref.host(state["optimizer"])} - {""}
  assert moments == {path for path in before if path.endswith(module.ADAPTERS)}
