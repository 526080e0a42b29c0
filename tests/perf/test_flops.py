"""FLOPs of public models against published numbers; of traced programs against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from maxscale import config as configs
from maxscale.perf import flops
from maxscale.perf.flops import Attention, ModelFlops, flops_per_token, jaxpr_flops


def decoder(layers, embed, mlp, heads, kv_heads, vocab, experts=0, k=2) -> ModelFlops:
  """Through the config, as a run would count it; heads are 128 wide."""
  c = configs.default()
  c.model.update(layers=layers, embed=embed, mlp=mlp, heads=heads, kv_heads=kv_heads, head_dim=128)
  c.model.update(experts=experts, experts_per_token=k)
  return flops.from_config(configs._build(configs.Config, c.to_dict(), ""), vocab)


def deepseek_v3() -> ModelFlops:
  """Its public hyper-parameters: latent attention with heads of 192 and 128, 3 dense layers, 8 of 256 experts + 1."""
  d, h, q_rank, kv_rank, nope, rope, v = 7168, 128, 1536, 512, 128, 64, 128
  q = d * q_rank + q_rank * h * (nope + rope)
  kv = d * (kv_rank + rope) + kv_rank * h * (nope + v)
  experts = 3 * d * 2048 * (8 + 1) + d * 256
  params = 61 * (q + kv + h * v * d) + 3 * 3 * d * 18432 + 58 * experts + d * 129280
  return ModelFlops(params, (Attention(61, h, nope + rope, v),))


LLAMA_8B = decoder(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = decoder(80, 8192, 28672, 64, 8, 128256)
LLAMA_405B = decoder(126, 16384, 53248, 128, 8, 128256)
MIXTRAL = decoder(32, 4096, 14336, 32, 8, 32000, experts=8)


@pytest.mark.parametrize(
  "model, length, causal, giga",
  [
    (LLAMA_8B, 8192, True, 51.47),
    (LLAMA_8B, 8192, False, 57.91),
    (LLAMA_70B, 8192, True, 449.22),
    (LLAMA_70B, 8192, False, 481.43),
    (LLAMA_70B, 131072, True, 932.41),
    (LLAMA_405B, 8192, True, 2523.96),
    (LLAMA_405B, 8192, False, 2625.42),  # the quotient of two rounded published numbers is 2625.43
    (MIXTRAL, 8192, True, 82.93),
    (MIXTRAL, 8192, False, 89.38),
    (MIXTRAL, 4096, False, 82.93),
    (deepseek_v3(), 4096, True, 250.45),
    (deepseek_v3(), 8192, True, 281.15),
    (deepseek_v3(), 4096, False, 281.15),
    (deepseek_v3(), 8192, False, 342.56),
  ],
)
def test_published_flops_per_token(model, length, causal, giga):
  assert round(flops_per_token(model, length, causal) / 1e9, 2) == giga


def test_window():
  def keys(window, length, causal):
    return flops_per_token(ModelFlops(0, (Attention(1, 1, 1, 0, window),)), length, causal) / 6

  assert keys(None, 64, True) == keys(64, 64, True) == keys(100, 64, True) == 32
  exact = np.mean([min(i + 1, 16) for i in range(1024)])
  assert keys(16, 1024, True) == pytest.approx(exact, abs=0.5)  # T/2 for (T+1)/2: half a key
  assert keys(16, 1024, False) == 16


def test_mfu():
  # H100 at 10,000 tokens/s of Llama-3.1-8B: 514.70 of 989 TFLOP/s
  assert flops.mfu(LLAMA_8B, 8192, 10_000, 989e12) == pytest.approx(0.5204, abs=1e-4)
  assert flops.mfu_full_mask(LLAMA_8B, 8192, 10_000, 989e12) == pytest.approx(0.5856, abs=1e-4)


# ---- traced programs


def counted(function, *shapes, notes=None):
  return jaxpr_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)), notes)


def test_matmuls():
  assert counted(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert counted(lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y), (2, 3, 4, 5), (2, 6, 4, 5)) == 2 * 2 * 4 * 3 * 6 * 5
  assert counted(lambda x: jnp.tanh(x).sum(), (3, 5)) == 0
  convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=2)  # noqa: E731
  assert counted(convolve, (2, 4, 8, 8), (6, 2, 3, 3)) == 2 * (2 * 6 * 8 * 8) * (2 * 3 * 3)


def test_ragged_dot_and_its_gradients_count_each_row_once():
  sizes = jnp.array([3, 5], jnp.int32)
  forward = 2 * 8 * 4 * 6
  assert counted(lambda x, w: jax.lax.ragged_dot(x, w, sizes), (8, 4), (2, 4, 6)) == forward
  loss = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()  # noqa: E731
  assert counted(jax.grad(loss, (0, 1)), (8, 4), (2, 4, 6)) == 3 * forward


def scanned(remat):
  def loss(x, ws):
    body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, ws)[0].sum()

  return loss


@pytest.mark.parametrize("remat, matmuls", [(False, 3), (True, 4)])
def test_scan_and_remat(remat, matmuls):
  one = 2 * 8 * 4 * 4  # of each of 3 layers: forward, two of backward, and with remat the forward again
  assert counted(scanned(remat), (8, 4), (3, 4, 4)) == 3 * one
  assert counted(jax.jit(jax.grad(scanned(remat), (0, 1))), (8, 4), (3, 4, 4)) == 3 * matmuls * one


def test_gradient_of_an_mlp_with_and_without_checkpoint():
  def mlp(x, a, b):
    return jnp.tanh(x @ a) @ b

  first, second = 2 * 8 * 4 * 16, 2 * 8 * 16 * 5
  shapes = (8, 4), (4, 16), (16, 5)
  plain = counted(jax.grad(lambda *args: mlp(*args).sum(), (1, 2)), *shapes)
  assert plain == 2 * first + 3 * second  # the input needs no gradient
  remat = counted(jax.grad(lambda *args: jax.checkpoint(mlp)(*args).sum(), (1, 2)), *shapes)
  assert remat == plain + first  # the output of the last matmul is not needed again


def test_control_flow():
  notes = []
  branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
  assert counted(branch, (4, 4), notes=notes) == 2 * 2 * 4**3
  assert counted(jax.vmap(lambda x: x @ x), (5, 4, 4), notes=notes) == 5 * 2 * 4**3 and not notes
  loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)  # noqa: E731
  assert counted(loop, (4, 4), notes=notes) == 2 * 4**3 and len(notes) == 1


def test_custom_derivatives():
  @jax.custom_vjp
  def square(x):
    return x @ x

  square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
  assert counted(square, (4, 4)) == 2 * 4**3
  assert counted(jax.grad(lambda x: square(x).sum()), (4, 4)) == 3 * 2 * 4**3


def test_shard_map_counts_all_devices():
  mesh = AbstractMesh((4, 2), ("data", "tensor"))
  local = lambda x, w: x @ w  # noqa: E731
  manual = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})
  assert counted(manual, (8, 4), (4, 6)) == 2 * 8 * 4 * 6
  whole = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
  assert counted(whole, (8, 4), (4, 6)) == 2 * (2 * 8 * 4 * 6)  # both devices along tensor do the same work


def test_pallas_counts_its_estimate():
  def kernel(x, out):
    out[...] = x[...]

  def call(x, **estimate):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), **estimate)(x)

  notes = []
  cost = pl.CostEstimate(flops=100, transcendentals=0, bytes_accessed=1)
  assert counted(lambda x: call(x, cost_estimate=cost), (8, 8), notes=notes) == 100 and not notes
  assert counted(call, (8, 8), notes=notes) == 0 and "kernel" in notes[0]
