"""The MLPs of experts: rows sorted by expert, each through the three matrices of its own, and the gradients of that.

Legend: R rows, E experts, D width, F width of an expert. Rows past those of experts are of no one: nobody reads their
results, which hold anything, and they touch no gradient of a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxscale.models import activations, grouped, kernels
from maxscale.models.kernels import Weight
from maxscale.sharding import context as sharding

PRODUCT = "md,edf->mf"  # x, w and result of a grouped product, where m is a row of one e


class Weights(NamedTuple):
  """The parameters of the experts of a device.

  Attributes:
    gate, up: [E, D, F], no gate where the activation has none. down: [E, F, D]. Used in the dtype of x. A quantised one
      has one scale for a channel of all its experts: a scale for each would be looked up for every row.
    gate_bias, up_bias: [E, F].
  """

  gate: Weight | None
  up: Weight
  down: Weight
  gate_bias: jax.Array | None = None
  up_bias: jax.Array | None = None

  @property
  def wide(self) -> tuple[Weight, ...]:
    """Those that the rows meet first, in the order of the arguments of an activation."""
    return tuple(w for w in (self.gate, self.up) if w is not None)

  @property
  def biases(self) -> tuple[jax.Array, ...]:
    return tuple(b for b in (self.gate_bias, self.up_bias) if b is not None)


@functools.partial(kernels.custom_vjp, nondiff_argnums=(4, 5))
def expert_mlp(
  x: jax.Array, gates: jax.Array, sizes: jax.Array, weights: Weights, activation: str, backend: str | None = None
) -> jax.Array:
  """gate * down(act(x gate, x up)) of each row, by its expert: no row is computed for an expert that it did not choose.

  The gate of a row multiplies its hidden row: its gradient then needs no result of the third product. Backward needs x
  and the results of the first two products, which are named "gate" and "up".

  Args:
    x: [R, D]; rows past the sum of sizes are finite. gates: [R], float32. sizes: int32 [E], rows of each expert.
    activation: `model.activation` (activations.hidden).
    backend: "tpu" for its kernels, "interpret" to simulate them, "blocks" for loops over blocks of rows (of which XLA
      makes a CPU's fastest), "xla" for its ragged products; None: as the platform has.

  Returns:
    [R, D] in the dtype of x.
  """
  return _forward(x, gates, sizes, weights, activation, backend)[0]


def _forward(
  x: jax.Array, gates: jax.Array, sizes: jax.Array, weights: Weights, activation: str, backend: str | None
) -> Any:
  product = Products(sizes, backend)

  def hidden(ys: grouped.Tiles, _: grouped.Tiles, rows: grouped.Tiles, biases: grouped.Tiles) -> Any:
    if biases:
      ys = tuple(y.astype(jnp.float32) + b for y, b in zip(ys, biases))
    ys = tuple(y.astype(x.dtype) for y in ys)  # what backward keeps: it sees the same numbers
    h = activations.wide(activation, *(y.astype(jnp.float32) for y in ys)) * rows[0]
    return (*ys, h.astype(x.dtype)), ()

  (*ys, h), _ = product.forward(x, weights.wide, hidden, rows=(gates,), groups=weights.biases)
  ys = tuple(checkpoint_name(y, name) for y, name in zip(ys, ("gate", "up")[-len(ys) :]))
  (y,), _ = product.forward(h, (weights.down,), lambda ys, *_: ((ys[0].astype(x.dtype),), ()))
  gate, up, down = (w and w.residual() for w in (weights.gate, weights.up, weights.down))
  kept = weights._replace(gate=gate, up=up, down=down)
  return y, (x, gates, sizes, kept, ys)


def _backward(activation: str, backend: str | None, residuals: Any, dy: jax.Array) -> Any:
  x, gates, sizes, weights, ys = residuals
  product = Products(sizes, backend)

  def hidden(dh: grouped.Tiles, ys: grouped.Tiles, rows: grouped.Tiles, _: grouped.Tiles) -> Any:
    dh_, wide = dh[0].astype(jnp.float32), (y.astype(jnp.float32) for y in ys)
    h, pull = jax.vjp(functools.partial(activations.wide, activation), *wide)
    back = (*pull(dh_ * rows[0]), h * rows[0])
    return tuple(v.astype(x.dtype) for v in back), (dh_ * h,)

  (*dys, h), (dgates,) = product.backward(dy, weights.down, hidden, columns=ys, rows=(gates,))
  dws = [product.weight(w, x, d) for w, d in zip(weights.wide, dys)]
  dbs = [of_rows_gradient(b, product.expert(len(x)), d) for b, d in zip(weights.biases, dys)]

  def add(ys: grouped.Tiles, before: grouped.Tiles, *_: grouped.Tiles) -> Any:
    return (functools.reduce(jnp.add, (v.astype(jnp.float32) for v in (*ys, *before))).astype(x.dtype),), ()

  dx: grouped.Tiles = ()
  for w, d in zip(weights.wide, dys):
    dx, _ = product.backward(d, w, add, columns=dx)
  dw = Weights(None, dws[-1], product.weight(weights.down, h, dy))
  if weights.gate is not None:
    dw = dw._replace(gate=dws[0])
  if dbs:
    dw = dw._replace(up_bias=dbs[-1], gate_bias=dbs[0] if weights.gate_bias is not None else None)
  return *dx, dgates.astype(gates.dtype), None, dw


expert_mlp.defvjp(_forward, _backward)


class Products:
  """The products of rows and experts, and what is made of them: by kernels that do both, or one after another."""

  def __init__(self, sizes: jax.Array, backend: str | None = None):
    self.sizes = sizes
    self.backend = backend or {"cpu": "blocks", "tpu": "tpu"}.get(sharding.platform(), "xla")

  def forward(self, x: jax.Array, ws: Sequence[Weight], then: grouped.Then, **beside: grouped.Tiles) -> Any:
    """`grouped.products` of x [R, D] and each w [E, D, F]."""
    return self._made(x, ws, False, then, **beside) or self._then(
      [kernels.product(PRODUCT, x, w, self.multiply) for w in ws], then, **beside
    )

  def backward(self, dy: jax.Array, w: Weight, then: grouped.Then, **beside: grouped.Tiles) -> Any:
    """The same of dy [R, F] and w transposed: of the gradient of x."""
    return self._made(dy, (w,), True, then, **beside) or self._then(
      [kernels.input_gradient(PRODUCT, dy, w, self.multiply)], then, **beside
    )

  def weight(self, w: Weight, x: jax.Array, dy: jax.Array) -> Weight:
    """The cotangent of w."""
    return w.cotangent(kernels.weight_gradient(PRODUCT, x, w, dy, self.multiply))

  def expert(self, rows: int) -> jax.Array:
    """The expert of each row, E past those of experts. To compare all is what a TPU does best."""
    return jnp.searchsorted(jnp.cumsum(self.sizes), jnp.arange(rows), side="right", method="compare_all")

  def _made(self, x: jax.Array, ws: Sequence[Weight], transposed: bool, then: grouped.Then,
            **beside: grouped.Tiles) -> Any:  # fmt: skip
    if self.backend not in ("tpu", "interpret") or any(w.quantize for w in ws):
      return None
    used, precision = [w.used for w in ws], kernels.precision(x)
    return grouped.products(x, used, self.sizes, precision, transposed, self.backend, then, **beside)

  def _then(self, ys: Sequence[jax.Array], then: grouped.Then, columns: grouped.Tiles = (), rows: grouped.Tiles = (),
            groups: grouped.Tiles = ()) -> Any:  # fmt: skip
    own = jnp.arange(len(ys[0])) < jnp.sum(self.sizes)
    groups = tuple(of_rows(b, self.expert(len(ys[0]))) for b in groups)
    results, terms = then(tuple(ys), columns, tuple(v[:, None] for v in rows), groups)
    # A ragged product of XLA may read rows of no expert, so they are cleared.
    return tuple(jnp.where(own[:, None], v, 0) for v in results), tuple(jnp.where(own, v.sum(1), 0) for v in terms)

  def multiply(self, spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """A product (`quantise.Multiply`) of rows and the matrices of their experts, or of rows and rows for each expert."""
    dtype, precision = jnp.dtype(dtype), kernels.precision(a)
    if spec == "md,mf->edf":
      if self.backend == "blocks":
        return _blocks_outer(a, b, self.sizes, dtype)
      if self.backend == "xla":
        dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(a, b, self.sizes, dims, precision, dtype)
      if a.dtype.itemsize == 1:  # exact; kernels of fp8 only compile for some chips
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
      return grouped.outer(a, b, self.sizes, precision, self.backend, dtype)
    b = b if spec == PRODUCT else b.swapaxes(1, 2)
    if self.backend == "blocks":
      return _blocks_forward(a, b, self.sizes, dtype)
    return jax.lax.ragged_dot(a, b, self.sizes, precision, dtype)


# ---- numbers of an expert, for each of its rows


def of_rows(bias: jax.Array, expert: jax.Array) -> jax.Array:
  """[R, F]: the bias [E, F] of each row's expert, 0 for a row of none (E)."""
  return bias.at[expert].get(mode="fill", fill_value=0)


def of_rows_gradient(bias: jax.Array, expert: jax.Array, dy: jax.Array) -> jax.Array:
  """The gradient of the bias: sums over the rows of each expert, in float32.

  A product with zeros and ones: a scatter is slow on a TPU. Rows of no expert may hold anything, zero times which is
  not zero.
  """
  rows = jax.nn.one_hot(expert, len(bias), dtype=dy.dtype)
  dy, precision = jnp.where(expert[:, None] < len(bias), dy, 0), jax.lax.Precision.HIGHEST
  return jnp.einsum("re,rf->ef", rows, dy, precision=precision, preferred_element_type=jnp.float32).astype(bias.dtype)


# ---- a CPU's products

BLOCK_ROWS = 256  # the last of a group is partly wasted


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
