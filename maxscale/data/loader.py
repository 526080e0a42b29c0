"""Batches read ahead by threads, on Grain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from maxscale import config as config_lib
from maxscale.data.batches import Batches, Rows
from maxscale.data.packing import Batch
from maxscale.data.tokenizers import load_tokenizer


class Loader(Iterator[tuple[int, Batch]]):
  """Yields (step, batch) for steps [start, stop), in order. Its state is the step: start another where this stopped."""

  def __init__(
    self,
    batches: Batches,
    start: int,
    stop: int,
    rows_of: Callable[[int], Rows],
    prefetch: int,
    threads: int,
  ):
    """Starts to read.

    Args:
      batches: what to read.
      start, stop: steps.
      rows_of: step -> the rows of its batch that this host needs.
      prefetch: batches read ahead.
      threads: that read them.
    """
    import grain

    data = grain.MapDataset.source(_Steps(batches, start, stop, rows_of))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    self._iterator = iter(data.to_iter_dataset(options))
    self._iterator.start_prefetch()

  def __next__(self) -> tuple[int, Batch]:
    """Raises what reading that batch raised."""
    return next(self._iterator)

  def close(self) -> None:
    """Stops the threads; batches read ahead are dropped."""
    self._iterator.close()


class _Steps:
  """Random access by step, as Grain wants it."""

  def __init__(self, batches: Batches, start: int, stop: int, rows_of: Callable[[int], Rows]):
    self._batches, self._start, self._stop, self._rows_of = batches, start, stop, rows_of

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int) -> tuple[int, Batch]:
    step = self._start + index
    return step, self._batches.batch(step, self._rows_of(step))


def throughput(config: config_lib.Config, seconds: float) -> float:
  """Tokens/s that one core makes of a config's training batches, measured for so many seconds of CPU time."""
  batches = Batches(config, load_tokenizer(config.data.tokenizer))
  batches.batch(0)  # maps the files
  step, tokens, start = 0, 0, time.process_time()
  while time.process_time() - start < seconds:
    tokens += batches.batch(step)["tokens"].size
    step += 1
  return tokens / (time.process_time() - start)
