import dataclasses

import numpy as np
import pytest

from maxscale.config import ConfigError, Data
from maxscale.data.schedule import CYCLE, Schedule

BASE = Data(
  sources={name: {"kind": "synthetic"} for name in "abc"},
  mixture={"a": 5, "b": 3, "c": 2},
  batch_size=8,
  length=16,
  phases=(
    {"start": 100, "batch_size": 12},
    {"start": 230, "length": 32, "mixture": {"a": 1, "c": 1}},
    {"start": 300, "length": 16},
    {"start": 310, "mixture": {"b": 1}},
  ),
)


def samples(schedule, step):
  phase = schedule.phase(step)
  which, positions = schedule.samples(step, np.arange(phase.batch_size))
  return [(phase.sources[w], phase.length, p) for w, p in zip(which.tolist(), positions.tolist())]


def test_phases_inherit_and_are_found():
  schedule = Schedule(BASE, 0)
  shapes = {s: (schedule.phase(s).batch_size, schedule.phase(s).length) for s in (0, 99, 100, 229, 230, 299, 300)}
  assert shapes == {0: (8, 16), 99: (8, 16), 100: (12, 16), 229: (12, 16), 230: (12, 32), 299: (12, 32), 300: (12, 16)}
  assert schedule.phase(305).sources == ("a", "c") and schedule.phase(10**9).sources == ("b",)


def test_each_stream_is_read_from_row_0_without_a_gap_over_all_phases():
  schedule, seen = Schedule(BASE, 0), {}
  for step in range(400):
    for source, length, position in samples(schedule, step):
      seen.setdefault((source, length), []).append(position)
  assert set(seen) == {("a", 16), ("b", 16), ("c", 16), ("a", 32), ("c", 32)}
  for positions in seen.values():
    assert sorted(positions) == list(range(len(positions)))


def test_mixture_counts_are_exact_in_every_cycle():
  data = dataclasses.replace(BASE, batch_size=64, phases=())
  schedule = Schedule(data, 3)
  steps = CYCLE // 64
  for cycle in range(3):
    drawn = [s for step in range(cycle * steps, (cycle + 1) * steps) for s, _, _ in samples(schedule, step)]
    assert (drawn.count("a"), drawn.count("b"), drawn.count("c")) == (2048, 1229, 819)
  near = [s for step in range(8) for s, _, _ in samples(schedule, step)]
  assert 0.35 < near.count("a") / len(near) < 0.65  # shuffled, not in runs


def test_largest_remainder_fills_the_cycle():
  data = dataclasses.replace(BASE, mixture={"a": 1, "b": 1, "c": 1}, phases=())
  assert Schedule(data, 0).phases[0].counts.tolist() == [1366, 1365, 1365]


def test_changing_a_later_phase_changes_no_earlier_step():
  later = (*BASE.phases[:2], {"start": 290, "batch_size": 4, "length": 64, "mixture": {"b": 2, "a": 1}})
  a, b = Schedule(BASE, 0), Schedule(dataclasses.replace(BASE, phases=later), 0)
  assert all(samples(a, step) == samples(b, step) for step in range(290))
  assert samples(a, 290) != samples(b, 290)


def test_the_seed_changes_the_order_and_the_order_of_names_does_not():
  other = dataclasses.replace(BASE, mixture={"c": 2, "b": 3, "a": 5})
  assert samples(Schedule(BASE, 0), 5) == samples(Schedule(other, 0), 5)
  assert samples(Schedule(BASE, 0), 5) != samples(Schedule(BASE, 1), 5)


def test_far_steps_cost_nothing_more():
  which, positions = Schedule(BASE, 0).samples(10**12, np.arange(12))
  assert positions.min() > 10**12 and len(which) == 12


def test_a_weight_that_would_never_be_read_is_refused():
  with pytest.raises(ConfigError, match=r"data\.mixture: the weight 0\.0001 of 'b'"):
    Schedule(dataclasses.replace(BASE, mixture={"a": 1, "b": 1e-4}, phases=()), 0)
  with pytest.raises(ConfigError, match=r"data\.phases\[0\]\.mixture"):
    Schedule(dataclasses.replace(BASE, phases=({"start": 5, "mixture": {"a": 1, "b": 1e-4}},)), 0)
