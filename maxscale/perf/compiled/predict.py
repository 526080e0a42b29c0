"""What a compiled step will take on its chips: seconds with an interval, MFU, and where the time goes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from maxscale.perf import calibration, flops, hardware
from maxscale.perf.compiled import aot, simulate, trace


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Of one step, by the calibrated walk of its schedule. Not a measurement.

  Attributes:
    timeline: the walk, with the central rates.
    low, high: seconds; 80% of the public step times of the calibration lie within as much of their prediction.
    tokens: of a step, over all chips.
    chips: of all slices.
    hfu: of `executed`.
    unmodelled: kernels that the walk knows no cost of: they count as 0.
  """

  timeline: simulate.Timeline
  low: float
  high: float
  tokens: int
  chips: int
  mfu: float
  mfu_full_mask: float
  hfu: float
  unmodelled: int

  @property
  def seconds(self) -> float:
    return self.timeline.seconds

  @property
  def tokens_per_second_per_chip(self) -> float:
    return self.tokens / self.seconds / self.chips

  @functools.cached_property
  def classes(self) -> dict[str, float]:
    """Class -> seconds of the step, largest first; they add up to it."""
    return self.timeline.classes()


def executed(jaxpr: Any, devices: int, timeline: simulate.Timeline) -> float:
  """Matmul FLOPs of a device in a step, recomputation included.

  Those of kernels are the timeline's: JAX's attention has no cost estimate, and that of experts' kernels has all rows
  that there is room for.
  """
  return flops.jaxpr_flops(jaxpr, kernels=False) / devices + math.fsum(
    span.what.useful * times for span, times in simulate.flat(timeline.spans) if isinstance(span.what, trace.Work)
  )


def events_of(compiled: aot.Compiled) -> trace.Trace:
  """The trace of a compiled step, with as many rows for its experts as come when all are chosen equally often."""
  mesh, parts = compiled.step.mesh, compiled.step.rules.factor("experts", "compute")
  spare = min(compiled.step.config.sharding.expert_buffer, parts) if parts > 1 else 1.0
  kind = mesh.devices.flat[0].device_kind
  return trace.of_program(compiled.program, trace.coordinates(mesh), kind, mesh, spare)


def predict(compiled: aot.Compiled) -> Prediction:
  """The prediction for a compiled step.

  Raises:
    ValueError: the trips of a loop in the program are unknown, or the hardware table lacks the chip.
  """
  mesh, config = compiled.step.mesh, compiled.step.config
  device = mesh.devices.flat[0]
  chip = hardware.chip_of(device.device_kind)
  if chip is None:
    raise ValueError(f"the hardware table (perf/hardware.py) has no chip {device.device_kind!r}")
  events = events_of(compiled)
  timeline = simulate.run(events, chip, calibration.rates(chip))
  low, high = calibration.interval(chip, timeline.classes().get("grouped", 0.0) / timeline.seconds)
  tokens, devices, seconds = config.data.batch_size * config.data.length, mesh.devices.size, timeline.seconds
  model = flops.from_config(config, compiled.step.vocab_size)
  rate, peak = tokens / seconds / devices, chip.bf16 / chip.devices
  return Prediction(
    timeline=timeline, low=seconds * low, high=seconds * high, tokens=tokens, chips=devices // chip.devices,
    mfu=flops.mfu(model, config.data.length, rate, peak),
    mfu_full_mask=flops.mfu_full_mask(model, config.data.length, rate, peak),
    hfu=executed(compiled.traced.jaxpr, devices, timeline) / seconds / peak,
    unmodelled=sum(1 for w, _ in simulate.flat(timeline.spans) if isinstance(w.what, trace.Work)
                   and w.what.kind == "kernel" and w.end == w.start),
  )  # fmt: skip
