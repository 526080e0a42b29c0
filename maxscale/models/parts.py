"""The parts that layers are made of: sizes, weights and their adapters, norms, MLP, dropout, embedding tables.

Blocks take and give the residual layout, [B, T of this device, D]; `sharding.gather` and `sharding.reduce` are where
they enter and leave the region whose weights are split (sharding/context.py).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxscale import config as config_lib
from maxscale.models import activations, kernels, quantise
from maxscale.models.module import param
from maxscale.sharding import context as sharding

REGIONS = ("heads", "kv_heads", "mlp")  # logical axes of the regions whose weights are split


def region_of(names: Sequence[str | None]) -> str:
  """The region whose weights are split as an array with these dimensions is; "": none."""
  return next((r for r in REGIONS for name in names if name and r in name.split("+")), "")


def _pad(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
  """Sizes of a decoder, by the letters of the legend, and its options; `*_pad` are the padded sizes of the arrays.

  D width, F of an MLP or expert, V vocabulary, N query heads, K key and value heads, H width of a query or key,
  H_v of a value, L layers (of them L_dense with a dense MLP before those with experts), E experts, A of a token.
  """

  m: config_lib.Model
  lora: config_lib.Lora
  D: int
  F: int
  V: int
  V_pad: int
  N: int
  N_pad: int
  K: int
  K_pad: int
  H: int
  H_v: int
  L: int
  L_dense: int
  E: int
  E_pad: int
  A: int
  buffer: float
  exchange: bool
  context: str
  grad_dtype: str

  @classmethod
  def of(cls, config: config_lib.Config, vocab_size: int) -> Shape:
    m, kv = config.model, config.kv_heads
    kv_pad = _pad(kv, m.kv_head_multiple)
    return cls(
      m=m, lora=config.lora, D=m.embed, F=m.mlp, V=vocab_size, V_pad=_pad(vocab_size, m.vocab_multiple),
      N=m.heads, N_pad=m.heads // kv * kv_pad, K=kv, K_pad=kv_pad, H=config.head_dim, H_v=config.value_dim,
      L=m.layers, L_dense=config.dense_layers, E=m.experts, E_pad=_pad(m.experts, m.expert_multiple),
      A=m.experts_per_token, buffer=config.sharding.expert_buffer, exchange=config.sharding.experts == "exchange", context=config.sharding.context,
      grad_dtype=config.optimizer.grad_reduce_dtype,
    )  # fmt: skip

  def window(self, layer: int) -> int:
    """Keys that the queries of a layer see; 0: all."""
    return self.m.windows[layer % len(self.m.windows)] if self.m.windows else 0


class Weights(nnx.Module):
  """A part with parameters; `part` is its name in the rules of `model.quantize`."""

  part = ""

  def __init__(self, shape: Shape):
    self.shape = shape

  def array(self, name: str, region: str = "") -> jax.Array:
    """A parameter as it is; inside a region, one that all of its devices have the same of gets the sum of gradients."""
    w = getattr(self, name)
    shared = region and not region_of(w.names)
    return sharding.spread(w.get_value(), region) if shared else w.get_value()

  def weight(self, name: str, dtype: Any, region: str = "") -> kernels.Weight:
    """A parameter ready for products."""
    w = getattr(self, name)
    kind = quantise.rule(self.shape.m.quantize, f"{self.part}/{name}") if w.inputs else ""
    return kernels.Weight.of(self.array(name, region), w.names, dtype, self.shape.grad_dtype, kind)

  def product(self, spec: str, x: jax.Array, name: str, parts: kernels.Parts = ()) -> Any:
    """einsum(spec, x, parameter), and of the two thin matrices beside it where it is adapted; of each of its `parts`."""
    times = (lambda spec, x, w: kernels.matmul_parts(spec, parts, x, w)) if parts else kernels.matmul
    y = times(spec, x, self.weight(name, x.dtype))
    if not hasattr(self, f"{name}_a"):
      return y
    region = region_of(getattr(self, name).names)
    (xs, ws), ys = spec.split("->")[0].split(","), spec.split("->")[1]
    kept, inputs, outputs = ("".join(c for c in a if (c in b) == both) for a, b, both in
                             ((xs, ws, False), (ws, ys, False), (ws, ys, True)))  # fmt: skip
    low = kernels.matmul(f"{xs},{inputs}z->{kept}z", x, self.weight(f"{name}_a", x.dtype, region))
    more = times(f"{kept}z,z{outputs}->{ys}", low, self.weight(f"{name}_b", x.dtype, region))
    return jax.tree.map(lambda a, b: a + (self.shape.lora.alpha / self.shape.lora.rank) * b, y, more)

  def biased(self, x: jax.Array, name: str) -> jax.Array:
    """x plus a parameter, in float32, where the part has it."""
    if not hasattr(self, name):
      return x
    return (x.astype(jnp.float32) + self.array(name)).astype(x.dtype)


def adapt(module: nnx.Module, lora: config_lib.Lora, prefix: str = "") -> int:
  """Gives each product whose weight's path the targets match its adapters; returns how many were given."""
  count = 0
  for name, value in list(vars(module).items()):
    path = f"{prefix}{name}"
    if isinstance(value, nnx.Module):
      count += adapt(value, lora, f"{path}/")
    elif (
      isinstance(value, nnx.Param)
      and value.inputs
      and "experts" not in value.names
      and re.fullmatch(lora.targets, path)
    ):
      i, meta = value.inputs, value.get_metadata()
      shape, logical, names = value.get_value().shape, meta["logical"], meta["names"]
      a = param((*shape[:i], lora.rank), (*names[:i], None), math.prod(logical[:i]) ** -0.5, (*logical[:i], lora.rank))
      setattr(module, f"{name}_a", a)
      setattr(module, f"{name}_b", param((lora.rank, *shape[i:]), (None, *names[i:]), 0.0, (lora.rank, *logical[i:])))
      count += 1
  return count


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last dimension, in float32. Zhang and Sennrich, arXiv 1910.07467."""
  y = x.astype(jnp.float32)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


class Norm(Weights):
  """RMSNorm with scale or 1 + scale, or LayerNorm (Ba et al., arXiv 1607.06450) of the residual stream."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    self.scale = param((shape.D,), ("norm",), scale_std(shape))
    if shape.m.norm == "layer":
      self.bias = param((shape.D,), ("norm",), 0.0)

  @jax.named_scope("norm")
  def __call__(self, x_btd: jax.Array) -> jax.Array:
    if self.shape.m.norm != "layer":
      return rms_norm(x_btd, scale_of(self.shape, self.array("scale")), self.shape.m.norm_eps)
    x = x_btd.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return (rms_norm(x, self.array("scale"), self.shape.m.norm_eps) + self.array("bias")).astype(x_btd.dtype)


def scale_std(shape: Shape) -> float | None:
  """How the scale of a norm starts: as ones, or as zeros where one is added to it."""
  return 0.0 if shape.m.norm == "rms_plus_one" else None


def scale_of(shape: Shape, scale: jax.Array) -> jax.Array:
  return 1 + scale if shape.m.norm == "rms_plus_one" else scale


class MLP(Weights):
  """act(x gate) * (x up), projected down, or act(x up) without a gate. Shazeer, arXiv 2002.05202."""

  part = "mlp"

  def __init__(self, shape: Shape, width: int, part: str = "mlp", bias: bool = False):
    super().__init__(shape)
    self.part = part
    d = shape.D
    if shape.m.gated:
      self.gate = param((d, width), ("embed", "mlp"), d**-0.5, inputs=1)
    self.up = param((d, width), ("embed", "mlp"), d**-0.5, inputs=1)
    self.down = param((width, d), ("mlp", "embed"), (2 * shape.L * width) ** -0.5, inputs=1)
    if bias:
      if shape.m.gated:
        self.gate_bias = param((width,), ("mlp",), 0.0)
      self.up_bias = param((width,), ("mlp",), 0.0)
      self.down_bias = param((d,), ("norm",), 0.0)

  def __call__(self, x_btd: jax.Array, valid_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    y = sharding.reduce(self.inside(sharding.gather(x_btd, "mlp")), "mlp")
    return checkpoint_name(self.biased(y, "down_bias"), "mlp_out"), {}

  def inside(self, x_btd: jax.Array) -> jax.Array:
    """Inside the region of `mlp`: all places, a partial sum, without the last bias."""
    gate = None
    if self.shape.m.gated:
      gate = checkpoint_name(self.biased(self.product("btd,df->btf", x_btd, "gate"), "gate_bias"), "gate")
    up = checkpoint_name(self.biased(self.product("btd,df->btf", x_btd, "up"), "up_bias"), "up")
    return self.product("btf,fd->btd", activations.hidden(self.shape.m.activation, gate, up), "down")


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Dropout whose mask depends on (seed, step, layer, place, row, position) alone: on no layout, stack or remat."""

  key: jax.Array  # of (seed, step)
  ids_bt: jax.Array  # int32 [B, T]: row of the global batch * T + position in the row
  rate: float

  def __call__(self, x_btd: jax.Array, layer: jax.Array, place: int) -> jax.Array:
    key = jax.random.fold_in(self.key, 2 * layer + place)
    draw = lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, (x_btd.shape[-1],))  # noqa: E731
    keep = jax.vmap(jax.vmap(draw))(self.ids_bt)
    return jnp.where(keep, x_btd / (1 - self.rate), 0)


def embedding(shape: Shape) -> nnx.Param:
  """A table [V, D]: the embedding, or the output head."""
  return param((shape.V_pad, shape.D), ("vocab", "embed"), shape.D**-0.5, (shape.V, shape.D))


def embedding_scale(shape: Shape) -> float:
  """The table starts at 1/sqrt(D), right for a head; the residual stream starts at one."""
  return shape.m.embedding_scale or math.sqrt(shape.D)
