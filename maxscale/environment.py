"""What must be set before JAX is imported, and the few settings right after. Nothing here imports JAX at the top."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from maxscale.config import Config, ConfigError


def prepare(config: Config) -> None:
  """Sets the environment that JAX reads when it is imported: the simulated devices.

  Raises:
    ConfigError: JAX was imported already, with another number of devices.
  """
  devices = config.run.simulated_devices
  if not devices:
    return
  if "jax" in sys.modules:
    raise ConfigError("run.simulated_devices must be set before JAX is imported; start the run in its own process")
  # The user's own flags stay, except the one that this option is; the two others let many devices share few cores.
  own = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
  flags = [f"--xla_force_host_platform_device_count={devices}"]
  for flag in ("xla_cpu_collective_call_terminate_timeout_seconds", "xla_cpu_collective_timeout_seconds"):
    if flag not in own:
      flags.append(f"--{flag}=600")
  os.environ["XLA_FLAGS"] = " ".join([*own.split(), *flags])
  os.environ["JAX_PLATFORMS"] = "cpu"


def devices(config: Config) -> list[Any]:
  """Imports JAX, sets its compile cache, and returns the devices."""
  import jax

  if config.run.compile_cache:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.run.compile_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  return jax.devices()
