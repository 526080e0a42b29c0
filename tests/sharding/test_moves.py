"""Checkpoints move between layouts: bit for bit as arrays, to rounding as training."""

import pytest

from tests import multidevice

MODULE = "tests.sharding.move_cases"
results = multidevice.fixture(MODULE)


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_move(results, name):
  multidevice.check(results, name)
