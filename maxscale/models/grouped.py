"""Grouped products by Pallas kernels for TPU: rows sorted by group, each group with a matrix of its own.

XLA's `ragged_dot` has no kernel for the gradient of the matrices: it multiplies all rows for every group. JAX's
megablox has, but with the default 16 MiB of VMEM only, a search for its tiles that takes 105 to 155 thousand cycles
where the one here takes 9 thousand, and a mask on every tile.

A visit is a tile of rows and a group that has rows in it. A kernel's grid is (tiles of the result's columns, visits),
so that the matrix of a group stays in VMEM while its rows pass. Chips whose device has two cores (v4, v5p) give each of
them half of the column tiles; with a single tile one would be idle.

What a visit takes at D 4096, F 2048, in bundles of instructions (libtpu 0.0.42, bfloat16), where the matrix unit alone
needs at least the cycles behind the stroke:

                                                      v5p          v6e          tpu7x
  product, 128 rows (v5p) or 256                      7548/8192    9024/8192    3127/4096
  product transposed                                  7324/8192    4496/4096    3403/4096
  outer, 128 or 256 rows                              2127/2048    1558/1024    1622/1024
  outer, 256 or 512 rows                              4030/4096    2730/2048    2130/2048
  megablox's outer (tgmm), tile 512 x 1024 x 1024                  3988/2048    3300/2048
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Tiles = tuple[jax.Array, ...]
# (products in float32 [r, n], columns [r, n], rows [r, 1], groups [1, n]) -> (results [r, n], terms [r, n] of sums)
Then = Callable[[Tiles, Tiles, Tiles, Tiles], tuple[Tiles, Tiles]]


def products(
  x: jax.Array, ws: Sequence[jax.Array], sizes: jax.Array, precision: Any, transposed: bool, backend: str, then: Then,
  columns: Tiles = (), rows: Tiles = (), groups: Tiles = (),
) -> tuple[Tiles, Tiles] | None:  # fmt: skip
  """What `then` makes of the products of row block e of x [M, K] and w[e], each [M, N], and of what lies beside them.

  It is called for a tile of rows and columns while that is in VMEM: nothing between the products and its results is
  written to HBM, and its work is beside that of the matrix unit. Rows past the sum of sizes hold anything.

  Args:
    ws: each [E, K, N], or [E, N, K] if transposed.
    sizes: int32 [E].
    backend: "tpu", or "interpret" to simulate it.
    columns: each [M, N]. rows: each [M]. groups: each [E, N], of which `then` sees that of the rows' group.

  Returns:
    Results, each [M, N]; and sums over the columns of the terms, each float32 [M]. None where no tile fits in VMEM.
  """
  (m, k), n, chip = x.shape, ws[0].shape[1 if transposed else 2], _chip(backend)
  # The next group's matrix is read during the last visit of a group, in the time that the products of 190 (v5p) to 560
  # rows (v6e) take: lower tiles would only wait for it. Higher ones waste more rows where a group ends.
  height = min(m, chip.mxu_column_size)

  def shapes(r: int, n: int) -> tuple[Tiles, Tiles]:
    like = lambda arrays, *shape: tuple(jax.ShapeDtypeStruct(shape, a.dtype) for a in arrays)  # noqa: E731
    products = (jax.ShapeDtypeStruct((r, n), jnp.float32),) * len(ws)
    return jax.eval_shape(then, products, like(columns, r, n), like(rows, r, 1), like(groups, 1, n))

  results, terms = shapes(m, n)
  column_bytes = sum(a.dtype.itemsize for a in (*columns, *results))
  wide = len(columns) + len(results) + len(terms) - 1  # float32 tiles beside that of a product alone
  # Of x a whole row is in VMEM, of w a whole column, or w would be read again at every visit.
  vmem = lambda width: (  # noqa: E731
    _element(x) * k * (height + len(ws) * width) + (2 * column_bytes + 4 * wide) * height * width
  )
  widths = _widths(chip, (n,), 2048, vmem, len(ws))
  if widths is None:
    return None
  visits, count = Visits.of(sizes, m, height)
  (width,) = widths
  tiles = pl.cdiv(n, width)

  def grouped_product(visits: Visits, x: Any, *refs: Any) -> None:
    each = iter(refs)
    w, column, row, group, result, total = (
      tuple(next(each) for _ in many) for many in (ws, columns, rows, groups, results, terms)
    )
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    ys = tuple(jax.lax.dot_general(x[...], a[...], dims, precision, jnp.float32) for a in w)
    made, terms_ = then(ys, *(tuple(a[...] for a in many) for many in (column, row, group)))
    mine = visits.mine(pl.program_id(1), height, (height, width))  # the others are of another visit of this tile
    for out, y in zip(result, made):
      kept = jnp.where(mine, y.astype(jnp.float32), out[...].astype(jnp.float32))
      out[...] = kept.astype(out.dtype)
    for out, term in zip(total, terms_):
      if n % width:  # the last tile reaches past the columns that there are
        inside = pl.program_id(0) * width + jax.lax.broadcasted_iota(jnp.int32, (height, width), 1) < n
        term = jnp.where(inside, term, 0)
      out[...] = jnp.where(mine[:, :1], jnp.sum(term, 1, keepdims=True), out[...])

  x_spec = pl.BlockSpec((height, k), lambda j, v, visits: (visits.tile(v), 0))
  if transposed:
    w_spec = pl.BlockSpec((None, width, k), lambda j, v, visits: (visits.group[v], j, 0))
  else:
    w_spec = pl.BlockSpec((None, k, width), lambda j, v, visits: (visits.group[v], 0, j))
  column_spec = pl.BlockSpec((height, width), lambda j, v, visits: (visits.tile(v), j))
  row_spec = pl.BlockSpec((height, 1), lambda j, v, visits: (visits.tile(v), 0))
  group_spec = pl.BlockSpec((None, 1, width), lambda j, v, visits: (visits.group[v], 0, j))
  total_spec = pl.BlockSpec((None, height, 1), lambda j, v, visits: (j, visits.tile(v), 0))
  operands = x, *ws, *columns, *(a[:, None] for a in rows), *(a[:, None] for a in groups)
  in_specs = [x_spec] + [w_spec] * len(ws) + [column_spec] * len(columns) + [row_spec] * len(rows)
  in_specs += [group_spec] * len(groups)
  out_specs = [column_spec] * len(results) + [total_spec] * len(terms)
  out = [*results, *(jax.ShapeDtypeStruct((tiles, m, 1), jnp.float32) for _ in terms)]
  moved = tiles * x.nbytes + sum(w.nbytes for w in ws) + m * n * column_bytes
  done = _call(grouped_product, backend, (tiles, count), in_specs, out_specs, out, vmem(width),
               2 * len(ws) * m * k * n, moved, visits, *operands)  # fmt: skip
  return tuple(done[: len(results)]), tuple(a.sum((0, 2)) for a in done[len(results) :])


def outer(
  x: jax.Array, dy: jax.Array, sizes: jax.Array, precision: Any, backend: str, dtype: Any = jnp.float32
) -> jax.Array:
  """For each group the product of its rows of x [M, K], transposed, and dy [M, N], summed in float32: [E, K, N].

  Args:
    sizes, backend: as for `product`. Rows past their sum may hold anything.
  """
  (m, k), n, chip = x.shape, dy.shape[1], _chip(backend)
  # The result is read and written at each visit, long beside the product of few rows; but the last rows of a tile
  # are wasted where its group ends.
  side = chip.mxu_column_size
  rows = min(m, 2 * side if m // sizes.size >= 4 * side else side)
  vmem = lambda a, b: _element(x) * rows * (a + b) + 2 * 4 * a * b  # noqa: E731
  widths = _widths(chip, (k, n), 1024, vmem)
  assert widths, "tiles of the least width fit in any VMEM"
  tiles = [pl.cdiv(size, width) for size, width in zip((k, n), widths)]
  visits, count = Visits.of(sizes, m, rows)

  narrow = jnp.dtype(dtype) != jnp.float32  # sums need a place of their own

  def grouped_outer(visits: Visits, x: Any, dy: Any, out: Any, *own_sums: Any) -> None:
    v = pl.program_id(1)
    first = (v == 0) | (visits.group[v] != visits.group[jnp.maximum(v - 1, 0)])
    whole = visits.whole(v, rows)

    def add(x: jax.Array, dy: jax.Array) -> None:
      dw = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision, jnp.float32)
      sums = own_sums[0] if narrow else out
      sums[...] = jnp.where(first, 0, sums[...]) + dw
      if narrow:
        out[...] = sums[...].astype(out.dtype)

    @pl.when(whole)
    def _() -> None:
      add(x[...], dy[...])

    @pl.when(~whole)
    def _() -> None:
      own = lambda a: jnp.where(visits.mine(v, rows, a.shape), a[...].astype(jnp.float32), 0).astype(a.dtype)  # noqa: E731
      add(own(x), own(dy))

  x_spec = pl.BlockSpec((rows, widths[0]), lambda t, v, visits: (visits.tile(v), t // tiles[1]))
  dy_spec = pl.BlockSpec((rows, widths[1]), lambda t, v, visits: (visits.tile(v), t % tiles[1]))
  out_spec = pl.BlockSpec((None, *widths), lambda t, v, visits: (visits.group[v], t // tiles[1], t % tiles[1]))
  out = jax.ShapeDtypeStruct((sizes.size, k, n), dtype)
  moved = tiles[1] * x.nbytes + tiles[0] * dy.nbytes + out.dtype.itemsize * out.size
  scratch = [pltpu.VMEM(widths, jnp.float32)] if narrow else []
  return _call(grouped_outer, backend, (math.prod(tiles), count), (x_spec, dy_spec), out_spec, out, vmem(*widths),
               2 * m * k * n, moved, visits, x, dy, scratch=scratch)  # fmt: skip


SCRATCH = 8 * 2**20  # bytes of VMEM that a kernel may take beside its windows; 0 to 4 MiB were seen in bfloat16


def _call(kernel: Callable, backend: str, grid: tuple, in_specs: Any, out_specs: Any, out: Any, vmem: int, flops: int,
          moved: int, *operands: Any, scratch: Sequence[Any] = ()) -> Any:  # fmt: skip
  """The kernel on `operands`, of which the first are the visits; `moved`: bytes between HBM and VMEM."""
  return pl.pallas_call(
    kernel,
    out,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem + SCRATCH
    ),
    cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
    interpret=backend == "interpret",
    name=kernel.__name__,
  )(*operands)


# ---- visits


class Visits(NamedTuple):
  """Where the visits are: visit v is of row tile v + shift[group[v]].

  Attributes:
    group: int32, ascending; as long as there can be visits.
    shift, start, end: int32 [E]; group e has the rows from start[e] to end[e].
  """

  group: Any
  shift: Any
  start: Any
  end: Any

  @classmethod
  def of(cls, sizes: jax.Array, m: int, rows: int) -> tuple[Visits, jax.Array]:
    """The visits of m rows in tiles of `rows`, and how many they are. A group without rows has one: its product is 0."""
    end = jnp.cumsum(sizes)
    start = end - sizes
    first = jnp.minimum(start, m - 1) // rows
    behind = jnp.cumsum(jnp.where(sizes > 0, (end - 1) // rows - first + 1, 1))
    before = jnp.concatenate([jnp.zeros_like(behind[:1]), behind[:-1]])
    v = jnp.arange(pl.cdiv(m, rows) + sizes.size - 1)
    group = jnp.searchsorted(behind, v, side="right", method="compare_all")
    return cls(group.astype(jnp.int32), first - before, start, end), behind[-1]

  def tile(self, v: Any) -> Any:
    """The row tile of visit v."""
    return v + self.shift[self.group[v]]

  def mine(self, v: Any, rows: int, shape: tuple[int, ...]) -> jax.Array:
    """Which rows of the tile of visit v, in an array of this shape, are those of its group."""
    row = self.tile(v) * rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (self.start[self.group[v]] <= row) & (row < self.end[self.group[v]])

  def whole(self, v: Any, rows: int) -> Any:
    """Whether all are."""
    row = self.tile(v) * rows
    return (self.start[self.group[v]] <= row) & (row + rows <= self.end[self.group[v]])


# ---- tiles


def _chip(backend: str) -> pltpu.TpuInfo:
  """The TPU that is compiled for, or one to simulate."""
  return pltpu.get_tpu_info() if backend == "tpu" else pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)


def _element(x: jax.Array) -> int:
  """Bytes of VMEM that an element of an operand takes: two buffers; in float32 also the parts that HIGHEST multiplies."""
  return 4 if x.dtype == jnp.bfloat16 else 16


def _widths(
  chip: pltpu.TpuInfo, sizes: tuple[int, ...], most: int, vmem: Callable[..., int], reuse: int = 1
) -> tuple[int, ...] | None:
  """Widths, up to `most`, of the tile of a result with columns of these sizes; None if not even the smallest fits.

  Its windows, of `vmem` bytes, take at most half of VMEM. Of those that fit, the one of least work: that of padding
  and of an idle core counts, and a tile so narrow that reading it takes longer than its product counts as much more.
  `reuse`: products of what is read.
  """
  side = chip.mxu_column_size
  ridge = chip.bf16_ops_per_second / chip.mem_bw_bytes_per_second / reuse

  def work(tile: tuple[int, ...]) -> tuple[float, int]:
    rounds = pl.cdiv(math.prod(pl.cdiv(n, width) for n, width in zip(sizes, tile)), chip.num_cores)
    return rounds * math.prod(tile) * max(1, ridge * sum(1 / width for width in tile)), -math.prod(tile)

  tiles = itertools.product(range(side, most + 1, side), repeat=len(sizes))
  tile = min((tile for tile in tiles if vmem(*tile) <= chip.vmem_capacity_bytes // 2), key=work, default=None)
  return tile and tuple(min(size, width) for size, width in zip(sizes, tile))
