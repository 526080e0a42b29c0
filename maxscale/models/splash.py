"""Attention by the Pallas kernels for TPU that JAX has ("splash attention"): no matrix of queries and keys exists.

Queries are scaled, and heads come first: [b, n, t, h]; keys and values are [b, k, s, h]. Any head size will do.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.extend.core import Literal

FullMask = masks.FullMask


@functools.cache  # a kernel is compiled once for each function
def seen(window: int) -> Callable[[Any, Any], Any]:
  """Whether a query at one place sees a key of its segment at another; window 0: all keys before it."""
  return (lambda q, k: (q >= k) & (q < k + window)) if window else operator.ge


class CausalMask(masks.Mask):
  """Causal mask [t, t], with a window if there is one, of queries in a given order and keys in the natural one.

  The kernel computes it from `q_sequence`, the positions of the queries, and takes from blocks only whether some and
  whether all of their elements are true: a block that is all one value is one element here, or the mask of 128k
  tokens takes a minute to make.
  """

  def __init__(self, q_sequence: np.ndarray, window: int = 0) -> None:
    self.q_sequence, self.window = q_sequence.astype(np.int32), window
    self.mask_function = seen(window)

  @property
  def shape(self) -> tuple[int, ...]:
    return len(self.q_sequence), len(self.q_sequence)

  def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
    rows, columns = self.q_sequence[idx[0]], np.arange(*idx[1].indices(len(self.q_sequence)))
    low, high, window = rows.min(), rows.max(), self.window or len(self.q_sequence)
    none = high < columns[0] or low >= columns[-1] + window
    if none or (low >= columns[-1] and high < columns[0] + window):
      rows, columns = rows[:1], columns[:1]
    return self.mask_function(rows[:, None], columns)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, CausalMask):
      return False
    return self.window == other.window and np.array_equal(self.q_sequence, other.q_sequence)

  def __hash__(self) -> int:
    return hash((self.window, self.q_sequence.tobytes()))


FUSED_BLOCKS = 8  # of keys


def kernel(mask: masks.Mask, softcap: float, window: int, chunk: int, backend: str, parts: int, q: jax.Array,
           v: jax.Array, **options: Any) -> Any:  # fmt: skip
  """The kernel of a mask [t, s] for all queries of `parts` devices; a block of queries divides `chunk` of its rows.

  Args:
    softcap, window: as in maxscale.models.attention.Form.
    q, v: arrays of the shapes and dtypes that it is for.
  """
  # Blocks of 1024 fit in the 16 MiB of VMEM that a kernel has up to this head size, in bfloat16 and without a softcap.
  # Nor should they be far wider than a window, as all of a block that has one visible key is computed.
  small = max(q.shape[-1], v.shape[-1]) > 128 or q.dtype.itemsize > 2 or softcap or 0 < window <= 512
  sizes = (512, 256, 128) if small else (1024, 512, 256, 128)
  block_q, block_kv = (next(b for b in sizes if n % b == 0) for n in (chunk, mask.shape[1]))
  # The fused backward kernel recomputes the logits once instead of twice, but writes dq once for each block of keys,
  # whether its queries see them or not.
  fused = mask.shape[1] // block_kv <= FUSED_BLOCKS and not window
  dq: dict[str, Any] = {} if fused else {"block_q_dq": block_q, "block_kv_dq": block_kv}
  blocks = library.BlockSizes(block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
                              use_fused_bwd_kernel=fused, **dq)  # fmt: skip
  options |= {"block_sizes": blocks, "head_shards": 1, "q_seq_shards": parts, "interpret": backend == "interpret"}
  return library.make_splash_mha(
    masks.MultiHeadMask([mask] * q.shape[1]), attn_logits_soft_cap=softcap or None, **options
  )


def computation(kernel: Callable) -> tuple[Callable, Callable]:
  """The (forward, backward) that maxscale.models.ring explains, by what `kernel(q, v, **options)` makes."""
  return functools.partial(_forward, kernel), functools.partial(_backward, kernel)


def _forward(kernel: Callable, queries: Any, keys: Any) -> tuple[jax.Array, jax.Array]:
  (q, q_segments), (k, v, k_segments) = queries, keys
  o, (lse,) = jax.vmap(kernel(q, v, save_residuals=True))(q, k, v, library.SegmentIds(q_segments, k_segments))
  return o, lse


def _backward(kernel: Callable, queries: Any, keys: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  (q, q_segments, o, lse, do), (k, v, k_segments) = queries, keys
  made = kernel(q, v)

  def backward(q: Any, k: Any, v: Any, segments: Any, o: Any, lse: Any, do: Any) -> Any:
    # The library's own backward rule, which it does not export: only it takes an output and a log-sum-exp that are
    # not those of its forward kernel.
    residuals = (q, k, v, segments, None, o, lse, made.dq_mask_info, made.dkv_mask_info)
    return library._splash_attention_bwd(**made.kwargs, res=residuals, do=do)[3:6]

  segments = library.SegmentIds(q_segments, k_segments)
  return jax.vmap(_partials_added(backward))(q, k, v, segments, o, lse, do)


def _partials_added(f: Callable) -> Callable:
  """f with each sum over the leading dimension of a kernel's result as a chain of additions.

  The fused backward kernel leaves a dq for each block of keys, and the library sums them. The TPU compiler does not fuse
  a sum over a leading dimension, but additions it does, into what reads dq: on v5p at 8 partials 4.5% of the cycles of
  Llama 3 8B.
  """

  def g(*args: Any) -> Any:
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts))
    values |= dict(zip(closed.jaxpr.invars, jax.tree.leaves(args)))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]  # noqa: E731
    partials: dict[Any, jax.Array] = {}  # results of kernels, also as what widens them: to widen slices is what fuses
    for eqn in closed.jaxpr.eqns:
      inputs = [read(v) for v in eqn.invars]
      if eqn.primitive.name == "reduce_sum" and eqn.params["axes"] == (0,) and eqn.invars[0] in partials:
        outputs = [functools.reduce(operator.add, (x.astype(inputs[0].dtype) for x in partials[eqn.invars[0]]))]
      else:
        with jax.named_scope(str(eqn.source_info.name_stack) or "splash"):  # it names the kernel
          outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        outputs = outputs if eqn.primitive.multiple_results else [outputs]
      values.update(zip(eqn.outvars, outputs))
      if eqn.primitive.name == "pallas_call":
        partials.update(zip(eqn.outvars, outputs))
      if eqn.primitive.name == "convert_element_type" and eqn.invars[0] in partials:
        partials[eqn.outvars[0]] = partials[eqn.invars[0]]
    return jax.tree.unflatten(jax.tree.structure(shape), [read(v) for v in closed.jaxpr.outvars])

  return g
