"""Which rows a step reads, in closed form: no step depends on having computed another.

A phase is a range of steps with one batch size, length and mixture. Its samples are dealt to sources in cycles of
`CYCLE`: each source has its exact share of a cycle, in an order shuffled by the seed. Each (source, length) is one
stream of rows: a phase goes on where the last phase of that length stopped, and a new length starts its stream at
row 0. Only earlier phases decide where a stream stands, so that changing a later one never changes an earlier batch.
(An empty mixture means every source of `data.sources` equally: adding a source there changes such phases.)
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from maxscale import config as config_lib
from maxscale.data import permutation

CYCLE = 4096


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase of the schedule.

  Attributes:
    start: first step.
    batch_size, length: B and T.
    sources: names of the sources with a weight, sorted.
    cycle: index of the source of each sample of a cycle, int64 [CYCLE].
    rank: how often that source came before in the cycle, int64 [CYCLE].
    counts: samples of each source in a cycle, int64 [sources].
    base: rows that earlier phases took of each source's stream, int64 [sources].
  """

  start: int
  batch_size: int
  length: int
  sources: tuple[str, ...]
  cycle: np.ndarray
  rank: np.ndarray
  counts: np.ndarray
  base: np.ndarray

  def consumed(self, samples: int) -> np.ndarray:
    """How many of the phase's first samples came from each source, int64 [sources]."""
    cycles, rest = divmod(samples, CYCLE)
    return cycles * self.counts + np.bincount(self.cycle[:rest], minlength=len(self.counts))


class Schedule:
  """The phases of a run."""

  def __init__(self, data: config_lib.Data, seed: int):
    """Raises ConfigError where a weight is too small for a cycle."""
    self.phases: list[Phase] = []
    taken: dict[tuple[str, int], int] = {}
    for i, phase in enumerate(config_lib.phases(data)):
      if self.phases:
        last = self.phases[-1]
        used = last.consumed((phase.start - last.start) * last.batch_size)
        taken.update({(s, last.length): int(n) for s, n in zip(last.sources, last.base + used)})
      path = "data.mixture" if i == 0 or not data.phases[i - 1].get("mixture") else f"data.phases[{i - 1}].mixture"
      counts = _counts(phase.mixture or dict.fromkeys(data.sources, 1.0), path)
      names = tuple(counts)
      base = np.array([taken.get((name, phase.length), 0) for name in names])
      cycle, rank = _deal(np.array(list(counts.values())), seed)
      dealt = (names, cycle, rank, np.array(list(counts.values())), base)
      self.phases.append(Phase(phase.start, phase.batch_size, phase.length, *dealt))
    self._starts = [phase.start for phase in self.phases]

  @property
  def sources(self) -> list[str]:
    """Names of the sources that some phase reads, sorted."""
    return sorted({name for phase in self.phases for name in phase.sources})

  def phase(self, step: int) -> Phase:
    """The phase of a step."""
    return self.phases[bisect.bisect_right(self._starts, step) - 1]

  def samples(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where some rows of a step's batch come from.

    Args:
      step: the step.
      rows: int [N], indices within the global batch.

    Returns:
      indices into the phase's sources and positions in their streams, int64 [N] each.
    """
    phase = self.phase(step)
    cycles, k = np.divmod((step - phase.start) * phase.batch_size + rows.astype(np.int64), CYCLE)
    which = phase.cycle[k]
    return which, phase.base[which] + cycles * phase.counts[which] + phase.rank[k]


def _counts(mixture: dict[str, float], path: str) -> dict[str, int]:
  """Samples of a cycle for each source with a weight: exact shares, rounded by largest remainder."""
  mixture = {name: mixture[name] for name in sorted(mixture) if mixture[name] > 0}
  shares = np.array(list(mixture.values())) * CYCLE / sum(mixture.values())
  counts = shares.astype(np.int64)
  order = np.argsort(counts - shares, kind="stable")
  counts[order[: CYCLE - counts.sum()]] += 1
  for name, count in zip(mixture, counts):
    if not count:
      raise config_lib.ConfigError(
        f"{path}: the weight {mixture[name]:g} of {name!r} is less than 1/{CYCLE} of the whole, so it would never be "
        f"read; raise it, or set it to 0"
      )
  return dict(zip(mixture, counts.tolist()))


def _deal(counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """A shuffled cycle with so many samples of each source, and the rank of each sample among those of its source."""
  index = np.arange(CYCLE)
  shuffle = permutation.permute(index, CYCLE, permutation.key("mixture", seed), np.zeros(CYCLE, np.int64))
  cycle = np.repeat(np.arange(len(counts)), counts)[shuffle]
  rank = np.empty(CYCLE, np.int64)
  by_source = np.argsort(cycle, kind="stable")
  rank[by_source] = index - np.repeat(np.cumsum(counts) - counts, counts)
  return cycle, rank
