"""One builder at a time: a lock file that says who holds it, and whether the holder still lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

BEAT = 5.0  # seconds between heartbeats (the lock file's mtime)
STALE = 60.0  # seconds without a heartbeat after which the holder is taken for dead


class Lock:
  """A lock file in a folder that hosts may share.

  It is stale where its process is dead (seen on the same host only) or its mtime has not moved for `STALE` seconds of
  watching it: hosts' clocks need not agree.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._me = {"pid": os.getpid(), "host": socket.gethostname(), "id": uuid.uuid4().hex}
    self._seen: tuple[str, float] = ("", 0.0)  # the holder's id and mtime when it last moved, and
    self._moved = time.monotonic()  # when that was
    self._stop = threading.Event()
    self._heart = threading.Thread(target=self._beat, name="data-lock", daemon=True)

  def acquire(self) -> bool:
    """Takes the lock where it is free or stale, and says whether it did; a lock object is taken once."""
    with self._guard():  # two waiters must not both take a stale lock
      if self._alive():
        return False
      fresh = self.path.with_suffix(".new")
      fresh.write_text(json.dumps(self._me))
      os.replace(fresh, self.path)
    self._heart.start()
    return True

  def release(self) -> None:
    """Gives the lock back, unless another has taken it over."""
    self._stop.set()
    self._heart.join()
    with self._guard():
      if self.holder().get("id") == self._me["id"]:
        self.path.unlink()

  def check(self) -> None:
    """Raises RuntimeError where another process took the lock over, as it may after a long suspension."""
    holder = self.holder()
    if holder.get("id") != self._me["id"]:
      raise RuntimeError(f"{self.path} was taken over by {describe(holder)}; this process was silent for too long")

  def holder(self) -> dict:
    """pid, host and id of the holder; empty where there is none."""
    if not self.path.exists():
      return {}
    try:
      return json.loads(self.path.read_text())
    except FileNotFoundError:  # released in between
      return {}

  def silence(self) -> float:
    """Seconds for which the holder has shown no sign of life, as far as this process watched."""
    return time.monotonic() - self._moved

  @contextlib.contextmanager
  def _guard(self) -> Iterator[None]:
    """Held for an instant around each change of the lock file; the kernel frees it when its holder dies."""
    with open(f"{self.path}.guard", "w") as guard:
      fcntl.flock(guard, fcntl.LOCK_EX)
      yield

  def _alive(self) -> bool:
    holder = self.holder()
    if not holder:
      return False
    if holder["host"] == self._me["host"] and not _runs(holder["pid"]):
      return False
    seen = (holder["id"], self.path.stat().st_mtime)
    if seen != self._seen:
      self._seen, self._moved = seen, time.monotonic()
    return self.silence() < STALE

  def _beat(self) -> None:
    while not self._stop.wait(BEAT) and self.holder().get("id") == self._me["id"]:
      os.utime(self.path)


def describe(holder: dict) -> str:
  """A holder, for messages."""
  return f"process {holder['pid']} on {holder['host']}" if holder else "nobody"


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it runs, as another user
    return True
  return True
