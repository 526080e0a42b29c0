"""The experts of a mixture: tokens sorted by expert, sent to the devices that hold the experts, and put back.

Legend: M tokens of this device, A choices of a token, D width, F width of an expert on this device, P devices that the
experts are split over, E experts of all of them, E/P of one device, R rows that a device has room for.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxscale.config import ConfigError
from maxscale.models import activations, expert_mlp, kernels
from maxscale.sharding import context as sharding

Slices = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # the four numbers of each slice of `ragged_all_to_all`


class Weights(NamedTuple):
  """The parameters of this device's experts.

  Attributes:
    mlp: of E/P experts.
    down_bias: [E/P, D], the same on all devices along `mlp`, of which the first adds it: only there is its gradient not
      zero.
  """

  mlp: expert_mlp.Weights
  down_bias: jax.Array | None = None


def experts(
  x: jax.Array,
  gates: jax.Array,
  ids: jax.Array,
  weights: Weights,
  activation: str,
  factor: float,
  route: str,
  exchange: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The sum over a token's choices of gate * (down(hidden(x gate, x up)) + its bias), by the expert of each choice.

  Runs inside a shard_map over all mesh axes. Where the logical axis `experts` is split, each device computes the rows
  that chose its experts, of all devices along it, in room for R = min(ceil(factor * M * A), P * M * A) rows. What does
  not fit is dropped: it adds nothing to y, its gradient is zero, and it is counted. The rows that fit are the first by
  (device of the token, expert, token) with `exchange`, else by (expert, token). A factor of P drops nothing, whatever
  the router does.

  Args:
    x: [M, D], tokens of this device. gates: [M, A], float. ids: int32 [M, A], experts of each token, in [0, E); -1 is
      none: it adds nothing and takes no room.
    activation: `model.activation` (activations.hidden).
    factor: R over the rows of a device when all experts are chosen equally often, at least 1.
    route: `model.moe.route`; `dense` computes every expert for every token, and is the same.
    exchange: rows go to the devices of their experts, in A * (P - 1) / P copies of a token; or all tokens go to all P
      devices, and what each has added to them comes back as a sum.

  Returns:
    y [M, D] in the dtype of x, a partial sum over the devices along `mlp`; and
    dropped: int32 [], choices that did not fit; the sum over devices is that of all tokens.

  Raises:
    ConfigError: the route is dense and experts are split.
  """
  if weights.down_bias is not None:
    weights = weights._replace(down_bias=jnp.where(sharding.shard_index("mlp") == 0, weights.down_bias, 0))
  if route == "dense":
    return _dense(x, gates, ids, weights, activation), {"dropped": jnp.int32(0)}
  if sharding.parts("experts") > 1 and exchange:
    return _exchanged(x, gates, ids, weights, activation, factor)
  return _gathered(x, gates, ids, weights, activation, factor)


def _gathered(x: jax.Array, gates: jax.Array, ids: jax.Array, weights: Weights, activation: str, factor: float) -> Any:
  """`experts` of all tokens of the devices along `experts` (or of one device's), which are summed over these devices."""
  axes, own, copies = sharding.mesh_axes("experts"), weights.mlp.up.used.shape[0], ids.shape[-1]
  if axes:
    x, gates, ids = (jax.lax.all_gather(v, axes, tiled=True) for v in (x, gates, ids))
  ids = ids.reshape(-1) - sharding.shard_index("experts") * own
  choices = jnp.where((ids < 0) | (ids >= own), own, ids)  # those of no expert here are sorted behind all others
  room = min(math.ceil(factor * choices.size / sharding.parts("experts")), choices.size)
  order = jnp.argsort(choices, stable=True)
  inverse = jnp.argsort(order)
  counts = jnp.bincount(choices, length=own).astype(jnp.int32)
  sizes = jnp.clip(room - (jnp.cumsum(counts) - counts), 0, counts)
  # `_gather` reads zeros for a choice without a place.
  order, inverse = order[:room], jnp.where((choices < own) & (inverse < room), inverse, room)
  row_gates = _spread(gates.reshape(-1), order, inverse, 1)
  if not axes:
    y = _mlp(_spread(x, order, inverse, copies), row_gates, sizes, weights, activation)
    return _gather(y, order, inverse, copies), {"dropped": jnp.sum(counts - sizes)}
  rows = Rows.of(jnp.where(jnp.arange(room) < jnp.sum(sizes), order // copies, len(x)), len(x))
  y = _total(_mlp(_take(x, rows), row_gates, sizes, weights, activation), rows, len(x))
  y = jax.lax.psum_scatter(y, axes, tiled=True)
  return y, {"dropped": jnp.sum(counts - sizes)}


def _exchanged(x: jax.Array, gates: jax.Array, ids: jax.Array, weights: Weights, activation: str, factor: float) -> Any:
  """`experts` where the row of each choice goes to the device of its expert, and its result comes back."""
  copies, parts = ids.shape[-1], sharding.parts("experts")
  total = parts * weights.mlp.up.used.shape[0]
  choices = jnp.where(ids < 0, total, ids).reshape(-1)  # those of no expert are sorted behind all others
  order = jnp.argsort(choices, stable=True)
  inverse = jnp.argsort(order)
  counts = jnp.bincount(choices, length=total).astype(jnp.int32)
  room = min(math.ceil(factor * choices.size), parts * choices.size)
  there, back, sizes = _routes(jax.lax.all_gather(counts, sharding.mesh_axes("experts")), room)
  first, sent = there[:2]
  inverse = jnp.where((choices < total) & (inverse < (first + sent)[choices]), inverse, choices.size)
  rows, row_gates = _spread(x, order, inverse, copies), _spread(gates.reshape(-1), order, inverse, 1)
  rows, row_gates = (_to_experts(v, there, back, choices.size, room) for v in (rows, row_gates))
  y = _mlp(rows, row_gates, sizes, weights, activation)
  y = _from_experts(y, there, back, choices.size, room)
  return _gather(y, order, inverse, copies), {"dropped": jnp.sum(counts - sent)}


def _mlp(x: jax.Array, gates: jax.Array, sizes: jax.Array, weights: Weights, activation: str) -> jax.Array:
  """Rows sorted by expert [R, D] through their experts, times gates [R]; sizes: int32 [E/P], rows of each expert."""
  y = expert_mlp.expert_mlp(x, gates, sizes, weights.mlp, activation)
  if weights.down_bias is None:
    return y
  expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right", method="compare_all")
  return (y + _of_rows(weights.down_bias, expert) * gates[:, None]).astype(x.dtype)


def _dense(x: jax.Array, gates: jax.Array, ids: jax.Array, weights: Weights, activation: str) -> jax.Array:
  """Every expert for every token, weighted by 0 where it was not chosen: E / A times the work, for small sizes."""
  if sharding.parts("experts") > 1:
    raise ConfigError(
      "model.moe.route=dense needs all experts on each device; set mesh.expert=1, or model.moe.route=sparse"
    )
  mlp = weights.mlp
  share = jnp.sum(jnp.where(ids[..., None] == jnp.arange(mlp.up.used.shape[0]), gates[..., None], 0), 1)  # [M, E]

  def product(w: kernels.Weight, bias: jax.Array | None, name: str) -> jax.Array:
    y = kernels.matmul("md,edf->mef", x, w)
    return checkpoint_name(y if bias is None else y + bias.astype(x.dtype), name)

  gate = None if mlp.gate is None else product(mlp.gate, mlp.gate_bias, "gate")
  h = activations.hidden(activation, gate, product(mlp.up, mlp.up_bias, "up"))
  y = kernels.matmul("mef,efd->md", (h * share[..., None]).astype(x.dtype), mlp.down)
  if weights.down_bias is None:
    return y
  return (y + jnp.matmul(share, weights.down_bias, precision=jax.lax.Precision.HIGHEST)).astype(x.dtype)


@kernels.custom_vjp
def _of_rows(bias: jax.Array, expert: jax.Array) -> jax.Array:
  return expert_mlp.of_rows(bias, expert)


_of_rows.defvjp(
  lambda bias, expert: (_of_rows(bias, expert), (bias, expert)),
  lambda kept, dy: (expert_mlp.of_rows_gradient(kept[0], kept[1], dy), None),
)


@kernels.custom_vjp
def _first_rows(x: jax.Array, count: jax.Array) -> jax.Array:
  """x with zeros in the rows from `count` on, whatever they hold; so is its cotangent."""
  keep = jnp.arange(x.shape[0]) < count
  return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


_first_rows.defvjp(lambda x, count: (_first_rows(x, count), count), lambda count, dy: (_first_rows(dy, count), None))


# ---- to the device of the expert and back


def _routes(counts: jax.Array, room: int) -> tuple[Slices, Slices, jax.Array]:
  """Where the rows of each (device, expert) lie, the same numbers on all devices. counts: int32 [P, E], sorted rows.

  A slice is the rows of one device for one expert. It lands beside the slices of the other devices for that expert,
  so that the rows of a receiver are sorted by expert without a permutation of their own.

  Returns:
    The slices of this device on the way there and on the way back, and the rows of each of its experts, int32 [E/P].
  """
  parts, me = counts.shape[0], sharding.shard_index("experts")
  start = _before(counts).reshape(parts, parts, -1)  # [source, receiver, expert of it]: row on the source
  wanted = counts.reshape(start.shape).swapaxes(0, 1)  # [receiver, source, expert]
  kept = jnp.clip(room - _before(wanted.reshape(parts, -1)).reshape(wanted.shape), 0, wanted)
  by_expert = kept.swapaxes(1, 2)
  place = _before(by_expert.reshape(parts, -1)).reshape(by_expert.shape).swapaxes(1, 2)  # row on the receiver
  there = (start[me], kept[:, me], place[:, me], kept[me])
  back = (place[me], kept[me], start[:, me], kept[:, me])
  flat = lambda slices: tuple(v.reshape(-1) for v in slices)  # noqa: E731
  return flat(there), flat(back), kept[me].sum(0)


def _before(sizes: jax.Array) -> jax.Array:
  """Exclusive sums of the rows of a matrix: where each of consecutive slices starts."""
  return jnp.cumsum(sizes, 1) - sizes


@functools.partial(kernels.custom_vjp, nondiff_argnums=(3, 4))
def _to_experts(x: jax.Array, there: Slices, back: Slices, choices: int, room: int) -> jax.Array:
  """Sorted rows of this device's choices [choices, ...] -> of this device's experts [room, ...], the rest zeros."""
  return _first_rows(_into_empty(x, room, there), jnp.sum(there[3]))


@functools.partial(kernels.custom_vjp, nondiff_argnums=(3, 4))
def _from_experts(y: jax.Array, there: Slices, back: Slices, choices: int, room: int) -> jax.Array:
  """The transpose of `_to_experts`: [room, ...] -> [choices, ...], where rows that were dropped hold anything."""
  return _into_empty(y, choices, back)


def _into_empty(x: jax.Array, rows: int, slices: Slices) -> jax.Array:
  """Whoever reads the result masks what no slice wrote: to clear the buffer first costs a TPU several times as much."""
  return ragged_all_to_all(x, jax.lax.empty((rows, *x.shape[1:]), x.dtype), *slices, sharding.mesh_axes("experts"))


# Plain AD of the collective would be right too, but it exchanges the offsets once more and clears its buffer.
_to_experts.defvjp(
  lambda x, there, back, *sizes: (_to_experts(x, there, back, *sizes), (there, back)),
  lambda choices, room, slices, dy: (_from_experts(dy, *slices, choices, room), None, None),
)
_from_experts.defvjp(
  lambda y, there, back, *sizes: (_from_experts(y, there, back, *sizes), (there, back)),
  lambda choices, room, slices, dx: (_to_experts(dx, *slices, choices, room), None, None),
)


def ragged_all_to_all(
  operand: jax.Array,
  output: jax.Array,
  input_offsets: jax.Array,
  send_sizes: jax.Array,
  output_offsets: jax.Array,
  recv_sizes: jax.Array,
  axis: Any,
) -> jax.Array:
  """`jax.lax.ragged_all_to_all`, and the same from other collectives on CPU, where XLA has none.

  Args:
    operand: [N, ...]. output: [R, ...], what the result is where nothing arrives.
    input_offsets, send_sizes, output_offsets, recv_sizes: int32 [S], S a multiple of the devices along `axis` (a name
      or a tuple of names). Slice i of `operand` goes to device i // (S / devices), to row output_offsets[i] of its
      result; recv_sizes[i] rows arrive from that device. Slices that arrive do not overlap.
  """
  if sharding.platform() != "cpu":
    slices = (input_offsets, send_sizes, output_offsets, recv_sizes)
    return jax.lax.ragged_all_to_all(operand, output, *slices, axis_name=axis)
  mine = lambda v: jax.lax.all_to_all(v, axis, 0, 0, tiled=True)  # noqa: E731  of the slices that arrive
  source, place = mine(input_offsets), mine(output_offsets)
  row = jnp.arange(output.shape[0])
  inside = (place <= row[:, None]) & (row[:, None] < place + recv_sizes)  # [R, S]
  piece = jnp.argmax(inside, 1)
  operands = jax.lax.all_gather(operand, axis)  # [devices, N, ...]
  device = piece // (input_offsets.size // operands.shape[0])
  rows = operands[device, source[piece] + row - place[piece]]
  return jnp.where(inside.any(1).reshape(-1, *(1,) * (output.ndim - 1)), rows, output)


# ---- permutations without a scatter


@functools.partial(kernels.custom_vjp, nondiff_argnums=(3,))
def _spread(x: jax.Array, order: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
  """Row i of the result [M * copies, ...] is row order[i] // copies of x; its transpose is `_gather`."""
  return x[order // copies]


@functools.partial(kernels.custom_vjp, nondiff_argnums=(3,))
def _gather(y: jax.Array, order: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
  """Row t of the result is the sum of the `copies` rows of y that `_spread` made of row t.

  inverse: int32 [M * copies], place of each copy; one past the end for a copy that counts as zero.
  """
  places = inverse.reshape(-1, copies)
  rows = [y.at[places[:, j]].get(mode="fill", fill_value=0) for j in range(copies)]  # no [M, copies, D] array
  return functools.reduce(jnp.add, rows)


_spread.defvjp(
  lambda x, order, inverse, copies: (_spread(x, order, inverse, copies), (order, inverse)),
  lambda copies, index, dy: (_gather(dy, *index, copies), None, None),
)
_gather.defvjp(
  lambda y, order, inverse, copies: (_gather(y, order, inverse, copies), (order, inverse)),
  lambda copies, index, dx: (_spread(dx, *index, copies), None, None),
)


# ---- sums of the rows of a token, where most tokens have few


class Rows(NamedTuple):
  """Of which token each row is.

  Attributes:
    token: int32 [R], the number of tokens for a row of none. by_token: int32 [R], the rows in the order of their tokens.
    sizes: int32 [blocks], rows of each block of `BLOCK` tokens.
  """

  token: jax.Array
  by_token: jax.Array
  sizes: jax.Array

  @classmethod
  def of(cls, token: jax.Array, tokens: int) -> Rows:
    block = jnp.where(token < tokens, token // BLOCK, tokens)  # rows of no token are behind all blocks
    sizes = jnp.bincount(block, length=-(-tokens // BLOCK))
    return cls(token, jnp.argsort(token), sizes.astype(jnp.int32))


BLOCK = 512  # tokens whose rows are summed in one product


@kernels.custom_vjp
def _take(x: jax.Array, rows: Rows) -> jax.Array:
  """The token [N, D] of each row: [R, D]. Nobody reads rows of none: they have the last token."""
  return x[jnp.minimum(rows.token, len(x) - 1)]


@functools.partial(kernels.custom_vjp, nondiff_argnums=(2,))
def _total(y: jax.Array, rows: Rows, tokens: int) -> jax.Array:
  """The sum of the rows [R, D] of each token: [N, D]. The transpose of `_take`.

  A product of rows, in the order of their tokens, with ones where a row is of a token: a gather for each choice of a
  token reads most of all for nothing, and a scatter takes one row after another.
  """
  place = rows.token[rows.by_token]
  ones = (place[:, None] % BLOCK == jnp.arange(BLOCK)).astype(y.dtype)
  product = expert_mlp.Products(rows.sizes)
  sums = product.multiply("md,mf->edf", ones, y[rows.by_token], y.dtype)
  return sums.reshape(-1, y.shape[-1])[:tokens]


_take.defvjp(lambda x, rows: (_take(x, rows), (rows, x.shape[0])), lambda kept, dy: (_total(dy, *kept), None))
_total.defvjp(lambda y, rows, tokens: (_total(y, rows, tokens), rows), lambda tokens, rows, dy: (_take(dy, rows), None))
