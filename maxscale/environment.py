"""What must be set before JAX is imported, how processes meet, and the few settings right after. Imports no JAX at the top.

The config is the same in every process of a run; what differs between them is in variables that a launcher sets:

  MAXSCALE_COORDINATOR          host:port at which process 0 listens, or "auto": JAX asks the cluster (TPU VMs, GKE, Slurm,
                                Open MPI) for this and the next two. Unset: there is one process
  MAXSCALE_PROCESSES            number of processes
  MAXSCALE_PROCESS              index of this process, from 0
  MAXSCALE_DEVICES_PER_PROCESS  CPU devices that each process simulates; unset: each uses those of its machine
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a launcher reads the names below, and may have nothing but Python
  from maxscale.config import Config

COORDINATOR, PROCESSES, PROCESS = "MAXSCALE_COORDINATOR", "MAXSCALE_PROCESSES", "MAXSCALE_PROCESS"
DEVICES = "MAXSCALE_DEVICES_PER_PROCESS"
AUTO = "auto"


def prepare(config: Config) -> None:
  """Sets the environment that JAX reads when it is imported: the simulated devices, or flags of libtpu.

  Raises:
    ConfigError: JAX was imported already, or the config and the launcher disagree on the number of devices.
  """
  from maxscale.config import ConfigError

  devices = _simulated_devices(config)
  if not devices:
    from maxscale.perf import compiler

    if (chip := compiler.local_chip()) and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
      compiler.before_jax(config, chip, int(os.environ.get("MEGASCALE_NUM_SLICES", "1")))
    return
  if "jax" in sys.modules:
    raise ConfigError("run.simulated_devices must be set before JAX is imported; start the run in its own process")
  os.environ.update(
    simulation(devices, os.environ.get("XLA_FLAGS", "")), NPROC=os.environ.get("NPROC", str(4 * devices))
  )
  os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"  # between processes; inside one there is none to choose


def prepare_plan(config: Config, topology: str, slices: int = 1) -> None:
  """Before libtpu is loaded: this process compiles a config for chips that are not here, with the flags of a run there."""
  from maxscale.perf import compiler

  os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  compiler.before_jax(config, compiler.chip_of_topology(topology), slices)


def simulation(devices: int, own: str = "") -> dict[str, str]:
  """Environment of a process that simulates so many CPU devices. `own`: the user's XLA_FLAGS, which stay."""
  own = re.sub(r"--xla_force_host_platform_device_count=\S+", "", own)
  flags = [f"--xla_force_host_platform_device_count={devices}"]
  # Timeouts let many devices share few cores
  for flag in ("xla_cpu_collective_call_terminate_timeout_seconds", "xla_cpu_collective_timeout_seconds"):
    if flag not in own:
      flags.append(f"--{flag}=600")
  # and there are more threads than collectives can hold
  return {"XLA_FLAGS": " ".join([*own.split(), *flags]), "JAX_PLATFORMS": "cpu", "NPROC": str(4 * devices)}


def quick_compile() -> None:
  """Before JAX is imported: XLA compiles for a CPU in a fraction of the time, to slower code; values change by rounding.

  For comparisons and tests, which compile more than they compute.
  """
  flags = ["--xla_backend_optimization_level=0"]
  if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # newer ones abort on the flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
  own = os.environ.get("XLA_FLAGS", "").split()
  os.environ["XLA_FLAGS"] = " ".join([*(f for f in flags if f not in own), *own])


def place() -> tuple[int, int]:
  """(index of this process, number of processes), as the variables say; (-1, -1) where only the cluster knows.

  Raises:
    ConfigError: the variables are incomplete or contradict each other.
  """
  where = os.environ.get(COORDINATOR, "")
  if not where:
    return 0, 1
  if where == AUTO:
    return -1, -1
  index, count = _number(PROCESS), _number(PROCESSES)
  if not 0 <= index < count or not re.fullmatch(r".+:\d+", where):
    from maxscale.config import ConfigError

    raise ConfigError(
      f"{COORDINATOR}={where!r}, {PROCESS}={os.environ.get(PROCESS)!r} and {PROCESSES}={os.environ.get(PROCESSES)!r} "
      "must be host:port, an index from 0, and a number above it; a launcher sets them"
    )
  return index, count


def devices(config: Config) -> list[Any]:
  """Meets the other processes, if it was not done yet, sets JAX's compile cache, and returns all devices."""
  import jax

  from maxscale import distributed

  distributed.join()
  if config.run.compile_cache:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.run.compile_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return jax.devices()


def _simulated_devices(config: Config) -> int:
  """CPU devices that this process is to simulate; 0: none."""
  from maxscale.config import ConfigError

  (_, count), each, total = place(), _number(DEVICES, 0), config.run.simulated_devices
  if COORDINATOR not in os.environ:
    return total
  if total and not each:
    raise ConfigError(
      f"run.simulated_devices={total} is for one process; with several, the launcher says how many each simulates "
      f"({DEVICES}): set run.simulated_devices=0"
    )
  if total and count > 0 and total != count * each:
    raise ConfigError(
      f"run.simulated_devices={total}, but {count} processes with {each} devices each have {count * each}: start another "
      f"number, or set run.simulated_devices={count * each} and a mesh for it"
    )
  return each


def _number(name: str, default: int = -1) -> int:
  text = os.environ.get(name, "")
  return int(text) if text.isdecimal() else default
