"""Training curves under eight layouts, in a process of their own with 8 simulated devices."""

import re

import pytest

from tests import multidevice

MODULE = "tests.sharding.curve_cases"
results = multidevice.fixture(MODULE)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_curve(results, name):
  multidevice.check(results, name)


def test_curves_report_errors_margins_and_tokens_that_changed_experts(results):
  lines = [line for line in results["stderr"].splitlines() if line.startswith("curve ")]
  print("\n".join(lines))  # pytest -s shows them
  assert len(lines) == 2 * len(multidevice.names(MODULE))
  pattern = r"curve \w+ \S+: error \S+, tokens of experts that differ (\d+) of (\d+), smallest margin (\S+)"
  found = [re.fullmatch(pattern, line) for line in lines]
  assert all(found), lines
  assert sum(int(m[1]) for m in found) < 1e-3 * sum(int(m[2]) for m in found)
