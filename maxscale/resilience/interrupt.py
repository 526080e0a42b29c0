"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, a second Ctrl-C leaves at once.

All processes of a run must stop after the same step, whichever of them was asked. They agree once, when there is
something to agree on:
  1. the loop of the process that was asked tells the others; a thread in each process waits for that;
  2. the thread holds its loop where it is (by the lock that `stops_after` takes) and tells the step that it is at;
  3. when all have told, all stop after the step that follows the latest of these, which no loop has passed.
Until then a step costs a lock that is free. Nothing is sent, no device takes part, and none is waited for.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from maxscale import distributed
from maxscale.errors import DeadlineError

INTERRUPTED = 75  # EX_TEMPFAIL: saved; the same command goes on from there
KILLED = 130  # left at once, without a save; what was committed stays
AGREE = 60.0  # seconds that all processes have to agree


class Interrupt:
  """Use as a context manager in the main thread.

  Attributes:
    requested: name of the signal that asked to stop, and of its process if that was another; or empty.
  """

  def __init__(self) -> None:
    self.requested = ""
    self._again = False
    self._before: dict[int, Any] = {}
    self._thread: threading.Thread | None = None
    self._lock = threading.Lock()
    self._step, self._last = 0, math.inf  # the newest step asked about, and the one agreed on

  def __enter__(self) -> Interrupt:
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    if self._thread and kind is None:
      distributed.tell("interrupt", "")  # wakes the threads: JAX cannot shut down while one is waiting
      self._thread.join(AGREE)
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def agree(self, fail: Callable[[Exception], Any]) -> None:
    """From here on all processes stop after the same step; to be called by all of them as soon as they have met.

    `fail` is called, in a thread, where they could not agree: a process is gone.
    """
    if distributed.count > 1:
      self._thread = threading.Thread(target=self._agree, args=(fail,), name="interrupt", daemon=True)
      self._thread.start()

  def stops_after(self, step: int) -> bool:
    """Whether the run ends after this step: the same answer in every process. For the loop, step by step."""
    if not self._thread:
      return bool(self.requested)
    if self.requested and self._last == math.inf:
      distributed.tell("interrupt", f"{self.requested} of process {distributed.index}")
    with self._lock:
      self._step = step
      return step >= self._last

  def _agree(self, fail: Callable[[Exception], Any]) -> None:
    try:
      requested = _wait()
      if requested:
        with self._lock:
          distributed.tell(f"step/{distributed.index}", str(self._step))
          distributed.meet("stop", AGREE)
          self._last = 1 + max(map(int, distributed.told("step")))
          self.requested = requested
    except Exception as e:
      fail(e)

  def _handle(self, number: int, _: Any) -> None:
    if self._again and number == signal.SIGINT:
      os.write(2, b"\nleaving at once; what was committed stays\n")
      os._exit(KILLED)  # not sys.exit: nothing that may block (a save, a device) stands between the user and the shell
    self._again = True
    self.requested = self.requested or signal.Signals(number).name
    name = signal.Signals(number).name
    os.write(2, f"\n{name}: saving and leaving; Ctrl-C again leaves at once\n".encode())


def _wait() -> str:
  """Who asked to stop, or empty where the run ended without."""
  while True:
    with contextlib.suppress(DeadlineError):
      return distributed.ask("interrupt", 86400.0)
