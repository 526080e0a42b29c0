"""Runs a command as several processes on this machine, each with simulated CPU devices:

    python -m launch.local --processes 4 --devices-per-process 2 -- python -m maxscale.train --config configs/tiny.py

What process 0 says is shown; each process has a log file. When one fails, the others are ended, and the last lines say
which one it was and why. Ctrl-C and SIGTERM are passed on to all. Exit code: 0, or that of the first process that failed
(128 + the number of the signal that ended it), or 75 where they were stopped and saved; 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

import launch

SAVED = 75  # the exit code of a run that was stopped and saved: no failure, the others are about to end, too
TAIL = 20  # lines of a log that are shown at the end
POLL = 0.02  # seconds
NOISE = b"[Gloo] Rank "  # it says of each connection that it was made, and cannot be told not to


class Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(argv: list[str] | None = None) -> int:
  parser = Parser("python -m launch.local", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
  parser.add_argument("--processes", type=int, required=True, help="how many to start")
  parser.add_argument("--devices-per-process", type=int, default=1, help="CPU devices that each simulates (1)")
  parser.add_argument("--logs", type=pathlib.Path, help="folder of the log files (runs/launch-<time>-<process id>)")
  parser.add_argument("--grace", type=float, default=5.0, help="seconds that the others have after a failure (5)")
  parser.add_argument("command", nargs="+", help="after --: the command, as for one process")
  arguments = parser.parse_args(argv)
  for name in ("processes", "devices_per_process"):
    if getattr(arguments, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  logs = arguments.logs or pathlib.Path("runs", time.strftime(f"launch-%Y%m%d-%H%M%S-{os.getpid()}"))
  with Job(arguments.grace) as job:
    try:
      logs.mkdir(parents=True, exist_ok=True)
      job.start(arguments.command, arguments.processes, arguments.devices_per_process, logs)
    except OSError as e:
      parser.error(str(e))
    say(f"{arguments.processes} x {shlex.join(arguments.command)}; logs in {logs}")
    return job.wait()


class Process:
  """One process of the job, the leader of a group of its own, so that what it starts can be ended with it."""

  def __init__(self, index: int, command: list[str], variables: dict[str, str], log: pathlib.Path):
    self.index, self.log = index, log
    with open(log, "wb") as output:
      self.popen = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **variables},
        start_new_session=True, preexec_fn=_die_with_parent(),
      )  # fmt: skip

  @property
  def code(self) -> int | None:
    return self.popen.poll()

  def signal(self, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
      os.killpg(self.popen.pid, number)

  def how(self) -> str:
    """How it ended: exit code, or name of the signal."""
    code = self.popen.returncode
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"

  def lines(self) -> list[str]:
    """What it said."""
    return [line.decode(errors="replace") for line in self.log.read_bytes().splitlines() if not line.startswith(NOISE)]


class Job:
  """The processes of a job. None of them is left at the end of the block."""

  def __init__(self, grace: float):
    self._grace = grace
    self._processes: list[Process] = []
    self._signals: list[int] = []  # received, and not yet passed on
    self._deadline = math.inf  # when what still runs is killed
    self._interrupts = 0
    self._reserved = socket.socket()

  def __enter__(self) -> Job:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background of a script
        signal.signal(number, lambda number, _: self._signals.append(number))
    return self

  def __exit__(self, *_: Any) -> None:
    for process in self._processes:
      process.signal(signal.SIGKILL)
      process.popen.wait()

  def start(self, command: list[str], processes: int, devices: int, logs: pathlib.Path) -> None:
    # Bound to the end, though never listened on: no other launcher on this machine is given the same port.
    self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    self._reserved.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{self._reserved.getsockname()[1]}"
    for i in range(processes):
      own = launch.variables(i, processes, coordinator, devices)
      own |= {"JAX_COORDINATOR_BIND_ADDRESS": coordinator}  # JAX would listen to the whole network
      if any("_proxy" in name.lower() for name in os.environ):
        own |= {"no_grpc_proxy": "127.0.0.1"}  # a proxy does not lead to this machine
      self._processes.append(Process(i, command, own, logs / f"process-{i}.log"))

  def wait(self) -> int:
    """Waits for all to end, and returns the exit code of the job."""
    running, failed = list(self._processes), None
    with open(self._processes[0].log, "rb") as shown:
      while running:
        time.sleep(POLL)
        self._pass_on()
        _copy(shown)
        ended = [p for p in running if p.code is not None]
        running = [p for p in running if p not in ended]
        if not failed and (failures := [p for p in ended if p.code not in (0, SAVED)]):
          failed = min(failures, key=_blame)
          self._deadline = time.monotonic() + self._grace
          for process in running:
            process.signal(signal.SIGTERM)
        if time.monotonic() > self._deadline:
          for process in running:
            process.signal(signal.SIGKILL)
      _copy(shown, last=True)
    if failed:
      self._explain(failed)
      code = failed.popen.returncode
      return code if code > 0 else 128 - code
    return SAVED if any(p.code for p in self._processes) else 0

  def _pass_on(self) -> None:
    """Passes on what was received; after a second Ctrl-C, at which processes leave at once, none has long to live."""
    while self._signals:
      number = self._signals.pop(0)
      self._interrupts += number == signal.SIGINT
      if self._interrupts > 1:
        self._deadline = min(self._deadline, time.monotonic() + self._grace)
      for process in self._processes:
        if process.code is None:
          process.signal(number if number == signal.SIGINT else signal.SIGTERM)

  def _explain(self, failed: Process) -> None:
    shown = set(self._processes[0].lines())
    for line in failed.lines()[-TAIL:]:
      if line not in shown:  # by process 0, often with the same error
        say(f"process {failed.index}: {line}")
    rest = "; the others were ended" if len(self._processes) > 1 else ""
    say(f"process {failed.index} of {len(self._processes)} {failed.how()}{rest}; its log is {failed.log}")


def _blame(process: Process) -> int:
  """Of several failures seen at the same time, the cause is the smallest: JAX aborts those that outlive another."""
  code = process.popen.returncode
  return 2 if code == -signal.SIGABRT else 1 if code > 0 else 0


def _copy(log: Any, last: bool = False) -> None:
  """Shows the lines that a log has more; one that is not complete waits, unless there will be no more."""
  while line := log.readline():
    if not line.endswith(b"\n") and not last:
      log.seek(-len(line), os.SEEK_CUR)
      break
    if not line.startswith(NOISE):
      sys.stdout.buffer.write(line)
  sys.stdout.flush()


def say(text: str) -> None:
  print(f"launch: {text}", flush=True)


def _die_with_parent() -> Any:
  """What a new process does first: it asks the kernel for SIGKILL when this one dies, even by SIGKILL (Linux only)."""
  if sys.platform != "linux":
    return None
  prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

  def ask() -> None:
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before
      os._exit(1)

  return ask


if __name__ == "__main__":
  sys.exit(main())
