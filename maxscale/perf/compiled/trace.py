"""What a scheduled program does in time, as data: work, transfers and loops in order, without its text.

`of_program` makes it once; `perf.compiled.simulate` gives it seconds. It is small (a few hundred events, a loop is in it
once) and holds no constant that is fitted, so that the calibration can keep the traces of programs and not the programs.

The order is that of the schedule. Work is done by the TensorCore, one after another. A transfer that is started apart
goes on beside it, from its Start to its Done.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from maxscale.perf.compiled import collectives
from maxscale.perf.compiled.program import Instruction, Program, Step
from maxscale.perf.hardware import chip_of
from maxscale.perf.network import Dims
from maxscale.sharding import topology

WORK = ("matmul", "attention", "grouped", "kernel", "vector", "copy")
PARTS = ("embed", "attention", "router", "experts", "shared", "mlp", "norm", "mtp", "head", "optimizer")
HOST = ("to-host", "from-host")


@dataclasses.dataclass(frozen=True)
class Work:
  """Work of the TensorCore.

  Attributes:
    kind: of `WORK`; `grouped` are products of experts, `kernel` another kernel.
    part: what of the model it belongs to, and whether it is its forward, recomputed or backward pass: "mlp backward".
    cycles: the compiler's estimate; kernels have none.
    flops, bytes: of a kernel: what it executes (blocks that are only half visible and tiles of rows of which a group of
      experts' rows has only some count whole), what it moves in HBM.
    useful: FLOPs of those that the mask leaves.
    count: instructions that it stands for.
    fill: of attention: what its heads fill of a matrix unit, over what heads of 128 fill.
  """

  kind: str
  part: str = ""
  cycles: int = 0
  flops: float = 0.0
  bytes: float = 0.0
  useful: float = 0.0
  count: int = 1
  fill: float = 1.0


@dataclasses.dataclass(frozen=True)
class Move:
  """A transfer.

  Attributes:
    kind: of `perf.compiled.collectives.KINDS`, or of `HOST`.
    bytes: as there; of a transfer to or from the host, those of this device.
    dims: chips along each dimension of the torus that a group spans, and whether it closes.
    share: of a chip's links that are its own.
    slices: of a group; more than 1 goes over DCN.
    axes: names of mesh axes, if they are known.
    part: as that of `Work`.
    lane: which links it has for itself: those of one direction of a permutation; "": it shares all of them.
    hops: of a permutation, the mean from source to target.
  """

  kind: str
  bytes: float
  dims: Dims = ()
  share: float = 1.0
  slices: int = 1
  axes: str = ""
  part: str = ""
  lane: str = ""
  hops: float = 1.0


@dataclasses.dataclass(frozen=True)
class Start:
  key: int
  move: Move


@dataclasses.dataclass(frozen=True)
class Done:
  key: int


@dataclasses.dataclass(frozen=True)
class Sync:
  """A transfer for which the TensorCore waits."""

  move: Move


@dataclasses.dataclass(frozen=True)
class Loop:
  times: int
  body: tuple[Any, ...]
  part: str = ""


Event = Work | Start | Done | Sync | Loop
Trace = tuple[Event, ...]


def of_program(
  program: Program, coordinates: Iterable[tuple[int, ...]], device_kind: str, mesh: Any = None, spare: float = 1.0
) -> Trace:
  """The trace of a program.

  Args:
    coordinates: (slice, x, y, z, core) of each device, in the program's order.
    device_kind: as JAX calls it.
    mesh: names the axes of collectives.
    spare: rows that experts have room for, over those that come when all are chosen equally often: kernels of experts
      are counted for the latter, and so are ragged exchanges.

  Raises:
    ValueError: the trips of a loop are unknown.
  """
  return _Reader(program, np.array(list(coordinates)), device_kind, mesh, spare).events(program.entry)


def coordinates(mesh: Any) -> list[tuple[int, ...]]:
  """(slice, x, y, z, core) of the devices of a mesh for TPUs, in the order in which a program numbers them."""
  return [(getattr(d, "slice_index", 0), *d.coords, d.core_on_chip) for d in mesh.devices.flat]


class _Reader:
  def __init__(self, program: Program, places: np.ndarray, device_kind: str, mesh: Any, spare: float):
    self.program, self.mesh, self.spare, self.keys = program, mesh, spare, 0
    # A program for several slices numbers the devices of one.
    self.places = places[places[:, 0] == places[0, 0]][:, 1:]
    extent = tuple(int(n) for n in np.ptp(self.places[:, :3], axis=0) + 1)
    self.extent, self.closed = extent, topology.wraps(device_kind, extent[: 2 if extent[2] == 1 else 3])
    self.cores = int(self.places[:, 3].max()) + 1
    self.tile = chip.tile if (chip := chip_of(device_kind)) else 1

  def events(self, computation: str) -> Trace:
    body = self.program.computations[computation]
    ends = {i.operands[0]: i.name for i in body if i.opcode.endswith("-done") and i.operands}
    chains = {chain: i.name for i in body for chain in self._chains(i)}  # the last fusion of each wins
    keys: dict[str, list[int]] = {}
    out: list[Event] = []

    def start(move: Move, end: str | None) -> None:
      if end is None:
        out.append(Sync(move))
      else:
        self.keys += 1
        keys.setdefault(end, []).append(self.keys)
        out.append(Start(self.keys, move))

    receives = {m.group(1): ends.get(i.name) for i in body if i.opcode == "recv" and (m := _PARTNER.search(i.text))}
    for i in body:
      if i.name in chains.values() and i.opcode == "fusion":
        out += [w for w in [self._work(i)] if w]  # it computes while the last of the transfer goes on
      moves = list(self._moves(i, computation))
      for c, move in moves:
        end = ends.get(i.name)
        if i.opcode == "send" and (partner := _PARTNER.search(i.text)):
          end = receives.get(partner.group(1)) or end
        elif i.opcode == "fusion":
          end = next((chains[chain] for chain in self._chains(i)), None) if c is None or c.asynchronous else None
        start(move, end)
      out += [Done(key) for key in keys.pop(i.name, ())]
      if i.opcode == "while":
        inner = self.events(i.called["body"][0])
        times = self.program.trips(i, computation)
        if inner and times:
          out.append(Loop(times, inner, part_of(i.op_name)))
      elif i.opcode == "conditional":
        names = [
          c for a in ("branch_computations", "true_computation", "false_computation") for c in i.called.get(a, ())
        ]
        out += max((self.events(c) for c in names), key=_rough_cycles, default=())
      elif i.opcode == "call":
        for c in i.beside:
          out += self.events(c)
      elif not moves and i.name not in chains.values():
        out += [w for w in [self._work(i)] if w]
    return merged(out)

  def _chains(self, i: Instruction) -> list[str]:
    """Asynchronous collectives that a fusion begins, goes on with or ends."""
    if i.opcode != "fusion":
      return []
    inside = (j for c in i.called.get("calls", ()) for j in self.program.computations[c])
    return [m.group(1) for j in inside if (m := _CHAIN.search(j.text))]

  def _work(self, i: Instruction) -> Work | None:
    kind, part = self.program.kind(i), part_of(i.op_name)
    if i.opcode == "fusion":  # XLA may let a kernel write straight into a part of an array
      inside = (j for c in i.called.get("calls", ()) for j in self.program.computations[c])
      i = next((j for j in inside if _MOSAIC in j.text), i)
    if i.opcode == "custom-call":
      if _MOSAIC not in i.text:
        return None
      return _kernel(i, part, self.program, self.tile, self.spare)
    if i.unknown:
      return Work("kernel", part)  # like a kernel without a cost: nobody knows
    return Work(kind, part, i.cycles) if i.cycles else None

  def _moves(self, i: Instruction, computation: str) -> Iterator[tuple[Any, Move]]:
    begun = i  # by which a computation on another thread is known
    if i.opcode == "custom-call-update":
      begun = self.program.definitions[computation][i.operands[0]]
    if i.opcode in ("call-start", "async-start", "custom-call-update"):
      for c in begun.beside:
        for inner in self.program.computations[c]:
          for found in collectives.of_step(self.program, Step(inner, c, thread="async")):
            yield found, self._move(found, inner)
    else:
      for found in collectives.of_step(self.program, Step(i, computation)):
        yield found, self._move(found, i)
    if i.opcode.endswith("-start") and "S(5)" in i.type:
      end = next((j.type for j in self.program.computations[computation] if i.name in j.operands), i.type)
      sizes = [_bytes(dtype, dims) for dtype, dims, _ in _ARRAY.findall(i.type)]
      yield None, Move(HOST["S(5)" not in end], min((s for s in sizes if s > 8), default=8), part=part_of(i.op_name))

  def _move(self, c: collectives.Collective, i: Instruction) -> Move:
    axes = "*".join(collectives.mesh_axes_of(c, self.mesh)) if self.mesh is not None else ""
    part, size = part_of(c.op_name), float(c.bytes)
    if c.dcn:
      return Move(c.kind, size, slices=len(c.groups[0]) if c.groups else 2, axes=axes, part=part)
    if c.pairs:
      return self._permutation(c, axes, part)
    places = self.places[np.array(c.groups[0] if c.groups else (0,))]
    counts = [len(np.unique(places[:, d])) for d in range(4)]
    apart = [int(np.diff(np.unique(places[:, d])).min(initial=self.extent[d])) for d in range(3)]  # chips, to the next
    dims = tuple((n, self._closed(d) and n * apart[d] == self.extent[d]) for d, n in enumerate(counts[:3]) if n > 1)
    # Groups that lie between each other's chips share the links of that dimension.
    share = np.mean([1 / apart[d] for d in range(3) if counts[d] > 1]) if dims else 1.0
    share *= 1.0 if counts[3] == self.cores else 1 / self.cores
    if c.kind == "ragged-all-to-all":
      # Its buffer has room for more rows than come on one of its sides: balanced, it sends the smaller.
      size = float(min([size, *(_bytes(d, n) for d, n, _ in _ARRAY.findall(i.type) if "," in n)]))
    if c.kind.endswith("all-to-all"):
      size *= counts[3]  # both devices of a chip send over its links
    return Move(c.kind, size, dims, float(share), axes=axes, part=part)

  def _permutation(self, c: collectives.Collective, axes: str, part: str) -> Move:
    source, target = (self.places[np.array(side)][:, :3] for side in zip(*c.pairs))
    steps = np.abs(target - source)
    closed = np.array([self._closed(d) for d in range(3)])
    steps = np.where(closed, np.minimum(steps, np.array(self.extent) - steps), steps)
    hops = steps.sum(axis=1)
    if not hops.any():
      return Move(c.kind, c.bytes, axes=axes, part=part, lane="core", hops=0.0)
    far = c.pairs[int(hops.argmax())]
    dims = tuple((int(n) + 1, False) for n in steps.max(axis=0) if n)
    lane = self._lane(self.places[np.array(far)])
    return Move(c.kind, c.bytes, dims, 1 / self.cores, axes=axes, part=part, lane=lane, hops=float(hops.mean()))

  def _closed(self, dimension: int) -> bool:
    return dimension < len(self.closed) and bool(self.closed[dimension])

  def _lane(self, pair: np.ndarray) -> str:
    """Dimension and direction of the first step from a device to another, the shorter way around."""
    for d, (n, step) in enumerate(zip(self.extent, pair[1] - pair[0])):
      if step:
        way = step if abs(step) <= n / 2 else -step
        return f"{d}{'+' if way > 0 else '-'}"
    return "core"


_MOSAIC = 'custom_call_target="tpu_custom_call"'
_PARTNER = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)_\d+"')
_CHAIN = re.compile(r'chain_id="?(\w+)')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_ESTIMATE = re.compile(r'"cost_estimate": ?\{([^}]*)\}')
_SPLASH = re.compile(r"(?:splash|flash)\w*?_(fwd|dkv|dq)")
_TILE_ROWS = re.compile(r'(?:"tile_m\\?": |\btm_)(\d+)')
_GROUPED = re.compile(r"gmm|ragged|grouped|megablox|outer|product")


def _kernel(i: Instruction, part: str, program: Program, tile: int, spare: float) -> Work:
  """A Mosaic kernel: what it executes, by the cost that its author gave it, or by the shapes of attention."""
  arrays = _arrays(_operands(i))
  if (found := _SPLASH.search(i.name + " " + i.op_name)) and arrays:
    return _attention(i, found.group(1), arrays, part, program, tile)
  if not (estimate := _ESTIMATE.search(i.text)):
    return Work("kernel", part)
  numbers = {k: float(v) for k, v in re.findall(r'"(\w+)":"?([\d.e+]+)', estimate.group(1))}
  flops, moved = numbers.get("flops", 0.0), numbers.get("bytes_accessed", 0.0)
  if not _GROUPED.search(i.name + i.op_name.rsplit("/", 2)[-1]):
    return Work("kernel", part, 0, flops, moved, flops)
  return Work("grouped", part, 0, flops / spare * _visited(i, arrays, tile, spare), moved, flops / spare)


def _visited(i: Instruction, arrays: list, tile: int, spare: float) -> float:
  """Rows of all tiles that a product of experts visits, over the rows: at the end of a group a tile is visited twice."""
  stacks = [shape for _, shape in arrays + _arrays(i.type) if len(shape) == 3]
  rows = max((shape[0] for dtype, shape in arrays if len(shape) == 2 and dtype[0] not in "su"), default=0)
  if not stacks or not rows:
    return 1.0
  said = _TILE_ROWS.search(f"{i.name} {i.text}")
  return 1.0 + (stacks[0][0] - 1) * (int(said.group(1)) if said else tile) * spare / rows


def _attention(i: Instruction, phase: str, arrays: list, part: str, program: Program, tile: int) -> Work:
  """Of operands q [.., n, t, h], k [.., k, s, h], v: the matmuls of the phase over the blocks that have a visible key.

  Each has one dimension that is the width of a head; where that is less than a matrix unit, the rest of it is idle.
  """
  q, _, v = [shape for dtype, shape in arrays if dtype in ("bf16", "f32", "f16") and len(shape) >= 3][:3]
  # Of the last two dimensions the longer is the sequence: which of them is minor is a choice of layout.
  (t, qk), (s, wide) = sorted(q[-2:], reverse=True), sorted(v[-2:], reverse=True)
  fused = not any("_dq_" in j.name for body in program.computations.values() for j in body if j.opcode == "custom-call")
  a, b = {"fwd": (1, 1), "dkv": (3, 2) if fused else (2, 2), "dq": (2, 1)}[phase]
  suffix = "" if phase == "fwd" else f"_{phase}"
  blocks = {side: int(m.group(1)) for side in ("q", "kv")
            if (m := re.search(rf'block_{side}{suffix}\\?": (\d+)', i.text))}  # fmt: skip
  pairs = float(math.prod(q[:-2]) * t * s)
  # Integers [t, 128] or [8, t] are segments, which come in pairs, and the positions of queries, which a causal mask needs
  causal = sum(dtype == "s32" and len(shape) == 2 for dtype, shape in arrays) % 2 == 1
  share = useful = 0.5 if causal else 1.0
  if len(blocks) == 2 and causal:
    rows, columns = max(1, t // blocks["q"]), max(1, s // blocks["kv"])
    _, most_rows, most_columns = next((g for d, g in arrays if d in ("s8", "s32") and len(g) == 3), (1, rows, columns))
    if phase == "dkv":  # for a block of keys the queries that see it; of a window the grid has only so many
      seen = sum(min(rows - c * rows // columns, most_rows) for c in range(columns))
    else:
      seen = sum(min(-(-(r + 1) * columns // rows), most_columns) for r in range(rows))
    listed = next((shape[0] for dtype, shape in arrays if dtype in ("s8", "s32") and len(shape) == 1), seen)
    share = min(seen, listed) / (rows * columns)  # a list of blocks may be padded
    useful = min(useful, share)
  width, whole = a * qk + b * wide, (a * -(-qk // tile) + b * -(-wide // tile)) * tile
  full = 2 * pairs * width
  return Work("attention", part, 0, full * share, 0.0, full * useful, fill=width / whole / min(1.0, 128 / tile))


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
  return [(d, tuple(map(int, filter(None, dims.split(","))))) for d, dims, _ in _ARRAY.findall(text)]


def _operands(i: Instruction) -> str:
  found = re.search(r"operand_layout_constraints=\{(.*?)\}\}?, (?:custom|frontend|metadata|backend|api)", i.text)
  return found.group(1) if found else ""


def part_of(op_name: str) -> str:
  """Part of the model and pass, from what JAX called the operation."""
  words = re.split(r"[/()]", op_name)
  part = next((w for w in reversed(words) if w in PARTS), "")
  if "rematted_computation" in op_name:
    phase = "again"
  elif "transpose(jvp" in op_name:
    phase = "backward"
  elif "jvp" in op_name:
    phase = "forward"
  else:
    phase = "update"
  return f"{part} {phase}".strip()


_BITS = re.compile(r"\d+")


def _bytes(dtype: str, dims: str) -> int:
  bits = _BITS.search(dtype)
  return math.prod(map(int, filter(None, dims.split(",")))) * (int(bits.group()) if bits else 8) // 8


def _rough_cycles(trace: Iterable[Event]) -> float:
  """Which of some branches takes longest, roughly: 2^18 FLOPs a cycle, 64 bytes a cycle over links."""
  total = 0.0
  for e in trace:
    if isinstance(e, Work):
      total += e.cycles + e.flops / 2**18
    elif isinstance(e, Loop):
      total += e.times * _rough_cycles(e.body)
    elif isinstance(e, Start | Sync):
      total += e.move.bytes / 64
  return total


def merged(events: Iterable[Event]) -> Trace:
  """The same with neighbouring work of one kind and part as one event; kernels stay apart, since each has its bound."""
  out: list[Event] = []
  for e in events:
    last = out[-1] if out else None
    if (isinstance(e, Work) and isinstance(last, Work) and (e.kind, e.part) == (last.kind, last.part)
        and not (e.flops or last.flops)):  # fmt: skip
      out[-1] = dataclasses.replace(last, cycles=last.cycles + e.cycles, count=last.count + e.count)
    else:
      out.append(e)
  return tuple(out)


# ---- as JSON


def to_json(trace: Iterable[Event]) -> list:
  """Nested lists; the first element of each says what it is."""
  out = []
  for e in trace:
    if isinstance(e, Loop):
      out.append(["loop", e.times, e.part, to_json(e.body)])
    elif isinstance(e, Start):
      out.append(["start", e.key, *_move_json(e.move)])
    elif isinstance(e, Sync):
      out.append(["sync", *_move_json(e.move)])
    elif isinstance(e, Done):
      out.append(["done", e.key])
    else:
      out.append(list(dataclasses.astuple(e)))
  return out


def _move_json(m: Move) -> list:
  return [m.kind, m.bytes, [list(d) for d in m.dims], m.share, m.slices, m.axes, m.part, m.lane, m.hops]


def from_json(data: list) -> Trace:
  """The inverse of `to_json`."""
  make = {
    "loop": lambda times, part, body: Loop(times, from_json(body), part),
    "start": lambda key, *m: Start(key, _move_of(*m)), "sync": lambda *m: Sync(_move_of(*m)), "done": Done,
  }  # fmt: skip
  return tuple(make[e[0]](*e[1:]) if e[0] in make else Work(*e) for e in data)


def _move_of(kind: str, bytes: float, dims: list, *rest: Any) -> Move:
  return Move(kind, bytes, tuple((n, w) for n, w in dims), *rest)
