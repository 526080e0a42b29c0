"""Conversion at work: threads with a bound on the memory that they hold, its measured peak, outputs that are whole or absent."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from maxscale import storage
from maxscale.interop import InteropError


class Budget:
  """Bytes that may be held at once. `peak`: the most that were.

  Args:
    limit: a job that alone needs more runs alone.
  """

  def __init__(self, limit: int):
    self._limit, self._used, self.peak = limit, 0, 0
    self._changed = threading.Condition()

  def take(self, nbytes: int) -> None:
    with self._changed:
      self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
      self._used += nbytes
      self.peak = max(self.peak, self._used)

  def give(self, nbytes: int) -> None:
    with self._changed:
      self._used -= nbytes
      self._changed.notify_all()


def run(jobs: Iterable[tuple[int, Callable[[], None]]], budget: Budget) -> None:
  """Runs (bytes that it holds, job) in threads; the first error ends it, when the jobs that have begun have ended."""

  def do(nbytes: int, job: Callable[[], None]) -> None:
    try:
      job()
    finally:
      budget.give(nbytes)

  begun: collections.deque[concurrent.futures.Future] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
    for nbytes, job in jobs:
      budget.take(nbytes)
      begun.append(pool.submit(do, nbytes, job))
      while begun and begun[0].done():
        begun.popleft().result()
    for future in begun:
      future.result()


@dataclasses.dataclass(frozen=True)
class Report:
  """What a conversion did, in bytes and seconds.

  Attributes:
    read, written: bytes of tensors.
    largest: bytes of the largest tensor of theirs in float32.
    held: the most that buffers held at once, by the budget.
    peak: the most that the process's memory grew, by the kernel; None where it does not say.
  """

  read: int
  written: int
  seconds: float
  largest: int
  held: int
  peak: int | None

  def __str__(self) -> str:
    mib = lambda n: f"{n / 2**20:,.1f} MiB"  # noqa: E731
    peak = f"memory grew by {mib(self.peak)} at its peak (VmHWM)" if self.peak is not None else "peak of memory unknown"
    return (
      f"read {mib(self.read)}, wrote {mib(self.written)} in {self.seconds:.1f} s ({self.written / self.seconds / 1e6:,.0f} "
      f"MB/s); {peak}, of which buffers {mib(self.held)}; the largest tensor has {mib(self.largest)} in float32"
    )


class Meter:
  """Measures a conversion, from when it is made. `largest` and the budget are set by who converts."""

  STATUS, RESET = "/proc/self/status", "/proc/self/clear_refs"

  def __init__(self):
    self.largest, self._start, self._budget = 0, time.perf_counter(), Budget(0)
    self._before = None
    if os.path.exists(self.RESET):  # Linux
      with open(self.RESET, "w") as f:
        f.write("5")  # the kernel's high-water mark of resident memory starts again from here
      self._before = self._status("VmRSS")

  def budget(self, limit: int) -> Budget:
    self._budget = Budget(limit)
    return self._budget

  def report(self, read: int, written: int) -> Report:
    peak = None if self._before is None else max(0, self._status("VmHWM") - self._before)
    return Report(read, written, time.perf_counter() - self._start, self.largest, self._budget.peak, peak)

  def _status(self, key: str) -> int:
    with open(self.STATUS) as f:
      found = re.search(rf"{key}:\s+(\d+) kB", f.read())
    assert found
    return int(found[1]) * 1024


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
  """A folder to write, which is at `path` if all goes well, and gone if not.

  Raises:
    InteropError: `path` holds something already, or cannot be written.
  """
  if storage.path(path).is_file() or storage.listdir(path):
    raise InteropError(f"{path} is there already; name a new folder, or remove it")
  remote = "://" in path  # stores of objects have no rename; there the marker of a checkpoint comes last
  whole = os.path.abspath(os.path.expanduser(path))
  writing = path if remote else os.path.join(os.path.dirname(whole), f".{os.path.basename(whole)}.partial")
  try:
    storage.delete(writing)  # what a stopped conversion left
    storage.path(writing).mkdir(parents=True, exist_ok=True)
    yield writing
    if not remote:
      if os.path.isdir(whole):
        os.rmdir(whole)  # empty
      os.rename(writing, whole)
  except BaseException as e:
    storage.delete(writing)
    if isinstance(e, OSError):
      raise InteropError(f"{path} cannot be written: {e}") from e
    raise
