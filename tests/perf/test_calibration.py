"""The fitted rates: planted ones are found again, and the committed ones are those of the committed rows."""

import dataclasses
import gzip
import json
import math

import pytest

from maxscale.perf import calibration
from maxscale.perf.calibration import Fit, Row
from maxscale.perf.compiled import simulate
from maxscale.perf.compiled.trace import Done, Move, Start, Sync, Work


def planted(name, chip, fit, cycles, flops, experts, sent, slices):
  events = (
    Start(1, Move("to-host", sent)),
    Work("matmul", cycles=int(cycles)),
    Work("attention", flops=flops),
    Work("grouped", flops=experts),
    Done(1),
    Sync(Move("all-reduce", 1.0, slices=slices)),
  )
  row = Row(name, chip, name, 0.0, "planted", (), events)
  return dataclasses.replace(row, seconds=calibration.predicted(row, fit))


def test_planted_rates_are_found_again():
  true = Fit(
    math.log(0.9), math.log(0.4), math.log(0.6), math.log(2.5), math.log(0.03), {"TPU v5p": 0.05, "TPU v6e": -0.05}
  )
  made = [
    planted(f"{chip} {n}", chip, true, *kinds)
    for chip in ("TPU v5p", "TPU v6e")
    for n, kinds in enumerate([
      (5e9, 1e12, 0, 1e6, 1), (1e9, 5e14, 0, 1e6, 1), (1e9, 1e12, 0, 4e11, 1), (3e9, 2e14, 0, 1e6, 1),
      (1e9, 1e12, 5e14, 1e6, 1), (3e9, 2e14, 0, 1e6, 16),
    ])
  ]  # fmt: skip
  found = calibration.fit(made)
  for row in made:
    assert calibration.predicted(row, found) == pytest.approx(row.seconds, rel=0.03)
  assert math.exp(found.attention) == pytest.approx(0.4, rel=0.1)
  assert math.exp(found.grouped) == pytest.approx(0.6, rel=0.1)
  assert math.exp(found.slices) == pytest.approx(0.03, rel=0.2)
  assert math.exp(found.host) == pytest.approx(2.5, rel=0.1)


def test_a_chip_without_rows_gets_the_rates_of_all():
  made = Fit(math.log(1.1), math.log(0.5), math.log(0.75), 0.0, -4.0, {"TPU v5p": 0.2})
  assert made.rates(calibration._chip("TPU v6e")).clock == pytest.approx(1.1 * 918e12 / (8 * 256**2))


def test_the_committed_fit_is_that_of_the_committed_rows():
  rows = calibration.rows()
  assert len(rows) >= 10 and len({r.chip for r in rows}) >= 4
  kept, made = calibration._fitted()[0], calibration.fit(rows)
  for row in rows:
    assert calibration.predicted(row, kept) == pytest.approx(calibration.predicted(row, made), rel=2e-3)


def test_the_errors_stay_what_they_are():
  """In the fit, and without a row's model and chip; the second is what the project says of its predictions."""
  kept = calibration._fitted()[0]
  fitted = [abs(calibration.predicted(r, kept) / r.seconds - 1) for r in calibration.rows()]
  out = [abs(e) for e in calibration.left_out("model").values()]
  assert sum(fitted) / len(fitted) < 0.02 and max(fitted) < 0.06
  assert sum(out) / len(out) < 0.06 and max(out) < 0.15


def test_a_step_is_added(tmp_path, monkeypatch, capsys):
  """A program that computes for 2.2e9 cycles, published at 1.5 s; its transfer of a stack to the host is left out."""
  text = """HloModule step, is_scheduled=true, num_partitions=1

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = (f32[1048576]{0:S(5)}, f32[1048576]{0}, u32[]) copy-start(%x)
  %done = f32[1048576]{0:S(5)} copy-done(%start)
  ROOT %r = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"2200000000"}
}
"""
  (tmp_path / "step.txt.gz").write_bytes(gzip.compress(text.encode()))
  step = {"name": "one", "model": "m", "seconds": 1.5, "source": "made up", "differences": ["all"], "versions": {},
          "program": "step.txt.gz", "device_kind": "TPU7x", "coordinates": [[0, 0, 0, 0, 0]], "host_below": 2**20}  # fmt: skip
  (tmp_path / "step.json").write_text(json.dumps(step))
  monkeypatch.setattr(calibration, "FILE", tmp_path / "calibration.json")
  calibration.FILE.write_text('{"rows": []}')
  try:
    calibration.rows.cache_clear()
    assert calibration.main(["--add", str(tmp_path / "step.json")]) == 0
    (row,) = calibration.rows()
    assert row.events == (Work("vector", "update", 2200000000),) and row.chip == "TPU7x"
    assert calibration.predicted(row, calibration._fitted()[0]) == pytest.approx(1.5, rel=0.02)
    assert "made up" in capsys.readouterr().out
  finally:
    monkeypatch.undo()
    calibration.rows.cache_clear()
    calibration._fitted.cache_clear()


def test_the_interval_is_wider_without_rows():
  known, unknown = calibration._chip("TPU v5p"), calibration._chip("TPU v4")
  assert calibration.interval(known)[1] < calibration.interval(unknown)[1]
  assert calibration.interval(known)[0] < 1 < calibration.interval(known)[1]


def test_the_interval_is_wider_by_what_is_not_known_of_kernels_of_experts():
  chip, (low, high) = calibration._chip("TPU v5p"), calibration._fitted()[2]
  (less, more), (least, most) = calibration.interval(chip), calibration.interval(chip, experts=0.5)
  rate = calibration._fitted()[0].grouped
  assert low <= rate <= high and low < high
  assert most - more == pytest.approx(0.5 * (math.exp(rate - low) - 1))
  assert less - least == pytest.approx(0.5 * (1 - math.exp(rate - high)))


def test_rates_turn_into_seconds_of_the_step():
  row = calibration.rows()[0]
  chip = calibration._chip(row.chip)
  slow = dataclasses.replace(calibration.rates(chip), clock=calibration.rates(chip).clock / 2)
  assert simulate.run(row.events, chip, slow).seconds > 1.5 * calibration.predicted(row, calibration._fitted()[0])
