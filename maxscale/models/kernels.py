"""The operations on parameters: products and lookups whose gradients are made, and cross devices, in their own dtype."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.models import grouped, quantise
from maxscale.sharding import context as sharding

Names = tuple[str | None, ...]
custom_vjp = sharding.custom_vjp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
  """A parameter in use.

  Attributes:
    used: narrow, whole as far as role compute says, and without a gradient of its own.
    master: this device's float32 shard, of which only the gradient is made.
    names: of the dimensions.
    grad_dtype: plain AD would make and reduce the gradient in the dtype of `used`; here it is made, and crosses devices,
      in this one, before it becomes the cotangent of `master`.
    quantize: kind of its products (quantise.py); "": they are not quantised. A lookup never is.
  """

  used: jax.Array
  master: jax.Array
  names: Names = dataclasses.field(metadata={"static": True})
  grad_dtype: str = dataclasses.field(metadata={"static": True})
  quantize: str = dataclasses.field(default="", metadata={"static": True})

  @classmethod
  def of(cls, w: jax.Array, names: Names, dtype: Any, grad_dtype: str, quantize: str = "") -> Weight:
    """Casts first, so that FSDP gathers the narrow type: once for forward, once for recomputation and backward."""
    # A quantised weight is gathered in `dtype` all the same. To gather its 8 bits would halve those bytes, but FSDP
    # splits the dimension that most products sum over: the scales would first have to agree on the maximum of all shards.
    used = sharding.gather_param(w.astype(dtype), names)
    return cls(jax.lax.stop_gradient(used), w, names, grad_dtype, quantize)

  def residual(self) -> Weight:
    """What a backward pass keeps: of the master only its dtype, or float32 weights would be kept a second time."""
    return dataclasses.replace(self, master=jnp.zeros((0,), self.master.dtype))

  def cotangent(self, dw: jax.Array) -> Weight:
    """The cotangent of the weight for this device's gradient dw, summed and scattered as role param says."""
    dw = sharding.scatter_gradient(dw, self.names).astype(self.master.dtype)
    return dataclasses.replace(self, used=jnp.zeros_like(self.used), master=dw)


# ---- products


def _product(spec: str, x: jax.Array, w: Weight, multiply: quantise.Multiply) -> jax.Array:
  if w.quantize:
    return quantise.product(w.quantize, spec, x, w.used, multiply).astype(x.dtype)
  return multiply(spec, x, w.used, x.dtype)


def _gradients(spec: str, x: jax.Array, w: Weight, dy: jax.Array, multiply: quantise.Multiply) -> Any:
  """Of `_product`: dx, and the cotangent of w."""
  a, b, y = quantise.letters(spec)
  if w.quantize:
    dx = quantise.input_gradient(w.quantize, spec, dy, w.used, multiply).astype(dy.dtype)
  else:
    dx = multiply(f"{y},{b}->{a}", dy, w.used, dy.dtype)
  if w.quantize and quantise.KINDS[w.quantize].dw:
    dw = quantise.weight_gradient(w.quantize, spec, x, dy, multiply).astype(w.grad_dtype)
  else:
    dw = multiply(f"{a},{y}->{b}", x, dy, w.grad_dtype)
  return dx, w.cotangent(dw)


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.dtype(dtype), precision=_precision(a))


def _precision(x: jax.Array) -> jax.lax.Precision | None:
  """Of products with parameters: float32 means float32. A TPU would otherwise multiply in one pass of bfloat16."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def matmul(spec: str, x: jax.Array, w: Weight) -> jax.Array:
  """einsum(spec, x, w) in the dtype of x."""
  return _product(spec, x, w, _einsum)


def _matmul_bwd(spec: str, residuals: Any, dy: jax.Array) -> Any:
  x, w = residuals
  return _gradients(spec, x, w, dy, _einsum)


matmul.defvjp(lambda spec, x, w: (matmul(spec, x, w), (x, w.residual())), _matmul_bwd)


@custom_vjp
def lookup(table: Weight, tokens: jax.Array) -> jax.Array:
  """Rows of a table [V, D] for tokens [B, T], 0 where another device has the row: a partial sum over the devices that
  split the vocabulary. A token of -1 has no row."""
  rows, mine = own_rows(table.used.shape[0], tokens, table.names[0])
  return jnp.where(mine[..., None], table.used[rows], 0)


def _lookup_bwd(residuals: Any, dy: jax.Array) -> Any:
  table, tokens = residuals
  rows, mine = own_rows(table.used.shape[0], tokens, table.names[0])
  dy = jnp.where(mine[..., None], dy, 0).astype(table.grad_dtype)
  return table.cotangent(jnp.zeros(table.used.shape, table.grad_dtype).at[rows].add(dy)), None


lookup.defvjp(lambda table, tokens: (lookup(table, tokens), (table.residual(), tokens)), _lookup_bwd)


def own_rows(size: int, tokens: jax.Array, name: str | None = "vocab") -> tuple[jax.Array, jax.Array]:
  """Row of each token in this device's `size` rows of the table, and whether it is among them; `name` splits the rows."""
  rows = tokens - (sharding.shard_index(name) * size if name else 0)
  mine = (rows >= 0) & (rows < size)
  return jnp.where(mine, rows, 0), mine


# ---- grouped matmul

GROUPED = "md,edf->mf"  # x, w and result of the grouped matmul, where m is a row of one e


@functools.partial(custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: jax.Array, w: Weight, sizes: jax.Array, backend: str | None = None) -> jax.Array:
  """Row block e of x times w[e]: the experts' products, no row computed for an expert that it did not choose.

  Args:
    x: [M, D], rows sorted by expert. w: [E, D, F], used in x's dtype. sizes: int32 [E], rows of each expert; their
      sum is at most M: rows past it are finite in x, and anything in the result. A quantised w has one scale for a
      channel F of all its experts: a scale for each would be looked up for every row.
    backend: "tpu" for its kernels, "interpret" to simulate them, "blocks" for loops over blocks of rows (of which XLA
      makes a CPU's fastest), "xla" for its ragged products; None: as the platform has.

  Returns:
    [M, F] in the dtype of x.
  """
  return _grouped_fwd(x, w, sizes, backend)[0]


def _grouped_fwd(x: jax.Array, w: Weight, sizes: jax.Array, backend: str | None) -> Any:
  return _product(GROUPED, x, w, _by_group(sizes, backend)), (x, w.residual(), sizes)


def _grouped_bwd(backend: str | None, residuals: Any, dy: jax.Array) -> Any:
  x, w, sizes = residuals
  return *_gradients(GROUPED, x, w, dy, _by_group(sizes, backend)), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)


def _by_group(sizes: jax.Array, backend: str | None) -> quantise.Multiply:
  """The products of a grouped matmul and of its gradients, for row blocks of these sizes."""
  backend = backend or {"cpu": "blocks", "tpu": "tpu"}.get(sharding.platform(), "xla")

  def multiply(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    dtype, precision = jnp.dtype(dtype), _precision(a)
    if spec == "md,mf->edf":
      if backend == "blocks":
        return _blocks_outer(a, b, sizes, dtype)
      if backend == "xla":
        dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(a, b, sizes, dims, precision, dtype)
      if a.dtype.itemsize == 1:  # exact; kernels of fp8 only compile for some chips
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
      return grouped.outer(a, b, sizes, precision, backend).astype(dtype)
    if backend in ("tpu", "interpret"):
      return grouped.product(a, b, sizes, dtype, precision, spec != GROUPED, backend)
    b = b if spec == GROUPED else b.swapaxes(1, 2)
    if backend == "blocks":
      return _blocks_forward(a, b, sizes, dtype)
    return jax.lax.ragged_dot(a, b, sizes, precision, dtype)

  return multiply


BLOCK_ROWS = 256  # of the CPU's blocks; the last of a group is partly wasted


def _blocks(m: int) -> int:
  return min(BLOCK_ROWS, max(8, m // 8))


def _blocks_forward(x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
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
      y = jnp.matmul(jax.lax.dynamic_slice_in_dim(x, at, rows), w_e, preferred_element_type=dtype)
      return jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)

    return jax.lax.fori_loop(0, (size + rows - 1) // rows, block, out), None

  out, _ = jax.lax.scan(expert, jnp.zeros((m + rows, w.shape[2]), dtype), (w, ends, sizes))
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
