"""Cases on 8 simulated devices: a checkpoint of one layout goes on in another (tests/multidevice.py runs them)."""

import itertools
import tempfile

import numpy as np

from maxscale.checkpoint.commit import Meta
from maxscale.checkpoint.manager import Checkpointer
from maxscale.checkpoint.restore import restore
from maxscale.config import to_json
from maxscale.models import module
from maxscale.resume import leaves
from tests.models import reference as ref

BASE = {"model.vocab_multiple": 8, "model.layers": 4, "sharding.microbatches": 2, "remat.policy": "full",
        "optimizer.eps": 1e-2, "sharding.expert_buffer": 8.0, "data.batch_size": 16}  # fmt: skip
PIPELINE = {"mesh.pipeline": 2, "mesh.fsdp": 2, "sharding.repeats": 2}
DENSE = [
  {"mesh.fsdp": 4, "mesh.tensor": 2},
  {**PIPELINE, "mesh.context": 2},
  {"mesh.slices": 2, "mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 2, "sharding.context": "gather"},
]
MOE = [
  {"mesh.expert": 4, "mesh.fsdp": 2},
  {**PIPELINE, "mesh.expert": 2, "model.expert_multiple": 8},
  {"mesh.expert": 2, "mesh.tensor": 2, "mesh.context": 2, "mesh.fsdp": 1},
]


def logical(program, state):
  """Path -> array without padding, layers in their order."""
  out = {}
  for path, value in module.flatten(state).items():
    spec = program.specs[path]
    value = np.asarray(value)[tuple(slice(n) for n in spec.logical)]
    out[path] = value[np.argsort(spec.rows)] if spec.rows else value
  return out


def moved(family, layouts):
  """Train two steps in each layout, save, restore in each other one, and take the third step there."""
  programs = [ref.program({**ref.FAMILIES[family], **BASE, **layout}, 8) for layout in layouts]
  losses, saved, trains = {}, {}, [program.train() for program in programs]

  def step(i, state, seed):
    state, metrics = trains[i](state, ref.place(programs[i], ref.batch(16, seed=seed)))
    return state, float(metrics["loss"])

  for i, program in enumerate(programs):
    state = ref.initial(program)
    for seed in (0, 1):
      state, _ = step(i, state, seed)
    saved[i] = tempfile.mkdtemp(), logical(program, state)
    saver = Checkpointer(saved[i][0], 3, 0, 600.0, lambda *a, **k: None)
    saver.save(2, state, leaves(program), Meta(program.config.hash, to_json(program.config), "{}"))
    saver.close()
    losses[i, i] = step(i, state, 2)[1]
  for i, k in itertools.permutations(range(len(programs)), 2):
    found = restore(saved[i][0], leaves(programs[k]))
    for path, value in logical(programs[k], found.state).items():
      np.testing.assert_array_equal(value, saved[i][1][path], f"{layouts[i]} -> {layouts[k]}: {path}")
    losses[i, k] = step(k, found.state, 2)[1]
    assert abs(losses[i, k] - losses[i, i]) < 2e-6 * losses[i, i], f"{layouts[i]} -> {layouts[k]}: {losses}"


def case_dense_checkpoints_move_between_layouts():
  moved("dense", DENSE)


def case_moe_checkpoints_move_between_layouts():
  moved("moe", MOE)
