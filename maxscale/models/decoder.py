"""A decoder in three pieces, as a pipeline runs them: embedding, a stack of layers, loss. No piece holds all logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxscale.config import ConfigError
from maxscale.models import kernels, module, parts
from maxscale.models.loss import LossSpec, cross_entropy, softcapped
from maxscale.models.mixture import MoE
from maxscale.models.parts import Dropout, Shape
from maxscale.models.self_attention import Attention, LatentAttention
from maxscale.sharding import context as sharding

# tokens, targets, segments, positions, places: int32 [B, T]; segment 0 is padding. With multi-token prediction also
# tokens_1, targets_1, ...: those so many places further on, -1 where the segment has ended.
Batch = dict[str, jax.Array]
Aux = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Call:
  """How layers are run: dropout while training, what wraps a layer (models/remat.py), whether logits are watched."""

  dropout: Dropout | None = None
  remat: Callable[[Callable], Callable] = lambda f: f
  watch: bool = False


class Layer(nnx.Module):
  """Norm, attention, norm, and an MLP or experts; each added to the residual stream, or both at once."""

  def __init__(self, shape: Shape, dense: bool):
    m = shape.m
    self.shape = shape
    self.attention_norm = parts.Norm(shape)
    self.attention = LatentAttention(shape) if m.mla.kv_rank else Attention(shape)
    if not m.parallel_block:
      self.mlp_norm = parts.Norm(shape)
    width = m.moe.dense_mlp or shape.F if dense and shape.E else shape.F
    self.mlp = parts.MLP(shape, width, bias=m.mlp_bias) if dense else MoE(shape)
    if m.post_norms:
      self.attention_post_norm, self.mlp_post_norm = parts.Norm(shape), parts.Norm(shape)

  def __call__(self, x_btd: jax.Array, layer: jax.Array, window: int, batch: Batch, call: Call,
               cache: Any) -> tuple[jax.Array, Aux, Any]:  # fmt: skip
    m, valid = self.shape.m, sharding.own_part(batch["segments"]) > 0
    dropout = call.dropout
    drop = (lambda y, place: dropout(y, layer, place)) if dropout else (lambda y, place: y)
    normed = self.attention_norm(x_btd)
    # The scopes name the parts of a step for which perf/compiled/trace.py accounts.
    with jax.named_scope("attention"):
      y, cache, seen = self.attention(normed, batch, window, cache, call.watch)
    x_btd = x_btd + drop(self.attention_post_norm(y) if m.post_norms else y, 0)
    normed = normed if m.parallel_block else self.mlp_norm(x_btd)
    with jax.named_scope("mlp" if isinstance(self.mlp, parts.MLP) else "experts"):
      y, aux = self.mlp(normed, valid)
    return x_btd + drop(self.mlp_post_norm(y) if m.post_norms else y, 1), aux | seen, cache


class Further(parts.Weights):
  """Predicts one token further (DeepSeek-AI, arXiv 2412.19437, 2.2): the hidden states beside the embeddings of the
  tokens in between, through a layer of its own and the decoder's head."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    self.embedding_norm, self.hidden_norm = parts.Norm(shape), parts.Norm(shape)
    self.projection = module.param((2 * shape.D, shape.D), ("embed", None), (2 * shape.D) ** -0.5)
    self.layer = Layer(shape, dense=not shape.E)
    self.final_norm = parts.Norm(shape)

  def __call__(self, x_btd: jax.Array, embedded_btd: jax.Array, layer: int, batch: Batch,
               call: Call) -> tuple[jax.Array, Aux]:  # fmt: skip
    x = jnp.concatenate([self.hidden_norm(x_btd), self.embedding_norm(embedded_btd)], axis=-1)
    x = self.product("btd,de->bte", x, "projection")
    return self.layer(x, jnp.int32(layer), self.shape.window(layer), batch, call, None)[:2]


class Decoder(parts.Weights):
  """`embed`, then `run_layers` (all, or those of one stage), then `loss` or `logits`; activations are residual."""

  def __init__(self, shape: Shape):
    super().__init__(shape)
    self.embedding = parts.embedding(shape)
    if shape.m.max_positions:
      self.positions = module.param((shape.m.max_positions, shape.D), (None, "embed"), 0.02)
    if shape.L_dense:
      self.dense_layers = Layer(shape, dense=True)
    self.layers = Layer(shape, dense=not shape.E)
    if shape.m.mtp:
      self.mtp = Further(shape)
    self.final_norm = parts.Norm(shape)
    if not shape.m.tied_embeddings:
      self.head = parts.embedding(shape)

  def embed(self, batch: Batch, call: Call = Call(), cache: Any = None) -> tuple[jax.Array, Aux, Any]:
    """The residual stream [B, T, D] after the embedding and the layers before `layers`, if there are some; what these
    add to (aux, cache), as `run_layers`."""
    with jax.named_scope("embed"):
      x = self.lookup(batch["tokens"])
    if self.shape.m.max_positions:
      x = x + kernels.lookup(self.weight("positions", x.dtype), sharding.own_part(batch["positions"]))
    if not self.shape.L_dense:
      return x, {}, cache
    layers = jnp.arange(self.shape.L_dense)
    return _run(self.dense_layers, x, layers, self._windows(0, self.shape.L_dense), batch, call, cache)

  def lookup(self, tokens_bt: jax.Array) -> jax.Array:
    """Rows of the embedding table, scaled: [B, T, D]; zeros where a token is -1."""
    x = sharding.reduce(kernels.lookup(self.weight("embedding", self.shape.m.compute_dtype), tokens_bt), "vocab")
    return x * jnp.asarray(parts.embedding_scale(self.shape), x.dtype)

  def run_layers(self, x_btd: jax.Array, layers: jax.Array, batch: Batch, call: Call = Call(),
                 cache: Any = None) -> tuple[jax.Array, Aux, Any]:  # fmt: skip
    """Runs the layers whose parameters are stacked in `self.layers`.

    Args:
      x_btd: the residual stream.
      layers: int32 [L], number of each row's layer in the stack.
      cache: {key, value: [L, B, S, K, H], index: [L]} of earlier positions, when sampling.

    Returns:
      The residual stream; auxiliary sums over this device's tokens, each with a leading L; the new cache.
    """
    first = self.shape.L_dense
    windows = self._windows(first, len(layers))  # as the chunks of a pipeline are whole periods, the same in all
    return _run(self.layers, x_btd, layers + first, windows, batch, call, cache)

  def _windows(self, first: int, count: int) -> list[int]:
    return [self.shape.window(first + i) for i in range(count)]

  def loss(self, spec: LossSpec, x_btd: jax.Array, targets_bt: jax.Array, scale: jax.Array) -> Any:
    """(loss * scale, nll): sums over this device's positions that have a target."""
    return self._loss(spec, self.final_norm(x_btd), targets_bt, scale)

  def further(self, spec: LossSpec, x_btd: jax.Array, batch: Batch, scale: jax.Array, call: Call) -> Any:
    """The losses of multi-token prediction: (loss * scale, nll), each the mean of the modules; aux [modules, ...].

    A module takes hidden states as the head takes them, normalised, which is how published modules are used.
    """
    modules, (graph, stack), losses, outputs = self.shape.m.mtp, nnx.split(self.mtp), [], []
    x_btd = self.final_norm(x_btd)
    for k in range(modules):

      def run(params: Any, x: jax.Array, embedded: jax.Array, layer: int = self.shape.L + k) -> Any:
        return nnx.merge(graph, params)(x, embedded, layer, batch, call)

      params = jax.tree.map(lambda a: a[k], stack)  # noqa: B023
      with jax.named_scope("mtp"):
        x_btd, aux = call.remat(run)(params, x_btd, self.lookup(batch[f"tokens_{k + 1}"]))
      x_btd = nnx.merge(graph, params).final_norm(x_btd)
      losses.append(self._loss(spec, x_btd, batch[f"targets_{k + 1}"], scale / modules))
      outputs.append(aux)
    loss, nll = (sum(parts) for parts in zip(*losses))
    return loss, nll / modules, jax.tree.map(lambda *a: jnp.stack(a), *outputs)

  def _loss(self, spec: LossSpec, x_btd: jax.Array, targets_bt: jax.Array, scale: jax.Array) -> Any:
    x_btd = sharding.gather(x_btd, "vocab")
    with jax.named_scope("head"):
      return cross_entropy(spec, x_btd, self.weight(self.head_name, x_btd.dtype), targets_bt, scale)

  @property
  def head_name(self) -> str:
    """The table [V, D] of the output head: the embedding's where they are tied."""
    return "embedding" if self.shape.m.tied_embeddings else "head"

  def logits(self, x_btd: jax.Array) -> jax.Array:
    """float32 logits [B, T, V] of the real vocabulary; only for a few positions, with the table whole on a device."""
    x_btd = self.final_norm(x_btd)
    table = self.weight(self.head_name, x_btd.dtype).used
    logits = jnp.einsum("btd,vd->btv", x_btd, table, preferred_element_type=jnp.float32)
    return softcapped(logits[..., : self.shape.V], self.shape.m.logit_softcap)


def _run(stacked: Layer, x_btd: jax.Array, layers: jax.Array, windows: list[int], batch: Batch, call: Call,
         cache: Any) -> tuple[jax.Array, Aux, Any]:  # fmt: skip
  """Layers with stacked parameters: a scan over whole periods of their windows, then what is left of one."""
  graph, stack = nnx.split(stacked)
  period = next(p for p in range(1, len(windows) + 1) if all(w == windows[i % p] for i, w in enumerate(windows)))
  whole = len(windows) // period * period

  def layer(window: int) -> Callable:
    def one(x: jax.Array, args: Any) -> tuple[jax.Array, Any]:
      params, number, layer_cache = args
      x, aux, layer_cache = nnx.merge(graph, params)(x, number, window, batch, call, layer_cache)
      return x, (aux, layer_cache)

    return call.remat(one)

  def some(x: jax.Array, args: Any, windows: list[int]) -> tuple[jax.Array, Any]:
    outs = []
    for i, window in enumerate(windows):
      x, out = layer(window)(x, jax.tree.map(lambda a: a[i], args))  # noqa: B023
      outs.append(out)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)

  args, outs = (stack, layers, cache), []
  if period == 1:
    x_btd, (aux, cache) = jax.lax.scan(layer(windows[0]), x_btd, args)
    return x_btd, aux, cache
  for first, last, size in ((0, whole, period), (whole, len(windows), len(windows) - whole)):
    if last > first:
      part = jax.tree.map(lambda a: a[first:last].reshape(-1, size, *a.shape[1:]), args)  # noqa: B023
      x_btd, out = jax.lax.scan(lambda x, a: some(x, a, windows[first : first + size]), x_btd, part)  # noqa: B023
      outs.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out))
  aux, cache = jax.tree.map(lambda *a: jnp.concatenate(a), *outs)
  return x_btd, aux, cache


def skeleton(shape: Shape, rows: tuple[int, ...]) -> module.Skeleton:
  """The decoder without arrays, and the specs of its parameters; `rows`: the layer in each row of `layers`.

  Raises:
    ConfigError: adapters are wanted for what no weight is.
  """
  decoder, lora = Decoder(shape), shape.lora
  if lora.rank and not parts.adapt(decoder, lora):
    raise ConfigError(
      f"lora.targets={lora.targets!r} matches no weight of a dense product; one is layers/attention/out"
    )
  # Only `layers` is what stages of a pipeline split; the other stacks are whole on each.
  stacks = {"layers": (rows, "layers"), "dense_layers": (tuple(range(shape.L_dense)), None),
            "mtp": (tuple(range(shape.m.mtp)), None)}  # fmt: skip
  trained = (lambda path: path.endswith(module.ADAPTERS)) if lora.rank else (lambda path: True)
  return module.split(decoder, "float32", stacks, trained)


def empty_cache(shape: Shape, batch: int, length: int) -> tuple[Any, Any]:
  """Caches of the layers before `layers` and of these, for `length` positions of `batch` sequences."""

  def empty(layers: int) -> Any:
    zeros = lambda width: jnp.zeros((layers, batch, length, shape.K_pad, width), shape.m.compute_dtype)  # noqa: E731
    return {"key": zeros(shape.H), "value": zeros(shape.H_v), "index": jnp.zeros((layers,), jnp.int32)}

  return empty(shape.L_dense), empty(shape.L - shape.L_dense)
