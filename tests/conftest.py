"""The pytest process: one CPU device. What needs more devices runs in a process of its own (tests/multidevice.py)."""

import os
import pathlib
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
own = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\S+", "", own).strip()
ROOT = str(pathlib.Path(__file__).parents[1])
if ROOT not in sys.path:  # `pytest` alone; `python -m pytest` adds it itself
  sys.path.insert(0, ROOT)

from maxscale import environment  # noqa: E402

environment.quick_compile()
