"""The collectives that a step asks for, read from the program as it was traced: no compiler has seen it.

Every collective of a step is written by name (sharding/context.py), so this is what the rules imply, for any mesh and
model. `perf.compiled.collectives` says the same of the compiled program; tests hold the two together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval

from maxscale.perf.flops import inner_jaxprs
from maxscale.sharding.rules import Rules

KINDS = {
  "all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "psum": "all-reduce", "psum_invariant": "all-reduce",
  "pmax": "all-reduce", "pmin": "all-reduce", "ppermute": "collective-permute", "all_to_all": "all-to-all",
  "ragged_all_to_all": "ragged-all-to-all",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One collective.

  Attributes:
    kind: as in `perf.compiled.collectives.KINDS`.
    axes: mesh axes that it goes along.
    dtype: of its arrays.
    bytes: of a device and an execution: the full result of an all-gather, the operand of every other.
    times: executions in a step; a branch of a conditional counts as taken.
    depth: loops around it.
    dcn: it goes from slice to slice.
    grouped: it was asked for within slices or across them.
  """

  kind: str
  axes: tuple[str, ...]
  dtype: str
  bytes: int
  times: int
  depth: int
  dcn: bool = False
  grouped: bool = False

  @property
  def total(self) -> int:
    return self.bytes * self.times


def transfers(traced: jax.stages.Traced) -> list[Transfer]:
  """Every collective of a traced program whose result is used, in the order of the program."""
  jaxpr = traced.jaxpr.jaxpr
  return list(_walk(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]))


def _walk(jaxpr: Any, times: int = 1, depth: int = 0) -> Iterator[Transfer]:
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name in KINDS:
      axes = params.get("axes", params.get("axis_name"))
      axes = axes if isinstance(axes, tuple) else (axes,)
      for var in eqn.outvars if name == "all_gather" else eqn.invars[: 1 if name == "ragged_all_to_all" else None]:
        size = math.prod(var.aval.shape) * var.aval.dtype.itemsize
        groups = params.get("axis_index_groups")
        dcn = groups is not None and groups[0][1] != groups[0][0] + 1  # context.py groups by slice, or across them
        yield Transfer(KINDS[name], axes, str(var.aval.dtype), size, times, depth, dcn, groups is not None)
    loop = name in ("scan", "while")
    for inner in inner_jaxprs(params.values()):
      yield from _walk(inner, times * params["length"] if name == "scan" else times, depth + loop)


def by_slices(found: list[Transfer], rules: Rules) -> list[Transfer]:
  """The transfers as the TPU compiler carries them out on several slices: each inside a slice, or from slice to slice.

  A sum over an axis of both kinds is scattered inside, summed across, and gathered inside; a scatter sums inside first;
  a gather goes across first. What is grouped by slices already stays as it is.
  """
  out = []
  for t in found:
    across = math.prod(rules.slices.get(a, 1) for a in t.axes)
    inside = math.prod(rules.sizes[a] for a in t.axes) // across
    part = dataclasses.replace(t, bytes=t.bytes // inside, dcn=True)
    if across == 1 or t.grouped:
      out.append(t)
    elif inside == 1 or t.kind not in ("all-reduce", "reduce-scatter", "all-gather"):
      out.append(dataclasses.replace(t, dcn=True))  # of a permutation or exchange, at most all
    elif t.kind == "all-reduce":
      out += [dataclasses.replace(t, kind="reduce-scatter"), part, dataclasses.replace(t, kind="all-gather")]
    elif t.kind == "reduce-scatter":
      out += [dataclasses.replace(t, kind="all-reduce"), part]
    else:
      out += [part, t]
  return out


def table(found: list[Transfer]) -> str:
  """A line for each kind, axes, dtype and depth: executions and MiB of a device in a step, largest first."""
  rows: dict[tuple, list[Transfer]] = {}
  for t in found:
    rows.setdefault((t.kind + (" (DCN)" if t.dcn else ""), "*".join(t.axes), t.dtype, t.depth), []).append(t)
  lines = [("collective", "mesh axes", "dtype", "loops", "times a step", "MiB a step and device")]
  for (kind, axes, dtype, depth), ts in sorted(rows.items(), key=lambda row: -sum(t.total for t in row[1])):
    lines.append((kind, axes, dtype, str(depth), str(sum(t.times for t in ts)),
                  f"{sum(t.total for t in ts) / 2**20:.3f}"))  # fmt: skip
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
