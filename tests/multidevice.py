"""Cases on 8 simulated devices, in one process of their own, each of them a pytest result.

A module of cases has functions `case_*`; `python -m tests.multidevice <module>` runs them all. In the test file:

  results = multidevice.fixture("tests.sharding.layout_cases")

  @pytest.mark.parametrize("name", multidevice.names("tests.sharding.layout_cases"))
  def test_case(results, name):
    multidevice.check(results, name)
"""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback

import maxscale.environment
from maxscale.environment import simulation

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 8


def names(module: str) -> list[str]:
  """The cases of a module, found without importing it (it imports JAX)."""
  return re.findall(r"^def (case_\w+)", (ROOT / (module.replace(".", "/") + ".py")).read_text(), re.M)


def run(module: str) -> dict[str, str | None]:
  """Case -> its traceback, or None; "stderr" -> all that the process wrote there."""
  command = [sys.executable, "-m", "tests.multidevice", module]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  lines = done.stdout.splitlines()
  if done.returncode or not lines:
    return {"stderr": done.stderr, **dict.fromkeys(names(module), f"exit {done.returncode}\n{done.stderr[-5000:]}")}
  return {**json.loads(lines[-1]), "stderr": done.stderr}


def environment(devices: int = DEVICES, **more: str) -> dict[str, str]:
  """The environment of a process that simulates so many CPU devices."""
  return {**os.environ, **simulation(devices), **more}


def fixture(module: str):
  """A fixture of scope module: the results of `run`."""
  import pytest

  return pytest.fixture(scope="module")(lambda: run(module))


def check(results: dict[str, str | None], name: str) -> None:
  """Fails with the traceback of a case."""
  assert name in results, f"{name} did not run; stderr:\n{results['stderr'][-5000:]}"
  assert results[name] is None, results[name]


def main(module: str) -> None:
  os.environ.update(environment())  # before anything imports JAX
  maxscale.environment.quick_compile()
  cases, results = importlib.import_module(module), {}
  for name in names(module):
    try:
      getattr(cases, name)()
      results[name] = None
    except Exception:
      results[name] = traceback.format_exc()
  print(json.dumps(results))


if __name__ == "__main__":
  main(sys.argv[1])
