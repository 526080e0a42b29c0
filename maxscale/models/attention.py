"""Causal attention inside segments, of sequences that one device holds or that several devices share.

Where the logical axis `length` is split, a method says how queries meet the keys of other devices:

  ring     keys and values go around; the softmax is merged step by step (Liu et al., arXiv 2310.01889)
  gather   every device gathers all keys and values; layers with a window have this in place of ring, whose steps are
           even only where queries see all keys before them
  ulysses  heads are exchanged for length, so that each device has all places of some heads (arXiv 2309.14509)

Ring and gather expect the balanced order of `maxscale.sharding.sequence`, ulysses the natural one.

Dimensions: b batch, t queries, s keys, n heads, k key-value heads, h head size; all of the device's own shard. Values
may have another head size than queries and keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from maxscale.config import ConfigError
from maxscale.models import ring, splash
from maxscale.sharding import context as sharding
from maxscale.sharding import sequence

custom_vjp: Any = jax.custom_vjp  # its own type loses the signature behind a partial


@dataclasses.dataclass(frozen=True)
class Form:
  """How logits are made of queries and keys.

  Attributes:
    scale: factor of their products; None: head size ** -0.5.
    softcap: logits are softcap * tanh(logits / softcap) (Gemma Team, arXiv 2408.00118, 2); 0: as they are.
    window: keys that a query sees, up to and including its own; 0: all before it.
  """

  scale: float | None = None
  softcap: float = 0.0
  window: int = 0


def balanced(method: str) -> bool:
  """Whether the method needs the balanced order of `sequence.order`."""
  return method != "ulysses"


def attention(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
              sinks: jax.Array | None = None, form: Form = Form(), offset: jax.Array | int = 0, method: str = "ring",
              backend: str | None = None) -> jax.Array:  # fmt: skip
  """Causal attention inside segments, inside a manual shard_map where a mesh is active.

  Args:
    q: [b, t, n, h]. k: [b, s, k, h]. v: [b, s, k, hv]. n is a multiple of k.
    q_segments, k_segments: int32 [b, t] and [b, s]; a query sees the keys of its own segment up to its own position.
    sinks: float32 [n]: for each head a logit beside those of the keys, which takes weight and has no value (OpenAI,
      arXiv 2508.10925, 2.2).
    offset: index of the first query among the keys where t is not s (decoding).
    method: ring, gather or ulysses, where `length` is split.
    backend: "tpu" for its kernels, "interpret" to simulate them, "xla" for plain operations; None: as the platform has.

  Returns:
    [b, t, n, hv] in the dtype of q; logits, softmax and sums are float32.

  Raises:
    ConfigError: decoding over a split sequence, or ulysses with heads that do not divide by its devices.
  """
  backend = backend or ("tpu" if sharding.platform() == "tpu" else "xla")
  q, form = _scaled(q, k, form)
  queries, keys = (_heads_first(q), q_segments), (_heads_first(k), _heads_first(v), k_segments)
  if q.shape[1] != k.shape[1]:
    if sharding.parts("length") > 1:
      raise ConfigError("decoding needs whole sequences on each device: set mesh.context=1")
    return _heads_first(_forward(_xla(form, lambda: (offset,))[0], None, queries, keys, sinks)[0])
  if sharding.parts("length") == 1:
    return _heads_first(_whole(form, backend, (), queries, keys, sinks))
  shared = {"ring": _gather if form.window else _ring, "gather": _gather, "ulysses": _ulysses}[method]
  return _heads_first(shared(form, backend, queries, keys, sinks))


MAX_LOGITS = 2**26  # that exist at once


def max_logits(q: jax.Array, k: jax.Array, q_segments: jax.Array, k_segments: jax.Array, form: Form = Form(),
               method: str = "ring") -> jax.Array:  # fmt: skip
  """The largest logit of each head [n], float32, as the softmax of `attention` has it; without a gradient.

  It is that of this device's batch and, where `length` is split, of all its devices. Padding (segment 0) does not
  count; without other queries it is `ring.HIDDEN`.

  Args:
    q: [b, t, n, h]. k: [b, t, k, h]. The others: see `attention`.
  """
  q, form = _scaled(q, k, form)
  q, k = (_heads_first(jax.lax.stop_gradient(x)) for x in (q, k))
  axes, (b, n, t, _) = sharding.mesh_axes("length"), q.shape
  places = _places(axes, t) if balanced(method) else (sharding.shard_index("length") * t,)
  if axes:
    k, k_segments = (_gathered(x, axes, balanced(method)) for x in (k, k_segments))
  top = jnp.full(n, ring.HIDDEN)
  for block, keys, offset, _ in _blocks(form, places, (q, q_segments), (k, k_segments)):
    size, most = block[0].shape[2], MAX_LOGITS // (b * n * keys[0].shape[2])
    rows = max(r for r in range(1, size + 1) if size % r == 0 and r <= max(1, most))

    def largest(top: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
      queries = [jax.lax.dynamic_slice_in_dim(x, i, rows, _axis(x)) for x in block]  # noqa: B023
      logits = _logits(form, queries, keys, offset + i).reshape(b, n, rows, -1).max(-1)  # noqa: B023
      return jnp.maximum(top, jnp.where(queries[1][:, None] > 0, logits, ring.HIDDEN).max((0, 2))), None

    top, _ = jax.lax.scan(largest, top, jnp.arange(0, size, rows))
  return sharding.pmax(top, "length")


def _scaled(q: jax.Array, k: jax.Array, form: Form) -> tuple[jax.Array, Form]:
  """Queries whose products with keys are logits, and the form without a window that hides nothing."""
  window = form.window if form.window < k.shape[1] * sharding.parts("length") else 0
  return q * (q.shape[-1] ** -0.5 if form.scale is None else form.scale), dataclasses.replace(form, window=window)


def _heads_first(x: jax.Array) -> jax.Array:
  """[b, t, n, h] <-> [b, n, t, h]: products are then plain batched matmuls, which is what a CPU has fast code for."""
  return x.transpose(0, 2, 1, 3)


# Below here `queries` are (q, segments) and `keys` are (k, v, segments): q is scaled, and heads come first, [b, n, t, h].


def _axis(x: jax.Array) -> int:
  """The dimension of places in [b, n, t, h], [b, n, t] or [b, t]."""
  return min(2, x.ndim - 1)


# ---- softmax: all methods and backends have this one rule of differentiation


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def _attend(forward: Callable, backward: Callable | None, queries: Any, keys: Any, sinks: Any) -> jax.Array:
  """[b, n, t, hv] in the dtype of q, by the two functions of queries and keys that maxscale.models.ring explains."""
  return _forward(forward, backward, queries, keys, sinks)[0]


def _forward(forward: Callable, backward: Callable | None, queries: Any, keys: Any, sinks: Any) -> Any:
  del backward
  o, lse = forward(queries, keys)
  if sinks is not None:
    total = jnp.logaddexp(lse, sinks[:, None])
    o, lse = o * jnp.exp(lse - total)[..., None], total
  # The name under which a remat policy keeps what the backward pass needs so as not to run this again.
  o, lse = checkpoint_name(o.astype(queries[0].dtype), "attention"), checkpoint_name(lse, "attention")
  return o, (queries, keys, sinks, o, lse)


def _backward(forward: Callable, backward: Callable, residuals: Any, do: jax.Array) -> Any:
  del forward
  queries, keys, sinks, o, lse = residuals
  dq, dk, dv = (d.astype(x.dtype) for d, x in zip(backward((*queries, o, lse, do), keys), (queries[0], *keys)))
  if sinks is not None:  # the value of a sink is 0
    sinks = -(jnp.exp(sinks[:, None] - lse) * (o.astype(jnp.float32) * do).sum(-1)).sum((0, 2))
  return (dq, None), (dk, dv, None), sinks


_attend.defvjp(_forward, _backward)


# ---- methods


def _whole(form: Form, backend: str, axes: tuple[str, ...], queries: Any, keys: Any, sinks: Any) -> jax.Array:
  """Attention of this device's queries along `axes`, in the balanced order, to all keys, in the natural order."""
  t, s = queries[0].shape[2], keys[0].shape[2]
  chunk = t // 2 if axes else t
  if backend == "xla" or chunk % 128:
    return _attend(*_xla(form, lambda: _places(axes, t)), queries, keys, sinks)
  mask = splash.CausalMask(sequence.order(s, s // t, balanced=True), form.window)

  def own(x: jax.Array) -> jax.Array:
    """This device's share of what the kernel knows of the mask: [1, blocks of q, blocks of k], or positions [t]."""
    axis, size = x.ndim // 2, x.shape[x.ndim // 2] * t // s
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis) if axes else x

  def kernel(*args: Any, **options: Any) -> Any:
    made = splash.kernel(mask, form.softcap, form.window, chunk, backend, s // t, *args, **options)
    return jax.tree.map(own, made)

  return _attend(*splash.computation(kernel), queries, keys, sinks)


def _places(axes: tuple[str, ...], t: int) -> tuple[jax.Array | int, ...]:
  """The place in the sequence at which each equal chunk of this device's t queries begins, in the balanced order."""
  if not axes:
    return (0,)
  i, last = jax.lax.axis_index(axes), 2 * jax.lax.axis_size(axes) - 1
  return i * (t // 2), (last - i) * (t // 2)


def _gathered(x: jax.Array, axes: Sequence[str], balanced: bool = True) -> jax.Array:
  """All places, in the natural order, of a share [b, t] or [b, k, t, h]; its gradient is summed over the devices.

  They are gathered on a new first dimension, as its gradient is one that a TPU can reduce and scatter at once.
  """
  every, axis = jax.lax.all_gather(x, axes), _axis(x)
  if not balanced:
    return jnp.concatenate([*every], axis=axis)
  low, high = jnp.split(every, 2, axis=axis + 1)
  return jnp.concatenate([*low, *high[::-1]], axis=axis)


def _gather(form: Form, backend: str, queries: Any, keys: Any, sinks: Any) -> jax.Array:
  axes = sharding.mesh_axes("length")
  return _whole(form, backend, axes, queries, tuple(_gathered(x, axes) for x in keys), sinks)


def _ulysses(form: Form, backend: str, queries: Any, keys: Any, sinks: Any) -> jax.Array:
  axes, parts = sharding.mesh_axes("length"), sharding.parts("length")
  for what, x in (("heads", queries[0]), ("kv_heads", keys[0])):
    if x.shape[1] % parts:
      raise ConfigError(
        f"ulysses divides the heads of a device over the {parts} devices of its sequence, but it has {x.shape[1]} of "
        f"model.{what}; lower mesh.context or mesh.tensor, or set sharding.context to ring or gather"
      )
  exchange = functools.partial(jax.lax.all_to_all, axis_name=axes, tiled=True)

  def enter(x: jax.Array) -> jax.Array:
    return _gathered(x, axes, balanced=False) if x.ndim == 2 else exchange(x, split_axis=1, concat_axis=2)

  queries, keys = jax.tree.map(enter, (queries, keys))
  if sinks is not None:
    heads = len(sinks) // parts
    sinks = jax.lax.dynamic_slice_in_dim(sinks, sharding.shard_index("length") * heads, heads)
  return exchange(_whole(form, backend, (), queries, keys, sinks), split_axis=2, concat_axis=1)


def _ring(form: Form, backend: str, queries: Any, keys: Any, sinks: Any) -> jax.Array:
  axes, parts, t = sharding.mesh_axes("length"), sharding.parts("length"), queries[0].shape[2]
  own, rest = _xla(form, lambda: (0,)), _xla(form, lambda: (None,))
  if backend != "xla" and t % 256 == 0:  # each half has whole blocks
    own, rest = (
      splash.computation(functools.partial(splash.kernel, mask, form.softcap, 0, mask.shape[0], backend, 1))
      for mask in (splash.CausalMask(np.arange(t)), splash.FullMask((t // 2, t // 2)))
    )
  steps = zip((ring.forward, ring.backward), own, rest)
  return _attend(*(functools.partial(f, *pair, axes, parts) for f, *pair in steps), queries, keys, sinks)


# ---- XLA: a matrix of a block of queries and the keys that it may see exists

# Blocks of queries, as many as divide them and leave 32 to each. Four blocks save three eighths of a causal mask's
# work; with a window the work shrinks to a block's queries and the window.
CAUSAL_BLOCKS = 4
WINDOW_BLOCKS = 16


def _xla(form: Form, places: Callable[[], tuple[Any, ...]]) -> tuple[Callable, Callable]:
  """(forward, backward) of queries and keys; `places` are made in each of them, as they may be traced."""
  return (lambda queries, keys: _xla_forward(form, places(), queries, keys),
          lambda queries, keys: _xla_backward(form, places(), queries, keys))  # fmt: skip


def _blocks(form: Form, places: tuple[Any, ...], queries: Sequence[Any], keys: Sequence[Any]) -> Iterator[Any]:
  """(queries, keys, index of the first query among these keys, index of the first key) of each block of queries.

  Args:
    places: index among all keys of the first query of each equal chunk of queries; None: its queries see all keys.
    queries, keys: arrays [b, n, t, ...] or [b, t]; of keys, only those that the queries may see are in a block.
  """
  chunk, s = queries[0].shape[2] // len(places), keys[0].shape[2]
  for place, begin in zip(places, range(0, queries[0].shape[2], chunk)):
    counts = (WINDOW_BLOCKS, CAUSAL_BLOCKS) if form.window else (CAUSAL_BLOCKS,) if isinstance(place, int) else ()
    rows = chunk // next((n for n in counts if chunk % n == 0 and chunk >= 32 * n), 1)
    for a in range(0, chunk, rows):
      start, size, offset = 0, s, None if place is None else place + a
      if isinstance(offset, int):
        start = max(0, offset + 1 - form.window) if form.window else 0
        size = min(s, offset + rows) - start
      elif offset is not None and form.window:
        size = min(s, rows + form.window)
        start = jnp.clip(offset + 1 - form.window, 0, s - size)
      part = [jax.lax.slice_in_dim(x, begin + a, begin + a + rows, axis=_axis(x)) for x in queries]
      seen = [jax.lax.dynamic_slice_in_dim(x, start, size, _axis(x)) for x in keys]
      yield part, seen, None if offset is None else offset - start, start


def _logits(form: Form, queries: Sequence[Any], keys: Sequence[Any], offset: Any) -> jax.Array:
  """float32 [b, k, n/k * t, s] of (q, segments) and (k, segments); offset None: no causal mask."""
  (q, q_segments), (k, k_segments) = queries, keys
  b, n, t, h = q.shape
  kv, s = k.shape[1:3]
  logits = jnp.einsum("bkth,bksh->bkts", q.reshape(b, kv, -1, h), k, preferred_element_type=jnp.float32)
  if form.softcap:
    logits = form.softcap * jnp.tanh(logits / form.softcap)
  mask = q_segments[:, :, None] == k_segments[:, None, :]
  if offset is not None:
    mask &= splash.seen(form.window)((jnp.arange(t) + offset)[:, None], jnp.arange(s))
  return jnp.where(mask[:, None, None], logits.reshape(b, kv, n // kv, t, s), ring.HIDDEN).reshape(b, kv, -1, s)


def _xla_forward(form: Form, places: tuple[Any, ...], queries: Any, keys: Any) -> tuple[jax.Array, jax.Array]:
  parts = []
  for (q, q_segments), (k, v, k_segments), offset, _ in _blocks(form, places, queries, keys):
    logits = _logits(form, (q, q_segments), (k, k_segments), offset)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    o = jnp.einsum("bkts,bksh->bkth", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    # The sum divides after the product, on h numbers a row instead of s.
    parts.append(((o / total).reshape(*q.shape[:3], -1), (top + jnp.log(total)).reshape(q.shape[:3])))
  o, lse = (jnp.concatenate(x, axis=2) for x in zip(*parts))
  return o, lse


def _xla_backward(form: Form, places: tuple[Any, ...], queries: Any, keys: Any) -> tuple[jax.Array, ...]:
  dq, dk, dv = [], *(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  for (q, q_segments, o, lse, do), (k, v, k_segments), offset, start in _blocks(form, places, queries, keys):
    rows = lambda x: x.reshape(*k.shape[:2], -1, x.shape[-1])  # noqa: B023, E731
    at = lambda total: jax.lax.dynamic_slice_in_dim(total, start, k.shape[2], 2)  # noqa: B023, E731
    logits = _logits(form, (q, q_segments), (k, k_segments), offset)
    weights = jnp.exp(logits - rows(lse[..., None]))
    inner = rows((o.astype(jnp.float32) * do).sum(-1, keepdims=True))
    dlogits = weights * (product("bkth,bksh->bkts", rows(do), v) - inner)
    if form.softcap:  # the derivative of tanh; hidden logits are beyond all others
      dlogits *= 1 - jnp.clip(logits / form.softcap, -1, 1) ** 2
    dlogits, weights = dlogits.astype(q.dtype), weights.astype(q.dtype)
    dv_block, dk_block = (product("bkts,bkth->bksh", x, rows(y)) for x, y in ((weights, do), (dlogits, q)))
    dv = jax.lax.dynamic_update_slice_in_dim(dv, at(dv) + dv_block, start, 2)
    dk = jax.lax.dynamic_update_slice_in_dim(dk, at(dk) + dk_block, start, 2)
    dq.append(product("bkts,bksh->bkth", dlogits, k).reshape(q.shape))
  return jnp.concatenate(dq, axis=2), dk, dv
