"""The collectives that a step asks for, read from the program as it was traced: no compiler has seen it.

Every collective of a step is written by name (sharding/context.py), so this is what the rules imply, for any mesh and
model. `perf.collectives` says the same of the compiled program; tests hold the two together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from maxscale.perf.flops import inner_jaxprs

KINDS = {
  "all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "psum": "all-reduce", "psum_invariant": "all-reduce",
  "pmax": "all-reduce", "pmin": "all-reduce", "ppermute": "collective-permute", "all_to_all": "all-to-all",
  "ragged_all_to_all": "ragged-all-to-all",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One collective.

  Attributes:
    kind: as in `perf.collectives.KINDS`.
    axes: mesh axes that it goes along.
    dtype: of its arrays.
    bytes: of a device and an execution: the full result of an all-gather, the operand of every other.
    times: executions in a step; a branch of a conditional counts as taken.
    depth: loops around it.
    gradient: it is on the way back.
  """

  kind: str
  axes: tuple[str, ...]
  dtype: str
  bytes: int
  times: int
  depth: int
  where: str

  @property
  def total(self) -> int:
    return self.bytes * self.times


def transfers(jaxpr: Any, times: int = 1, depth: int = 0) -> Iterator[Transfer]:
  """Every collective of a jaxpr (of `jitted.trace(...).jaxpr`), in the order of the program."""
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name in KINDS:
      axes = params.get("axes", params.get("axis_name"))
      axes = axes if isinstance(axes, tuple) else (axes,)
      for var in eqn.outvars if name == "all_gather" else eqn.invars[: 1 if name == "ragged_all_to_all" else None]:
        size = math.prod(var.aval.shape) * var.aval.dtype.itemsize
        where = str(eqn.source_info.name_stack)
        yield Transfer(KINDS[name], axes, str(var.aval.dtype), size, times, depth, where)
    loop = name in ("scan", "while")
    for inner in inner_jaxprs(params.values()):
      yield from transfers(inner, times * params["length"] if name == "scan" else times, depth + loop)


def table(found: list[Transfer]) -> str:
  """A line for each kind, axes, dtype and depth: executions and MiB of a device in a step, largest first."""
  rows: dict[tuple, list[Transfer]] = {}
  for t in found:
    rows.setdefault((t.kind, "*".join(t.axes), t.dtype, t.depth), []).append(t)
  lines = [("collective", "mesh axes", "dtype", "loops", "times a step", "MiB a step and device")]
  for (kind, axes, dtype, depth), ts in sorted(rows.items(), key=lambda row: -sum(t.total for t in row[1])):
    lines.append((kind, axes, dtype, str(depth), str(sum(t.times for t in ts)),
                  f"{sum(t.total for t in ts) / 2**20:.3f}"))  # fmt: skip
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
