"""What a scheduled program does in time, as data: work, transfers and loops in order, without its text.

`of_program` makes it once; `perf.simulate` gives it seconds. It is small (a few hundred events, a loop is in it once) and
holds no constant that is fitted, so that the calibration can keep the traces of programs and not the programs.

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

from maxscale.perf import collectives
from maxscale.perf.network import Dims
from maxscale.perf.program import Instruction, Program, Step
from maxscale.sharding import topology

WORK = ("matmul", "attention", "grouped", "kernel", "vector", "copy")
PARTS = ("embed", "attention", "router", "experts", "shared", "mlp", "norm", "mtp", "head", "optimizer", "gradients")
HOST = ("to-host", "from-host")


@dataclasses.dataclass(frozen=True)
class Work:
  """Work of the TensorCore.

  Attributes:
    kind: of `WORK`; `grouped` are products of experts, `kernel` another kernel.
    part: what of the model it belongs to, and whether it is its forward, recomputed or backward pass: "mlp backward".
    cycles: the compiler's estimate; kernels have none.
    flops, bytes: of a kernel: what it executes (blocks that are only half visible count whole), what it moves in HBM.
    useful: FLOPs of those that the mask leaves.
    count: instructions that it stands for.
  """

  kind: str
  part: str = ""
  cycles: int = 0
  flops: float = 0.0
  bytes: float = 0.0
  useful: float = 0.0
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Move:
  """A transfer.

  Attributes:
    kind: of `perf.collectives.KINDS`, or of `HOST`.
    bytes: as there; of a transfer to or from the host, those of this device.
    dims: chips along each dimension of the torus that a group spans, and whether it closes.
    share: of a chip's links that are its own.
    slices: of a group; more than 1 goes over DCN.
    axes: names of mesh axes, if they are known.
    part: as that of `Work`.
    lane: which links it has for itself: those of one direction of a permutation; "": it shares all of them.
  """

  kind: str
  bytes: float
  dims: Dims = ()
  share: float = 1.0
  slices: int = 1
  axes: str = ""
  part: str = ""
  lane: str = ""


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


def of_program(program: Program, coordinates: Iterable[tuple[int, ...]], device_kind: str, mesh: Any = None) -> Trace:
  """The trace of a program.

  Args:
    coordinates: (slice, x, y, z, core) of each device, in the program's order.
    device_kind: as JAX calls it.
    mesh: names the axes of collectives.

  Raises:
    ValueError: the trips of a loop are unknown.
  """
  return _Reader(program, np.array(list(coordinates)), device_kind, mesh).events(program.entry)


def coordinates(mesh: Any) -> list[tuple[int, ...]]:
  """(slice, x, y, z, core) of the devices of a mesh for TPUs, in the order in which a program numbers them."""
  return [(getattr(d, "slice_index", 0), *d.coords, d.core_on_chip) for d in mesh.devices.flat]


class _Reader:
  def __init__(self, program: Program, places: np.ndarray, device_kind: str, mesh: Any):
    self.program, self.mesh, self.keys = program, mesh, 0
    # A program for several slices numbers the devices of one.
    self.slices = len(set(places[:, 0].tolist()))
    self.places = places[places[:, 0] == places[0, 0]][:, 1:]
    extent = tuple(int(n) for n in np.ptp(self.places[:, :3], axis=0) + 1)
    self.extent, self.closed = extent, topology.wraps(device_kind, extent[: 2 if extent[2] == 1 else 3])
    self.cores = int(self.places[:, 3].max()) + 1

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

    receives = iter([i for i in body if i.opcode == "recv"])
    for i in body:
      if i.name in chains.values() and i.opcode == "fusion":
        out += [w for w in [self._work(i)] if w]  # it computes while the last of the transfer goes on
      moves = list(self._moves(i, computation))
      for c, move in moves:
        end = ends.get(i.name)
        if i.opcode in ("send", "recv"):
          end = ends.get(next(receives, i).name, end)
        elif i.opcode == "fusion":
          end = next((chains[chain] for chain in self._chains(i)), None) if c is None or c.asynchronous else None
        start(move, end)
      out += [Done(key) for key in keys.pop(i.name, ())]
      if i.opcode == "while":
        inner = self.events(i.called["body"][0])
        times = self.program.trips(i, computation)
        if inner and times:
          out.append(Loop(times, inner, _part(i.op_name)))
      elif i.opcode == "conditional":
        names = [
          c for a in ("branch_computations", "true_computation", "false_computation") for c in i.called.get(a, ())
        ]
        out += max((self.events(c) for c in names), key=_cycles, default=())
      elif i.opcode == "call":
        for c in i.called.get("to_apply") or i.called.get("calls", ()):
          out += self.events(c)
      elif not moves and i.name not in chains.values():
        out += [w for w in [self._work(i)] if w]
    return merged(out)

  def _chains(self, i: Instruction) -> set[str]:
    """Asynchronous collectives that a fusion begins, goes on with or ends."""
    if i.opcode != "fusion":
      return set()
    inside = (j for c in i.called.get("calls", ()) for j in self.program.computations[c])
    return {m.group(1) for j in inside if (m := _CHAIN.search(j.text))}

  def _work(self, i: Instruction) -> Work | None:
    kind, part = self.program.kind(i), _part(i.op_name)
    if kind == "kernel":
      return _kernel(i, part, self.program) if 'custom_call_target="tpu_custom_call"' in i.text else None
    return Work(kind, part, i.cycles) if i.cycles else None

  def _moves(self, i: Instruction, computation: str) -> Iterator[tuple[Any, Move]]:
    called = i.called.get("to_apply") or i.called.get("calls", ())
    if i.opcode in ("call-start", "async-start"):
      for c in called:
        for inner in self.program.computations[c]:
          for found in collectives.of_step(self.program, Step(inner, c, thread="async")):
            yield found, self._move(found)
    else:
      for found in collectives.of_step(self.program, Step(i, computation)):
        yield found, self._move(found)
    if i.opcode.endswith("-start") and "S(5)" in i.type:
      end = next((j.type for j in self.program.computations[computation] if i.name in j.operands), i.type)
      sizes = [_bytes(dtype, dims) for dtype, dims, _ in _ARRAY.findall(i.type)]
      yield None, Move(HOST["S(5)" not in end], min(s for s in sizes if s > 8), part=_part(i.op_name))

  def _move(self, c: collectives.Collective) -> Move:
    group = np.array(c.groups[0] if c.groups else c.pairs[0] if c.pairs else (0,))
    axes = "*".join(collectives.mesh_axes_of(c, self.mesh)) if self.mesh is not None else ""
    part = _part(c.op_name)
    if c.dcn:
      return Move(c.kind, c.bytes, slices=len(group) if c.groups else 2, axes=axes, part=part)
    places = self.places[group]
    counts = [len(np.unique(places[:, d])) for d in range(4)]
    closed = (*self.closed, False, False)[:3]
    dims = tuple((n, bool(closed[d]) and n == self.extent[d]) for d, n in enumerate(counts[:3]) if n > 1)
    share = 1.0 if counts[3] == self.cores else 1 / self.cores
    return Move(c.kind, c.bytes, dims, share, axes=axes, part=part, lane=self._lane(places) if c.pairs else "")

  def _lane(self, pair: np.ndarray) -> str:
    """Dimension and direction of the first step from a device to another, the shorter way around."""
    for d, (n, step) in enumerate(zip(self.extent, pair[1] - pair[0])):
      if step:
        way = step if abs(step) <= n / 2 else -step
        return f"{d}{'+' if way > 0 else '-'}"
    return "core"


_CHAIN = re.compile(r'chain_id="?(\w+)')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_ESTIMATE = re.compile(r'"cost_estimate":\{([^}]*)\}')
_SPLASH = re.compile(r"(?:splash|flash)\w*?_(fwd|dkv|dq)")
_GROUPED = re.compile(r"gmm|ragged|grouped|megablox|outer|product")


def _kernel(i: Instruction, part: str, program: Program) -> Work:
  """A Mosaic kernel: what it executes, by the cost that its author gave it, or by the shapes of attention."""
  arrays = [(d, tuple(map(int, filter(None, dims.split(","))))) for d, dims, _ in _ARRAY.findall(_operands(i))]
  if (found := _SPLASH.search(i.name + " " + i.op_name)) and arrays:
    return _attention(i, found.group(1), arrays, part, program)
  if estimate := _ESTIMATE.search(i.text):
    numbers = {k: float(v) for k, v in re.findall(r'"(\w+)":"?([\d.e+]+)', estimate.group(1))}
    kind = "grouped" if _GROUPED.search(i.name + i.op_name.rsplit("/", 2)[-1]) else "kernel"
    flops = numbers.get("flops", 0.0)
    return Work(kind, part, 0, flops, numbers.get("bytes_accessed", 0.0), flops)
  return Work("kernel", part)


def _attention(i: Instruction, phase: str, arrays: list, part: str, program: Program) -> Work:
  """Of operands q [.., n, t, h], k [.., k, s, h], v: the matmuls of the phase over the blocks that have a visible key."""
  q, _, v = [shape for dtype, shape in arrays if dtype in ("bf16", "f32", "f16") and len(shape) >= 3][:3]
  # Of the last two dimensions the longer is the sequence: which of them is minor is a choice of layout.
  (t, qk), (s, wide) = sorted(q[-2:], reverse=True), sorted(v[-2:], reverse=True)
  fused = not any("_dq_" in j.name for body in program.computations.values() for j in body if j.opcode == "custom-call")
  widths = {"fwd": qk + wide, "dkv": 3 * qk + 2 * wide if fused else 2 * qk + 2 * wide, "dq": 2 * qk + wide}[phase]
  suffix = "" if phase == "fwd" else f"_{phase}"
  blocks = {side: int(m.group(1)) for side in ("q", "kv")
            if (m := re.search(rf'block_{side}{suffix}\\?": (\d+)', i.text))}  # fmt: skip
  full, useful = 2.0 * math.prod(q[:-2]) * t * s * widths, 0.5
  share = useful
  if blocks:
    rows, columns = max(1, t // blocks["q"]), max(1, s // blocks["kv"])
    active = next((shape[0] for dtype, shape in arrays if dtype in ("s8", "s32") and len(shape) == 1), None)
    grid = next((shape for dtype, shape in arrays if dtype in ("s8", "s32") and len(shape) == 3), None)
    across = min(grid[1:]) if grid else columns  # the grid of a window has only the blocks that some query sees
    seen = sum(min(math.ceil((r + 1) * columns / rows), across) for r in range(rows))
    share = (active or seen) / (rows * columns)
    useful = min(useful, share)
  return Work("attention", part, 0, full * share, 0.0, full * useful)


def _operands(i: Instruction) -> str:
  found = re.search(r"operand_layout_constraints=\{(.*?)\}\}?, (?:custom|frontend|metadata|backend|api)", i.text)
  return found.group(1) if found else ""


def _part(op_name: str) -> str:
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


def _cycles(trace: Iterable[Event]) -> float:
  return sum(e.cycles + e.flops if isinstance(e, Work) else e.times * _cycles(e.body) if isinstance(e, Loop) else 0
             for e in trace)  # fmt: skip


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
  return [m.kind, m.bytes, [list(d) for d in m.dims], m.share, m.slices, m.axes, m.part, m.lane]


def from_json(data: list) -> Trace:
  """The inverse of `to_json`."""
  make = {
    "loop": lambda times, part, body: Loop(times, from_json(body), part),
    "start": lambda key, *m: Start(key, _move_of(*m)), "sync": lambda *m: Sync(_move_of(*m)), "done": Done,
  }  # fmt: skip
  return tuple(make[e[0]](*e[1:]) if e[0] in make else Work(*e) for e in data)


def _move_of(kind: str, bytes: float, dims: list, *rest: Any) -> Move:
  return Move(kind, bytes, tuple((n, w) for n, w in dims), *rest)
