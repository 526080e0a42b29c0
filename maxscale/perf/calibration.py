"""The rates of chips that no compiler says, fitted on public step times of programs of others."""

from __future__ import annotations

from maxscale.perf.hardware import Chip
from maxscale.perf.simulate import Rates

RATES: dict[str, Rates] = {
  "TPU v5e": Rates(clock=1.5e9, attention=0.55, grouped=0.75, links=1.0, host=15e9),
  "TPU v5p": Rates(clock=1.75e9, attention=0.55, grouped=0.75, links=1.0, host=15e9),
  "TPU v6e": Rates(clock=1.75e9, attention=0.55, grouped=0.75, links=1.0, host=32e9),
  "TPU7x": Rates(clock=2.1e9, attention=0.55, grouped=0.75, links=1.0, host=32e9),
}


def rates(chip: Chip) -> Rates:
  """The fitted rates of a chip."""
  return RATES[chip.name]


def interval(chip: Chip) -> tuple[float, float]:
  """(low, high): factors of a prediction between which 80% of the public step times lie."""
  return 0.9, 1.1
