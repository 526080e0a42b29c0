"""Low-rank adapters: loss and gradients are those of the weights that they stand for, under every kind of layout."""

import pytest

from maxscale.config import ConfigError
from tests import multidevice
from tests.models import reference as ref

MODULE = "tests.models.adapters_cases"
results = multidevice.fixture(MODULE)


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_adapters(results, name):
  multidevice.check(results, name)


def test_targets_that_match_nothing_are_refused():
  with pytest.raises(ConfigError, match=r"lora\.targets='nothing' matches no weight"):
    ref.program(ref.DENSE, lora__rank=2, lora__targets="nothing")
