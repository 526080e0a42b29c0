"""What a run says while it runs: rates and MFU of completed steps, the live line, metrics and step events."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from typing import Any

import jax

from maxscale import distributed
from maxscale.config import Config
from maxscale.goodput.events import EventLog
from maxscale.goodput.ledger import duration
from maxscale.goodput.metrics import MetricsWriter
from maxscale.perf import flops, hardware


@dataclasses.dataclass(frozen=True)
class Rates:
  """What a step's speed is measured against. peak: FLOP/s of a device, or None: MFU is then not a number."""

  model: flops.ModelFlops
  devices: int
  peak: float | None

  def of(self, tokens: int, length: int, seconds: float, executed: float) -> dict[str, float]:
    """tokens/s, tokens/s/device and the three utilisations of a step of `tokens` tokens in `seconds`.

    `executed` is the matmul FLOPs that the program really runs for the step, recomputation included.
    """
    rate, peak = tokens / seconds, (self.peak or math.nan) * self.devices
    return {
      "tokens_per_second": rate,
      "tokens_per_second_per_device": rate / self.devices,
      "mfu": flops.mfu(self.model, length, rate, peak),
      "mfu_full_mask": flops.mfu_full_mask(self.model, length, rate, peak),
      "hfu": executed / seconds / peak,
    }


def rates(config: Config, program: Any) -> Rates:
  """The rates of a config's steps on the devices of its program. On a CPU, process 0 measures what stands for a peak."""
  devices = program.mesh.devices
  device, peak = devices.flat[0], None
  if config.log.peak_tflops:
    peak = config.log.peak_tflops * 1e12
  elif device.platform != "cpu":
    known = hardware.peak_flops(device, config.model.compute_dtype)
    peak = known.flops if known else None
  elif not distributed.index:
    peak = hardware.measured_matmul_flops(config.model.compute_dtype).flops / devices.size
  return Rates(flops.from_config(config, program.vocab_size), devices.size, peak)


@dataclasses.dataclass(frozen=True)
class Pending:
  """A step that was dispatched and whose metrics are not read yet. step: steps done when it ends."""

  step: int
  metrics: dict[str, jax.Array]
  tokens: int
  length: int
  executed: float
  dispatched: float


class Telemetry:
  """Reads the metrics of a step once it is complete. Nothing here runs between a batch and its dispatch.

  `monitor_every`: steps between those whose metrics of each layer are written. `skipped`: steps that earlier attempts
  skipped.
  """

  def __init__(
    self, log: EventLog, writer: MetricsWriter | None, rates: Rates, steps: int, every: int, monitor_every: int = 0,
    skipped: int = 0,
  ):  # fmt: skip
    self._log, self._writer, self._rates, self._steps, self._every = log, writer, rates, steps, every
    self._looks = lambda step: monitor_every and step % monitor_every == 0
    self._last_end = 0.0
    self._skipped = skipped
    self._recent: list[float] = []

  def complete(self, pending: Pending) -> dict[str, float]:
    """Waits for a step to end; records and shows it. Its time runs from the end of the one before, or its dispatch."""
    arrays = jax.device_get(pending.metrics)
    values = {k: float(v) for k, v in arrays.items() if not v.shape}
    end = time.perf_counter()
    seconds = end - max(self._last_end, pending.dispatched)
    self._last_end = end
    self._recent = [*self._recent[-49:], seconds]
    rates = self._rates.of(pending.tokens, pending.length, seconds, pending.executed)
    self._log.event("step", step=pending.step, seconds=round(seconds, 6), tokens=pending.tokens)
    if values["skipped"] > self._skipped:
      self._skipped = int(values["skipped"])
      self._log.event("skip", step=pending.step)
    if self._writer:
      layers = {
        f"{k}/{i:03d}": x for k, v in arrays.items() if v.shape and self._looks(pending.step) for i, x in enumerate(v)
      }
      self._writer.write(pending.step, {**values, **rates, "step_seconds": seconds, **layers})
      if pending.step % self._every == 0 or pending.step in (1, self._steps):
        self._show(pending.step, values, rates)
    return values

  def _show(self, step: int, values: dict[str, float], rates: dict[str, float]) -> None:
    typical = sorted(self._recent)[len(self._recent) // 2]
    mfu = "n/a" if math.isnan(rates["mfu"]) else f"{rates['mfu']:.1%}"
    skipped = f"  skipped {self._skipped}" if self._skipped else ""
    line(
      f"step {step}/{self._steps}  loss {values['loss']:.4f}  {rates['tokens_per_second']:,.0f} tokens/s  "
      f"MFU {mfu}  grad norm {values['grad_norm']:.2f}  lr {values['learning_rate']:.2e}  "
      f"ETA {duration(typical * (self._steps - step))}{skipped}",
      live=step not in (1, self._steps),
    )


def line(text: str, live: bool = False) -> None:
  """Prints a line, in process 0; on a terminal a live one is replaced by the next."""
  if distributed.index:
    return
  if sys.stdout.isatty():
    print(f"\r\x1b[2K{text}", end="" if live else "\n", flush=True)
  else:
    print(text, flush=True)
