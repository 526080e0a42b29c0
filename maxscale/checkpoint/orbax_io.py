"""All of Orbax in one place: its asynchronous save, its barriers. Written for orbax-checkpoint 0.12's v1 API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import jax

from maxscale import storage
from maxscale.checkpoint import arrays as arrays_lib
from maxscale.checkpoint.fingerprint import collect, dispatch
from maxscale.checkpoint.layout import CheckpointError, Leaf

ARRAYS = "arrays"  # the folder of a checkpoint that holds them


def process_file(index: int) -> str:
  """What process `index` says that it has written, once all of it is on the medium."""
  return f"process-{index:05d}.json"


class ArrayStore:
  """The arrays of a state, as Orbax's StatefulCheckpointable."""

  def __init__(self, arrays: list[jax.Array], leaves: tuple[Leaf, ...], barrier: Callable[[str], Awaitable[None]]):
    self._arrays, self._leaves, self._barrier = arrays, leaves, barrier
    self.error: Exception | None = None  # why this process's part was not written; to be raised after the save

  async def save(self, directory: Any) -> Awaitable[None]:
    """Copies to the host, blocking; the awaitable that it returns writes, in Orbax's background thread."""
    # The sums are queued before the copies: both read the state before a later step can overwrite it.
    sums = dispatch(self._arrays, self._leaves)
    pieces = arrays_lib.to_host(self._arrays, self._leaves)
    self._arrays = []  # the state must not live on because a save is in flight
    return self._write(directory, pieces, sums)

  async def _write(self, directory: Any, pieces: list[arrays_lib.Piece], sums: list[jax.Array]) -> None:
    base, me = await directory.await_creation(), jax.process_index()
    try:
      written = await arrays_lib.write(str(base), pieces, self._leaves, first=me == 0)
      words = {name: w.tolist() for name, w in collect(sums, self._leaves).items()}
      storage.write_sealed(base / process_file(me), {"bytes": written, "fingerprints": words})
    except Exception as e:
      # Kept, not raised, until Orbax has been through its last barrier: raised here, it would leave the other processes
      # waiting there for 300 s, which cannot be set. They find this process's file missing instead, at once.
      self.error = e
    await self._barrier("written")  # our own, with our deadline: however late the slowest, all reach Orbax's together

  async def load(self, directory: Any) -> Awaitable[None]:
    """Part of Orbax's protocol only."""
    raise CheckpointError(f"{directory} is read by maxscale.checkpoint.restore, not by Orbax")


def save_async(path: str, store: ArrayStore, timeout: float) -> Any:
  """Starts a save into a new folder; `.result(timeout)` of what it returns waits for every process and raises."""
  from orbax.checkpoint import v1 as ocp
  from orbax.checkpoint.experimental.v1._src.saving import execution

  # With several processes Orbax compares their paths by two device collectives at each save. They would wait behind the
  # steps in flight, and a save must not depend on collectives; the path comes from the config that all processes share.
  if not hasattr(execution, "_check_directory_consistency"):
    raise CheckpointError("this Orbax has no _check_directory_consistency to switch off; use orbax-checkpoint<0.13")
  execution._check_directory_consistency = lambda directory: None
  context = ocp.Context()
  context.asynchronous.timeout_secs = int(timeout)
  context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE  # no rename
  context.file.skip_sync_file_validations = True  # a folder without a marker is overwritten; and no barriers for it
  with context:
    return ocp.save_checkpointables_async(path, {ARRAYS: store})


async def barrier(name: str, operation: str, timeout: float) -> None:
  """Waits for all processes through the coordination service: no device takes part. Nothing to do for one process."""
  from orbax.checkpoint import v1 as ocp

  await ocp.multihost.sync_global_processes(f"maxscale_{name}", operation_id=operation, timeout=max(1, int(timeout)))
