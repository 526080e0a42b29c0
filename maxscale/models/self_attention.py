"""Self-attention of a layer: grouped-query attention, and multi-head latent attention.

Both make queries, keys and values of the residual stream, and share what follows (`_Heads.attend`). Padded heads come
last and are masked out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxscale.models import attention, rope
from maxscale.models.module import param
from maxscale.models.parts import Shape, Weights, rms_norm, scale_of, scale_std
from maxscale.sharding import context as sharding

Batch = dict[str, jax.Array]


class _Heads(Weights):
  part = "attention"

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s = shape
    # The outputs of 2L blocks are added up; this keeps the variance of their sum near one.
    self.out = param((s.N_pad, s.H_v, s.D), ("heads", "head_dim", "embed"), (2 * s.L * s.N * s.H_v) ** -0.5,
                     (s.N, s.H_v, s.D), inputs=2)  # fmt: skip
    if s.m.out_bias:
      self.out_bias = param((s.D,), ("norm",), 0.0)
    if s.m.attention_sinks:
      self.sinks = param((s.N_pad,), ("heads",), 0.0, (s.N,))

  def rotate(self, x_btnh: jax.Array, batch: Batch, window: int) -> jax.Array:
    m = self.shape.m
    if m.max_positions:  # learned positions: they are in the residual stream
      return x_btnh
    local = window > 0 and m.rope_local_theta > 0
    theta, scaling = (m.rope_local_theta, {}) if local else (m.rope_theta, m.rope_scaling)
    dims = m.mla.rope_dim if m.mla.kv_rank else x_btnh.shape[-1]
    return rope.rotate(x_btnh, batch["positions"], *rope.frequencies(theta, dims, scaling))

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, window: int, cache: Any, watch: bool) -> Any:
    """(output in the residual layout [B, T, D], the cache with these keys and values, {"max_logit": [N]} if `watch`)."""
    s, m = self.shape, self.shape.m
    q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
    segments, positions = batch["segments"], batch["positions"]
    k_segments, k_positions, offset = segments, positions, 0
    if cache is not None:
      offset = cache["index"]
      k = jax.lax.dynamic_update_slice(cache["key"], k, (0, offset, 0, 0))
      v = jax.lax.dynamic_update_slice(cache["value"], v, (0, offset, 0, 0))
      k_segments = jnp.ones(k.shape[:2], jnp.int32)  # causality alone hides the places not yet written
      k_positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k_segments.shape)
      cache = {"key": k, "value": v, "index": offset + q.shape[1]}
    if window and m.window_kind == "chunked":  # a chunk is a segment of its own
      segments, k_segments = (jnp.where(a > 0, a * 2**16 + b // window, 0)
                              for a, b in ((segments, positions), (k_segments, k_positions)))  # fmt: skip
    # published code of latent attention alone multiplies the logits, too
    factor = rope.logit_factor(m.rope_scaling) if m.mla.kv_rank else 1.0
    scale = (m.query_scale or s.H**-0.5) * factor
    form = attention.Form(scale, m.attention_softcap, window if m.window_kind == "sliding" else 0)
    sinks = self.array("sinks") if m.attention_sinks else None
    o = attention.attention(q, k, v, segments, k_segments, sinks, form, offset, s.context)  # names what it keeps itself
    if s.N_pad > s.N:
      head = sharding.shard_index("heads") * o.shape[2] + jnp.arange(o.shape[2])
      o = o * (head < s.N).astype(o.dtype)[:, None]
    y = self.biased(sharding.reduce(self.product("btnh,nhd->btd", o, "out"), "heads"), "out_bias")
    seen = {"max_logit": attention.max_logits(q, k, segments, k_segments, form, s.context)} if watch else {}
    return checkpoint_name(y, "attention_out"), cache, seen


class Attention(_Heads):
  """Grouped-query attention (Ainslie et al., arXiv 2305.13245), rotary or with learned positions."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s, heads, kv = shape, ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    self.query = param((s.D, s.N_pad, s.H), heads, s.D**-0.5, (s.D, s.N, s.H), inputs=1)
    self.key = param((s.D, s.K_pad, s.H), kv, s.D**-0.5, (s.D, s.K, s.H), inputs=1)
    self.value = param((s.D, s.K_pad, s.H), kv, s.D**-0.5, (s.D, s.K, s.H), inputs=1)
    if s.m.qkv_bias:
      self.query_bias = param((s.N_pad, s.H), heads[1:], 0.0, (s.N, s.H))
      self.key_bias = param((s.K_pad, s.H), kv[1:], 0.0, (s.K, s.H))
      self.value_bias = param((s.K_pad, s.H), kv[1:], 0.0, (s.K, s.H))
    if s.m.qk_norm:
      self.query_norm = param((s.H,), ("norm",), scale_std(s))
      self.key_norm = param((s.H,), ("norm",), scale_std(s))

  def __call__(self, x_btd: jax.Array, batch: Batch, window: int, cache: Any, watch: bool) -> Any:
    x_btd = sharding.gather(x_btd, "heads")
    q, k, v = (self.biased(self.product(f"btd,d{n}h->bt{n}h", x_btd, name), f"{name}_bias")
               for name, n in (("query", "n"), ("key", "k"), ("value", "k")))  # fmt: skip
    if self.shape.m.qk_norm:
      q, k = self._normalised(q, "query_norm"), self._normalised(k, "key_norm")
    return self.attend(self.rotate(q, batch, window), self.rotate(k, batch, window), v, batch, window, cache, watch)

  def _normalised(self, x: jax.Array, name: str) -> jax.Array:
    return rms_norm(x, scale_of(self.shape, self.array(name, "heads")), self.shape.m.norm_eps)


class LatentAttention(_Heads):
  """Multi-head latent attention: queries, and keys with values, come from narrow latents (arXiv 2405.04434, 2.1).

  The latents are made and normalised in the residual layout, by each device for its own places: what is gathered for
  the heads is they, not the wider residual stream. A head's query and key are a part without and a part with rotary
  embedding; the rotary key is one for all heads.
  """

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s, a, up = shape, shape.m.mla, ("rank", "heads", "head_dim")
    if a.q_rank:
      self.query_down = param((s.D, a.q_rank), ("embed", None), s.D**-0.5, inputs=1)
      self.query_down_norm = param((a.q_rank,), ("norm",), scale_std(s))
      self.query_up = param((a.q_rank, s.N_pad, s.H), up, a.q_rank**-0.5, (a.q_rank, s.N, s.H), inputs=1)
    else:
      self.query = param((s.D, s.N_pad, s.H), ("embed", *up[1:]), s.D**-0.5, (s.D, s.N, s.H), inputs=1)
    self.kv_down = param((s.D, a.kv_rank + a.rope_dim), ("embed", None), s.D**-0.5, inputs=1)
    self.kv_down_norm = param((a.kv_rank,), ("norm",), scale_std(s))
    wide = a.nope_dim + a.v_dim
    self.kv_up = param((a.kv_rank, s.N_pad, wide), up, a.kv_rank**-0.5, (a.kv_rank, s.N, wide), inputs=1)

  def __call__(self, x_btd: jax.Array, batch: Batch, window: int, cache: Any, watch: bool) -> Any:
    a = self.shape.m.mla
    kv, k_rope = jnp.split(self.product("btd,dr->btr", x_btd, "kv_down"), [a.kv_rank], axis=-1)
    kv, k_rope = (sharding.gather(y, "heads") for y in (self._normalised(kv, "kv_down_norm"), k_rope))
    if a.q_rank:
      q = self._normalised(self.product("btd,dr->btr", x_btd, "query_down"), "query_down_norm")
      q = self.product("btr,rnh->btnh", sharding.gather(q, "heads"), "query_up")
    else:
      q = self.product("btd,dnh->btnh", sharding.gather(x_btd, "heads"), "query")
    k_rope = self.rotate(k_rope[:, :, None], batch, window)
    parts = ((a.nope_dim, a.rope_dim), (a.v_dim, 0))
    k, v = self.product("btr,rnh->btnh", kv, "kv_up", parts)
    k = k + jnp.pad(k_rope, ((0, 0),) * 3 + ((a.nope_dim, 0),))
    q = self.rotate(q, batch, window)
    return self.attend(q, k, v, batch, window, cache, watch)

  def _normalised(self, x: jax.Array, name: str) -> jax.Array:
    return rms_norm(x, scale_of(self.shape, self.array(name)), self.shape.m.mla.norm_eps)
