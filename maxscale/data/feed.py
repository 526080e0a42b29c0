"""From the loader to the devices: each process makes the rows that its devices hold, one batch ahead of the loop."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maxscale.config import Config
from maxscale.data.batches import Batches
from maxscale.data.loader import Loader

Shardings = Callable[[str], jax.sharding.Sharding]  # key of a batch -> sharding of that array


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> np.ndarray:
  """Indices of the rows of a global batch [B, T] that this process's devices hold, sorted."""
  indices = sharding.addressable_devices_indices_map(shape).values()
  return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in indices if index]))


def place(batch: dict[str, np.ndarray], size: int, sharding_of: Shardings) -> dict[str, jax.Array]:
  """Global arrays from this process's rows; `size` is B of the global batch."""

  def global_array(key: str, value: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      first, last, _ = index[0].indices(size)
      at = int(np.searchsorted(batch["rows"], first))  # `rows` is sorted, so a slice of the batch is one of ours
      return value[(slice(at, at + last - first), *index[1:])]

    return jax.make_array_from_callback((size, *value.shape[1:]), sharding_of(key), part)

  return {key: global_array(key, value) for key, value in batch.items()}


class Feed:
  """Batches on the devices for steps [start, stop), the next one always under way."""

  def __init__(self, config: Config, batches: Batches, start: int, stop: int, sharding_of: Shardings):
    rows_of = lambda step: local_rows(sharding_of("tokens"), batches.shape(step))  # noqa: E731
    self._batches, self._sharding_of = batches, sharding_of
    self._loader = Loader(batches, start, stop, rows_of, config.data.prefetch, config.data.threads)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed")
    self._left = stop - start
    self._next: concurrent.futures.Future | None = None
    self._order()

  def _order(self) -> None:
    self._next = self._thread.submit(self._read) if self._left > 0 else None
    self._left -= 1

  def _read(self) -> dict[str, jax.Array]:
    step, batch = next(self._loader)
    return place(batch, self._batches.shape(step)[0], self._sharding_of)

  @property
  def waiting(self) -> bool:
    """Whether the next batch is not there yet."""
    return self._next is not None and not self._next.done()

  def __next__(self) -> dict[str, Any]:
    """The next step's batch; blocks while it is made, and raises what making it raised."""
    if self._next is None:
      raise StopIteration
    batch = self._next.result()
    self._order()
    return batch

  def close(self) -> None:
    self._thread.shutdown(wait=False, cancel_futures=True)
    self._loader.close()
