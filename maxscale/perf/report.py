"""What is known of a compiled step before any chip runs it, as text and as JSON; perf/page.py shows it as HTML.

The JSON (`Report.to_json`) is flat and has version 1. Bytes and seconds are those of one JAX device and of one step.

  version, config, topology, slices, chips, devices, device_kind, mesh {axis: size}, parameters, active_parameters (that a
  token uses), batch, length, tokens (of a step), compile_seconds, versions {package: version}, flags {option: value}
  hbm {class: bytes}, peak, capacity, headroom, fits, host_bytes
  predicted: seconds, low, high (80% of the calibration's public step times lie within as much of their prediction),
    tokens_per_second_per_chip, mfu, mfu_full_mask, hfu, unmodelled (kernels that count as 0 seconds),
    classes {class: seconds; they add up to the step}, parts [{part, seconds, flops, at_peak (seconds), bound, classes}]
  collectives [{kind, over (mesh axes, or DCN), bytes, times, synchronous, asynchronous (executions), seconds, exposed}]
  advice [{text, seconds (gain), hbm (bytes more), by}]
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from maxscale.perf import advice, compiler, flops, hardware, search
from maxscale.perf.advice import Row
from maxscale.perf.compiled import aot, collectives, memory, predict, simulate, trace
from maxscale.perf.compiled.trace import Loop, Move, Work
from maxscale.sharding import topology

VERSION = 1
GIB, MIB = 2.0**30, 2.0**20
BUBBLE = "pipeline bubble"


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the model in one pass ("mlp backward").

  Attributes:
    flops: of its products and kernels, of one device, those that a mask leaves.
    at_peak: seconds that they would take at the chip's peak.
    bound: what most of its seconds are spent on: compute, HBM (elementwise work and copies), links, DCN or host.
    classes: class -> seconds.
  """

  part: str
  seconds: float
  flops: float
  at_peak: float
  bound: str
  classes: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Predicted:
  """As `perf.compiled.predict.Prediction`, with the bubble of a pipeline as a class, and by part."""

  seconds: float
  low: float
  high: float
  tokens_per_second_per_chip: float
  mfu: float
  mfu_full_mask: float
  hfu: float
  unmodelled: int
  classes: dict[str, float]
  parts: list[Part]


@dataclasses.dataclass(frozen=True)
class Report:
  """What the module says. `timeline`, `torus` and `peak_flops` (of a device) are for text and HTML alone."""

  config: str
  topology: str
  slices: int
  chips: int
  devices: int
  device_kind: str
  mesh: dict[str, int]
  parameters: int
  active_parameters: int
  batch: int
  length: int
  compile_seconds: float
  versions: dict[str, str]
  flags: dict[str, str]
  hbm: dict[str, float]
  peak: float
  capacity: float
  host_bytes: float
  predicted: Predicted
  collectives: list[Row]
  advice: list[advice.Suggestion] = dataclasses.field(default_factory=list)
  timeline: tuple[simulate.Span, ...] = ()
  torus: str = ""
  peak_flops: float = 0.0

  @property
  def headroom(self) -> float:
    return self.capacity - self.peak

  @property
  def fits(self) -> bool:
    return self.headroom >= 0

  @property
  def tokens(self) -> int:
    return self.batch * self.length

  def to_json(self) -> dict[str, Any]:
    """The schema above, as dicts and lists."""
    shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    plain = {"timeline", "torus", "peak_flops", "predicted", "collectives", "advice"}
    out = {"version": VERSION, **{k: v for k, v in shown.items() if k not in plain}}
    out |= {"tokens": self.tokens, "headroom": self.headroom, "fits": self.fits}
    out["predicted"] = dataclasses.asdict(self.predicted)
    out["collectives"] = [dataclasses.asdict(row) for row in self.collectives]
    out["advice"] = [dataclasses.asdict(a) for a in self.advice]
    return out


# ---- from a compiled step


def make(compiled: aot.Compiled) -> Report:
  """The report of a compiled step, with the options that this process compiles with.

  Raises:
    ValueError: the program has a loop of unknown trips, or the hardware table lacks the chip.
  """
  step, config, devices = compiled.step, compiled.step.config, compiled.step.mesh.devices
  kind = devices.flat[0].device_kind
  found, hbm, chip = predict.predict(compiled), memory.classes(compiled), hardware.chip_of(kind)
  assert chip  # otherwise there is no prediction
  peak, products = chip.bf16 / chip.devices, part_flops(compiled.traced.jaxpr)
  flags = compiler.in_force() | compiler.options(kind, config, compiled.slices)
  all_parts = parts(found.timeline, products, peak)
  rows = collective_rows(found.timeline, collectives.collectives(compiled.program), step.mesh)
  classes = with_bubble(found.timeline, step.schedule.stages, step.schedule.bubble)
  active, total = _parameters(step)
  suggestions = advice.advise(
    config, compiled.topology, compiled.slices, found.seconds, classes, {p.part: p.seconds for p in all_parts},
    hbm.headroom, rows, math.fsum(products.values()) / peak, chip.name, flags,
  )  # fmt: skip
  return Report(
    config=config.run.name, topology=compiled.topology, slices=compiled.slices, chips=found.chips, devices=devices.size,
    device_kind=kind, mesh=dict(step.mesh.shape), parameters=total, active_parameters=active,
    batch=config.data.batch_size, length=config.data.length, compile_seconds=compiled.seconds,
    versions=search.versions(), flags=flags,
    hbm={**hbm.parts, "unattributed": hbm.unattributed}, peak=hbm.peak, capacity=hbm.capacity,
    host_bytes=sum(hbm.host.values()), collectives=rows, advice=suggestions, timeline=found.timeline.spans,
    torus=topology.table(step.mesh), peak_flops=peak,
    predicted=Predicted(
      found.seconds, found.low, found.high, found.tokens_per_second_per_chip, found.mfu, found.mfu_full_mask, found.hfu,
      found.unmodelled, classes, all_parts),
  )  # fmt: skip


def _parameters(step: Any) -> tuple[int, int]:
  """Those that a token uses, and all."""
  m, specs = step.config.model, step.skeleton.specs.values()
  sizes = [(math.prod(s.logical), "experts" in s.names and len(s.logical) > 2) for s in specs]
  total = sum(n for n, _ in sizes)
  idle = sum(n for n, of_experts in sizes if of_experts) * (1 - m.experts_per_token / m.experts) if m.experts else 0
  return round(total - idle), total


def part_flops(jaxpr: Any, outer: str = "", times: float = 1) -> dict[str, float]:
  """Part -> FLOPs of the products that a traced step executes, of one device; kernels are not counted.

  Loops inside have names relative to what is around them.
  """
  out: dict[str, float] = collections.defaultdict(float)
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name = f"{outer}/{eqn.source_info.name_stack}"
    if eqn.primitive.name == "dot_general":
      out[trace.part_of(name)] += times * flops.dot_flops(eqn)
    many = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    if eqn.primitive.name != "pallas_call":
      for inner in flops.inner_jaxprs(eqn.params.values()):
        for part, n in part_flops(inner, name, times * many).items():
          out[part] += n
  return dict(out)


def parts(timeline: simulate.Timeline, products: Mapping[str, float], peak: float) -> list[Part]:
  """The parts of a step, the longest first.

  Args:
    products: part -> FLOPs of its products.
    peak: FLOP/s of a device.
  """
  totals: dict[str, dict[str, float]] = collections.defaultdict(dict)
  for (cls, part), seconds in timeline.totals().items():
    totals[part][cls] = totals[part].get(cls, 0.0) + seconds
  kernels: dict[str, float] = collections.defaultdict(float)
  for span, times in simulate.flat(timeline.spans):
    if isinstance(span.what, Work):
      kernels[span.what.part] += span.what.useful * times
  out = []
  for part, classes in totals.items():
    done = kernels[part] + (products.get(part, 0.0) if "matmul" in classes else 0.0)
    shares: dict[str, float] = collections.defaultdict(float)
    for cls, seconds in classes.items():
      shares[_resource(cls)] += seconds
    by_size = dict(sorted(classes.items(), key=lambda item: -item[1]))
    out.append(Part(part, sum(classes.values()), done, done / peak, max(shares, key=lambda r: shares[r]), by_size))
  return sorted(out, key=lambda p: -p.seconds)


def _resource(cls: str) -> str:
  """What a class of time is bound by."""
  if cls.startswith("exposed"):
    return "DCN" if cls.endswith("DCN") else "host" if cls.endswith("host") else "links"
  return "HBM" if cls in ("vector", "copy") else "compute"


def with_bubble(timeline: simulate.Timeline, stages: int, bubble: float) -> dict[str, float]:
  """Class -> seconds. Of a pipeline's loops, the share in which a stage waits is a class of its own."""
  out = timeline.classes()
  if stages == 1:
    return out
  waits = 0.0
  for span in timeline.spans:
    if isinstance(span.what, Loop) and any(isinstance(s.what, Loop) for s in span.inside):  # ticks, with layers inside
      for cls, seconds in simulate.Timeline(0.0, span.inside).classes().items():
        out[cls] -= seconds * span.what.times * bubble
        waits += seconds * span.what.times * bubble
  return dict(sorted({**out, BUBBLE: waits}.items(), key=lambda item: -item[1]))


def collective_rows(timeline: simulate.Timeline, found: Iterable[collectives.Collective], mesh: Any) -> list[Row]:
  """A row for each kind and axes, the most exposed first."""
  seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
  for span, times in simulate.flat(timeline.spans):
    if isinstance(span.what, Move):
      over = simulate.label(span.what).removeprefix(span.what.kind).strip() or "host"
      row = seconds[span.what.kind, over]
      for n, value in enumerate((span.end - span.start, span.waited, span.what.bytes, 1)):
        row[n] += value * times
  counts: collections.Counter[tuple[str, str, bool]] = collections.Counter()
  for c in found:
    over = "DCN" if c.dcn else "*".join(collectives.mesh_axes_of(c, mesh)) or "ICI"
    counts[c.kind, over, c.asynchronous] += c.times
  out = []
  for (kind, over), (took, waited, size, times) in seconds.items():
    synchronous = counts[kind, over, False]
    out.append(Row(kind, over, size, round(times), synchronous, round(times) - synchronous, took, waited))
  return sorted(out, key=lambda row: (-row.exposed, -row.seconds))


# ---- as text


def text(r: Report) -> str:
  """All of a report but the timeline, for a terminal."""
  return "\n\n".join([header(r), hbm_text(r), step_text(r), classes_text(r), parts_text(r), collectives_text(r),
                      advice_text(r)])  # fmt: skip


def header(r: Report) -> str:
  """What was compiled, and for what."""
  active = f" ({r.active_parameters:,} of a token)" if r.active_parameters != r.parameters else ""
  axes = " ".join(f"{axis}={n}" for axis, n in r.mesh.items() if n > 1) or "one device"
  slices = f"{r.slices} slices of " if r.slices > 1 else ""
  versions = ", ".join(f"{name} {version}" for name, version in r.versions.items())
  return (f"{r.config}: {r.parameters:,} parameters{active}, {r.batch} x {r.length} tokens\n"
          f"{slices}{r.topology}: {r.chips} chips, {axes}\n"
          f"compiled in {r.compile_seconds:.0f} s by {versions}; no chip was used")  # fmt: skip


def step_text(r: Report) -> str:
  """The predicted step, its throughput and its utilisation."""
  p = r.predicted
  unknown = f"; {p.unmodelled} kernels of unknown cost count as 0 s" if p.unmodelled else ""
  one, unit = _unit(p.seconds)
  return (f"step, predicted: {p.seconds * one:.3f} {unit} (80% interval {p.low * one:.3f} to {p.high * one:.3f} {unit}), "
          f"{p.tokens_per_second_per_chip:,.0f} tokens/s/chip{unknown}\n"
          f"predicted MFU {p.mfu:.1%}, with the full mask {p.mfu_full_mask:.1%}, HFU {p.hfu:.1%}, of "
          f"{r.peak_flops / 1e12:.0f} TFLOP/s a device in bfloat16")  # fmt: skip


def _unit(step: float) -> tuple[float, str]:
  """In what the seconds of a step, or of parts of it, are read well."""
  return (1.0, "s") if step >= 1 else (1e3, "ms")


def hbm_text(r: Report) -> str:
  """Memory of a device by class, and whether it fits."""
  rows = [(name, f"{size / GIB:.3f}", f"{size / r.peak:.1%}") for name, size in r.hbm.items()]
  rows.append(("peak", f"{r.peak / GIB:.3f}", "100.0%"))
  verdict = f"fits: {r.headroom / GIB:.2f} GiB of {r.capacity / GIB:.2f} are free"
  if not r.fits:
    verdict = f"does NOT fit: {-r.headroom / GIB:.2f} GiB more than the {r.capacity / GIB:.2f} of the chip"
  host = f"; {r.host_bytes / GIB:.2f} GiB in host memory" if r.host_bytes else ""
  return f"{_table([('HBM of a device', 'GiB', 'of peak'), *rows])}\n{verdict}{host}"


def classes_text(r: Report) -> str:
  """Seconds of a step by class."""
  p, (one, unit) = r.predicted, _unit(r.predicted.seconds)
  rows = [(cls, f"{s * one:.4f}", f"{s / p.seconds:.1%}") for cls, s in p.classes.items()]
  return _table([("time by class, predicted", unit, "of step"), *rows])


def parts_text(r: Report) -> str:
  """Seconds and FLOPs of a step by part of the model."""
  p, (one, unit) = r.predicted, _unit(r.predicted.seconds)
  rows = []
  for part in p.parts:
    share = f"{part.at_peak / part.seconds:.0%}" if part.flops and part.seconds else "-"
    rows.append((part.part, f"{part.seconds * one:.4f}", f"{part.seconds / p.seconds:.1%}", f"{part.flops / 1e12:.2f}",
                 f"{part.at_peak * one:.4f}", share, part.bound))  # fmt: skip
  head = ("time by part, predicted", unit, "of step", "TFLOP", f"{unit} at peak", "of peak", "bound by")
  return _table([head, *rows])


def collectives_text(r: Report) -> str:
  """Collectives by kind and axes: bytes, executions and seconds."""
  one, unit = _unit(r.predicted.seconds)
  rows = [(c.kind, c.over, f"{c.bytes / MIB:,.1f}", str(c.times), str(c.synchronous), f"{c.seconds * one:.4f}",
           f"{c.exposed * one:.4f}") for c in r.collectives]  # fmt: skip
  head = ("collective", "over", "MiB", "times", "synchronous", unit, f"exposed {unit}, predicted")
  return _table([head, *rows]) if rows else "no collectives"


def advice_text(r: Report) -> str:
  """What to try next, numbered."""
  lines = [f"  {n}. {a}" for n, a in enumerate(r.advice, 1)]
  return "\n".join(["what to try next:", *(lines or ["  nothing that would gain 1% of the step was found"])])


def _table(rows: list[tuple[str, ...]]) -> str:
  """Text to the left, numbers to the right."""
  widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
  number = [all(row[n][:1].isdigit() or row[n][:1] in "-" for row in rows[1:]) for n in range(len(rows[0]))]
  lines = []
  for row in rows:
    cells = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, number))
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
