"""Reads a scheduled TPU program (`compiled.as_text()`): its instructions, loops, and the compiler's estimated cycles.

`while` carries no trip count; it is the s32 constant of its condition. Kernels (Mosaic) and collectives carry no
cycles, so a sum of cycles compares two programs of one compiler only where both have the same of those.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s})\]])([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction. called: attribute -> names of the computations; cycles: the compiler's estimate, or 0."""

  name: str
  opcode: str
  text: str
  cycles: int
  called: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, and the name of the entry."""

  computations: dict[str, tuple[Instruction, ...]]
  entry: str

  def walk(self, name: str = "", times: int = 1, depth: int = 0) -> Iterator[tuple[Instruction, int, int]]:
    """(instruction, times that it runs, loops around it), for all that is scheduled; a fusion is one instruction."""
    for i in self.computations[name or self.entry]:
      yield i, times, depth
      if i.opcode == "while":
        trips = self.trip_count(i.called["condition"][0])
        yield from self.walk(i.called["body"][0], times * trips, depth + 1)
      elif i.opcode in ("call", "conditional", "async-start"):
        for names in i.called.values():
          for called in names:
            yield from self.walk(called, times, depth)

  def trip_count(self, condition: str) -> int:
    """Trips of a loop with this condition.

    Raises:
      ValueError: it has not exactly one s32 constant, so the count is not known.
    """
    constants = {int(n) for i in self.computations[condition] for n in _CONSTANT.findall(i.text)}
    if len(constants) != 1:
      raise ValueError(f"the loop condition {condition} has the constants {sorted(constants)}; its trips are unknown")
    return constants.pop()

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
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = head.group(2)
      computations[current] = []
      entry = current if head.group(1) else entry
    elif current and (found := _INSTRUCTION.match(line)):
      computations[current].append(_instruction(*found.groups()))
  return Program({name: tuple(body) for name, body in computations.items()}, entry)


def _instruction(name: str, rest: str) -> Instruction:
  opcode = _OPCODE.search(" " + rest)
  cycles = _CYCLES.search(rest)
  called = {a: tuple(re.findall(r"[\w.\-]+", v.replace("%", ""))) for a, v in _CALLED.findall(rest)}
  return Instruction(name, opcode.group(1) if opcode else "", rest, int(cycles.group(1)) if cycles else 0, called)
