"""The rates of chips that no compiler says, fitted on public step times of programs of others.

`calibration.json` has a row for each: model, chip, layout, the published seconds with their source, and the trace of a
program with the same model, sharding, batch and recomputation, compiled by a newer compiler; "differences" says where
it is known not to be the program that ran. None of them is a program of this project.

What is fitted, as little as the rows can tell:
  clock      one factor for all chips on the clock that the peak implies, and one for each chip that is drawn to it
  attention  fraction of the peak in attention kernels, one for all chips
  host       factor on the documented rate between a chip and its host, one for all
Kernels of experts and the links are not fitted, since no row depends on them: GROUPED is an assumption with a range, and
links reach the usable rate that the hardware table has.

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

from maxscale.perf import program, simulate, trace
from maxscale.perf.hardware import CHIPS, Chip, chip_of
from maxscale.perf.simulate import Rates

# FLOPs of a device and cycle: matrix units of 128x128 (v4, v5e: 4 a core; v4, v5p: two cores a device) or 256x256 (2 or 4
# multiply and add); with the published peaks these give 1.05, 1.5, 1.75, 1.75 and 2.2 GHz.
_PER_CYCLE = {"TPU v4": 2 * 8 * 128**2, "TPU v5e": 2 * 4 * 128**2, "TPU v5p": 2 * 8 * 128**2, "TPU v6e": 2 * 4 * 256**2,
              "TPU7x": 2 * 4 * 256**2, "TPU8t": 2 * 4 * 256**2}  # fmt: skip
GROUPED, GROUPED_RANGE = 0.75, (0.6, 0.9)  # of the peak, in kernels of experts with full tiles: an assumption
_HOST = 32e9  # bytes/s of a device where the table has no rate of the host
_PRIOR = (0.0, math.log(0.5), math.log(2.0))  # of log clock factor, log attention, log host factor
_PULL = (0.0, 0.003, 0.003)  # weight of the squared distance to these, beside the squared log error of each row
_CHIP_PULL = 0.1  # the same of a chip's own clock factor to that of all
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
  """Logarithms: of the clock factor, attention, host factor; and a chip's own clock factor beside that of all."""

  clock: float
  attention: float
  host: float
  chips: dict[str, float]

  def rates(self, chip: Chip) -> Rates:
    """Those of a chip; of one without rows, those of all."""
    nominal = chip.bf16 / chip.devices / _PER_CYCLE[chip.name]
    host = (chip.host_bytes or _HOST * chip.devices) / chip.devices
    return Rates(
      clock=nominal * math.exp(self.clock + self.chips.get(chip.name, 0.0)), attention=math.exp(self.attention),
      grouped=GROUPED, links=1.0, host=host * math.exp(self.host),
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

  def make(x: np.ndarray) -> Fit:
    return Fit(x[0], x[1], x[2], dict(zip(chips, x[3:])))

  def loss(x: np.ndarray) -> float:
    made = make(x)
    errors = [math.log(predicted(row, made) / row.seconds) for row in rows]
    pulls = [w * (a - b) ** 2 for a, b, w in zip(x, _PRIOR, _PULL)]
    return 100 * (sum(e**2 for e in errors) + sum(pulls) + _CHIP_PULL * sum(v**2 for v in x[3:]))

  start = np.array([*_PRIOR, *[0.0] * len(chips)])
  found = optimize.minimize(loss, start, method="Powell", bounds=[(-0.4, 0.4), (-1.6, -0.05), (-0.5, 2.0),
                                                                  *[(-0.3, 0.3)] * len(chips)])  # fmt: skip
  return make(found.x)


def left_out(key: str) -> dict[str, float]:
  """Name of each row -> predicted / published - 1, by a fit without the rows that share its `key`.

  Args:
    key: "chip", or "model": the rows of the same model on the same chip.
  """
  same = (lambda r: r.chip) if key == "chip" else (lambda r: (r.model, r.chip))
  out = {}
  for group in dict.fromkeys(map(same, rows())):
    others = [r for r in rows() if same(r) != group]
    made = fit(others) if others else Fit(*_PRIOR, {})
    out |= {r.name: predicted(r, made) / r.seconds - 1 for r in rows() if same(r) == group}
  return out


@functools.cache
def _fitted() -> tuple[Fit, float]:
  data = json.loads(FILE.read_text())["fit"]
  return Fit(data["clock"], data["attention"], data["host"], data["chips"]), data["spread"]


def rates(chip: Chip) -> Rates:
  """The fitted rates of a chip."""
  return _fitted()[0].rates(chip)


def interval(chip: Chip, experts: float = 0.0) -> tuple[float, float]:
  """(low, high): factors of a prediction between which `COVERAGE` of the published steps lie.

  From the errors of rows whose model and chip were left out; twice as wide for a chip without a row.

  Args:
    experts: share of the step in kernels of experts: as no row has them, it is widened by the range that is assumed.
  """
  spread = _fitted()[1] * (1 if chip.name in _fitted()[0].chips else 2)
  slow, fast = (experts * (GROUPED / reached - 1) for reached in GROUPED_RANGE)
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
    rows.cache_clear()
    _fitted.cache_clear()


def refit() -> dict:
  """What `calibration.json` keeps of a fit of all rows. The spread is that which covers `COVERAGE` of the errors."""
  made, errors = fit(rows()), sorted(abs(math.log1p(e)) for e in left_out("model").values())
  spread = errors[min(len(errors) - 1, math.ceil(COVERAGE * (len(errors) + 1)) - 1)]
  return {**dataclasses.asdict(made), "spread": spread}


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
               (("clock", made.clock), ("attention", made.attention), ("host", made.host), *made.chips.items())))  # fmt: skip
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
