"""Saves without stopping the training: one save in flight, committed and pruned in a background thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from maxscale import storage
from maxscale.checkpoint import commit, orbax_io
from maxscale.checkpoint.layout import CheckpointError, Leaf, arrays_of


class Checkpointer:
  """Writes the checkpoints of a run. Every process makes one and calls its methods at the same steps.

  Args:
    run_dir: directory of the run, shared by all processes.
    keep: newest checkpoints to keep.
    keep_every: also keep those at multiples of this step; 0: none.
    timeout: seconds that a save may take.
    on_event: called with ("save", step, seconds blocked) in the caller's thread and ("commit", step, seconds, bytes) in the
      background one, in process 0.
  """

  def __init__(
    self,
    run_dir: str,
    keep: int,
    keep_every: int,
    timeout: float,
    on_event: Callable[..., None] = lambda kind, **fields: None,
  ):
    self._run_dir, self._keep, self._keep_every = run_dir, keep, keep_every
    self._timeout, self._on_event = timeout, on_event
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._saves = 0

  def save(self, step: int, state: dict[str, Any], leaves: tuple[Leaf, ...], meta: commit.Meta) -> float:
    """Starts saving a state, which may be donated afterwards; returns the seconds that this blocked.

    A checkpoint of the same step is replaced.

    Raises:
      CheckpointError: the previous save failed or is late, or state and leaves differ.
    """
    start = time.monotonic()
    self.wait()
    self._saves += 1
    # The number keeps barriers apart when a step is saved twice; it is the same in every process.
    barrier = functools.partial(orbax_io.barrier, operation=f"{step}-{self._saves}", timeout=self._timeout)
    store = orbax_io.ArrayStore(arrays_of(state, leaves), leaves, barrier)
    path = commit.folder(self._run_dir, step)
    try:
      if jax.process_index() == 0:
        # Before the folder is reused: a marker must never stand over another state's files.
        storage.delete(path / commit.MARKER)
      response = orbax_io.save_async(str(path), store, self._timeout)
    except (OSError, ValueError, RuntimeError) as e:
      raise self._failure(step, e) from e
    finish = functools.partial(self._finish, step, store, response, leaves, meta, barrier, start)
    self._pending = (step, self._pool.submit(finish))
    blocking = time.monotonic() - start
    self._on_event("save", step=step, seconds=blocking)
    return blocking

  def wait(self) -> None:
    """Waits until the save in flight, if any, is committed.

    Raises:
      CheckpointError: it failed (and says why) or is late; earlier checkpoints are untouched.
    """
    if self._pending is None:
      return
    step, future = self._pending
    self._pending = None
    try:
      future.result(self._timeout)
    except Exception as e:  # whatever failed in the background, the caller learns it here, with its cause
      raise self._failure(step, e) from e

  def close(self) -> None:
    """Waits for the save in flight and ends the background thread.

    Raises:
      CheckpointError: as `wait`.
    """
    try:
      self.wait()
    finally:
      self._pool.shutdown(wait=False)

  def steps(self) -> list[int]:
    """Committed steps, ascending."""
    return commit.steps(self._run_dir)

  def _finish(
    self,
    step: int,
    store: orbax_io.ArrayStore,
    response: Any,
    leaves: tuple[Leaf, ...],
    meta: commit.Meta,
    barrier: Callable[..., Any],
    start: float,
  ) -> None:
    response.result(self._timeout)
    try:
      if store.error:
        raise store.error
      if jax.process_index() == 0:
        written = commit.write_marker(self._run_dir, step, leaves, meta)
        self._on_event("commit", step=step, seconds=time.monotonic() - start, bytes=written)
    finally:
      asyncio.run(barrier("committed"))  # also by a process that failed: the others look, instead of waiting
    if not commit.is_committed(self._run_dir, step):
      raise CheckpointError("process 0 did not commit it; its log says why")
    if jax.process_index() == 0:
      commit.retain(self._run_dir, self._keep, self._keep_every, writing=step)

  def _failure(self, step: int, error: Exception) -> CheckpointError:
    text = f"{type(error).__name__}: {error}"
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
      what = "the disk is full; free space or lower checkpoint.keep"
    elif isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in text:
      what = (
        f"it was not finished after checkpoint.timeout={self._timeout:g} seconds; raise it, or look for a slow process"
      )
    elif isinstance(error, PermissionError) or "PERMISSION_DENIED" in text or "Permission denied" in text:
      what = "the directory is not writable"
    else:
      what = "it was not written"
    return CheckpointError(
      f"saving step {step} in {self._run_dir} failed: {what} ({text[:800]}). Earlier checkpoints are untouched."
    )
