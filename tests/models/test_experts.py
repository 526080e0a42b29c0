"""Experts on one device, split over simulated devices, and in the program of a TPU; and what they compute inside."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.models import activations, expert_mlp, experts, kernels
from tests import multidevice
from tests.models import reference as ref

CASES = "tests.models.experts_cases"
results = multidevice.fixture(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", multidevice.names(CASES))
def test_case(results, name):
  multidevice.check(results, name)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'maxscale[plan]')"
)
def test_a_tpu_exchanges_only_the_rows_that_another_device_computes():
  environment = multidevice.environment(1, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  command = [sys.executable, "-m", CASES]
  done = subprocess.run(command, cwd=multidevice.ROOT, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-5000:]
  program = json.loads(done.stdout.splitlines()[-1])
  room, choices = "1280", "1024"
  # Rows and gates go to the experts, their results come back; backward each of the three goes the other way.
  expected = [["bf16", room], ["f32", room], ["bf16", choices], ["bf16", room], ["bf16", choices], ["f32", choices]]
  assert sorted(program["exchanges"]) == sorted(expected)
  assert set(program["others"]) == {"s32"}, "only counts go to all devices"


# ---- against Hugging Face

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def hugging_face(module):
  """A module of transformers, and torch."""
  reason = "torch and transformers are not installed (pip install 'maxscale[hf]')"
  torch = pytest.importorskip("torch", reason=reason)
  pytest.importorskip("transformers", reason=reason)
  return importlib.import_module(f"transformers.{module}"), torch


def normal(*shapes, scale=1.0):
  rng = np.random.default_rng(0)
  return [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_and_their_gradients_are_those_of_hugging_face(kind):
  theirs, torch = hugging_face("activations")
  arrays = normal(*[(16, 8)] * 3, scale=3)
  gate, up, dy = (torch.tensor(v, requires_grad=True) for v in arrays)
  act = theirs.ACT2FN[ACTIVATIONS[kind]]
  for inputs, f, expected in (
    ((gate, up), lambda g, u: activations.hidden(kind, g, u), act(gate) * up),
    ((up,), lambda u: activations.hidden(kind, None, u), act(up)),
  ):
    y, pull = jax.vjp(f, *(v.detach().numpy() for v in inputs))
    ref.assert_close(y, expected.detach().numpy())
    for ours, torchs in zip(pull(arrays[2]), torch.autograd.grad(expected, inputs, dy), strict=True):
      ref.assert_close(ours, torchs.numpy())


def test_experts_and_their_gradients_are_those_of_gpt_oss():
  theirs, torch = hugging_face("models.gpt_oss.modeling_gpt_oss")
  config = theirs.GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2)
  module = theirs.GptOssExperts(config)
  names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
  values = normal(*(getattr(module, name).shape for name in names))
  with torch.no_grad():
    for name, value in zip(names, values):
      getattr(module, name).copy_(torch.tensor(value))
  x, dy = normal((20, 16), (20, 16), scale=2)
  rng = np.random.default_rng(1)
  ids, gates = np.stack([rng.permutation(4)[:2] for _ in range(20)]), rng.random((20, 2)).astype(np.float32)
  inputs = torch.tensor(x, requires_grad=True), torch.tensor(gates, requires_grad=True)
  expected = module(inputs[0], torch.tensor(ids), inputs[1])
  leaves = (*inputs, *(getattr(module, name) for name in names))
  gradients = torch.autograd.grad(expected, leaves, torch.tensor(dy))

  def f(x, gates, wide, wide_bias, down, down_bias):
    weight = lambda w, *names: kernels.Weight.of(w, names, "float32", "float32")  # noqa: E731
    gate, up = (weight(wide[..., i::2], "experts", "embed", "mlp") for i in (0, 1))
    mlp = expert_mlp.Weights(
      gate, up, weight(down, "experts", "mlp", "embed"), wide_bias[..., ::2], wide_bias[..., 1::2]
    )
    weights = experts.Weights(mlp, down_bias)
    return experts.experts(x, gates, jnp.asarray(ids, jnp.int32), weights, "clamped_swiglu", 1.0, "sparse")[0]

  y, pull = jax.vjp(f, x, gates, *values)
  ref.assert_close(y, expected.detach().numpy())
  for name, ours, torchs in zip(("x", "gates", *names), pull(dy), gradients, strict=True):
    ref.assert_close(ours, torchs.numpy(), 1e-5, name)


# ---- what activations keep


def test_bfloat16_is_rounded_once_and_backward_keeps_the_inputs_alone():
  gate, up = (jnp.asarray(v, jnp.bfloat16) for v in normal((16, 8), (16, 8), scale=3))
  for kind in (*ACTIVATIONS, "clamped_swiglu"):
    y, pull = jax.vjp(lambda g, u: activations.hidden(kind, g, u), gate, up)  # noqa: B023
    whole = activations.hidden(kind, gate.astype(jnp.float32), up.astype(jnp.float32))
    np.testing.assert_array_equal(y, whole.astype(jnp.bfloat16))
    assert [(v.shape, v.dtype) for v in jax.tree.leaves(pull)] == [((16, 8), jnp.bfloat16)] * 2
    assert all(v.dtype == jnp.bfloat16 for v in pull(y))
