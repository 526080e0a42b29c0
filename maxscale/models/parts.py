"""The parts of a decoder layer: norm, rotary embedding, attention, gated MLP, mixture of experts, dropout.

Blocks take and give the residual layout, [B, T of this device, D]; `sharding.gather` and `sharding.reduce` are where
they enter and leave the region whose weights are split (sharding/context.py).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxscale.config import Config
from maxscale.models import attention, experts, kernels
from maxscale.models.module import param
from maxscale.sharding import context as sharding


def _pad(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes and dtypes of a decoder, by the letters of the legend; `*_pad` are the padded sizes of the arrays."""

  D: int
  F: int
  V: int
  V_pad: int
  N: int
  N_pad: int
  K: int
  K_pad: int
  H: int
  L: int
  E: int
  E_pad: int
  A: int
  buffer: float
  tied: bool
  context: str
  theta: float
  eps: float
  dropout: float
  dtype: str
  grad_dtype: str

  @classmethod
  def of(cls, config: Config, vocab_size: int) -> Shape:
    m, kv = config.model, config.kv_heads
    kv_pad = _pad(kv, m.kv_head_multiple)
    return cls(
      D=m.embed, F=m.mlp, V=vocab_size, V_pad=_pad(vocab_size, m.vocab_multiple),
      N=m.heads, N_pad=m.heads // kv * kv_pad, K=kv, K_pad=kv_pad, H=config.head_dim, L=m.layers,
      E=m.experts, E_pad=_pad(m.experts, m.expert_multiple), A=m.experts_per_token,
      buffer=config.sharding.expert_buffer, tied=m.tied_embeddings, context=config.sharding.context, theta=m.rope_theta, eps=m.norm_eps, dropout=m.dropout,
      dtype=m.compute_dtype, grad_dtype=config.optimizer.grad_reduce_dtype,
    )  # fmt: skip


class Weights(nnx.Module):
  """A part with parameters: `weight` makes one ready for use, `product` multiplies by it."""

  def __init__(self, shape: Shape):
    self.shape = shape

  def weight(self, w: nnx.Param, dtype: Any) -> kernels.Weight:
    return kernels.Weight.of(w.get_value(), w.names, dtype, self.shape.grad_dtype)

  def product(self, spec: str, x: jax.Array, w: nnx.Param) -> jax.Array:
    return kernels.matmul(spec, x, self.weight(w, x.dtype))


class RMSNorm(Weights):
  """x / rms(x) * scale, in float32."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    self.scale = param((shape.D,), ("norm",), None)

  def __call__(self, x_btd: jax.Array) -> jax.Array:
    x = x_btd.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.shape.eps)
    return (x * self.scale.get_value()).astype(x_btd.dtype)


def rope(x_btnh: jax.Array, positions_bt: jax.Array, theta: float) -> jax.Array:
  """Rotary embedding: pairs (i, i + H/2) turn by position * theta**(-2i/H). Su et al., arXiv 2104.09864."""
  half = x_btnh.shape[-1] // 2
  angle = positions_bt[..., None, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_btnh.dtype)


class Attention(Weights):
  """Grouped-query attention with rotary embeddings. Padded heads come last and are masked out."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s = shape
    heads, kv = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    self.query = param((s.D, s.N_pad, s.H), heads, s.D**-0.5, (s.D, s.N, s.H))
    self.key = param((s.D, s.K_pad, s.H), kv, s.D**-0.5, (s.D, s.K, s.H))
    self.value = param((s.D, s.K_pad, s.H), kv, s.D**-0.5, (s.D, s.K, s.H))
    # The outputs of 2L blocks are added up; this keeps the variance of their sum near one.
    self.out = param(
      (s.N_pad, s.H, s.D), ("heads", "head_dim", "embed"), (2 * s.L * s.N * s.H) ** -0.5, (s.N, s.H, s.D)
    )

  def __call__(self, x_btd: jax.Array, segments_bt: jax.Array, positions_bt: jax.Array, cache: Any = None) -> Any:
    """Returns [B, T, D], and the cache with this call's keys and values where one is given."""
    s = self.shape
    x_btd = sharding.gather(x_btd, "heads")
    q = rope(self.product("btd,dnh->btnh", x_btd, self.query), positions_bt, s.theta)
    k = rope(self.product("btd,dkh->btkh", x_btd, self.key), positions_bt, s.theta)
    v = self.product("btd,dkh->btkh", x_btd, self.value)
    q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
    k_segments, offset = segments_bt, 0
    if cache is not None:
      offset = cache["index"]
      k = jax.lax.dynamic_update_slice(cache["key"], k, (0, offset, 0, 0))
      v = jax.lax.dynamic_update_slice(cache["value"], v, (0, offset, 0, 0))
      k_segments = jnp.ones(k.shape[:2], jnp.int32)  # causality alone hides the places not yet written
      cache = {"key": k, "value": v, "index": offset + x_btd.shape[1]}
    o = attention.attention(q, k, v, segments_bt, k_segments, offset, s.context)  # names what it keeps itself
    if s.N_pad > s.N:
      head = sharding.shard_index("heads") * o.shape[2] + jnp.arange(o.shape[2])
      o = o * (head < s.N).astype(o.dtype)[:, None]
    y = sharding.reduce(self.product("btnh,nhd->btd", o, self.out), "heads")
    return checkpoint_name(y, "attention_out"), cache


class MLP(Weights):
  """silu(x gate) * (x up), projected down. Shazeer, arXiv 2002.05202."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s = shape
    self.gate = param((s.D, s.F), ("embed", "mlp"), s.D**-0.5)
    self.up = param((s.D, s.F), ("embed", "mlp"), s.D**-0.5)
    self.down = param((s.F, s.D), ("mlp", "embed"), (2 * s.L * s.F) ** -0.5)

  def __call__(self, x_btd: jax.Array, valid_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    x_btd = sharding.gather(x_btd, "mlp")
    gate = checkpoint_name(self.product("btd,df->btf", x_btd, self.gate), "gate")
    up = checkpoint_name(self.product("btd,df->btf", x_btd, self.up), "up")
    y = sharding.reduce(self.product("btf,fd->btd", jax.nn.silu(gate) * up, self.down), "mlp")
    return checkpoint_name(y, "mlp_out"), {}


class MoE(Weights):
  """Top-k mixture of gated MLPs without token dropping: every token is computed by each expert that it chose.

  The router and its losses are float32. Both losses are sums over sequences, so that they are the same whatever the
  microbatches and devices: for a sequence, E * sum_e(share of choices of e * mean probability of e) * its tokens.
  """

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s = shape
    wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    self.router = param((s.D, s.E_pad), ("embed", None), s.D**-0.5, (s.D, s.E))
    self.gate = param((s.E_pad, s.D, s.F), wide, s.D**-0.5, (s.E, s.D, s.F))
    self.up = param((s.E_pad, s.D, s.F), wide, s.D**-0.5, (s.E, s.D, s.F))
    self.down = param((s.E_pad, s.F, s.D), narrow, (2 * s.L * s.F) ** -0.5, (s.E, s.F, s.D))

  def __call__(self, x_btd: jax.Array, valid_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    s = self.shape
    logits = self.product("btd,de->bte", x_btd.astype(jnp.float32), self.router)
    logits = checkpoint_name(jnp.where(jnp.arange(s.E_pad) < s.E, logits, -jnp.inf), "router")
    probs = jax.nn.softmax(logits, axis=-1)
    gates, own_ids = jax.lax.top_k(probs, s.A)
    gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    x_btd, gates, ids = (sharding.gather(v, "mlp") for v in (x_btd, gates, own_ids))
    if sharding.parts("experts") > 1:  # padding must not take the room of tokens
      ids = jnp.where(sharding.gather(valid_bt, "mlp")[..., None], ids, -1)
    weights = [self.weight(w, x_btd.dtype) for w in (self.gate, self.up, self.down)]
    rows, choices = x_btd.reshape(-1, s.D), (-1, s.A)
    y, dropped = experts.experts(rows, gates.reshape(choices), ids.reshape(choices), weights, s.buffer)
    y = checkpoint_name(sharding.reduce(y.reshape(x_btd.shape), "mlp"), "mlp_out")
    return y, self._losses(logits, probs, own_ids, valid_bt.astype(jnp.float32)) | dropped

  def _losses(self, logits: jax.Array, probs: jax.Array, ids: jax.Array, valid_bt: jax.Array) -> dict[str, jax.Array]:
    s = self.shape
    chosen = jax.nn.one_hot(ids, s.E_pad).sum(2) * valid_bt[..., None]  # [B, T, E]
    # A sequence may be on several devices: its counts are summed over them, and carry no gradient.
    counts, tokens = sharding.psum((chosen.sum(1), valid_bt.sum(1)), "residual_length")  # [B, E], [B]
    share = counts / (jnp.maximum(tokens, 1.0)[:, None] * s.A)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return {
      "balance_loss": s.E * jnp.sum(share * (probs * valid_bt[..., None]).sum(1)),
      "router_z_loss": jnp.sum(log_z**2 * valid_bt),
      "expert_tokens": chosen.sum((0, 1))[: s.E],
    }


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
  return math.sqrt(shape.D)
