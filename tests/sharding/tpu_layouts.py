"""Compiles training steps of many layouts for TPUs that are not here; prints what each moves, beside what it asks for.

`python -m tests.sharding.tpu_layouts name ...`; in a process of its own, because libtpu reads its environment once.
"""

import json
import os
import sys
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
from jax.experimental import topologies

from maxscale.perf import traffic
from maxscale.perf.compiled import collectives, program
from maxscale.sharding import mesh, rules
from maxscale.step import Program
from tests.models import reference as ref

VOCAB = 4096
BASE = {"model.embed": 512, "model.layers": 4, "model.heads": 4, "model.kv_heads": 4, "model.head_dim": 128,
        "model.mlp": 1024, "data.batch_size": 16, "data.length": 512, "remat.policy": "full"}  # fmt: skip
MOE = {**BASE, "model.experts": 8, "model.mlp": 512}
ZERO1 = {"embed": ["fsdp", "data"]}
# name -> (topology, slices, options)
LAYOUTS = {
  "v5p fsdp": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 8}),
  "v5p data fsdp tensor": ("v5p:2x2x2", 1, {**BASE, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
  "v5p microbatches": ("v5p:2x2x1", 1, {**BASE, "mesh.fsdp": 4, "sharding.microbatches": 4}),
  "v5p context": ("v5p:2x2x2", 1, {**BASE, "mesh.context": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
  "v5p context gather": ("v5p:2x2x1", 1, {**BASE, "mesh.context": 4, "mesh.fsdp": 1, "sharding.context": "gather"}),
  "v5p pipeline": ("v5p:2x2x2", 1, {**BASE, "mesh.pipeline": 2, "mesh.fsdp": 4, "sharding.microbatches": 4}),
  "v5p expert": ("v5p:2x2x2", 1, {**MOE, "mesh.expert": 4, "mesh.fsdp": 2}),
  "v6e fsdp": ("v6e:2x4", 1, {**BASE, "mesh.fsdp": 8}),
  "v6e fsdp tensor": ("v6e:2x4", 1, {**BASE, "mesh.fsdp": 4, "mesh.tensor": 2}),
  "7x fsdp": ("tpu7x:2x2x1", 1, {**BASE, "mesh.fsdp": 8}),
  "7x expert tensor": ("tpu7x:2x2x1", 1, {**MOE, "mesh.expert": 4, "mesh.fsdp": 1, "mesh.tensor": 2}),
  "two slices": ("v5p:2x2x1", 2, {**BASE, "mesh.data": 2, "mesh.fsdp": 2, "sharding.microbatches": 2}),
  "two slices fsdp inside": ("v5p:2x2x1", 2, {**BASE, "mesh.fsdp": 4, "sharding.microbatches": 2}),
  "two slices state": ("v5p:2x2x1", 2, {**BASE, "mesh.data": 2, "mesh.fsdp": 2, "sharding.state": ZERO1}),
}  # fmt: skip


def build(topology, slices, options):
  c = ref.config(options)
  several = {"num_slices": slices} if slices > 1 else {}
  devices = topologies.get_topology_desc(topology, "tpu", **several).devices
  shape, device_mesh = mesh.for_config(c, devices)
  out = Program(c, VOCAB, device_mesh, rules.make(c.sharding, shape.sizes, shape.slices))
  out.check(c.data.batch_size, c.data.length)
  return out


def totals(rows):
  """[kind, axes, in a loop, across slices] -> [bytes of a step and device]; those of a KiB and less are not counted."""
  out = {}
  for kind, axes, depth, dcn, size in rows:
    key = json.dumps([kind, list(axes), depth > 0, dcn])
    out[key] = out.get(key, 0) + size
  return out


def look(name):
  p = build(*LAYOUTS[name])
  traced = p.trace(p.config.data.batch_size, p.config.data.length)
  asked = traffic.transfers(traced)
  found = collectives.collectives(program.read(p.compile(traced).as_text()))
  return {
    "asked": totals((t.kind, t.axes, t.depth, t.dcn, t.total) for t in traffic.by_slices(asked, p.rules)),
    "compiled": totals(
      (c.kind, collectives.mesh_axes_of(c, p.mesh), c.depth, c.dcn, c.run_bytes) for c in found
    ),
    "asynchronous": sum(c.run_bytes for c in found if c.asynchronous) / max(1, sum(c.run_bytes for c in found)),
  }  # fmt: skip


def grow(topology, **mesh_sizes):
  """[devices, instructions, seconds] of the compile of a layout whose work for a device is always the same."""
  replicas = mesh_sizes["mesh.data"] * mesh_sizes["mesh.fsdp"]
  changes = {"data.batch_size": 4 * replicas, "sharding.microbatches": 4, "mesh.tensor": 4}
  p = build(topology, 1, {**BASE, **changes, **mesh_sizes})
  start = time.perf_counter()
  text = p.compile(p.trace(4 * replicas, p.config.data.length)).as_text()
  return p.mesh.size, text.count(" = "), time.perf_counter() - start


def main(names):
  jax.config.update("jax_exec_time_optimization_effort", -1.0)  # three times faster; the schedule is not looked at
  if names == ["growth"]:
    few = grow("tpu7x:4x4x2", **{"mesh.data": 1, "mesh.fsdp": 8, "mesh.pipeline": 2})
    many = grow("tpu7x:16x16x16", **{"mesh.data": 16, "mesh.fsdp": 32, "mesh.pipeline": 4})
    print(json.dumps([few, many]))
  else:
    print(json.dumps({name: look(name) for name in names}))


if __name__ == "__main__":
  main(sys.argv[1:] or list(LAYOUTS))
