"""The collectives that a compiled program executes: what each moves, between which devices, how often, and how.

`collectives(program.read(compiled.as_text()))`. Bytes are those of one device and one execution, of the operation's
logical array without tile padding: of the full result of an all-gather, of the operand of every other. On a ring of n
devices each then sends (n-1)/n of the bytes of an all-gather, reduce-scatter or all-to-all, twice that of an
all-reduce, and all of those of a collective-permute.

How they look in a TPU program (seen in libtpu 0.0.42, v5e to TPU7x):

* An all-reduce in a computation named `all-reduce-scatter` is a reduce-scatter. Its operand may be padded, and a
  collective-permute then shifts the excess along: both are counted as executed.
* An asynchronous one may be a chain of fusions, of which the first starts it, and those in between compute beside it:
  each repeats the instruction, and the first counts. One on the SparseCores is what a `call-start` calls.
* One across slices (DCN) is a `send` and a `recv` of the megascale runtime. A reduction over an axis that lies both
  inside slices and across them is one inside, one across and, for an all-reduce, an all-gather inside.
* A program for several slices numbers the devices of one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from maxscale.perf.compiled.program import Instruction, Program, Step

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
_DCN_KINDS = {"ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
              "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute"}  # fmt: skip
_DCN_KIND = re.compile(r'_xla_megascale_transfer_type="?(\w+)')
_DCN_TARGET = re.compile(r"_xla_megascale_target=(.*?),_xla")
_SLICES_TIMES_DEVICES = re.compile(r'"\{([\d,]+)\}x\{(\d+):(\d+)\}"')
_IDS_OF_A_SLICE = 100_000  # device d of slice s, counted from 1, has the id s * this + d

_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_GROUPS = re.compile(
  r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\([^{]*\))? \{[^}]*\}"
  r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]+\},?)*\})"
)
_PAIRS = re.compile(r"source_target_pairs=(\{[\d,{}]*\})")
_PAIR = re.compile(r"\{(\d+)(?:,|->)(\d+)\}")
_LIST = re.compile(r"\{(\d[\d,]*)\}")
_IOTA = re.compile(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}")
_MESH_AXIS = re.compile(r"'?([^',=]+)'?=(\d+)")
_GROUP_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: of `KINDS`.
    bytes: of one device and one execution, as the module says. For a ragged all-to-all, those of the whole buffer: how
      many of its rows are sent depends on data.
    dtypes: of its arrays, each once; the compiler may combine several arrays into one collective.
    groups: devices that exchange with each other, as positions in the flattened devices of the mesh (in those of a
      slice, if there are several), or as device ids over DCN. Empty for a collective-permute.
    pairs: source and target of each transfer of a collective-permute, numbered in the same way.
    depth: loops around it.
    times: executions in one run of the program.
    asynchronous: it is started and ended apart; whether other work runs between is not said.
    sparsecore: it runs on the SparseCores.
    dcn: it goes between slices.
    branch: it is in a branch of a conditional, of which one is taken; `times` counts each as taken.
    op_name: what JAX called it. The compiler drops this from some, and from all in a program for several slices: then
      that of the innermost loop around it, or "".
    name: of its instruction.
  """

  kind: str
  bytes: int
  dtypes: tuple[str, ...]
  groups: Groups
  pairs: Groups
  depth: int
  times: int
  asynchronous: bool
  sparsecore: bool
  dcn: bool
  branch: bool
  op_name: str
  name: str

  @property
  def group_size(self) -> int:
    """Devices of a group; 2 for a collective-permute."""
    return len(self.groups[0]) if self.groups else 2

  @property
  def run_bytes(self) -> int:
    """Bytes of one device in a run of the program."""
    return self.bytes * self.times


def collectives(program: Program) -> list[Collective]:
  """Those that are executed, in the order of the schedule; each once, however many instructions it is spread over.

  Raises:
    ValueError: the trips of a loop are unknown, or its devices are written in no known form.
  """
  return [c for step in program.steps() for c in of_step(program, step)]


def of_step(program: Program, step: Step) -> Iterator[Collective]:
  """The collectives that one step of a program executes or starts."""
  i = step.instruction
  kind, started = i.opcode.removesuffix("-start"), i.opcode.endswith("-start")
  if kind in KINDS:
    here, type_ = program.definitions[step.computation], i.type
    if started:  # its type lists operands and context too: that of its end is the result
      type_ = next(j.type for j in here.values() if i.name in j.operands)
    elif kind == "ragged-all-to-all" and i.operands[0] in here:
      type_ = here[i.operands[0]].type
    yield _collective(program, step, i, kind, type_, started)
  elif i.opcode == "fusion":
    for inner, kind, chained in _inside(program, i):
      yield _collective(program, step, inner, kind, inner.type, chained)
  elif i.opcode in ("send", "recv") and (found := _DCN_KIND.search(i.text)):
    # A program has both ends. The result of an all-gather is what it receives, the operand of others what they send.
    kind = _DCN_KINDS.get(found.group(1), found.group(1).lower())
    if (i.opcode == "recv") == (kind == "all-gather"):
      yield _collective(program, step, i, kind, i.type.split(", u32[]")[0], True)


def _inside(program: Program, fusion: Instruction) -> Iterator[tuple[Instruction, str, bool]]:
  """Collectives that a fusion executes: each with its kind and whether it is only started."""
  for name in fusion.called.get("calls", ()):
    body = program.computations[name]
    starts = any('"AsyncCollectiveStart"' in i.text for i in body)
    for i in body:
      if i.opcode == "fusion":
        yield from _inside(program, i)
      elif i.opcode in KINDS:
        chained = "chain_id=" in i.text  # asynchronous: the fusions that go on with it and end it repeat it
        if starts or not chained:
          yield i, "reduce-scatter" if name.startswith("all-reduce-scatter") else i.opcode, chained


def _collective(program: Program, step: Step, i: Instruction, kind: str, type_: str, started: bool) -> Collective:
  arrays = _ARRAY.findall(type_)
  size = sum(math.prod(map(int, filter(None, dims.split(",")))) * int(bits or 8) for _, bits, dims in arrays) // 8
  groups, pairs = _devices(i.text, program.partitions)
  if i.opcode.startswith("reduce-scatter"):
    size *= len(groups[0])  # its type is the result, a part of the operand
  return Collective(
    kind=kind,
    bytes=size,
    dtypes=tuple(dict.fromkeys(dtype for dtype, _, _ in arrays)),
    groups=groups,
    pairs=pairs,
    depth=step.depth,
    times=step.times,
    asynchronous=started or step.thread != "",
    sparsecore=step.thread == "sparsecore",
    dcn=i.opcode in ("send", "recv"),
    branch=step.branch,
    op_name=i.op_name or step.instruction.op_name or step.scope,
    name=i.name,
  )


def _devices(text: str, partitions: int) -> tuple[Groups, Groups]:
  """(groups, pairs) of an instruction, one of them empty."""
  for pattern in (_GROUPS, _PAIRS, _DCN_TARGET):
    if found := pattern.search(text):
      form = found.group(1)
      pairs = pattern is _PAIRS or "->" in form
      return ((), _numbers(_PAIR, form)) if pairs else (_groups(form, partitions), ())
  raise ValueError(f"a collective between unknown devices: {text[:400]}")


def _numbers(pattern: re.Pattern[str], text: str) -> Groups:
  return tuple(tuple(int(n) for part in m.groups() for n in part.split(",")) for m in pattern.finditer(text))


@functools.cache
def _groups(form: str, partitions: int) -> Groups:
  """The groups of any form: lists, an iota, axes of a mesh, slices times devices (over DCN).

  They are `{{0,1},{2,3}}` ({}: one of all), `[2,4]<=[4,2]T(1,0)` (2 groups of 4, of numbers counted as [4, 2] and
  transposed), `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}` (an axis may be a part, `a:(2)4`: those 4 inside 2),
  and `{1,2}x{0:3}` (each of the devices 0 to 3 with those that have its number in slices 1 and 2).
  """
  if found := _SLICES_TIMES_DEVICES.fullmatch(form):
    slices, (first, last) = _ints(found.group(1)), _ints(",".join(found.groups()[1:]))
    return tuple(tuple(s * _IDS_OF_A_SLICE + d for s in slices) for d in range(first, last + 1))
  if found := _MESH.fullmatch(form):
    return _mesh_groups(*found.groups())
  if _IOTA.fullmatch(form):
    return _as_groups(_iota(form))
  return _numbers(_LIST, form) or (tuple(range(partitions)),)


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _as_groups(array: np.ndarray) -> Groups:
  return tuple(map(tuple, array.tolist()))


def _iota(form: str) -> np.ndarray:
  """The array that `[shape]<=[dims]T(permutation)` stands for; the shape, the permutation or both may be missing."""
  found = _IOTA.fullmatch(form)
  assert found
  shape, dims, permutation = (_ints(part) if part else None for part in found.groups())
  array = np.arange(math.prod(dims or [])).reshape(dims or []).transpose(permutation)
  return array.reshape(shape) if shape else array


def _mesh_groups(axes: str, devices: str | None, grouped: str) -> Groups:
  sizes = {axis: int(n) for axis, n in _MESH_AXIS.findall(axes)}
  parts = [(a, int(pre or 1), int(n or sizes[a])) for a, pre, n in _GROUP_AXIS.findall(grouped)]
  numbers = np.arange(math.prod(sizes.values()))
  if devices:
    numbers = (_iota(devices) if _IOTA.fullmatch(devices) else np.array(_ints(devices.strip("[]")))).reshape(-1)
  dims, inside = [], []
  for axis, size in sizes.items():
    # Cut where its parts begin and end; the pieces in between belong to a part or to none.
    mine = [(pre, pre * n) for a, pre, n in parts if a == axis]
    cuts = sorted({1, size}.union(*mine))
    for low, high in itertools.pairwise(cuts):
      dims.append(high // low)
      inside.append(any(first <= low and high <= last for first, last in mine))
  order = [n for wanted in (False, True) for n, is_inside in enumerate(inside) if is_inside == wanted]
  return _as_groups(numbers.reshape(dims).transpose(order).reshape(-1, math.prod(n for _, _, n in parts)))


def mesh_axes_of(collective: Collective, mesh: Any) -> tuple[str, ...]:
  """The axes of a `jax.sharding.Mesh` along which the devices of a group differ, in the order of the mesh.

  One that lies in part across slices counts for the transfer inside a slice and for the one between them.

  Raises:
    ValueError: the mesh has not all of these devices.
  """
  devices = list(mesh.devices.flat)
  if collective.dcn:
    position = {d.id: n for n, d in enumerate(devices)}
  else:
    # On TPU a program numbers the devices of a slice, in the order of the mesh; one slice is then all of them.
    slices = [getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices]
    position = dict(enumerate(n for n, s in enumerate(slices) if s == slices[0]))
  links = collective.pairs or [(group[0], other) for group in collective.groups for other in group[1:]]
  if unknown := {device for link in links for device in link} - position.keys():
    raise ValueError(f"{collective.name} has devices {sorted(unknown)[:8]}, which a mesh {mesh.devices.shape} has not")
  if not links:
    return ()
  ends = [np.unravel_index([position[device] for device in side], mesh.devices.shape) for side in zip(*links)]
  return tuple(axis for axis, source, target in zip(mesh.axis_names, *ends) if (source != target).any())


def summary(found: Iterable[Collective], mesh: Any = None) -> str:
  """A table, a line for each kind, mesh axes and depth: instructions, executions and MiB of a device in one run.

  Args:
    mesh: names the axes; without it groups are given by their size.
  """
  rows: dict[tuple[str, str, int], list[Collective]] = {}
  for c in found:
    axes = "*".join(mesh_axes_of(c, mesh)) if mesh else f"{c.group_size} devices"
    rows.setdefault((c.kind + (" (DCN)" if c.dcn else ""), axes or "-", c.depth), []).append(c)
  table = [("collective", "axes", "depth", "count", "async", "SparseCore", "times", "MiB")]
  for (kind, axes, depth), cs in sorted(rows.items(), key=lambda row: -sum(c.run_bytes for c in row[1])):
    table.append((kind, axes, str(depth), str(len(cs)), str(sum(c.asynchronous for c in cs)),
                  str(sum(c.sparsecore for c in cs)), str(sum(c.times for c in cs)),
                  f"{sum(c.run_bytes for c in cs) / 2**20:.3f}"))  # fmt: skip
  widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
  return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)
