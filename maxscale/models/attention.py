"""Causal attention inside segments, of sequences that one device holds or that several devices share.

Where the logical axis `length` is split, a method says how queries meet the keys of other devices:

  ring     keys and values go around; the softmax is merged step by step (Liu et al., arXiv 2310.01889)
  gather   every device gathers all keys and values
  ulysses  heads are exchanged for length, so that each device has all places of some heads (arXiv 2309.14509)

Ring and gather expect the balanced order of `maxscale.sharding.sequence`, ulysses the natural one.

Dimensions: b batch, t queries, s keys, n heads, k key-value heads, h head size; all of the device's own shard.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from maxscale.config import ConfigError
from maxscale.models import ring
from maxscale.sharding import context as sharding
from maxscale.sharding import sequence


def balanced(method: str) -> bool:
  """Whether the method needs the balanced order of `sequence.order`."""
  return method != "ulysses"


def attention(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
              offset: jax.Array | int = 0, method: str = "ring", backend: str | None = None) -> jax.Array:  # fmt: skip
  """Causal attention inside segments, inside a manual shard_map where a mesh is active.

  Args:
    q: [b, t, n, h]. k, v: [b, s, k, h], n a multiple of k.
    q_segments, k_segments: int32 [b, t] and [b, s]; a query sees the keys of its own segment up to its own position.
    offset: index of the first query among the keys (decoding); training has 0.
    method: ring, gather or ulysses, where `length` is split.
    backend: "tpu" for its kernels, "interpret" to simulate them, "xla" for plain operations; None: as the platform has.

  Returns:
    [b, t, n, h] in the dtype of q; logits, softmax and sums are float32.

  Raises:
    ConfigError: decoding over a split sequence, or ulysses with heads that do not divide by its devices.
  """
  backend = backend or ("tpu" if sharding.platform() == "tpu" else "xla")
  q, k, v = _heads_first(q * q.shape[-1] ** -0.5), _heads_first(k), _heads_first(v)
  if sharding.parts("length") == 1:
    return _heads_first(_whole(q, k, v, q_segments, k_segments, offset, backend))
  if q.shape[2] != k.shape[2]:
    raise ConfigError("decoding needs whole sequences on each device: set mesh.context=1")
  shared = {"ring": _ring, "gather": _gather, "ulysses": _ulysses}[method]
  return _heads_first(shared(q, k, v, q_segments, k_segments, backend))


def _heads_first(x: jax.Array) -> jax.Array:
  """[b, t, n, h] <-> [b, n, t, h]: products are then plain batched matmuls, which is what a CPU has fast code for."""
  return x.transpose(0, 2, 1, 3)


# Below here queries are scaled and have their heads first, [b, n, t, h], and so have keys, values and outputs.


# ---- one device has the sequence

CAUSAL_BLOCKS = 4  # of queries: later keys are left out of each, which saves three eighths of the work


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
           offset: jax.Array | int, backend: str) -> jax.Array:  # fmt: skip
  """`attention`: by a kernel no [t, s] matrix exists, by XLA that of a block of queries does."""
  t = q.shape[2]
  if t != k.shape[2]:
    return _attend(q, k, v, q_segments, k_segments, offset)
  if backend == "xla" or t % 128:
    blocks = _blocks((q, q_segments), (k, v, k_segments))
    return jnp.concatenate([_attend(q, k, v, qs, ks, at) for (q, qs), (k, v, ks), at in blocks], axis=2)
  kernel = _kernel(CausalMask(np.arange(t)), q.shape[1], t, backend, residual_checkpoint_name="attention")
  return jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_segments, k_segments))


def _blocks(queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> list[tuple[Any, Any, int]]:
  """(queries, keys, offset) of each block of queries, with the keys up to its last."""
  t = queries[0].shape[2]
  count = CAUSAL_BLOCKS if t % CAUSAL_BLOCKS == 0 and t >= 128 else 1
  part = lambda tree, a, z: [jax.lax.slice_in_dim(x, a, z, axis=min(2, x.ndim - 1)) for x in tree]  # noqa: E731
  ends = [(i * t // count, (i + 1) * t // count) for i in range(count)]
  return [(part(queries, a, z), part(keys, 0, z), a) for a, z in ends]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
            offset: jax.Array | int) -> jax.Array:  # fmt: skip
  o, total, _ = _softmax(q, k, v, _logits(q, k, q_segments, k_segments, offset))
  # The sum divides after the product, on h numbers a row instead of s. The two have the name under which a remat
  # policy keeps attention: they are what the backward pass needs so as not to run this product again.
  o, total = checkpoint_name(o, "attention"), checkpoint_name(total, "attention")
  return (o / total).astype(q.dtype)


def _logits(q: jax.Array, k: jax.Array, q_segments: jax.Array, k_segments: jax.Array, offset: Any) -> jax.Array:
  """float32 [b, k, n/k * t, s] of queries [b, n, t, h] and keys [b, k, s, h]; offset None: no causal mask."""
  b, n, t, h = q.shape
  kv, s = k.shape[1:3]
  logits = jnp.einsum("bkth,bksh->bkts", q.reshape(b, kv, -1, h), k, preferred_element_type=jnp.float32)
  mask = q_segments[:, :, None] == k_segments[:, None, :]
  if offset is not None:
    mask &= (jnp.arange(t)[:, None] + offset) >= jnp.arange(s)[None, :]
  return jnp.where(mask[:, None, None], logits.reshape(b, kv, n // kv, t, s), ring.HIDDEN).reshape(b, kv, -1, s)


def _softmax(q: jax.Array, k: jax.Array, v: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The sum over keys of weight times value [b, n, t, h], of the weights, and the largest logit [b, n, t, 1]."""
  top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - top)
  o = jnp.einsum("bkts,bksh->bkth", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
  rows = lambda x: x.reshape(*q.shape[:3], -1)  # noqa: E731
  return rows(o), rows(weights.sum(-1, keepdims=True)), rows(top)


# ---- TPU kernels


class CausalMask(masks.Mask):
  """Causal mask [t, t] of queries in a given order and keys in the natural one.

  The kernel computes it from `q_sequence`, the positions of the queries, and takes from blocks only whether some and
  whether all of their elements are true: a block that is all one value is one element here, or the mask of 128k
  tokens takes a minute to make.
  """

  mask_function = operator.ge

  def __init__(self, q_sequence: np.ndarray) -> None:
    self.q_sequence = q_sequence.astype(np.int32)

  @property
  def shape(self) -> tuple[int, ...]:
    return len(self.q_sequence), len(self.q_sequence)

  def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
    rows, columns = self.q_sequence[idx[0]], np.arange(*idx[1].indices(len(self.q_sequence)))
    if rows.min() >= columns[-1] or rows.max() < columns[0]:
      rows, columns = rows[:1], columns[:1]
    return rows[:, None] >= columns

  def __eq__(self, other: object) -> bool:
    return isinstance(other, CausalMask) and np.array_equal(self.q_sequence, other.q_sequence)

  def __hash__(self) -> int:
    return hash(self.q_sequence.tobytes())


FUSED_BLOCKS = 8  # of keys


def _kernel(mask: masks.Mask, heads: int, chunk: int, backend: str, parts: int = 1, **options: Any) -> Any:
  """The kernel of a mask [t, s] on `parts` devices; a block of queries divides `chunk` of its rows."""
  q, kv = (next(b for b in (1024, 512, 256, 128) if n % b == 0) for n in (chunk, mask.shape[1]))
  # The fused backward kernel recomputes the logits once instead of twice, but writes dq once for each block of keys.
  fused = mask.shape[1] // kv <= FUSED_BLOCKS
  dq: dict[str, Any] = {} if fused else {"block_q_dq": q, "block_kv_dq": kv}
  sizes = splash.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, use_fused_bwd_kernel=fused, **dq)
  options |= {"block_sizes": sizes, "head_shards": 1, "q_seq_shards": parts, "interpret": backend == "interpret"}
  return splash.make_splash_mha(masks.MultiHeadMask([mask] * heads), **options)


# ---- gather


def _gather(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
            backend: str) -> jax.Array:  # fmt: skip
  axes, parts, index = sharding.mesh_axes("length"), sharding.parts("length"), sharding.shard_index("length")
  k, v, k_segments = (_in_natural_order(x, axes) for x in (k, v, k_segments))
  chunk = q.shape[2] // 2
  if backend == "xla" or chunk % 128:
    halves = zip(jnp.split(q, 2, axis=2), jnp.split(q_segments, 2, axis=1), (index, 2 * parts - 1 - index))
    return jnp.concatenate([_attend(q, k, v, segments, k_segments, i * chunk) for q, segments, i in halves], axis=2)
  mask = CausalMask(sequence.order(k.shape[2], parts, balanced=True))
  kernel = _kernel(mask, q.shape[1], chunk, backend, parts, residual_checkpoint_name="attention")

  def own(x: jax.Array) -> jax.Array:
    """This device's share of what the kernel knows of the mask: [1, blocks of q, blocks of k], or positions [t]."""
    axis = x.ndim // 2
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

  return jax.vmap(jax.tree.map(own, kernel))(q, k, v, splash.SegmentIds(q_segments, k_segments))


def _in_natural_order(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """All places of a share [b, t] or [b, k, t, h] in the balanced order; its gradient is summed over the devices.

  They are gathered on a new first dimension, as its gradient is one that a TPU can reduce and scatter at once.
  """
  low, high = jnp.split(jax.lax.all_gather(x, axes), 2, axis=-1 if x.ndim == 2 else -2)
  return jnp.concatenate([*low, *high[::-1]], axis=min(2, x.ndim - 1))


# ---- ulysses


def _ulysses(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
             backend: str) -> jax.Array:  # fmt: skip
  axes, parts = sharding.mesh_axes("length"), sharding.parts("length")
  for what, heads in (("heads", q.shape[1]), ("kv_heads", k.shape[1])):
    if heads % parts:
      raise ConfigError(
        f"ulysses divides the heads of a device over the {parts} devices of its sequence, but it has {heads} of "
        f"model.{what}; lower mesh.context or mesh.tensor, or set sharding.context to ring or gather"
      )
  exchange = functools.partial(jax.lax.all_to_all, axis_name=axes, tiled=True)
  q, k, v = (exchange(x, split_axis=1, concat_axis=2) for x in (q, k, v))
  q_segments, k_segments = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (q_segments, k_segments))
  return exchange(_whole(q, k, v, q_segments, k_segments, 0, backend), split_axis=2, concat_axis=1)


# ---- ring: what `ring.ring` needs for a pair of queries and keys, by XLA and by the TPU kernel


def _ring(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
          backend: str) -> jax.Array:  # fmt: skip
  forward, backward = _xla_forward, _xla_backward
  if backend != "xla" and q.shape[2] % 256 == 0:  # each half has whole blocks
    forward, backward = functools.partial(_splash_forward, backend), functools.partial(_splash_backward, backend)
  return ring.ring(
    q, k, v, q_segments, k_segments, sharding.mesh_axes("length"), sharding.parts("length"), forward, backward
  )


def _xla_forward(queries: Any, keys: Any, causal: bool) -> tuple[jax.Array, jax.Array]:
  parts = []
  for (q, q_segments), (k, v, k_segments), offset in _blocks(queries, keys) if causal else [(queries, keys, None)]:
    o, total, top = _softmax(q, k, v, _logits(q, k, q_segments, k_segments, offset))
    parts.append((o / total, (top + jnp.log(total))[..., 0]))
  o, lse = (jnp.concatenate(x, axis=2) for x in zip(*parts))
  return o, lse


def _xla_backward(queries: Any, keys: Any, causal: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  dq, dk, dv = [], *(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  for (q, q_segments, o, lse, do), (k, v, k_segments), offset in (
    _blocks(queries, keys) if causal else [(queries, keys, None)]
  ):
    s, rows = k.shape[2], lambda x: x.reshape(*k.shape[:2], -1, x.shape[-1])  # noqa: B023
    weights = jnp.exp(_logits(q, k, q_segments, k_segments, offset) - rows(lse[..., None]))
    inner = rows((o.astype(jnp.float32) * do).sum(-1, keepdims=True))
    dlogits = (weights * (product("bkth,bksh->bkts", rows(do), v) - inner)).astype(q.dtype)
    dv = dv.at[:, :, :s].add(product("bkts,bkth->bksh", weights.astype(q.dtype), rows(do)))
    dk = dk.at[:, :, :s].add(product("bkts,bkth->bksh", dlogits, rows(q)))
    dq.append(product("bkts,bksh->bkth", dlogits, k).reshape(q.shape))
  return jnp.concatenate(dq, axis=2), dk, dv


def _splash_forward(backend: str, queries: Any, keys: Any, causal: bool) -> tuple[jax.Array, jax.Array]:
  (q, q_segments), (k, v, k_segments) = queries, keys
  kernel = _pair_kernel(q, causal, backend, save_residuals=True)
  o, (lse,) = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_segments, k_segments))
  return o, lse


def _splash_backward(backend: str, queries: Any, keys: Any, causal: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  (q, q_segments, o, lse, do), (k, v, k_segments) = queries, keys
  kernel = _pair_kernel(q, causal, backend)

  def backward(q: Any, k: Any, v: Any, segments: Any, o: Any, lse: Any, do: Any) -> Any:
    # The library's own backward rule, which it does not export: only it takes an output and a log-sum-exp that are
    # not those of its forward kernel.
    residuals = (q, k, v, segments, None, o, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
    return splash._splash_attention_bwd(**kernel.kwargs, res=residuals, do=do)[3:6]

  return jax.vmap(backward)(q, k, v, splash.SegmentIds(q_segments, k_segments), o, lse, do)


def _pair_kernel(q: jax.Array, causal: bool, backend: str, **options: Any) -> Any:
  n, t = q.shape[1:3]
  return _kernel(CausalMask(np.arange(t)) if causal else masks.FullMask((t, t)), n, t, backend, **options)
