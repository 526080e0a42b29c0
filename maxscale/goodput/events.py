"""The event log of a run: one JSON line an event, from which every second of every process is accounted for.

Each line has the envelope
  v        version of the schema
  run      random hex name of the run directory (`run_id` in it)
  attempt  starts of the run so far, from 1
  process  index of the process
  seq      number of the line in its (attempt, process), from 0
  wall     unix time in seconds: comparable between hosts as far as their clocks agree
  mono     seconds since the operating system started the process: never runs backwards
  kind     one of `KINDS`
and the fields of its kind. Readers ignore kinds and fields that they do not know; non-finite numbers are null.

What the main thread is doing is a sequence of classes (`CLASSES`): a process is in class "start" from mono=0, and a
"state" event says that it enters another. Each second therefore belongs to exactly one class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from maxscale.goodput import segments

VERSION = 1
FOLDER = "events"

_PACKAGES = ("maxscale", "jax", "jaxlib")  # whose versions the first line has
_NUMBER = (int, float)
# kind -> its required fields and their types; an event may have more. A "step" is a number of optimizer steps done:
# the first one that ends is step 1, and the checkpoint of step s holds the steps 1..s.
KINDS: dict[str, dict[str, type | tuple]] = {
  # the first line of each process
  "job": {"host": str, "pid": int, "processes": int, "config_hash": str, "versions": dict},
  "devices": {"devices": int, "device_kind": str},  # JAX devices of the whole job, once they are known
  "state": {"class": str},  # the main thread enters a class of time
  "config": {"option": str, "old": object, "new": object},  # a schedule option changed at a resume
  "compile": {"seconds": _NUMBER, "cache": str, "program": str},  # cache: hit, miss, or off (was not asked)
  "restore": {"step": int, "seconds": _NUMBER, "bytes": int},  # the run goes on from the checkpoint of this step
  "step": {"step": int, "seconds": _NUMBER, "tokens": int},  # a step whose end was seen, and its global tokens
  "save": {"step": int, "seconds": _NUMBER},  # the training loop was blocked for so long by a save
  "commit": {"step": int, "seconds": _NUMBER, "bytes": int},  # the checkpoint of this step exists from now on
  "checkpoint_bad": {"step": int, "array": str, "reason": str},  # a checkpoint that failed its verification
  "eval": {"step": int, "loss": _NUMBER, "seconds": _NUMBER},
  "skip": {"step": int},  # the update of this step was not finite, and was not applied
  "profile": {"step": int, "path": str},
  "exit": {"code": int, "reason": str},  # the last line of a process that was not killed
}
ENVELOPE = frozenset(("v", "run", "attempt", "process", "seq", "wall", "mono", "kind"))


@dataclasses.dataclass(frozen=True)
class TimeClass:
  """A class of time. good: its seconds are progress; derived: the ledger finds it, no process enters it."""

  good: bool
  meaning: str
  derived: bool = False


CLASSES: dict[str, TimeClass] = {
  "step": TimeClass(True, "training steps"),
  "start": TimeClass(False, "start of the process, Python, imports"),
  "device_init": TimeClass(False, "joining the other processes and finding the devices"),
  "data_init": TimeClass(False, "opening and tokenising the data"),
  "init": TimeClass(False, "initialising the parameters"),
  "restore": TimeClass(False, "restoring a checkpoint"),
  "compile": TimeClass(False, "tracing and compiling"),
  "data_wait": TimeClass(False, "waiting for a batch"),
  "save": TimeClass(False, "blocked by a checkpoint save"),
  "eval": TimeClass(False, "evaluation on held-out data"),
  "finish": TimeClass(False, "samples, reports and the last commit at the end"),
  "exit": TimeClass(False, "shutting down"),
  "down": TimeClass(False, "between two attempts: no process was running", derived=True),
  "lost": TimeClass(False, "steps whose progress no later attempt resumed from", derived=True),
}


class EventLog:
  """The event log of one process: its only writer. `event` may be called from any thread, `enter` from the main one.

  The first line (kind "job") is written to the run directory at once, the others go through a spool on the local disk
  (`segments.SegmentWriter`).

  Attributes:
    attempt: number of this start of the run, from 1.
    current: the class of time that the main thread is in.
    at_close: functions that `close` calls first.
  """

  def __init__(
    self, run_dir: str, process: int = 0, processes: int = 1, config_hash: str = "", seconds: float = 30.0
  ) -> None:
    """Opens the log and writes the first line.

    Args:
      run_dir: directory of the run, in any store.
      process: index of this process, of `processes`.
      config_hash: hash of the identity options of the config.
      seconds: interval at which lines reach the run directory.

    Raises:
      DeadlineError: process 0 of a new run did not name it.
    """
    self._start = process_start()
    self._writer = segments.SegmentWriter(run_dir, FOLDER, process, seconds)
    self._envelope = {"v": VERSION, "run": segments.run_id(run_dir, process)}
    self._envelope |= {"attempt": self._writer.attempt, "process": process}
    self._lock = threading.RLock()  # a signal handler may log while the main thread is here
    self._seq = 0
    self.attempt, self.current, self.closed = self._writer.attempt, "start", False
    self.at_close: list[Callable[[], None]] = []
    who = {"host": socket.gethostname(), "pid": os.getpid(), "processes": processes, "config_hash": config_hash}
    self.event("job", **who, versions={"python": platform.python_version()} | {p: version(p) for p in _PACKAGES})

  def event(self, kind: str, **fields: Any) -> None:
    """Appends one event.

    Raises:
      ValueError: the kind is unknown, a field is missing or has a name of the envelope, or the log is closed.
      TypeError: a field has the wrong type.
      OSError: the local disk refused the line.
    """
    _check(kind, fields)
    with self._lock:
      if self.closed:
        raise ValueError(f"the event log is closed: {kind} {fields}")
      clock = {"seq": self._seq, "wall": round(time.time(), 6), "mono": round(_boot_clock() - self._start, 6)}
      self._writer.append(dumps({**self._envelope, **clock, "kind": kind, **fields}))
      self._seq += 1

  def enter(self, cls: str) -> None:
    """The main thread is in class `cls` from now on.

    Raises:
      ValueError: there is no such class, or it is one that the ledger derives.
    """
    if cls not in CLASSES or CLASSES[cls].derived:
      raise ValueError(f"{cls!r} is no class that a process enters: {', '.join(CLASSES)}")
    if cls != self.current:
      self.event("state", **{"class": cls})
      self.current = cls

  @contextlib.contextmanager
  def state(self, cls: str) -> Iterator[None]:
    """The main thread is in class `cls` within the block, and in the class before it afterwards."""
    before = self.current
    self.enter(cls)
    try:
      yield
    finally:
      self.enter(before)

  def flush(self) -> None:
    """Writes all lines so far to the run directory, for whoever reads it while this log is open.

    Raises:
      OSError: the store refused them; they stay in the spool.
    """
    with self._lock:
      self._writer.flush()

  def close(self, code: int, reason: str) -> None:
    """Writes the "exit" event and all lines to the run directory. A second call does nothing.

    Raises:
      OSError: the store refused the lines; the next start of the run on this host recovers them.
    """
    with self._lock:
      if self.closed:
        return
      for function in self.at_close:
        function()
      self.event("exit", code=code, reason=reason)
      self.closed = True
      self._writer.close()

  def failed(self, error: BaseException) -> None:
    """Closes the log of a process that ends with an error."""
    self.close(getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"[:1000])


def read(run_dir: str) -> list[dict]:
  """All events of a run, by attempt, process and seq; of a log that is still open, those that were flushed.

  A line that cannot be read (the last one of a process that was killed while it wrote) becomes an event of kind "torn",
  with the clocks of the line before it.

  Raises:
    ValueError: a line has a newer schema than this version knows.
  """
  events, before = [], {}
  for attempt, process, line in segments.read_lines(run_dir, FOLDER):
    try:
      event = json.loads(line)
      schema = event["v"]
    except (ValueError, TypeError, KeyError):
      clocks = {key: before.get(key, 0) for key in ("run", "seq", "wall", "mono")}
      schema = VERSION
      event = {"v": schema, "attempt": attempt, "process": process, "kind": "torn", **clocks}
    if schema > VERSION:
      raise ValueError(f"{run_dir} has events of schema {schema}; this version of maxscale knows {VERSION}")
    events.append(event)
    before = event
  return events


def watch_jax(log: EventLog) -> None:
  """Writes a "compile" event for each program that XLA compiles or takes from the persistent cache, until `close`."""
  from jax import monitoring

  seen = threading.local()  # the events of one compilation come from one thread, its duration last

  def on_event(event: str, **_: str | int) -> None:
    if event == "/jax/compilation_cache/compile_requests_use_cache":
      seen.cache = "miss"
    elif event == "/jax/compilation_cache/cache_hits":
      seen.cache = "hit"

  def on_duration(event: str, duration_secs: float, **fields: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      cache, seen.cache = getattr(seen, "cache", "off"), "off"
      log.event("compile", seconds=duration_secs, cache=cache, program=str(fields.get("fun_name", "")))

  monitoring.register_event_listener(on_event)
  monitoring.register_event_duration_secs_listener(on_duration)
  log.at_close.append(lambda: monitoring.unregister_event_listener(on_event))
  log.at_close.append(lambda: monitoring.unregister_event_duration_listener(on_duration))


def dumps(line: dict[str, Any]) -> str:
  """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
  try:
    return json.dumps(line, allow_nan=False)
  except ValueError:
    return json.dumps(_finite(line), allow_nan=False)


def process_start() -> float:
  """The time of `_boot_clock` at which the operating system started this process.

  Off Linux there is no such clock without a dependency: there it is the time at which this module was imported, which
  misses the start of Python and earlier imports.
  """
  try:
    with open("/proc/self/stat") as f:
      ticks = int(f.read().rpartition(")")[2].split()[19])  # field 22, starttime; the name before it may hold blanks
  except FileNotFoundError:
    return _IMPORTED
  return ticks / os.sysconf("SC_CLK_TCK")


def _boot_clock() -> float:
  return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


_IMPORTED = _boot_clock()


def _check(kind: str, fields: dict[str, Any]) -> None:
  if kind not in KINDS:
    raise ValueError(f"unknown kind of event {kind!r}; known: {', '.join(KINDS)}")
  for name, types in KINDS[kind].items():
    if name not in fields:
      raise ValueError(f"event {kind!r} lacks the field {name!r}")
    if not isinstance(fields[name], types) or (types is not object and isinstance(fields[name], bool)):
      raise TypeError(f"event {kind!r}: {name}={fields[name]!r} has type {type(fields[name]).__name__}")
  if not ENVELOPE.isdisjoint(fields):
    raise ValueError(f"event {kind!r}: {sorted(ENVELOPE & fields.keys())} are fields of the envelope")


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
