"""The schedule by simulation, and the compiled pipeline on 8 simulated devices."""

import pytest

from maxscale.sharding.pipeline import Schedule, picture
from tests import multidevice

MODULE = "tests.sharding.pipeline_cases"
results = multidevice.fixture(MODULE)
SCHEDULES = [(1, 1, 1), (1, 1, 5), (2, 1, 2), (4, 1, 4), (4, 1, 7), (2, 2, 4), (4, 3, 8), (3, 2, 9)]


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_pipeline(results, name):
  multidevice.check(results, name)


@pytest.mark.parametrize("stages, repeats, microbatches", SCHEDULES)
def test_every_unit_runs_once_after_what_it_needs(stages, repeats, microbatches):
  s = Schedule(stages, repeats, microbatches)
  forward, backward = {}, {}  # (chunk of the model, microbatch) -> tick
  for stage in range(stages):
    for unit in range(s.units):
      chunk, m = s.forward(unit)
      forward[chunk * stages + stage, m] = unit + stage
      chunk, m, same = s.backward(unit)
      assert s.forward(same) == (chunk, m), "the slot of another unit"
      backward[chunk * stages + stage, m] = unit + s.fill + stages - 1 - stage
  chunks = stages * repeats
  assert forward.keys() == backward.keys() == {(c, m) for c in range(chunks) for m in range(microbatches)}
  for (chunk, m), tick in forward.items():
    if chunk:  # what is sent at the end of a tick is there in the next
      assert tick == forward[chunk - 1, m] + 1
      assert backward[chunk - 1, m] == backward[chunk, m] + 1
  for m in range(microbatches):
    assert backward[chunks - 1, m] == forward[chunks - 1, m], "the last chunk turns around in one tick"
  assert max(forward.values()) + 1 == s.ticks == max(backward.values()) + 1 - s.fill
  assert min(backward.values()) == s.fill


@pytest.mark.parametrize("stages, repeats, microbatches", SCHEDULES)
def test_no_slot_is_overwritten_before_its_backward(stages, repeats, microbatches):
  s = Schedule(stages, repeats, microbatches)
  for stage in range(stages):
    taken = {s.backward(b)[2]: b + s.fill + stages - 1 - stage for b in range(s.units)}
    for unit, tick in taken.items():
      overwritten = unit + s.slots + stage
      assert tick < overwritten, (unit, tick, overwritten)
  most = max(s.backward(b)[2] * -1 + b + s.fill + stages - 1 for b in range(s.units)) + 1
  assert most == s.slots or microbatches < stages or s.units < s.slots, "the ring is larger than needed"


def test_the_bubble_by_hand():
  assert Schedule(4, 1, 8).bubble == pytest.approx(3 / 11)
  assert Schedule(4, 2, 8).bubble == pytest.approx(3 / 19)
  assert Schedule(1, 1, 8).bubble == 0


def test_rows_by_hand():
  assert Schedule(2, 1, 2).rows(4) == (0, 1, 2, 3)
  assert Schedule(2, 2, 2).rows(4) == (0, 2, 1, 3)
  assert Schedule(2, 2, 2).rows(8) == (0, 1, 4, 5, 2, 3, 6, 7)


def test_the_picture_by_hand():
  lines = [line.split() for line in picture(Schedule(2, 1, 3)).splitlines()]
  assert lines[0] == ["stage", "0", "0", "1", "2", "0'", "1'", "2'"]
  assert lines[1] == ["stage", "1", ".", "0", "0'", "1", "1'", "2", "2'", "."]
  assert "0b" in picture(Schedule(2, 2, 2)) and "25.0%" in picture(Schedule(2, 1, 3))
