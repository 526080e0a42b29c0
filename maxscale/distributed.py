"""The processes of a run: how they meet, and what they tell each other through JAX's coordination service.

No device takes part in any of it, and every wait has a deadline.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from maxscale import environment
from maxscale.errors import DeadlineError, UserError

JOIN = 300.0  # seconds that all processes have to meet
HEARTBEAT = 30  # seconds without a sign of life after which JAX ends the others

index, count = 0, 1  # of this process and its run; known for sure once `join` is back


def join(failed: Callable[[UserError], Any] = lambda e: None) -> None:
  """Meets the other processes, where a launcher said that there are any; a second call does nothing.

  When they have not all met after `JOIN` seconds, calls `failed` and ends this process.

  Raises:
    UserError: the address cannot be used, or no cluster that JAX knows was found; `failed` was called.
  """
  global index, count
  where = os.environ.get(environment.COORDINATOR)
  if not where:
    return
  import jax

  if jax.distributed.is_initialized():
    return
  # Its handler of SIGTERM would replace ours (resilience/interrupt.py), which knows other signals too.
  jax.config.update("jax_enable_preemption_service", False)
  known: dict[str, Any] = {}
  if where != environment.AUTO:
    me, all_ = environment.place()
    known = {"coordinator_address": where, "num_processes": all_, "process_id": me}
  alarm = threading.Timer(JOIN, _not_met, (where, failed))  # JAX's own deadline ends in SIGABRT and C++ stack traces
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(**known, initialization_timeout=int(JOIN) + 60, heartbeat_timeout_seconds=HEARTBEAT)
  except (RuntimeError, ValueError) as e:
    error = UserError(f"the processes cannot meet ({environment.COORDINATOR}={where}): {e}")
    failed(error)
    raise error from e
  finally:
    alarm.cancel()
  index, count = jax.process_index(), jax.process_count()


def _not_met(where: str, failed: Callable[[UserError], Any]) -> None:
  error = DeadlineError(
    f"after {JOIN:.0f} s the processes of this run have not all met ({environment.COORDINATOR}={where}): look for one "
    "that did not start, or that cannot reach this address"
  )
  failed(error)
  print(error, file=sys.stderr, flush=True)
  os._exit(1)


def tell(key: str, value: str) -> None:
  """Tells every process something; what is told first under a key stays."""
  from jax.errors import JaxRuntimeError

  try:
    _client().key_value_set(f"maxscale/{key}", value)
  except JaxRuntimeError as e:
    if "ALREADY_EXISTS" not in str(e):
      raise


def ask(key: str, seconds: float, whom: str = "any process") -> str:
  """What a process tells under a key; waits for it.

  Raises:
    DeadlineError: it did not tell.
  """
  return _by(seconds, f"{whom} did not tell {key!r}", _client().blocking_key_value_get, f"maxscale/{key}")


def told(prefix: str) -> list[str]:
  """What was told under all keys `prefix/...`."""
  return [value for _, value in _client().key_value_dir_get(f"maxscale/{prefix}/")]


def meet(name: str, seconds: float) -> None:
  """Waits until every process is here; nothing to do for one. A name is used once in the life of a run's processes.

  Raises:
    DeadlineError: names some that are missing.
  """
  if count > 1:
    _by(seconds, f"not all of {count} processes came to {name!r}", _client().wait_at_barrier, f"maxscale/{name}")


def leave(program: str, error: BaseException) -> None:
  """With other processes: prints why this one fails, and ends it at once. Alone: returns.

  A normal exit would wait for the others, who may be waiting for this one.
  """
  if count == 1:
    return
  sys.stdout.flush()
  if isinstance(error, UserError):
    print(f"{program}: {error}", file=sys.stderr)
  else:
    traceback.print_exception(error)
  sys.stderr.flush()
  os._exit(getattr(error, "exit_code", 1))


def _by(seconds: float, what: str, wait: Any, key: str) -> Any:
  from jax.errors import JaxRuntimeError

  try:
    return wait(key, int(seconds * 1000))
  except JaxRuntimeError as e:
    if "DEADLINE_EXCEEDED" in str(e):
      raise DeadlineError(f"{what} within {seconds:.0f} s ({' '.join(str(e).split())[:500]})") from e
    raise


def _client() -> Any:
  from jax._src import distributed  # JAX has no public name for it

  return distributed.global_state.client
