"""Lines of text that survive the death of the process that writes them, in a store that cannot append.

A writer appends each line to a spool on the local disk, and now and then writes the spool as one whole object, a
segment, to a folder of the run directory. A segment is written again while it grows, up to `SEGMENT_BYTES`: a run of a
month leaves hundreds of objects, not one per interval. A spool whose writer died is finished by the next writer of the
run on that host.

  <run directory>/run_id                                         names the run, made once
  <run directory>/<folder>/<attempt>-<process>-<segment>.jsonl   attempts count from 1, the others from 0
"""

from __future__ import annotations

import fcntl
import logging
import os
import pathlib
import re
import secrets
import tempfile
import time
from collections.abc import Iterator

from maxscale import storage
from maxscale.errors import DeadlineError

SEGMENT_BYTES = 1 << 20
RUN_ID_DEADLINE = 300.0  # seconds that other processes wait for process 0 to name a new run

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)\.jsonl")
_open_here: set[pathlib.Path] = set()  # spools of this operating system process, whose own locks do not stop it


def run_id(run_dir: str, process: int = 0) -> str:
  """The random hex name of a run directory; process 0 makes it if there is none, the others wait for it.

  Raises:
    DeadlineError: process 0 did not make it within `RUN_ID_DEADLINE` seconds.
  """
  file = storage.path(run_dir) / "run_id"
  deadline = time.monotonic() + RUN_ID_DEADLINE
  while True:
    text = file.read_text().strip() if file.exists() else ""
    if re.fullmatch(r"[0-9a-f]{16}", text):  # a shorter one is still being written, or was torn
      return text
    if process == 0:
      storage.write(file, secrets.token_hex(8))
    elif time.monotonic() > deadline:
      raise DeadlineError(f"process 0 has not made {file} within {RUN_ID_DEADLINE:.0f} s: it did not start, or failed")
    else:
      time.sleep(0.1)


def read_lines(run_dir: str, folder: str) -> Iterator[tuple[int, int, str]]:
  """(attempt, process, line) of all segments in order; the last line of a segment may be torn.

  Lines reach the run directory with a delay: of a process that is still running, the last `seconds` are missing.
  """
  for attempt, process, segment in _names(storage.path(run_dir) / folder):
    data = (storage.path(run_dir) / folder / f"{attempt}-{process}-{segment}.jsonl").read_bytes()
    for line in data.decode(errors="replace").removesuffix("\n").split("\n"):
      yield attempt, process, line


class SegmentWriter:
  """The one writer of a (run, folder, process). Not safe for threads: its owner holds a lock.

  Attributes:
    attempt: 1 + the attempts that this process left in the folder, and at least the newest of process 0.
  """

  def __init__(self, run_dir: str, folder: str, process: int = 0, seconds: float = 30.0):
    """Recovers the spools of dead writers; writes nothing of its own yet.

    Args:
      seconds: interval at which lines reach the run directory, checked when a line is appended.
    """
    self._folder = storage.path(run_dir) / folder
    self._spools = _spool_root() / run_id(run_dir, process) / folder
    self._spools.mkdir(parents=True, exist_ok=True)
    self._process, self._seconds, self._segment, self._fd = process, seconds, 0, -1
    self._recover()
    found = [(a, p) for a, p, _ in _names(self._folder)]
    # An attempt of process 0 that this process has not joined is the one that is starting now.
    self.attempt = max([1] + [a + 1 for a, p in found if p == process] + [a for a, p in found if p == 0])

  def append(self, line: str) -> None:
    """Appends a line (without its newline) to the spool; ships the spool when it is due."""
    data = line.encode() + b"\n"
    if self._fd < 0:
      if self._segment == 0:  # the first line claims the number of the attempt, before any spool bears it
        storage.write(self._folder / self._name, data)
      self._open()
    os.write(self._fd, data)
    self._size += len(data)
    if self._size >= self._limit or time.monotonic() >= self._due:
      self._ship_or_retry()

  def flush(self) -> None:
    """Writes what the spool holds to the run directory.

    Raises:
      OSError: the store refused it; the spool keeps the lines.
    """
    if self._fd >= 0:
      storage.write(self._folder / self._name, os.pread(self._fd, self._size, 0))

  def close(self) -> None:
    """Ships the last lines and deletes the spool.

    Raises:
      OSError: the store refused them; the spool stays for the next writer of the run on this host.
    """
    self.flush()
    self._drop()

  @property
  def _name(self) -> str:
    return f"{self.attempt}-{self._process}-{self._segment}.jsonl"

  def _open(self) -> None:
    self._fd = os.open(self._spools / self._name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    # A lock of the process, not of the descriptor: it ends with the writer even if a forked worker lives on.
    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _open_here.add(self._spools / self._name)
    self._size, self._limit, self._due = 0, SEGMENT_BYTES, time.monotonic() + self._seconds

  def _drop(self) -> None:
    if self._fd >= 0:
      (self._spools / self._name).unlink()
      _open_here.discard(self._spools / self._name)
      os.close(self._fd)
      self._fd, self._segment = -1, self._segment + 1

  def _ship_or_retry(self) -> None:
    self._due = time.monotonic() + self._seconds
    try:
      self.flush()
    except OSError as e:  # the lines are safe in the spool: an outage of the store must not stop a training run
      logging.getLogger(__name__).warning("%s is not written yet, trying again: %s", self._folder / self._name, e)
      self._limit = self._size + SEGMENT_BYTES
    else:
      if self._size >= SEGMENT_BYTES:
        self._drop()

  def _recover(self) -> None:
    for spool in sorted(set(self._spools.iterdir()) - _open_here):
      try:
        fd = os.open(spool, os.O_RDWR)
      except FileNotFoundError:  # another process of the run, starting at the same time, has just recovered it
        continue
      try:
        if _lock(fd):
          storage.write(self._folder / spool.name, os.pread(fd, os.fstat(fd).st_size, 0))
          spool.unlink(missing_ok=True)
      finally:
        os.close(fd)


def _names(folder: str | os.PathLike) -> list[tuple[int, ...]]:
  """(attempt, process, segment) of each segment of a folder, sorted."""
  return sorted(tuple(map(int, m.groups())) for m in map(_NAME.fullmatch, storage.listdir(folder)) if m)


def _lock(fd: int) -> bool:
  try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except BlockingIOError:  # another process of the run on this host, alive
    return False


def _spool_root() -> pathlib.Path:
  return pathlib.Path(tempfile.gettempdir()) / f"maxscale-{os.getuid()}"
