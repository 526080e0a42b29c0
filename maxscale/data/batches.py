"""Global batches as a pure function of the step."""

from __future__ import annotations

import dataclasses

import numpy as np

from maxscale import config as config_lib
from maxscale.config import ConfigError
from maxscale.data import permutation, sources
from maxscale.data.packing import Batch
from maxscale.data.schedule import Schedule
from maxscale.data.tokenizers import Tokenizer

Rows = slice | np.ndarray | None  # which rows of the global batch; None: all


class Batches:
  """The batches of a run, or the fixed batches on which it is evaluated.

  Training rows are shuffled anew each epoch, keyed by (run.seed, source, length, epoch). Held-out batches depend on
  neither the seed nor the phases: they have the batch size, length and mixture that the run starts with, and take rows
  in an order of their own, so that the first few are a fair sample.

  Attributes:
    sources: name -> Source.
    schedule: which rows a step reads.
  """

  def __init__(self, config: config_lib.Config, tokenizer: Tokenizer, split: str = "train"):
    """Opens what the split reads; text is tokenised here.

    Raises:
      ConfigError: a source, its content or the vocabulary is wrong.
      DeadlineError: another process is still tokenising after data.deadline.
    """
    data, self._seed = config.data, config.run.seed
    if 0 < config.model.vocab_size < tokenizer.vocab_size:
      raise ConfigError(
        f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of data.tokenizer, "
        f"{tokenizer.vocab_size}; set it to at least that, or to 0"
      )
    if split == "heldout":
      data, self._seed = _heldout(data), 0
    self._split = split
    self.schedule = Schedule(data, self._seed)
    self.sources = {
      name: sources.open_source(name, data.sources[name], tokenizer, split, config) for name in self.schedule.sources
    }

  @property
  def fingerprint(self) -> dict[str, dict]:
    """Source name -> documents, tokens and digest; a resume compares it."""
    return {name: source.fingerprint for name, source in self.sources.items()}

  def shape(self, step: int) -> tuple[int, int]:
    """(B, T) of a step's global batch."""
    phase = self.schedule.phase(step)
    return phase.batch_size, phase.length

  def batch(self, step: int, rows: Rows = None) -> Batch:
    """The batch of a step, or some of its rows: each is the same whichever others are asked for.

    Args:
      step: from 0.
      rows: a slice of, or indices into, the global batch; None: all of it.

    Returns:
      int32 [B, T] (B: the rows asked for): `tokens`; `targets`, -1 where there is none; `segments`, from 1, 0 in
      padding; `positions` within the segment. int32 [B]: `rows`, their indices in the global batch.
    """
    phase = self.schedule.phase(step)
    index = np.arange(phase.batch_size, dtype=np.int32)[slice(None) if rows is None else rows]
    which, positions = self.schedule.samples(step, index)
    batch = {
      key: np.empty((len(index), phase.length), np.int32) for key in ("tokens", "targets", "segments", "positions")
    }
    for i, name in enumerate(phase.sources):
      mine = np.flatnonzero(which == i)
      if mine.size:
        part = self.sources[name].examples(self._row_ids(name, phase.length, positions[mine]), phase.length)
        for key, value in part.items():
          batch[key][mine] = value
    return {**batch, "rows": index}

  def _row_ids(self, name: str, length: int, positions: np.ndarray) -> np.ndarray:
    """Rows of a source at some positions of its stream."""
    size = self.sources[name].rows(length)
    key = permutation.key("rows", self._seed, self._split, name, length)
    epoch, index = np.divmod(positions, size)
    return permutation.permute(index, size, key, epoch)


def _heldout(data: config_lib.Data) -> config_lib.Data:
  mixture = data.mixture or dict.fromkeys(data.sources, 1.0)
  held = {name: weight for name, weight in mixture.items() if data.sources[name].get("heldout", sources.HELDOUT) > 0}
  if not any(held.values()):
    raise ConfigError("no source of data.mixture has held-out text; set its heldout above 0, or eval.every=0")
  return dataclasses.replace(data, mixture=held, phases=())
