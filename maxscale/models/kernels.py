"""The operations that have a kernel for each platform: each is one function that picks it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxscale.sharding import context as sharding

Names = tuple[str | None, ...]
custom_vjp: Any = jax.custom_vjp  # its own type loses the signature behind a partial
TOKENS, INNER = ("batch", "length"), ("batch", "length", "embed")


def use_weight(w: jax.Array, names: Names, dtype: Any) -> jax.Array:
  """A parameter as operations use it: cast first, so that FSDP gathers the narrow type, then sharded for compute."""
  return sharding.constrain(w.astype(dtype), names)


@functools.partial(custom_vjp, nondiff_argnums=(0, 3, 4))
def matmul(spec: str, x: jax.Array, w: jax.Array, names: Names, grad_dtype: str) -> jax.Array:
  """einsum(spec, x, w) in the dtype of x, for a parameter w with dimensions `names`.

  Plain AD would make and reduce the gradient of w in x's dtype; here it is made, and crosses devices, in `grad_dtype`.
  """
  return jnp.einsum(spec, x, use_weight(w, names, x.dtype), precision=_precision(x))


def _precision(x: jax.Array) -> jax.lax.Precision | None:
  """float32 means float32: a TPU would otherwise multiply in one pass of bfloat16."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _matmul_fwd(spec: str, x: jax.Array, w: jax.Array, names: Names, grad_dtype: str) -> Any:
  return matmul(spec, x, w, names, grad_dtype), (x, w)


def _matmul_bwd(spec: str, names: Names, grad_dtype: str, residuals: Any, dy: jax.Array) -> Any:
  x, w = residuals
  operands, y = spec.split("->")
  a, b = operands.split(",")
  dx = jnp.einsum(f"{y},{b}->{a}", dy, use_weight(w, names, dy.dtype), precision=_precision(dy))
  dw = jnp.einsum(f"{a},{y}->{b}", x, dy, preferred_element_type=jnp.dtype(grad_dtype), precision=_precision(dy))
  return dx, sharding.constrain(dw, names, "param").astype(w.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(table: jax.Array, tokens: jax.Array, names: Names, dtype: str, grad_dtype: str) -> jax.Array:
  """Rows of an embedding table [V, D] for tokens [B, T], in `dtype`; its gradient is made in `grad_dtype`.

  Each device looks into its own part of the vocabulary: the partitioner, left alone, gathers the table or the
  activations to do this.
  """

  def shard(table: jax.Array, tokens: jax.Array) -> jax.Array:
    rows, mine = own_rows(table.shape[0], tokens)
    return sharding.psum(jnp.where(mine[..., None], table[rows], 0), "vocab")

  f = sharding.on_shards(shard, (names, TOKENS), INNER)
  return f(use_weight(table, names, jnp.dtype(dtype)), tokens)


def _lookup_fwd(table: jax.Array, tokens: jax.Array, names: Names, dtype: str, grad_dtype: str) -> Any:
  return lookup(table, tokens, names, dtype, grad_dtype), (table, tokens)


def _lookup_bwd(names: Names, dtype: str, grad_dtype: str, residuals: Any, dy: jax.Array) -> Any:
  table, tokens = residuals
  vocab, width = table.shape

  def shard(tokens: jax.Array, dy: jax.Array) -> jax.Array:
    size = vocab // sharding.parts("vocab")
    rows, mine = own_rows(size, tokens)
    dw = jnp.zeros((size, width), grad_dtype).at[rows].add(jnp.where(mine[..., None], dy, 0).astype(grad_dtype))
    return sharding.reduce_gradient(dw, names)

  dw = sharding.on_shards(shard, (TOKENS, INNER), sharding.Gradient(names))(tokens, dy)
  return sharding.constrain(dw, names, "param").astype(table.dtype), None


def own_rows(size: int, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Row of each token in this device's `size` rows of the vocabulary, and whether it is among them."""
  rows = tokens - sharding.shard_index("vocab") * size
  mine = (rows >= 0) & (rows < size)
  return jnp.where(mine, rows, 0), mine


lookup.defvjp(_lookup_fwd, _lookup_bwd)


# ---- attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
              offset: jax.Array | int = 0) -> jax.Array:  # fmt: skip
  """Causal attention inside segments.

  Args:
    q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K.
    q_segments, k_segments: int32 [B, T] and [B, S]; a query sees keys of its own segment only.
    offset: index of the first query among the keys (decoding); training has 0.

  Returns:
    [B, T, N, H] in the dtype of q.
  """
  if sharding.platform() != "tpu" or q.shape[1] != k.shape[1] or q.shape[1] % 128:
    return xla_attention(q, k, v, q_segments, k_segments, offset)
  q_names, k_names = ("batch", "length", "heads", "head_dim"), ("batch", "length", "kv_heads", "head_dim")
  f = sharding.on_shards(splash_attention, (q_names, k_names, k_names, TOKENS, TOKENS), q_names)
  return f(q, k, v, q_segments, k_segments)


CAUSAL_BLOCKS = 4  # of queries: later keys are left out of each, which saves three eighths of the work


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
                  offset: jax.Array | int = 0) -> jax.Array:  # fmt: skip
  """`attention` as XLA compiles it anywhere; the [T/4, S] matrix of a block of queries exists."""
  t = q.shape[1]
  if t != k.shape[1] or t % CAUSAL_BLOCKS or t < 128:
    return _attend(q, k, v, q_segments, k_segments, offset)
  size = t // CAUSAL_BLOCKS
  blocks = [(i * size, (i + 1) * size) for i in range(CAUSAL_BLOCKS)]
  return jnp.concatenate(
    [_attend(q[:, a:z], k[:, :z], v[:, :z], q_segments[:, a:z], k_segments[:, :z], a) for a, z in blocks], axis=1
  )


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
            offset: jax.Array | int) -> jax.Array:  # fmt: skip
  b, t, n, h = q.shape
  s, kv = k.shape[1], k.shape[2]
  # Heads in front: both products are then plain batched matmuls, which is what a CPU has fast code for.
  q = (q * h**-0.5).reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  logits = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32).reshape(b, kv, n // kv, t, s)
  causal = (jnp.arange(t)[:, None] + offset) >= jnp.arange(s)[None, :]
  mask = causal & (q_segments[:, :, None] == k_segments[:, None, :])
  logits = jnp.where(mask[:, None, None], logits, -1e30)
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  o = jnp.einsum("bkts,bksh->bkth", weights.astype(q.dtype).reshape(b, kv, -1, s), v,
                 preferred_element_type=jnp.float32).reshape(b, kv, n // kv, t, h)  # fmt: skip
  # The sum divides after the product, on H numbers a row instead of S. The two have the name under which a remat
  # policy keeps attention: they are what the backward pass needs so as not to run this product again.
  o, total = checkpoint_name(o, "attention"), checkpoint_name(weights.sum(-1, keepdims=True), "attention")
  return (o / total).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def splash_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array
) -> jax.Array:
  """`attention` by the TPU kernel; T is a multiple of 128. No [T, T] matrix exists."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  t, n, h = q.shape[1:]
  block = next(b for b in (1024, 512, 256, 128) if t % b == 0)
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((t, t))] * n),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    ),
    # The kernel's output and log-sum-exp must be kept together, or the backward pass runs the kernel again.
    residual_checkpoint_name="attention",
  )
  heads_first = lambda x: x.transpose(0, 2, 1, 3)  # noqa: E731
  segments = splash.SegmentIds(q=q_segments, kv=k_segments)
  out = jax.vmap(kernel)(heads_first(q * h**-0.5), heads_first(k), heads_first(v), segments)
  return heads_first(out)


# ---- grouped matmul


def grouped_matmul(x: jax.Array, w: jax.Array, master: jax.Array, sizes: jax.Array) -> jax.Array:
  """Row block e of x times w[e]: the experts' products, no row computed for an expert that it did not choose.

  Args:
    x: [M, D], rows sorted by expert. w: [E, D, F] in x's dtype. sizes: int32 [E], rows of each expert; they sum to M.
    master: [E, D, F], never read: the gradient of the weights is its cotangent, made in its dtype (w's own is zero).

  Returns:
    [M, F] in the dtype of x.
  """
  return _grouped(x, w, master, sizes)


@custom_vjp
def _grouped(x: jax.Array, w: jax.Array, master: jax.Array, sizes: jax.Array) -> jax.Array:
  if sharding.platform() == "cpu":
    return _blocks_forward(x, w, sizes)
  return jax.lax.ragged_dot(x, w, sizes)


def _grouped_fwd(x: jax.Array, w: jax.Array, master: jax.Array, sizes: jax.Array) -> Any:
  # of the master only the dtype is kept: a residual of its size would be the gathered float32 weights
  return _grouped(x, w, master, sizes), (x, w, jnp.zeros((0,), master.dtype), sizes)


def _grouped_bwd(residuals: Any, dy: jax.Array) -> Any:
  x, w, master, sizes = residuals
  wt = w.swapaxes(1, 2)
  if sharding.platform() == "cpu":
    dx, dw = _blocks_forward(dy, wt, sizes), _blocks_outer(x, dy, sizes, master.dtype)
  else:
    dx = jax.lax.ragged_dot(dy, wt, sizes)
    dims = jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    dw = jax.lax.ragged_dot_general(x, dy, sizes, dims, preferred_element_type=master.dtype)
  return dx, jnp.zeros_like(w), dw.astype(master.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)

BLOCK_ROWS = 256  # of the CPU's blocks; the last of a group is partly wasted


def _blocks(m: int) -> int:
  return min(BLOCK_ROWS, max(8, m // 8))


def _blocks_forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """A CPU's grouped matmul: blocks of rows, expert after expert.

  The last block of an expert reaches into rows of the next, which then overwrites them: the order is what makes it
  right, and no row is copied to a padded place.
  """
  rows, (m, _) = _blocks(x.shape[0]), x.shape
  x = jnp.pad(x, ((0, rows), (0, 0)))
  ends = jnp.cumsum(sizes)

  def expert(out: jax.Array, args: Any) -> Any:
    w_e, end, size = args

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
      at = end - size + i * rows
      y = jax.lax.dynamic_slice_in_dim(x, at, rows) @ w_e
      return jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)

    return jax.lax.fori_loop(0, (size + rows - 1) // rows, block, out), None

  out, _ = jax.lax.scan(expert, jnp.zeros((m + rows, w.shape[2]), x.dtype), (w, ends, sizes))
  return out[:m]


def _blocks_outer(x: jax.Array, dy: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
  """[E, D, F]: for each expert the product of its rows of x [M, D] and dy [M, F], summed in blocks."""
  rows = _blocks(x.shape[0])
  x, dy = jnp.pad(x, ((0, rows), (0, 0))), jnp.pad(dy, ((0, rows), (0, 0)))
  ends = jnp.cumsum(sizes)

  def expert(_: None, args: Any) -> Any:
    end, size = args

    def block(i: jax.Array, dw: jax.Array) -> jax.Array:
      at = end - size + i * rows
      mine = (at + jnp.arange(rows) < end)[:, None]
      a = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, at, rows), 0)
      return dw + jnp.einsum("md,mf->df", a, jax.lax.dynamic_slice_in_dim(dy, at, rows), preferred_element_type=dtype)

    zero = jnp.zeros((x.shape[1], dy.shape[1]), dtype)
    return None, jax.lax.fori_loop(0, (size + rows - 1) // rows, block, zero)

  return jax.lax.scan(expert, None, (ends, sizes))[1]
