"""A decoder in three pieces, as a pipeline runs them: embedding, a stack of layers, loss. No piece holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxscale.models import kernels, module, parts
from maxscale.models.loss import LossSpec, cross_entropy
from maxscale.models.parts import Dropout, Shape
from maxscale.sharding import context as sharding

Batch = dict[str, jax.Array]  # tokens, targets, segments, positions, places: int32 [B, T]; segment 0 is padding


class Layer(nnx.Module):
  """Pre-norm attention, then a gated MLP or experts."""

  def __init__(self, shape: Shape):
    self.attention_norm = parts.RMSNorm(shape)
    self.attention = parts.Attention(shape)
    self.mlp_norm = parts.RMSNorm(shape)
    self.mlp = parts.MoE(shape) if shape.E else parts.MLP(shape)

  def __call__(self, x_btd: jax.Array, layer: jax.Array, batch: Batch, dropout: Dropout | None,
               cache: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:  # fmt: skip
    drop = (lambda y, place: dropout(y, layer, place)) if dropout else (lambda y, place: y)
    y, cache = self.attention(self.attention_norm(x_btd), batch["segments"], batch["positions"], cache)
    x_btd = x_btd + drop(y, 0)
    y, aux = self.mlp(self.mlp_norm(x_btd), sharding.own_part(batch["segments"]) > 0)
    return x_btd + drop(y, 1), aux, cache


class Decoder(parts.Weights):
  """`embed`, then `run_layers` (all, or those of one stage), then `loss` or `logits`; activations are residual."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    self.embedding = parts.embedding(shape)
    self.layers = Layer(shape)
    self.final_norm = parts.RMSNorm(shape)
    if not shape.tied:
      self.head = parts.embedding(shape)

  def embed(self, tokens_bt: jax.Array) -> jax.Array:
    """Rows of the embedding table, scaled: [B, T, D]."""
    x = sharding.reduce(kernels.lookup(self.weight(self.embedding, self.shape.dtype), tokens_bt), "vocab")
    return x * jnp.asarray(parts.embedding_scale(self.shape), x.dtype)

  def run_layers(
    self,
    x_btd: jax.Array,
    layers: jax.Array,
    batch: Batch,
    dropout: Dropout | None = None,
    cache: Any = None,
    remat: Callable[[Callable], Callable] = lambda f: f,
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Runs the layers whose parameters are stacked in `self.layers`.

    Args:
      x_btd: the residual stream.
      layers: int32 [L], number of each layer, for dropout.
      dropout: while training with a rate above 0.
      cache: {key, value: [L, B, S, K, H], index: [L]} of earlier positions, when sampling.
      remat: wraps a layer (models/remat.py).

    Returns:
      The residual stream; auxiliary sums over this device's tokens, each with a leading L; the new cache.
    """
    graph, stack = nnx.split(self.layers)

    def body(x: jax.Array, args: Any) -> tuple[jax.Array, Any]:
      params, layer, layer_cache = args
      x, aux, layer_cache = nnx.merge(graph, params)(x, layer, batch, dropout, layer_cache)
      return x, (aux, layer_cache)

    x_btd, (aux, cache) = jax.lax.scan(remat(body), x_btd, (stack, layers, cache))
    return x_btd, aux, cache

  def loss(self, spec: LossSpec, x_btd: jax.Array, targets_bt: jax.Array, scale: jax.Array) -> Any:
    """(loss * scale, nll): sums over this device's positions that have a target."""
    x_btd = sharding.gather(self.final_norm(x_btd), "vocab")
    return cross_entropy(spec, x_btd, self.weight(self.head_table(), x_btd.dtype), targets_bt, scale)

  def head_table(self) -> nnx.Param:
    """The table [V, D] of the output head: the embedding's where they are tied."""
    return self.embedding if self.shape.tied else self.head

  def logits(self, x_btd: jax.Array) -> jax.Array:
    """float32 logits [B, T, V] of the real vocabulary; only for a few positions, with the table whole on a device."""
    x_btd = self.final_norm(x_btd)
    table = self.weight(self.head_table(), x_btd.dtype).used
    return jnp.einsum("btd,vd->btv", x_btd, table, preferred_element_type=jnp.float32)[..., : self.shape.V]


def skeleton(shape: Shape, rows: tuple[int, ...]) -> module.Skeleton:
  """The decoder without arrays, and the specs of its parameters; `rows`: the layer in each row of the stack."""
  return module.split(Decoder(shape), "float32", {"layers": rows})


def empty_cache(shape: Shape, batch: int, length: int) -> dict[str, jax.Array]:
  """A cache for `length` positions of `batch` sequences."""
  zeros = jnp.zeros((shape.L, batch, length, shape.K_pad, shape.H), shape.dtype)
  return {"key": zeros, "value": zeros, "index": jnp.zeros((shape.L,), jnp.int32)}
