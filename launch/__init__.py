"""How a job reaches machines. What every launcher sets for process i of n is `variables`; nothing here needs JAX."""

from __future__ import annotations

from maxscale import environment


def variables(process: int, processes: int, coordinator: str, devices: int = 0) -> dict[str, str]:
  """The environment of one process, beside what it inherits.

  Args:
    process: its index, of `processes`.
    coordinator: host:port at which process 0 listens, as all can reach it.
    devices: CPU devices that it simulates; 0: it uses those of its machine.
  """
  own = {
    environment.COORDINATOR: coordinator,
    environment.PROCESSES: str(processes),
    environment.PROCESS: str(process),
    "PYTHONUNBUFFERED": "1",  # what a process says last is in its log, however it ends
  }
  return own | ({environment.DEVICES: str(devices)} if devices else {})
