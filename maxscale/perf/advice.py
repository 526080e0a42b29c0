"""What to try next with a config, and what would make one fit: changes, each with what it is expected to gain.

By the schedule: what the compiled program waits for, or spends beyond what its products need; more than that cannot be
gained. By the closed form (perf/closed/analytic.py): the effect of one changed option, scaled to the step as it was predicted.
Nothing here was compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maxscale import config as config_lib
from maxscale.config import Config, ConfigError
from maxscale.perf import search
from maxscale.perf.closed import analytic
from maxscale.sharding import chips, mesh

GIB = 2.0**30
SMALLEST = 0.01  # of the step: what gains less is not worth a try
MARGIN = 0.02  # of HBM: the closed form is not exact, and the compiler's limit is below the chip's
# Without these a collective is taken by a fusion, or waits on the TensorCore, on chips with SparseCores.
ASYNCHRONOUS = ("xla_tpu_enable_async_collective_fusion_fuse_{}=false",
                "xla_tpu_enable_sparse_core_collective_offload_{}=true",
                "xla_tpu_enable_{}_offload_tracing=true")  # fmt: skip
OFFLOADED = ("all-gather", "all-reduce", "reduce-scatter")
SPARSECORES = ("TPU v5p", "TPU v6e", "TPU7x")
TILES, KIB = "xla_tpu_scoped_vmem_limit_kib", {"TPU v5p": "65536", "TPU v6e": "98304", "TPU7x": "65536"}
KINDS = ("remat", "batch", "microbatches", "repeats", "mesh", "context", "offload")  # of changes that may be faster


@dataclasses.dataclass(frozen=True)
class Row:
  """Collectives of a kind over the same axes of the mesh ("DCN": between slices; "host": to or from its memory).

  Attributes:
    bytes: of a device, of all executions.
    times: executions in a step; of them `synchronous` and `asynchronous`.
    seconds: that they take alone; `exposed`: that the step waits for them, and for what is before them on the links.
  """

  kind: str
  over: str
  bytes: float
  times: int
  synchronous: int
  asynchronous: int
  seconds: float
  exposed: float


@dataclasses.dataclass(frozen=True)
class Suggestion:
  """A change to try.

  Attributes:
    text: what to change, and why.
    seconds: what a step, of as many tokens as now, would take less.
    hbm: bytes that a device would need more.
    by: "schedule": `seconds` is a bound; "closed form".
  """

  text: str
  seconds: float
  hbm: float
  by: str

  def __str__(self) -> str:
    most = "up to " if self.by == "schedule" else "about "
    memory = f", {self.hbm / GIB:+.2f} GiB" if abs(self.hbm) >= 0.005 * GIB else ""
    gain = f"{self.seconds:.3f} s" if self.seconds >= 0.01 else f"{self.seconds * 1e3:.3f} ms"
    return f"{self.text}: {most}{gain} less{memory} (predicted by the {self.by})"


# ---- changes of one option


def changes(config: Config, shape: mesh.MeshShape) -> Iterator[tuple[str, search.Options]]:
  """(kind, options) of configs beside this one."""
  c, s = config, config.sharding
  yield from (("remat", policy) for policy in search.policies(c))
  yield "batch", {"data.batch_size": 2 * c.data.batch_size}
  yield from (("microbatches", {"sharding.microbatches": n}) for n in _halves(s.microbatches))
  if shape.sizes["pipeline"] > 1:
    yield from (("repeats", {"sharding.repeats": n}) for n in _halves(s.repeats))
  if shape.sizes["context"] > 1:
    yield from (("context", {"sharding.context": way}) for way in ("ring", "gather", "ulysses") if way != s.context)
  yield "offload", {"optimizer.offload": not c.optimizer.offload}
  yield from (("state", {"optimizer.state_dtype": d}) for d in ("bfloat16", "int8") if d != c.optimizer.state_dtype)
  inside = dict(zip(shape.sizes, shape.ici))
  for a, n in inside.items():
    for b, m in inside.items():
      if a != b and n % 2 == 0:
        yield "mesh", {f"mesh.{a}": n // 2, f"mesh.{b}": 2 * m}


def _halves(n: int) -> Iterator[int]:
  """Numbers that are twice, four times and half as large."""
  yield from (2 * n, 4 * n, *([n // 2] if n % 2 == 0 else []))


def written(options: Mapping[str, Any]) -> str:
  """Options as a command takes them."""
  shown = {p: v for p, v in options.items() if p != "remat.table" or v}
  return " ".join(f"--config.{path}={_value(value)}" for path, value in shown.items())


def _value(value: Any) -> str:
  return f'"{value}"' if isinstance(value, dict) else str(value)


@dataclasses.dataclass(frozen=True)
class _Near:
  kind: str
  options: search.Options
  seconds: float  # that a step of as many tokens takes more
  bytes: float  # that a device needs more


def estimate(config: Config, options: search.Options, topology: str, slices: int) -> analytic.Estimate | None:
  """The closed form of a changed config; None where the config cannot run so."""
  chip, dims = analytic.parse(topology)
  changed = search.with_options(config, options)
  try:
    config_lib.check(changed)
    step, _ = analytic.program(changed, chip, dims, slices)
    step.check(changed.data.batch_size, changed.data.length)
    return analytic.estimate(changed, chip, dims, slices)
  except ConfigError:
    return None


def near(config: Config, topology: str, slices: int) -> tuple[analytic.Estimate, list[_Near]]:
  """The config by the closed form, and those beside it that can run.

  Raises:
    ConfigError: the mesh does not have the topology's devices.
  """
  chip, dims = analytic.parse(topology)
  now, out = analytic.estimate(config, chip, dims, slices), []
  for kind, options in changes(config, mesh.resolve(config.mesh, math.prod(dims) * chip.devices * slices, slices)):
    if e := estimate(config, options, topology, slices):
      times = options.get("data.batch_size", config.data.batch_size) / config.data.batch_size
      out.append(_Near(kind, options, e.step_seconds / times - now.step_seconds, e.bytes - now.bytes))
  return now, out


# ---- what to try


def advise(
  config: Config, topology: str, slices: int, step_seconds: float, classes: Mapping[str, float],
  parts: Mapping[str, float], headroom: float, rows: Sequence[Row], products: float, chip_name: str,
  flags: Mapping[str, str], count: int = 5,
) -> list[Suggestion]:  # fmt: skip
  """The suggestions that gain most, best first; a look at elementwise work last.

  Args:
    step_seconds, classes, parts: predicted; class -> seconds, part -> seconds.
    headroom: bytes of HBM that are free.
    rows: collectives.
    products: seconds that the matmuls of `classes` would take at the peak.
    flags: that the program was compiled with.
  """
  found = [*_waiting(rows, chip_name, flags), *_tiles(classes, products, chip_name, flags)]
  now, nearby = near(config, topology, slices)
  again = {part: s for part, s in parts.items() if part.endswith("again")}
  for kind in KINDS:
    of_kind = [n for n in nearby if n.kind == kind and n.bytes <= headroom - MARGIN * analytic.parse(topology)[0].hbm]
    if of_kind:
      best = min(of_kind, key=lambda n: (n.seconds, n.bytes))
      gain, why = -best.seconds * step_seconds / now.step_seconds, ""
      if kind == "remat":
        gain = min(gain, sum(again.values()))
        largest = sorted(again, key=lambda part: -again[part])[:3]
        spent = ", ".join(f"{part.removesuffix(' again')} {again[part]:.3f} s" for part in largest)
        why = f" (computed again now: {spent})" if spent else ""
      found.append(Suggestion(f"{written(best.options)}{why}", gain, best.bytes, "closed form"))
  worth = [s for s in found if s.seconds > SMALLEST * step_seconds]
  # what no option changes comes last, however much it is
  return [*sorted(worth, key=lambda s: -s.seconds), *_elementwise(classes, step_seconds)][:count]


def _set(flags: Iterable[tuple[str, str]]) -> str:
  return " ".join(f"--config.run.flags.{name}={value}" for name, value in flags)


def _waiting(rows: Sequence[Row], chip_name: str, flags: Mapping[str, str]) -> Iterator[Suggestion]:
  """Collectives for which the step stands still."""
  for kind in dict.fromkeys(r.kind for r in rows if r.kind in OFFLOADED):
    waits = [r for r in rows if r.kind == kind and r.synchronous and r.exposed and r.over != "DCN"]
    options = (tuple(f.format(kind.replace("-", "_")).split("=")) for f in ASYNCHRONOUS)
    wanted = [(name, value) for name, value in options if flags.get(name) != value]
    if waits and wanted and chip_name in SPARSECORES:
      over, count = ", ".join(dict.fromkeys(r.over for r in waits)), sum(r.synchronous for r in waits)
      yield Suggestion(f"{_set(wanted)} for {count} synchronous {kind}s over {over}", sum(r.exposed for r in waits), 0.0,
                       "schedule")  # fmt: skip
  across = sum(r.exposed for r in rows if r.over == "DCN")
  if across:
    yield Suggestion("--config.optimizer.grad_reduce_dtype=bfloat16 halves what crosses slices (DCN)", across / 2, 0.0,
                     "schedule")  # fmt: skip


def _tiles(classes: Mapping[str, float], products: float, chip_name: str, flags: Mapping[str, str]) -> Iterator:
  """Products that are slower than long ones are: larger tiles need more of the vector memory."""
  spent, best = classes.get("matmul", 0.0), products / analytic.Efficiency().matmul
  if products and TILES not in flags and chip_name in KIB:
    yield Suggestion(f"{_set([(TILES, KIB[chip_name])])} for larger tiles: products reach {products / spent:.0%} of the "
                     "peak (the compile takes some times longer)", spent - best, 0.0, "schedule")  # fmt: skip


def _elementwise(classes: Mapping[str, float], step_seconds: float) -> Iterator[Suggestion]:
  work = classes.get("vector", 0.0) + classes.get("copy", 0.0)
  if work > 0.2 * step_seconds:
    yield Suggestion(f"{work / step_seconds:.0%} of the step is elementwise work and copies: the largest parts are in the "
                     "table, their instructions in the program that --hlo writes", work, 0.0, "schedule")  # fmt: skip


# ---- what would make it fit


def to_fit(config: Config, topology: str, slices: int, excess: float, count: int = 3) -> list[str]:
  """Changes of one option, or of two, that save `excess` bytes of a device by the closed form; the fastest first."""
  now, nearby = near(config, topology, slices)
  saving = [n for n in nearby if n.bytes < 0 and n.kind != "batch"]
  if larger := _larger(config, topology, slices, now):
    saving.append(larger)
  enough = _fastest_of_kind([n for n in saving if -n.bytes >= excess])
  if len(enough) < count:
    firsts = _most_of_kind([n for n in saving if -n.bytes < excess])
    pairs = []
    for a, b in itertools.combinations(firsts, 2):
      options = {**a.options, **b.options}
      if e := estimate(config, options, options.get("mesh.topology", topology), slices):
        pairs.append(_Near(f"{a.kind} {b.kind}", options, e.step_seconds - now.step_seconds, e.bytes - now.bytes))
    enough += sorted((n for n in pairs if -n.bytes >= excess), key=lambda n: n.seconds)
  return [_says(n, now.step_seconds) for n in enough[:count]]


def _most_of_kind(found: Sequence[_Near]) -> list[_Near]:
  return list({n.kind: n for n in sorted(found, key=lambda n: -n.bytes)}.values())


def _fastest_of_kind(found: Sequence[_Near]) -> list[_Near]:
  best: dict[str, _Near] = {}
  for n in sorted(found, key=lambda n: (n.seconds, n.bytes)):
    best.setdefault(n.kind, n)
  return list(best.values())


def _larger(config: Config, topology: str, slices: int, now: analytic.Estimate) -> _Near | None:
  """The same config on the next shape of a slice with twice the chips or more."""
  kind, dims = topology.partition(":")[0], analytic.parse(topology)[1]
  for shape in (s for s in chips.shapes(kind) if math.prod(s) >= 2 * math.prod(dims)):
    name = f"{kind}:{'x'.join(map(str, shape))}"
    options = {} if -1 in dataclasses.astuple(config.mesh) else {"mesh.fsdp": -1}
    if e := estimate(config, options, name, slices):
      seconds = e.step_seconds - now.step_seconds
      return _Near("chips", {"mesh.topology": name, **options}, seconds, e.bytes - now.bytes)
  return None


def _says(n: _Near, known: float) -> str:
  slower = n.seconds / known
  pace = f"the step {abs(slower):.0%} {'longer' if slower > 0 else 'shorter'}" if abs(slower) >= 0.005 else "as fast"
  return f"{written(n.options)}: about {-n.bytes / GIB:.1f} GiB less, {pace}"
