"""The pipeline: microbatches through stages of layers and back, as loops inside the one compiled program.

A stage holds `repeats` (v) chunks of layers; chunk c of stage s is the (c P + s)-th of the v P chunks of the model, and
a unit is one microbatch in one chunk. Units enter in groups of P microbatches, which pass all v chunks before the next
group enters (Narayanan et al., arXiv 2104.04473: v = 1 is 1F1B, more are the interleaved schedule). With P stages, M
microbatches and ticks t = 0, 1, ...:

  forward   stage s computes forward unit t - s at tick t
  backward  stage s computes backward unit t - (v P - 1) - (P - 1 - s); backward units pass the chunks in reverse

so that the last stage begins the backward of a microbatch in the tick of its last forward, and what a unit leaves for
its backward lives at most 2 v P - 2 ticks: a ring of 2 v P - 1 slots holds it, whatever M is. Three loops (v P - 1
ticks only forward, v (M - P) + P both, v P - 1 only backward) execute no work for a phase that is not there: the time
lost to filling and draining is (P - 1) / (v M + P - 1). Without a pipeline (P = v = 1) this is accumulation over
microbatches: one loop, and no ring.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.sharding import context as sharding

Tree = Any


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Stages P, chunks of a stage v, microbatches M; M is a multiple of P where v > 1."""

  stages: int
  repeats: int
  microbatches: int

  @property
  def units(self) -> int:
    """Units of a stage, in each direction."""
    return self.repeats * self.microbatches

  @property
  def fill(self) -> int:
    """Ticks before the first backward."""
    return self.repeats * self.stages - 1

  @property
  def slots(self) -> int:
    return 2 * self.repeats * self.stages - 1

  @property
  def ticks(self) -> int:
    """Ticks of each direction; `units` of them are work."""
    return self.units + self.stages - 1

  @property
  def bubble(self) -> float:
    """Fraction of the time that a stage waits: (P - 1) / (v M + P - 1)."""
    return (self.stages - 1) / self.ticks

  def forward(self, unit: Any) -> tuple[Any, Any]:
    """(chunk, microbatch) of a forward unit."""
    group, in_group = unit // (self.repeats * self.stages), unit % (self.repeats * self.stages)
    return in_group // self.stages, group * self.stages + in_group % self.stages

  def backward(self, unit: Any) -> tuple[Any, Any, Any]:
    """(chunk, microbatch, the forward unit of the same) of a backward unit."""
    chunk, microbatch = self.forward(unit)
    back = self.repeats - 1 - chunk
    return back, microbatch, unit + (back - chunk) * self.stages

  def rows(self, layers: int) -> tuple[int, ...]:
    """The layer in each row of a stack that is split evenly over the stages."""
    size = layers // (self.stages * self.repeats)
    return tuple(
      (chunk * self.stages + stage) * size + i
      for stage in range(self.stages) for chunk in range(self.repeats) for i in range(size)
    )  # fmt: skip


def picture(s: Schedule, ticks: int = 24) -> str:
  """The schedule as text: a line a stage, a column a tick; 3 is the forward of microbatch 3, 3' its backward.

  Chunks after the first are marked with letters: 3b is microbatch 3 in the second chunk of the stage.
  """
  letters = ["", *"bcdefghijklmnopqrstuvwxyz"]

  def cell(stage: int, t: int) -> str:
    out = []
    for unit, chunk_of, mark in ((t - stage, s.forward, ""), (t - s.fill - (s.stages - 1 - stage), s.backward, "'")):
      if 0 <= unit < s.units:
        chunk, microbatch, *_ = chunk_of(unit)
        out.append(f"{microbatch}{letters[chunk % len(letters)]}{mark}")
    return " ".join(out) or "."

  shown = range(min(ticks, s.ticks + s.fill))
  rows = [[f"stage {stage}", *(cell(stage, t) for t in shown)] for stage in range(s.stages)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  more = " ..." if len(shown) < s.ticks + s.fill else ""
  lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() + more for row in rows]
  return "\n".join([*lines, f"a stage waits for {s.bubble:.1%} of the time: (P - 1) / (v M + P - 1)"])


@dataclasses.dataclass(frozen=True)
class Pieces:
  """What a model does with a microbatch (a tree of arrays) between tokens and loss; all of it on this device's shards.

  Attributes:
    embed: (outer parameters, microbatch) -> x.
    stage: (parameters of a chunk's layers, x, microbatch, numbers of the layers) -> (x, loss, sums): what the layers
      add to the loss, and sums for the metrics, each with a leading dimension of layers.
    head: (outer parameters, x, microbatch) -> (loss, sums).
  """

  embed: Callable[[Tree, Tree], jax.Array]
  stage: Callable[[Tree, jax.Array, Tree, jax.Array], tuple[jax.Array, jax.Array, Tree]]
  head: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]


def run(schedule: Schedule, pieces: Pieces, outer: Tree, stack: Tree, parts: Tree,
        gradients: Callable[[str], bool] | None) -> tuple[Tree, ...]:  # fmt: skip
  """All microbatches, forward and (with `gradients`) backward.

  Args:
    outer: parameters outside the layers by path. stack: the layers of this stage by path, each [rows, ...], chunk after
      chunk.
    parts: microbatches, each leaf [M, ...].
    gradients: of a path, whether the parameter has a gradient; None: there is no backward.

  Returns:
    (loss of the head, loss of this stage's layers, sums of the head, sums of the layers [rows, ...], gradients of
    outer, gradients of stack), added up over the microbatches but over no devices; there are no gradients without
    `gradients`. `outer` has the gradient of all stages, complete as far as stages go. Sums whose name begins with max_
    are maxima.
  """
  return _Run(schedule, pieces, outer, stack, parts, gradients).all()


class _Run:
  """One trace of the schedule. `carry` holds what passes from tick to tick."""

  def __init__(self, schedule: Schedule, pieces: Pieces, outer: Tree, stack: Tree, parts: Tree,
               gradients: Callable[[str], bool] | None):  # fmt: skip
    self.schedule, self.pieces, self.outer, self.stack, self.parts = schedule, pieces, outer, stack, parts
    self.gradients = gradients
    self.rows = len(jax.tree.leaves(stack)[0])
    self.alone = schedule.stages * schedule.repeats == 1

  def all(self) -> tuple[Tree, ...]:
    s = self.schedule
    part = self._part(0)
    x = jax.eval_shape(self.pieces.embed, self.outer, part)
    (_, stage_loss, stage_sums), saved = jax.eval_shape(self._forward, self._chunk(0), x, part, self._layers(0))
    head_loss, head_sums = jax.eval_shape(self.pieces.head, self.outer, x, part)
    carry: dict[str, Any] = {
      "head_loss": head_loss, "stage_loss": stage_loss, "head_sums": head_sums,
      "stage_sums": jax.tree.map(lambda a: jax.ShapeDtypeStruct((self.rows, *a.shape[1:]), a.dtype), stage_sums),
    }  # fmt: skip
    if not self.alone:
      carry |= {"x": x, "dx": x}  # what has come from the stage before, and from the one after
    if self.gradients:
      carry |= {"outer": self._trained(self.outer), "stack": self._trained(self.stack)}
      if not self.alone:
        carry["ring"] = [jax.ShapeDtypeStruct((s.slots, *a.shape), a.dtype) for a in saved.leaves]
        self.saved = saved  # how a unit's backward is put together again from the ring
    carry = {key: _empty(value) for key, value in carry.items()}
    if not self.gradients:
      phases = [(0, s.ticks, True, False)]
    else:
      phases = [(0, s.fill, True, False), (s.fill, s.ticks, True, True), (s.ticks, s.ticks + s.fill, False, True)]
    for start, stop, forward, backward in phases:
      tick = functools.partial(self._tick, forward, backward)
      if stop - start == 1 and self.alone:
        carry = tick(carry, 0)
      elif stop > start:
        carry = jax.lax.scan(lambda c, t: (tick(c, t), None), carry, jnp.arange(start, stop))[0]  # noqa: B023
    return tuple(carry.get(k) for k in ("head_loss", "stage_loss", "head_sums", "stage_sums", "outer", "stack"))

  # ---- a tick

  def _tick(self, forward: bool, backward: bool, carry: dict[str, Any], t: Any) -> dict[str, Any]:
    """Order matters: a unit's forward must come before the backward that starts in the same tick."""
    carry, dlast, saved = dict(carry), None, None
    if forward:
      saved, out = self._forward_unit(carry, t)
      if backward or not self.gradients:
        dlast = self._head(carry, t, out)
    if backward:
      self._backward_unit(carry, t, dlast, saved)
    return carry

  def _forward_unit(self, carry: dict[str, Any], t: Any) -> tuple[_Saved, jax.Array]:
    s, unit = self.schedule, t - sharding.stage()
    chunk, microbatch = s.forward(unit)
    valid = self._valid(unit)
    entering, first = s.forward(t)
    came = carry.get("x")
    x = self._when(entering == 0, lambda: self.pieces.embed(self.outer, self._part(first)), came)
    x = self._select((sharding.stage() == 0) & (chunk == 0), x, came)
    (out, loss, sums), saved = self._forward(self._chunk(chunk), x, self._part(microbatch), self._layers(chunk))
    if "ring" in carry:
      slot = unit % s.slots  # a unit that is not there writes where no unit is waiting
      put = jax.lax.dynamic_update_index_in_dim
      carry["ring"] = [put(ring, leaf, slot, 0) for ring, leaf in zip(carry["ring"], saved.leaves, strict=True)]
    carry["stage_loss"] += self._select(valid, loss, 0)
    carry["stage_sums"] = self._add_chunk(carry["stage_sums"], sums, chunk, valid)
    if not self.alone:
      carry["x"] = sharding.to_next_stage(out, 1)
    return saved, out

  def _head(self, carry: dict[str, Any], t: Any, out: jax.Array) -> jax.Array:
    """The unit that leaves the last stage: its loss on all stages, each with its part of the vocabulary."""
    s, unit = self.schedule, t - (self.schedule.stages - 1)
    chunk, microbatch = s.forward(unit)
    valid = self._valid(unit) & (chunk == s.repeats - 1) if not self.alone else True

    def run() -> Any:
      x, part = sharding.from_stage(out, s.stages - 1), self._part(microbatch)
      if not self.gradients:
        return self.pieces.head(self.outer, x, part), None, None
      head = lambda o, x: self.pieces.head({**self.outer, **o}, x, part)  # noqa: E731
      loss, pull, sums = jax.vjp(head, self._trained(self.outer), x, has_aux=True)
      douter, dx = pull(jnp.ones_like(loss))
      return (loss, sums), self._as_it_is(douter), dx

    nothing = lambda: tuple(map(_empty, jax.eval_shape(run)))  # noqa: E731
    # where v is 1 a microbatch leaves the last stage at every tick that also runs backward: no condition is needed
    always = self.gradients and s.repeats == 1
    (loss, sums), douter, dx = run() if always or self.alone else jax.lax.cond(valid, run, nothing)
    carry["head_loss"] += loss
    carry["head_sums"] = jax.tree.map_with_path(_added, carry["head_sums"], sums)
    if self.gradients:
      carry["outer"] = jax.tree.map(jnp.add, carry["outer"], douter)
    return dx

  def _backward_unit(self, carry: dict[str, Any], t: Any, dlast: Any, saved: Any) -> None:
    s = self.schedule
    unit = t - s.fill - (s.stages - 1 - sharding.stage())
    chunk, microbatch, forward = s.backward(unit)
    valid = self._valid(unit)
    dx = carry.get("dx")
    if dlast is not None:
      dx = self._select((sharding.stage() == s.stages - 1) & (chunk == s.repeats - 1), dlast, dx)
    if not self.alone:
      take = lambda ring: jax.lax.dynamic_index_in_dim(ring, forward % s.slots, 0, keepdims=False)  # noqa: E731
      saved = dataclasses.replace(self.saved, leaves=[take(ring) for ring in carry["ring"]])
    dw, dx = saved.pull(self._chunk(chunk), self._part(microbatch), dx)
    dx = self._select(valid, dx, 0)  # a slot that no unit has filled gives anything, not a number included
    carry["stack"] = self._add_chunk(carry["stack"], dw, chunk, valid)
    if not self.alone:
      carry["dx"] = sharding.to_next_stage(dx, -1)
    leaving, last, _ = s.backward(t - s.fill - (s.stages - 1))
    there = self._valid(t - s.fill - (s.stages - 1)) & (leaving == 0) if not self.alone else True

    def embedding() -> Tree:
      embed = lambda o: self.pieces.embed({**self.outer, **o}, self._part(last))  # noqa: E731
      pull = jax.vjp(embed, self._trained(self.outer))[1]
      return jax.tree.map(jnp.add, carry["outer"], self._as_it_is(pull(sharding.from_stage(dx, 0))[0]))

    carry["outer"] = self._when(there, embedding, carry["outer"], always=False)

  # ---- pieces of a tick

  def _forward(self, params: Tree, x: jax.Array, part: Tree, layers: jax.Array) -> Any:
    """((x, loss, sums), what its backward needs)."""
    if not self.gradients:
      return self.pieces.stage(params, x, part, layers), None

    def f(trained: Tree, x: jax.Array) -> Any:
      x, loss, sums = self.pieces.stage({**params, **trained}, x, part, layers)
      return (x, loss), sums

    (x, loss), pull, sums = jax.vjp(f, self._trained(params), x, has_aux=True)
    return (x, loss, sums), _Saved.of(pull, params, part)

  def _trained(self, params: Tree) -> Tree:
    """Those that have a gradient; the others are constants, for which no buffer is made."""
    assert self.gradients
    return {path: x for path, x in params.items() if self.gradients(path)}

  def _part(self, microbatch: Any) -> Tree:
    """A microbatch; the nearest one where there is none of that number."""
    if self.schedule.microbatches == 1:
      return jax.tree.map(lambda a: a[0], self.parts)
    at = jnp.clip(microbatch, 0, self.schedule.microbatches - 1)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, 0, keepdims=False), self.parts)

  def _chunk(self, chunk: Any) -> Tree:
    """The parameters of a chunk's layers."""
    if self.schedule.repeats == 1:
      return self.stack
    size = self.rows // self.schedule.repeats
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, chunk * size, size, 0), self.stack)

  def _layers(self, chunk: Any) -> jax.Array:
    """Numbers of a chunk's layers."""
    size = self.rows // self.schedule.repeats
    return (chunk * self.schedule.stages + sharding.stage()) * size + jnp.arange(size)

  def _add_chunk(self, sums: Tree, more: Tree, chunk: Any, valid: Any) -> Tree:
    """`more`, the sums of a chunk's layers, added to those of the stage."""
    at = chunk * (self.rows // self.schedule.repeats)

    def add(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
      b = self._select(valid, b, jnp.asarray(_neutral(path), b.dtype))
      if self.schedule.repeats == 1:
        return _added(path, a, b)
      old = jax.lax.dynamic_slice_in_dim(a, at, len(b), 0)
      return jax.lax.dynamic_update_slice_in_dim(a, _added(path, old, b), at, 0)

    return jax.tree.map_with_path(add, sums, more)

  def _as_it_is(self, gradients: Tree) -> Tree:
    """Gradients that a loop is to add up in their scattered form: XLA would move the reduction behind the loop, whose
    sums would then be whole float32 tables."""
    return gradients if self.schedule.ticks == 1 else jax.lax.optimization_barrier(gradients)

  def _valid(self, unit: Any) -> Any:
    return (unit >= 0) & (unit < self.schedule.units)

  def _select(self, condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds on this stage, else b; a alone where there is only one stage."""
    return a if self.alone else jnp.where(condition, a, b)

  def _when(self, condition: Any, f: Callable[[], Tree], otherwise: Tree, always: bool = True) -> Tree:
    """f() at the ticks at which the condition holds, which are the same on every device: f may communicate.

    `always`: where v is 1 it holds at every tick that matters, and f() is called without asking.
    """
    if self.alone or (always and self.schedule.repeats == 1):
      return f()
    return jax.lax.cond(condition, f, lambda: otherwise)


def _neutral(path: Any) -> float:
  """What changes nothing when it is added to a sum, or is compared with a maximum, at a path of a tree."""
  return -jnp.inf if path and str(getattr(path[-1], "key", "")).startswith("max_") else 0.0


def _added(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
  return a + b if _neutral(path) == 0 else jnp.maximum(a, b)


def _empty(tree: Tree) -> Tree:
  return jax.tree.map_with_path(lambda path, a: jnp.full(a.shape, _neutral(path), a.dtype), tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
  """What a unit's backward needs, as arrays that a ring can hold, and the recipe that makes its backward of them.

  Parameters and microbatch are not among the arrays: they are there at the time of the backward, too.
  """

  leaves: list[Any]
  treedef: Any = dataclasses.field(metadata={"static": True})
  places: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each leaf: in known inputs, or -1

  @classmethod
  def of(cls, pull: Any, params: Tree, part: Tree) -> _Saved:
    known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((params, part)))}
    leaves, treedef = jax.tree.flatten(pull)
    places = tuple(known.get(id(leaf), -1) for leaf in leaves)
    return cls([leaf for leaf, place in zip(leaves, places) if place < 0], treedef, places)

  def pull(self, params: Tree, part: Tree, dx: jax.Array) -> tuple[Tree, jax.Array]:
    """Gradients of the parameters and of x, for the gradient of the stage's result; that of its loss is 1."""
    known, saved = jax.tree.leaves((params, part)), iter(self.leaves)
    pull = jax.tree.unflatten(self.treedef, [next(saved) if p < 0 else known[p] for p in self.places])
    return pull((dx, jnp.ones((), jnp.float32)))
