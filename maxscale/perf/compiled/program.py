"""Reads a scheduled program (`compiled.as_text()`): its instructions, loops, and the compiler's estimated cycles.

Written for TPU programs; those of other backends read as well, but carry no cycles. Kernels (Mosaic) and collectives
carry none on TPU either, so a sum of cycles compares two programs of one compiler only where both have the same of
those. What the collectives move is in `maxscale.perf.compiled.collectives`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")
_DONATED = re.compile(r"^HloModule .*?\binput_output_alias=\{(.*?\)) *\}")
_ALIAS = re.compile(r"\{(\d+)\}: \((\d+), \{\}")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s})\]])([a-z][\w\-]*)\(")
_CLOSING = re.compile(r"\)(?:,|$)")  # of the operands: a `)` inside a type has something else behind it
_OPERAND = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1  # cycles of an instruction that the compiler cannot estimate
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)"
  r"=(\{[^}]*\}|%?[\w.\-]+)"
)
# What begins a computation on another thread; libtpu from 0.0.50 on gives it its operands by a `custom-call-update`.
ASIDE = ("async-start", "call-start", "custom-call-start")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_CONSTANT = re.compile(r"[su]\d+\[\]\S* constant\((-?\d+)\)")
_INDEX = re.compile(r"\bindex=(\d+)")
_DIRECTION = re.compile(r"\bdirection=([A-Z]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_METADATA = re.compile(r"(kernel_metadata=\{)\n(.*)\n\}")  # of a kernel: the one attribute that is several lines
_COPIES = ("copy", "copy-start", "copy-done", "bitcast")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction: `name = type opcode(operands), attributes`.

  Attributes:
    text: all of it behind the name.
    cycles: the compiler's estimate, or 0; `unknown` where it has tried and failed.
    called: attribute -> names of the computations.
    root: its value is that of the computation.
  """

  name: str
  opcode: str
  text: str
  cycles: int
  called: dict[str, tuple[str, ...]]
  type: str = ""
  operands: tuple[str, ...] = ()
  root: bool = False

  @property
  def op_name(self) -> str:
    """What JAX called the operation that it comes from; "" where the compiler dropped it."""
    found = _OP_NAME.search(self.text)
    return found.group(1) if found else ""

  @property
  def unknown(self) -> bool:
    return self.number(_CYCLES) == _NO_ESTIMATE

  @property
  def beside(self) -> tuple[str, ...]:
    """The computations that a call, or what begins one on another thread, runs."""
    return next((self.called[a] for a in ("to_apply", "calls", "called_computations") if a in self.called), ())

  def number(self, pattern: re.Pattern[str]) -> int | None:
    """What the pattern's group finds in the text."""
    found = pattern.search(self.text)
    return int(found.group(1)) if found else None


@dataclasses.dataclass(frozen=True)
class Step:
  """An instruction where it is executed.

  Attributes:
    computation: the one that it stands in.
    times: executions in one run: the product of the trips of the loops around it.
    depth: number of those loops.
    branch: it stands in a branch of a conditional, of which one is taken; `times` counts each as taken.
    thread: what runs it beside the main program: "" (it is part of that), "sparsecore", or "async" for another.
    scope: `op_name` of the innermost loop around it.
  """

  instruction: Instruction
  computation: str
  times: int = 1
  depth: int = 0
  branch: bool = False
  thread: str = ""
  scope: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, the name of the entry, and the number of devices that the program is partitioned over.

  `donated`: an element of the entry's result -> number of the parameter whose memory it takes over.
  """

  computations: dict[str, tuple[Instruction, ...]]
  entry: str
  partitions: int = 1
  donated: dict[int, int] = dataclasses.field(default_factory=dict)

  def steps(self, name: str = "", **where) -> Iterator[Step]:
    """All that is scheduled in a computation (the entry) and those it calls, in order; a fusion is one instruction.

    Args:
      where: fields of `Step` that hold for the whole computation.

    Raises:
      ValueError: the trips of a loop are unknown.
    """
    name = name or self.entry
    for i in self.computations[name]:
      step = Step(i, name, **where)
      yield step
      called, inner = (), {}
      if i.opcode == "while":
        called, scope = i.called["body"], i.op_name or step.scope
        inner = {"times": step.times * self.trips(i, name), "depth": step.depth + 1, "scope": scope}
      elif i.opcode == "conditional":
        called, inner = [c for attribute in _BRANCHES for c in i.called.get(attribute, ())], {"branch": True}
      elif i.opcode in ("call", *ASIDE):
        called = i.beside
        if i.opcode != "call":
          inner = {"thread": "sparsecore" if 'async_execution_thread="sparsecore"' in i.text else "async"}
      for computation in called:
        yield from self.steps(computation, **where | inner)

  def walk(self) -> Iterator[tuple[Instruction, int, int]]:
    """(instruction, times that it runs, loops around it), for all that is scheduled outside the SparseCores."""
    return ((s.instruction, s.times, s.depth) for s in self.steps() if s.thread != "sparsecore")

  def trips(self, loop: Instruction, computation: str) -> int:
    """Trips of a `while` that stands in a computation.

    A TPU program does not say them. They follow from the start, step and limit of the loop's counter where all three
    can be traced to constants; else the counter is taken to go from 0 by 1 to the only constant of the condition.

    Raises:
      ValueError: there is no such constant either, as where the trips depend on data.
    """
    known = loop.number(_KNOWN_TRIPS)
    if known is not None:
      return known
    condition, body = loop.called["condition"][0], loop.called["body"][0]
    compare = self._root(condition)
    direction = _DIRECTION.search(compare.text)
    for counter, limit in zip(compare.operands, compare.operands[::-1]):
      k, end = self._element(counter, condition), self._constant(limit, condition)
      if direction and k is not None and end is not None:
        start, step = self._initial(loop, computation, k), self._increment(body, k)
        if start is not None and step:
          distance = (end - start if step > 0 else start - end) + (direction.group(1) in ("LE", "GE"))
          return max(0, -(-distance // abs(step)))
    return self.trip_count(condition)

  def trip_count(self, condition: str) -> int:
    """Trips of a loop with this condition, if it counts from 0 by 1.

    Raises:
      ValueError: it has not exactly one integer constant, so the count is not known.
    """
    constants = {int(n) for i in self.computations[condition] for n in _CONSTANT.findall(i.text)}
    if len(constants) != 1:
      raise ValueError(f"the loop condition {condition} has the constants {sorted(constants)}; its trips are unknown")
    return constants.pop()

  @functools.cached_property
  def definitions(self) -> dict[str, dict[str, Instruction]]:
    """Computation -> name of an instruction -> instruction."""
    return {name: {i.name: i for i in body} for name, body in self.computations.items()}

  @functools.cached_property
  def _loops(self) -> dict[str, tuple[Instruction, str]]:
    """Condition or body -> the `while` that it belongs to, and the computation which that stands in."""
    whiles = ((i, name) for name, body in self.computations.items() for i in body if i.opcode == "while")
    return {c: (i, name) for i, name in whiles for a in ("condition", "body") for c in i.called[a]}

  def _root(self, computation: str) -> Instruction:
    return next((i for i in self.computations[computation] if i.root), self.computations[computation][-1])

  def _source(self, name: str, computation: str) -> Instruction | None:
    """The instruction of this name, or what it copies."""
    i = self.definitions[computation].get(name)
    while i and i.opcode in _COPIES and i.operands:
      i = self.definitions[computation].get(i.operands[0])
    return i

  def _element(self, name: str, computation: str) -> int | None:
    """Which element of the computation's tuple parameter the instruction is."""
    i = self._source(name, computation)
    of = self._source(i.operands[0], computation) if i and i.opcode == "get-tuple-element" else None
    return i.number(_INDEX) if i and of and of.opcode == "parameter" else None

  def _constant(self, name: str, computation: str) -> int | None:
    """The integer that the instruction always gives: a constant, or one that the loops around it only pass on."""
    i, k = self._source(name, computation), self._element(name, computation)
    if k is not None and computation in self._loops:
      loop, outer = self._loops[computation]
      body = loop.called["body"][0]
      passed_on = self._element(self._carried(body, k), body) == k
      return self._initial(loop, outer, k) if passed_on else None
    return i.number(_CONSTANT) if i and i.opcode == "constant" else None

  def _initial(self, loop: Instruction, computation: str, k: int) -> int | None:
    """Element k of a loop's state before its first trip."""
    state = self._source(loop.operands[0], computation)
    return self._constant(state.operands[k], computation) if state and state.opcode == "tuple" else None

  def _carried(self, body: str, k: int) -> str:
    """Name of what a trip leaves in element k of the state; "" where that is not listed."""
    root = self._root(body)
    return root.operands[k] if root.opcode == "tuple" else ""

  def _increment(self, body: str, k: int) -> int | None:
    """What a trip adds to element k of the state."""
    i = self._source(self._carried(body, k), body)
    if i and i.opcode in ("add", "subtract"):
      for old, by in zip(i.operands, i.operands[::-1]):
        step = self._constant(by, body)
        if self._element(old, body) == k and step is not None:
          return step if i.opcode == "add" else -step
    return None

  @functools.cached_property
  def matmuls(self) -> frozenset[str]:
    """Computations (of fusions) that multiply matrices."""
    return frozenset(
      name for name, body in self.computations.items() if any(i.opcode in ("convolution", "dot") for i in body)
    )

  def kind(self, i: Instruction) -> str:
    """matmul, kernel, copy or vector: what an instruction spends its cycles on."""
    if i.opcode in ("convolution", "dot") or self.matmuls.intersection(i.called.get("calls", ())):
      return "matmul"
    if i.opcode == "custom-call":
      return "kernel"
    return "copy" if i.opcode.startswith("copy") else "vector"

  def cycles(self) -> dict[str, int]:
    """Estimated cycles of one run by kind, loops multiplied by their trips."""
    out: dict[str, int] = {}
    for i, times, _ in self.walk():
      if i.cycles:
        out[self.kind(i)] = out.get(self.kind(i), 0) + i.cycles * times
    return out


def read(text: str) -> Program:
  """The program of `compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  current, entry = "", ""
  for line in _whole_lines(_METADATA.sub(r"\1\2}", text)):
    if head := _COMPUTATION.match(line):
      current = head.group(2)
      computations[current] = []
      entry = current if head.group(1) else entry
    elif current and (found := _INSTRUCTION.match(line)):
      computations[current].append(_instruction(*found.groups()))
  partitions = _PARTITIONS.match(text)
  donated = _DONATED.match(text)
  aliases = {int(k): int(n) for k, n in _ALIAS.findall(donated.group(1))} if donated else {}
  return Program({n: tuple(b) for n, b in computations.items()}, entry,
                 int(partitions.group(1)) if partitions else 1, aliases)  # fmt: skip


def _whole_lines(text: str) -> Iterator[str]:
  """Lines, of which some are several: the configuration of a kernel inside a fusion goes on at the margin."""
  whole = ""
  for line in text.splitlines():
    if line.startswith(('"', '}, "')):
      whole += line
    else:
      yield whole
      whole = line
  yield whole


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  opcode = _OPCODE.search(rest)
  cycles = _CYCLES.search(rest)
  estimate = int(cycles.group(1)) % _NO_ESTIMATE if cycles else 0
  called = {a: tuple(re.findall(r"[\w.\-]+", v.replace("%", ""))) for a, v in _CALLED.findall(rest)}
  start = opcode.end() if opcode else 0
  closing = _CLOSING.search(rest, start)
  operands = _OPERAND.findall(rest, start, closing.start()) if opcode and closing else ()
  return Instruction(name, opcode.group(1) if opcode else "", rest, estimate, called,
                     rest[: opcode.start(1)] if opcode else "", tuple(operands), bool(root))  # fmt: skip
