"""Lowers the step of configs for the chips that they are for, without one of these, and prints what it saw, as JSON.

`python -m tests.lowering llama3_8b ...`; in a process of its own, because libtpu reads its environment once.
"""

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from maxscale import config as config_lib
from maxscale.models import module
from maxscale.perf import flops
from maxscale.sharding import chips, mesh, rules
from maxscale.step import Program


def lowered(name):
  start = time.perf_counter()
  c = config_lib.load(f"configs/{name}.py")
  shape, device_mesh = mesh.for_config(c, chips.devices(c.mesh.topology, c.mesh.slices or 1))
  program = Program(c, c.model.vocab_size, device_mesh, rules.make(c.sharding, shape.sizes, shape.slices))
  program.check(c.data.batch_size, c.data.length)
  text = program.trace(c.data.batch_size, c.data.length).lower().as_text()
  active = flops.from_config(c, c.model.vocab_size).params
  return {
    "devices": shape.devices, "parameters": module.count(program.skeleton.specs), "matmul_parameters": active,
    "tokens": c.data.batch_size * c.data.length, "text": len(text), "seconds": time.perf_counter() - start,
  }  # fmt: skip


if __name__ == "__main__":
  print(json.dumps({name: lowered(name) for name in sys.argv[1:]}))
