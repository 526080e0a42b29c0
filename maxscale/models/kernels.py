"""The operations on parameters: products and lookups whose gradients are made, and cross devices, in their own dtype."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxscale.models import quantise
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


def product(spec: str, x: jax.Array, w: Weight, multiply: quantise.Multiply) -> jax.Array:
  """einsum(spec, x, w) in the dtype of x; of grouped ones `multiply` knows the groups."""
  if w.quantize:
    return quantise.product(w.quantize, spec, x, w.used, multiply).astype(x.dtype)
  return multiply(spec, x, w.used, x.dtype)


def input_gradient(spec: str, dy: jax.Array, w: Weight, multiply: quantise.Multiply) -> jax.Array:
  """dx of `product`, in the dtype of dy."""
  a, b, y = quantise.letters(spec)
  if w.quantize:
    return quantise.input_gradient(w.quantize, spec, dy, w.used, multiply).astype(dy.dtype)
  return multiply(f"{y},{b}->{a}", dy, w.used, dy.dtype)


def weight_gradient(spec: str, x: jax.Array, w: Weight, dy: jax.Array, multiply: quantise.Multiply) -> jax.Array:
  """dw of `product`, of this device's x and dy, in `grad_dtype`."""
  a, b, y = quantise.letters(spec)
  if w.quantize and quantise.KINDS[w.quantize].dw:
    return quantise.weight_gradient(w.quantize, spec, x, dy, multiply).astype(w.grad_dtype)
  return multiply(f"{a},{y}->{b}", x, dy, w.grad_dtype)


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.dtype(dtype), precision=precision(a))


def precision(x: jax.Array) -> jax.lax.Precision | None:
  """Of products with parameters: float32 means float32. A TPU would otherwise multiply in one pass of bfloat16."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def matmul(spec: str, x: jax.Array, w: Weight) -> jax.Array:
  """einsum(spec, x, w) in the dtype of x."""
  return product(spec, x, w, _einsum)


def _matmul_bwd(spec: str, residuals: Any, dy: jax.Array) -> Any:
  x, w = residuals
  return input_gradient(spec, dy, w, _einsum), w.cotangent(weight_gradient(spec, x, w, dy, _einsum))


matmul.defvjp(lambda spec, x, w: (matmul(spec, x, w), (x, w.residual())), _matmul_bwd)

# Of the last dimension of a weight: columns, and how many of zeros come behind them.
Parts = tuple[tuple[int, int], ...]


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def matmul_parts(spec: str, parts: Parts, x: jax.Array, w: Weight) -> tuple[jax.Array, ...]:
  """einsum(spec, x, part of w) for each part, in the dtype of x.

  On a TPU a slice of some lanes of activations, or one that makes room beside them, is a pass through HBM; of a weight
  it is a small one.
  """
  ys = (product(spec, x, part, _einsum) for part in _parts(parts, w))
  return tuple(_widened(y, sum(part)) for y, part in zip(ys, parts))


def _parts(parts: Parts, w: Weight) -> list[Weight]:
  used = jnp.split(w.used, np.cumsum([n for n, _ in parts])[:-1], axis=-1)
  # quantised, columns of zeros would have a scale, which those of dy would be measured by
  return [dataclasses.replace(w, used=u if w.quantize else _widened(u, sum(part))) for u, part in zip(used, parts)]


def _widened(x: jax.Array, columns: int) -> jax.Array:
  return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, columns - x.shape[-1]),))


def _matmul_parts_bwd(spec: str, parts: Parts, residuals: Any, dys: tuple[jax.Array, ...]) -> Any:
  x, w = residuals
  dx, dw = jnp.zeros((), jnp.float32), []
  for (n, _), part, dy in zip(parts, _parts(parts, w), dys):
    dy = dy[..., : part.used.shape[-1]]
    dx += input_gradient(spec, dy, part, _einsum).astype(jnp.float32)
    dw.append(weight_gradient(spec, x, part, dy, _einsum)[..., :n])
  return dx.astype(x.dtype), w.cotangent(jnp.concatenate(dw, axis=-1))


matmul_parts.defvjp(lambda spec, parts, x, w: (matmul_parts(spec, parts, x, w), (x, w.residual())), _matmul_parts_bwd)


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
