"""The rates of chips that no compiler says, fitted on public step times of programs of others.

`calibration.json` has a row for each: model, chip, layout, the published seconds with their source, and the trace of a
program with the same model, sharding, batch and recomputation, compiled by a newer compiler; "differences" says where
it is known not to be the program that ran. None of them is a program of this project.

What is fitted, as little as the rows can tell:
  clock      one factor for all chips on the clock that the peak implies, and one for each chip that is drawn to it
  attention  fraction of the peak of that part of the matrix units that the heads of attention kernels fill
  grouped    fraction of the peak in kernels of experts, on whole tiles: as long as no row has them it is an assumption
  host       factor on the documented rate between a chip and its host, one for all
  slices     share of a step that each doubling of slices adds to it
Links are not fitted: they reach the usable rate that the hardware table has.

`python -m maxscale.perf.calibration [--add STEP.json]` adds a published step, fits again and rewrites `calibration.json`.
STEP.json: name, model, seconds, source, differences, versions; `program`: a file with `compiled.as_text()`, also .gz;
`device_kind` as JAX calls it; `coordinates`: (slice, x, y, z, core) of its devices in their order; and, if transfers
between chip and host outside loops are to be left out from a size on, `host_below`: that many bytes (say so in differences).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxscale.perf.compiled import program, simulate, trace
from maxscale.perf.compiled.simulate import Rates
from maxscale.perf.hardware import CHIPS, Chip, chip_of

# FLOPs of a device and cycle: matrix units of 128x128 (v4, v5e: 4 a core; v4, v5p: two cores a device) or 256x256 (2 or 4
# multiply and add); with the published peaks these give 1.05, 1.5, 1.75, 1.75 and 2.2 GHz.
_PER_CYCLE = {"TPU v4": 2 * 8 * 128**2, "TPU v5e": 2 * 4 * 128**2, "TPU v5p": 2 * 8 * 128**2, "TPU v6e": 2 * 4 * 256**2,
              "TPU7x": 2 * 4 * 256**2, "TPU8t": 2 * 4 * 256**2}  # fmt: skip
_HOST = 32e9  # bytes/s of a device where the table has no rate of the host
# Constant -> what its logarithm is drawn to, with what weight beside the squared log error of a row, and its bounds.
# Attention: a little less than long products were measured at (0.82 of v6e, 0.83 of TPU7x); few rows have much of it.
_CONSTANTS = {
  "clock": (math.log(1.0), 0.0, (-0.4, 0.4)),
  "attention": (math.log(0.7), 0.03, (-1.6, -0.05)),
  "grouped": (math.log(0.75), 0.003, (-1.2, -0.02)),
  "host": (math.log(2.0), 0.003, (-0.5, 2.0)),
  "slices": (math.log(0.02), 0.0003, (-7.0, -2.0)),
}
_CHIP_PULL, _CHIP_BOUND = 0.1, 0.3  # the same of a chip's own clock factor to that of all
COVERAGE = 0.8
FILE = pathlib.Path(__file__).with_name("calibration.json")


@dataclasses.dataclass(frozen=True)
class Row:
  """A published step: `seconds`, what ran, and the trace of its equivalent."""

  name: str
  chip: str
  model: str
  seconds: float
  source: str
  differences: tuple[str, ...]
  events: trace.Trace


@dataclasses.dataclass(frozen=True)
class Fit:
  """Logarithms of the constants, and of a chip's own clock factor beside that of all."""

  clock: float
  attention: float
  grouped: float
  host: float
  slices: float
  chips: dict[str, float]

  def rates(self, chip: Chip) -> Rates:
    """Those of a chip; of one without rows, those of all."""
    nominal = chip.bf16 / chip.devices / _PER_CYCLE[chip.name]
    host = (chip.host_bytes or _HOST * chip.devices) / chip.devices
    return Rates(
      clock=nominal * math.exp(self.clock + self.chips.get(chip.name, 0.0)), attention=math.exp(self.attention) * min(1.0, 128 / chip.tile),
      grouped=math.exp(self.grouped), links=1.0, host=host * math.exp(self.host),
      slices=math.exp(self.slices),
    )  # fmt: skip


@functools.cache
def rows() -> tuple[Row, ...]:
  """The published steps."""
  return tuple(Row(r["name"], r["chip"], r["model"], r["seconds"], r["source"], tuple(r["differences"]),
                   trace.from_json(r["trace"])) for r in json.loads(FILE.read_text())["rows"])  # fmt: skip


def _chip(name: str) -> Chip:
  return next(chip for chip in CHIPS if chip.name == name)


def predicted(row: Row, fit: Fit) -> float:
  """Seconds of a row under a fit."""
  chip = _chip(row.chip)
  return simulate.run(row.events, chip, fit.rates(chip)).seconds


def fit(rows: Sequence[Row]) -> Fit:
  """The constants with the smallest squared errors of log seconds, drawn to their priors."""
  from scipy import optimize

  chips = sorted({row.chip for row in rows})
  priors, weights, bounds = map(list, zip(*_CONSTANTS.values()))
  priors += [0.0] * len(chips)
  pulls = np.sqrt(weights + [_CHIP_PULL] * len(chips))
  low, high = np.transpose(bounds + [(-_CHIP_BOUND, _CHIP_BOUND)] * len(chips))

  def make(x: np.ndarray) -> Fit:
    values = x.tolist()
    return Fit(**dict(zip(_CONSTANTS, values)), chips=dict(zip(chips, values[len(_CONSTANTS) :])))

  def errors(x: np.ndarray) -> np.ndarray:
    made = make(x)
    return np.array([math.log(predicted(row, made) / row.seconds) for row in rows] + list(pulls * (x - priors)))

  def slopes(x: np.ndarray, step: float = 1e-4) -> np.ndarray:
    return np.stack([(errors(x + d) - errors(x - d)) / (2 * step) for d in step * np.eye(len(x))], axis=1)

  options: dict[str, Any] = {"jac": slopes, "bounds": (low, high), "ftol": 1e-6, "xtol": 1e-5, "max_nfev": 30}
  return make(optimize.least_squares(errors, priors, **options).x)


def _group(row: Row, key: str) -> str | tuple[str, str]:
  return row.chip if key == "chip" else (row.model, row.chip)


@functools.cache
def _without(key: str) -> dict[str | tuple[str, str], Fit]:
  """Group of rows -> the fit of all others."""
  out = {}
  for group in dict.fromkeys(_group(r, key) for r in rows()):
    others = [r for r in rows() if _group(r, key) != group]
    out[group] = fit(others) if others else Fit(**{k: prior for k, (prior, _, _) in _CONSTANTS.items()}, chips={})
  return out


def left_out(key: str) -> dict[str, float]:
  """Name of each row -> predicted / published - 1, by a fit without the rows that share its `key`.

  Args:
    key: "chip", or "model": the rows of the same model on the same chip.
  """
  return {r.name: predicted(r, _without(key)[_group(r, key)]) / r.seconds - 1 for r in rows()}


@functools.cache
def _fitted() -> tuple[Fit, float, tuple[float, float]]:
  data = json.loads(FILE.read_text())["fit"]
  return Fit(**{k: data[k] for k in (*_CONSTANTS, "chips")}), data["spread"], tuple(data["experts"])


def rates(chip: Chip) -> Rates:
  """The fitted rates of a chip."""
  return _fitted()[0].rates(chip)


def interval(chip: Chip, experts: float = 0.0) -> tuple[float, float]:
  """(low, high): factors of a prediction between which `COVERAGE` of the published steps lie.

  From the errors of rows whose model and chip were left out; twice as wide for a chip without a row.

  Args:
    experts: share of the step in kernels of experts, which few rows have: it is widened by what their rate changes when
      one of the models that have them is left out.
  """
  made, spread, reached = _fitted()
  spread *= 1 if chip.name in made.chips else 2
  slow, fast = (experts * (math.exp(made.grouped - log) - 1) for log in reached)
  return math.exp(-spread) + fast, math.exp(spread) + slow


def kept(step: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """The row of `calibration.json` for a step, as the module says; `program` is relative to the folder."""
  chip = chip_of(step["device_kind"])
  if chip is None:
    raise ValueError(f"the hardware table has no {step['device_kind']!r}")
  data = (folder / step["program"]).read_bytes()
  text = (gzip.decompress(data) if step["program"].endswith(".gz") else data).decode()
  events = trace.of_program(program.read(text), step["coordinates"], step["device_kind"])
  limit = step.get("host_below", math.inf)
  out = {e.key for e in events if isinstance(e, trace.Start) and e.move.kind in trace.HOST and e.move.bytes >= limit}
  events = [e for e in events if not (isinstance(e, trace.Start | trace.Done) and e.key in out)]
  same = {key: step[key] for key in ("name", "model", "seconds", "source", "differences", "versions")}
  return {**same, "chip": chip.name, "trace": trace.to_json(events)}


def write(made: list[dict[str, Any]]) -> None:
  """Writes `calibration.json`, a row a line, with the fit of all rows."""
  lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in made)
  for fitted in ({}, None):  # the rows are there before they are fitted
    FILE.write_text(f'{{"fit": {json.dumps(refit() if fitted is None else fitted)},\n"rows": [\n{lines}\n]}}\n')
    for cached in (rows, _without, _fitted):
      cached.cache_clear()


def refit() -> dict:
  """What `calibration.json` keeps of a fit of all rows.

  Spread: that which covers `COVERAGE` of the errors. Experts: the least and largest rate of their kernels without one of
  the models that have them, or around the prior where none has.
  """
  made, errors = fit(rows()), sorted(abs(math.log1p(e)) for e in left_out("model").values())
  spread = errors[min(len(errors) - 1, math.ceil(COVERAGE * (len(errors) + 1)) - 1)]
  models = {_group(r, "model") for r in rows() if _has_experts(r.events)}
  reached = [made.grouped, *(_without("model")[m].grouped for m in models)]
  reached += [made.grouped + side for side in (-0.2, 0.2)] if not models else []
  return {**dataclasses.asdict(made), "spread": spread, "experts": [min(reached), max(reached)]}


def _has_experts(events: trace.Trace) -> bool:
  return any(_has_experts(e.body) if isinstance(e, trace.Loop) else isinstance(e, trace.Work) and e.kind == "grouped"
             for e in events)  # fmt: skip


def report() -> str:
  """A line for each row, and the summary: errors in the fit, and with the row's model or chip left out."""
  made, low_high = _fitted()[0], {r.name: interval(_chip(r.chip)) for r in rows()}
  by_model, by_chip = left_out("model"), left_out("chip")
  lines = [f"{'step':44}{'published':>10}{'predicted':>10}{'error':>8}{'model out':>10}{'chip out':>9}  source"]
  inside = 0
  for r in rows():
    seconds = predicted(r, made)
    inside += low_high[r.name][0] <= 1 / (1 + by_model[r.name]) <= low_high[r.name][1]
    lines.append(f"{r.name:44}{r.seconds:9.3f}s{seconds:9.3f}s{seconds / r.seconds - 1:+8.1%}{by_model[r.name]:+10.1%}"
                 f"{by_chip[r.name]:+9.1%}  {r.source}")  # fmt: skip
    lines += [f"    not the same: {d}" for d in r.differences]
  for what, errors in (("in the fit", {r.name: predicted(r, made) / r.seconds - 1 for r in rows()}),
                       ("model and chip left out", by_model), ("chip left out", by_chip)):  # fmt: skip
    sizes = [abs(e) for e in errors.values()]
    lines.append(f"{what}: mean error {np.mean(sizes):.1%}, largest {max(sizes):.1%}, of {len(sizes)} rows")
  low, high = math.exp(-_fitted()[1]), math.exp(_fitted()[1])
  lines.append(f"the 80% interval is {low - 1:+.1%} to {high - 1:+.1%}: {inside} of {len(rows())} rows are in that of their "
               "prediction without their model and chip, from which it was made")  # fmt: skip
  lines.append("constants: " + ", ".join(f"{k} {math.exp(v):.3f}" for k, v in
               (*((k, getattr(made, k)) for k in _CONSTANTS), *made.chips.items())))  # fmt: skip
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m maxscale.perf.calibration", description=(__doc__ or "").split("\n")[0]
  )
  parser.add_argument("--add", metavar="STEP.json", help="a published step and its program, as the module says")
  arguments = parser.parse_args(argv)
  made = json.loads(FILE.read_text())["rows"]
  if arguments.add:
    path = pathlib.Path(arguments.add)
    new = kept(json.loads(path.read_text()), path.parent)
    made = [row for row in made if row["name"] != new["name"]] + [new]
  write(made)
  print(report())
  return 0


if __name__ == "__main__":
  sys.exit(main())
