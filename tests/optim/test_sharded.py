"""Optimizers on 8 simulated devices: the cases of sharded_cases.py."""

import pytest

from tests import multidevice

MODULE = "tests.optim.sharded_cases"
results = multidevice.fixture(MODULE)


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_sharded(results, name):
  multidevice.check(results, name)


def test_the_partitioner_never_gives_up(results):
  assert "rematerialization" not in results["stderr"], results["stderr"][-3000:]
