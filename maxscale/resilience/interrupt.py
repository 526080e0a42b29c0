"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = 75  # EX_TEMPFAIL: saved; the same command goes on from there
KILLED = 130  # left at once, without a save; what was committed stays


class Interrupt:
  """`requested` is the name of the signal that asked to stop, or empty. Use as a context manager in the main thread."""

  def __init__(self) -> None:
    self.requested = ""
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Interrupt:
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: Any) -> None:
    if self.requested and number == signal.SIGINT:
      os.write(2, b"\nleaving at once; what was committed stays\n")
      os._exit(KILLED)  # not sys.exit: nothing that may block (a save, a device) stands between the user and the shell
    self.requested = signal.Signals(number).name
    os.write(2, f"\n{self.requested}: saving and leaving; Ctrl-C again leaves at once\n".encode())
