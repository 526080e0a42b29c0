"""What a compiled step will take on its chips: seconds with an interval, MFU, and where the time goes."""

from __future__ import annotations

import dataclasses
import functools

from maxscale.perf import aot, calibration, flops, hardware, simulate, trace


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Of one step, by the calibrated walk of its schedule. Not a measurement.

  Attributes:
    timeline: the walk, with the central rates.
    low, high: seconds; 80% of the public step times of the calibration lie within as much of their prediction.
    tokens: of a step, over all chips.
    chips: of all slices.
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
  events = trace.of_program(compiled.program, trace.coordinates(mesh), device.device_kind, mesh)
  timeline = simulate.run(events, chip, calibration.rates(chip))
  low, high = calibration.interval(chip)
  tokens, devices, seconds = config.data.batch_size * config.data.length, mesh.devices.size, timeline.seconds
  model = flops.from_config(config, compiled.step.vocab_size)
  rate, peak = tokens / seconds / devices, chip.bf16 / chip.devices
  return Prediction(
    timeline=timeline, low=seconds * low, high=seconds * high, tokens=tokens, chips=devices // chip.devices,
    mfu=flops.mfu(model, config.data.length, rate, peak),
    mfu_full_mask=flops.mfu_full_mask(model, config.data.length, rate, peak),
    hfu=flops.jaxpr_flops(compiled.traced.jaxpr) / devices / seconds / peak,
    unmodelled=sum(1 for w, _ in simulate.flat(timeline.spans) if isinstance(w.what, trace.Work)
                   and w.what.kind == "kernel" and w.end == w.start),
  )  # fmt: skip
