"""Layouts on 8 simulated devices, in a process of their own."""

import pytest

from tests import multidevice

MODULE = "tests.sharding.layout_cases"
CONTROL = "from here on the partitioner is meant to give up"  # as in the module, which imports JAX
results = multidevice.fixture(MODULE)


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_layout(results, name):
  multidevice.check(results, name)


def test_the_partitioner_never_gives_up(results):
  layouts, control = results["stderr"].split(CONTROL)
  assert "rematerialization" in control, "the warning no longer reaches stderr: this test sees nothing"
  lines = [line for line in layouts.splitlines() if "rematerialization" in line.lower()]
  assert not lines, "\n".join(lines)
