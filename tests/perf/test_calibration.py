"""The fitted rates: planted ones are found again, and the committed ones are those of the committed rows."""

import dataclasses
import math

import pytest

from maxscale.perf import calibration, simulate
from maxscale.perf.calibration import Fit, Row
from maxscale.perf.trace import Done, Move, Start, Work


def planted(name, chip, fit, cycles, flops, sent):
  events = (
    Start(1, Move("to-host", sent)),
    Work("matmul", cycles=int(cycles)),
    Work("attention", flops=flops),
    Done(1),
  )
  row = Row(name, chip, name, 0.0, "planted", (), events)
  return dataclasses.replace(row, seconds=calibration.predicted(row, fit))


def test_planted_rates_are_found_again():
  true = Fit(math.log(0.9), math.log(0.4), math.log(2.5), {"TPU v5p": 0.05, "TPU v6e": -0.05})
  made = [
    planted(f"{chip} {n}", chip, true, cycles, flops, sent)
    for chip in ("TPU v5p", "TPU v6e")
    for n, (cycles, flops, sent) in enumerate([(5e9, 1e12, 1e6), (1e9, 5e14, 1e6), (1e9, 1e12, 4e11), (3e9, 2e14, 1e6)])
  ]
  found = calibration.fit(made)
  for row in made:
    assert calibration.predicted(row, found) == pytest.approx(row.seconds, rel=0.03)
  assert math.exp(found.attention) == pytest.approx(0.4, rel=0.1)
  assert math.exp(found.host) == pytest.approx(2.5, rel=0.1)


def test_a_chip_without_rows_gets_the_rates_of_all():
  made = Fit(math.log(1.1), math.log(0.5), 0.0, {"TPU v5p": 0.2})
  assert made.rates(calibration._chip("TPU v6e")).clock == pytest.approx(1.1 * 918e12 / (8 * 256**2))


def test_the_committed_fit_is_that_of_the_committed_rows():
  """Two chips' rows suffice to see it: predictions by what is kept agree with the published seconds."""
  rows = calibration.rows()
  assert len(rows) >= 4 and len({r.chip for r in rows}) >= 3
  kept = calibration._fitted()[0]
  errors = {r.name: calibration.predicted(r, kept) / r.seconds - 1 for r in rows}
  assert max(map(abs, errors.values())) < 0.15 and sum(map(abs, errors.values())) / len(errors) < 0.06, errors


def test_the_interval_is_wider_without_rows():
  known, unknown = calibration._chip("TPU v5p"), calibration._chip("TPU v4")
  assert calibration.interval(known)[1] < calibration.interval(unknown)[1]
  assert calibration.interval(known)[0] < 1 < calibration.interval(known)[1]


def test_rates_turn_into_seconds_of_the_step():
  row = calibration.rows()[0]
  chip = calibration._chip(row.chip)
  slow = dataclasses.replace(calibration.rates(chip), clock=calibration.rates(chip).clock / 2)
  assert simulate.run(row.events, chip, slow).seconds > 1.5 * calibration.predicted(row, calibration._fitted()[0])
