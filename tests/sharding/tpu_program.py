"""Compiles training steps for four v5e chips, which need not be here, and prints what the test looks at, as JSON.

`python -m tests.sharding.tpu_program`; in a process of its own, because libtpu reads its environment once.
"""

import json
import math
import os
import re

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
from jax.experimental import topologies

from maxscale.perf.compiled import collectives, program
from maxscale.sharding import mesh, rules
from maxscale.step import Program
from tests.models import reference as ref

BATCH, LENGTH, VOCAB, DEVICES = 32, 256, 2**17, 4
SMALL = {"model.embed": 256, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 128,
         "model.mlp": 512, "data.batch_size": BATCH, "data.length": LENGTH, "mesh.fsdp": 4}  # fmt: skip
CONFIGS = {
  "dense": {},
  "moe": {"model__experts": 4},
  "bfloat16 gradients": {"optimizer__grad_reduce_dtype": "bfloat16"},
  "offloaded": {"remat__policy": "custom", "remat__table": {"gate": "offload"}},
}
ARRAY = re.compile(r"\b(f32|bf16)\[([\d,]+)\]")


def compiled_text(**options):
  c = ref.config(SMALL, **options)
  shape, device_mesh = mesh.for_config(c, topologies.get_topology_desc("v5e:2x2", "tpu").devices)
  p = Program(c, VOCAB, device_mesh, rules.make(c.sharding, shape.sizes, shape.slices))
  p.check(BATCH, LENGTH)
  return p.compile(p.trace(BATCH, LENGTH)).as_text()


def reductions(text):
  """dtype -> bytes of a step and device that cross devices in sums, those of single numbers left out."""
  out = {}
  for c in collectives.collectives(program.read(text)):
    if c.kind in ("all-reduce", "reduce-scatter") and c.bytes > 2**14:
      out["+".join(c.dtypes)] = out.get("+".join(c.dtypes), 0) + c.run_bytes
  return out


def main():
  jax.config.update("jax_exec_time_optimization_effort", -1.0)  # three times faster; the schedule is not looked at
  out = {}
  for name, options in CONFIGS.items():
    text = compiled_text(**options)
    arrays = [[math.prod(map(int, dims.split(","))), dims] for _, dims in set(ARRAY.findall(text))]
    out[name] = {
      "reductions": reductions(text),
      "largest": max(arrays),
      "kernels": text.count('custom_call_target="tpu_custom_call"'),
      "host_arrays": len(set(re.findall(r"bf16\[[\d,]+\]\{[^}]*S\(5\)", text))),
    }
  print(json.dumps(out))


if __name__ == "__main__":
  main()
