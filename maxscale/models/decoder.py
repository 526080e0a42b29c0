"""A decoder: embedding, scanned layers, final norm. The output head lives in the loss, which never holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxscale.models import kernels, module, parts
from maxscale.models.parts import RESIDUAL, Dropout, Shape
from maxscale.sharding import context as sharding


class Layer(nnx.Module):
  """Pre-norm attention, then a gated MLP or experts."""

  def __init__(self, shape: Shape):
    self.attention_norm = parts.RMSNorm(shape)
    self.attention = parts.Attention(shape)
    self.mlp_norm = parts.RMSNorm(shape)
    self.mlp = parts.MoE(shape) if shape.E else parts.MLP(shape)

  def __call__(self, x_btd: jax.Array, layer: jax.Array, segments_bt: jax.Array, positions_bt: jax.Array,
               dropout: Dropout | None, cache: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:  # fmt: skip
    drop = (lambda y, place: dropout(y, layer, place)) if dropout else (lambda y, place: y)
    y, cache = self.attention(self.attention_norm(x_btd), segments_bt, positions_bt, cache)
    x_btd = sharding.constrain(x_btd + drop(y, 0), RESIDUAL)
    y, aux = self.mlp(self.mlp_norm(x_btd), segments_bt > 0)
    return sharding.constrain(x_btd + drop(y, 1), RESIDUAL), aux, cache


class Decoder(nnx.Module):
  """Tokens to final hidden states; `head` is the table that gives logits."""

  def __init__(self, shape: Shape):
    self.shape = shape
    self.embedding = parts.embedding(shape)
    self.layers = Layer(shape)
    self.final_norm = parts.RMSNorm(shape)
    if not shape.tied:
      self.head = parts.embedding(shape)

  def __call__(
    self,
    tokens_bt: jax.Array,
    segments_bt: jax.Array,
    positions_bt: jax.Array,
    dropout: Dropout | None = None,
    cache: Any = None,
    remat: Callable[[Callable], Callable] = lambda f: f,
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Runs the decoder.

    Args:
      tokens_bt, segments_bt, positions_bt: int32 [B, T]; segment 0 is padding.
      dropout: while training with a rate above 0.
      cache: {key, value: [L, B, S, K, H], index: [L]} of earlier positions, when sampling.
      remat: wraps a layer (models/remat.py).

    Returns:
      Hidden states [B, T, D]; auxiliary sums, one a layer, each with a leading L; the new cache.
    """
    s = self.shape
    x = kernels.lookup(self.embedding.get_value(), tokens_bt, self.embedding.names, s.dtype, s.grad_dtype)
    x = sharding.constrain(x * jnp.asarray(parts.embedding_scale(s), x.dtype), RESIDUAL)
    graph, stack = nnx.split(self.layers)

    def body(x: jax.Array, args: Any) -> tuple[jax.Array, Any]:
      params, layer, layer_cache = args
      x, aux, layer_cache = nnx.merge(graph, params)(x, layer, segments_bt, positions_bt, dropout, layer_cache)
      return x, (aux, layer_cache)

    x, (aux, cache) = jax.lax.scan(remat(body), x, (stack, jnp.arange(s.L), cache))
    return self.final_norm(x), aux, cache

  def head_table(self) -> nnx.Param:
    """The table [V, D] of the output head: the embedding's where they are tied."""
    return self.embedding if self.shape.tied else self.head

  def logits(self, x_btd: jax.Array) -> jax.Array:
    """float32 logits [B, T, V] of the real vocabulary; only for a few positions."""
    head = self.head_table()
    table = kernels.use_weight(head.get_value(), head.names, x_btd.dtype)
    return jnp.einsum("btd,vd->btv", x_btd, table, preferred_element_type=jnp.float32)[..., : self.shape.V]


def skeleton(shape: Shape) -> module.Skeleton:
  """The decoder without arrays, and the specs of its parameters."""
  return module.split(Decoder(shape), "float32", {"layers": shape.L})


def empty_cache(shape: Shape, batch: int, length: int) -> dict[str, jax.Array]:
  """A cache for `length` positions of `batch` sequences."""
  zeros = jnp.zeros((shape.L, batch, length, shape.K_pad, shape.H), shape.dtype)
  return {"key": zeros, "value": zeros, "index": jnp.zeros((shape.L,), jnp.int32)}
