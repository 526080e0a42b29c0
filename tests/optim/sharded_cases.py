"""Cases on 8 simulated devices: an optimizer there is the optimizer on one device (tests/multidevice.py runs them)."""

import functools
import tempfile

import jax
import numpy as np

from maxscale.checkpoint.commit import Meta
from maxscale.checkpoint.manager import Checkpointer
from maxscale.checkpoint.restore import restore
from maxscale.config import to_json
from maxscale.models.module import flatten
from maxscale.perf.compiled import collectives, program
from maxscale.resume import leaves
from tests.models import reference as ref
from tests.optim import trees

STEPS = 2
FSDP_TENSOR = {"mesh__fsdp": 4, "mesh__tensor": 2}  # 64 of the width a device, where blocks have 128; 4 layers
ZERO1 = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "sharding__state": {"embed": ["fsdp", "data"]}}
PIPELINE = {"mesh__pipeline": 2, "mesh__fsdp": 2, "mesh__expert": 2}
ROWS = (0, 2, 1, 3)  # of two stages with two chunks of layers each


def options(name, dtype):
  # A large epsilon: Adam's division would otherwise turn the rounding of a tiny gradient into a whole step.
  return {"optimizer__name": name, "optimizer__state_dtype": dtype, "optimizer__eps": 1e-2,
          "optimizer__learning_rate": 0.1}  # fmt: skip


def stepped(run, first=0):
  """Logical parameters and state after some steps."""
  for seed in range(first, first + STEPS):
    run.take(trees.values(seed + 1, run.rows))
  for path, x in run.whole.items():
    assert x.sharding.is_equivalent_to(run.sharding(run.specs[path]), x.ndim), path
    assert not trees.padding(x, run.specs[path]).any(), f"the padding of {path} is not zero"
  return trees.logical(run.whole, run.specs)


@functools.cache
def one_device(name, dtype):
  return stepped(trees.Run(**options(name, dtype)))


def compare(name, dtype, **layout):
  run = trees.Run(8, **options(name, dtype), **layout)
  got, want = stepped(run), one_device(name, dtype)
  for path, x in want.items():
    if x.dtype == np.float32:  # a code of difference, a sixteenth of a moment, is seen in the parameters
      ref.assert_close(got[path], x, 1e-5 if dtype == "float32" else 2e-3, path)
    else:  # another order of a sum, and a number may lie on the other side of what was drawn: rarely
      assert (got[path] != x).mean() < 1e-3, f"{path}: {(got[path] != x).mean()} of its codes differ"
  return run


def case_adamw():
  for dtype in ("float32", "bfloat16", "int8"):
    compare("adamw", dtype, **FSDP_TENSOR)


def case_adafactor():
  for dtype in ("float32", "bfloat16", "int8"):
    run = compare("adafactor", dtype, **FSDP_TENSOR)
  state = flatten(run.state)
  assert state["v_row/layers/mlp/up"].addressable_shards[0].data.shape == (4, 4, 64)
  assert state["v_col/layers/mlp/up"].addressable_shards[0].data.shape == (4, 4, 12)


def case_lion():
  for dtype in ("float32", "bfloat16", "int8"):
    compare("lion", dtype, **FSDP_TENSOR)


def case_muon():
  for dtype in ("float32", "bfloat16", "int8"):
    compare("muon", dtype, **FSDP_TENSOR)


def case_zero1():
  """A dimension that is split over two mesh axes."""
  for name, dtype in (("muon", "float32"), ("adamw", "int8")):
    run = compare(name, dtype, **ZERO1)
    moment = flatten(run.state)["trace/layers/mlp/up" if name == "muon" else "mu/layers/mlp/up"]
    assert moment.addressable_shards[0].data.shape == (4, 4, 64, 12)


def case_stages_with_chunks_of_layers_and_experts():
  """Rows are other layers there: rounding must not notice."""
  for name, dtype in (("muon", "int8"), ("adamw", "bfloat16"), ("adafactor", "float32")):
    compare(name, dtype, rows=ROWS, **PIPELINE)


def case_layers_that_do_not_divide():
  """Four layers, or four of four experts, over eight devices: matrices of zeros fill up."""
  compare("muon", "float32", mesh__fsdp=8)


def crossing(run):
  """Kinds of the collectives of an update, and the bytes of the largest."""
  args = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), t)
          for t in (run.tree, run.state, run.tree)]  # fmt: skip
  text = run.jitted.lower(*args, jax.ShapeDtypeStruct((), np.int32)).compile().as_text()
  found = collectives.collectives(program.read(text))
  return {c.kind for c in found}, max((c.bytes for c in found), default=0)


def case_what_crosses_devices():
  """Muon exchanges matrices before and after its iterations, and nothing in them; int8 sends its blocks' maxima."""
  part = 4 * 4 * 4 * 64 * 12  # bytes of a device's part of the experts' matrices, the largest
  for name, dtype, kinds, least, most in (
    ("adamw", "float32", set(), 0, 0),
    ("adamw", "int8", {"all-reduce", "all-gather"}, 1, part // 20),
    ("muon", "float32", {"all-to-all"}, part, part),
  ):
    found, size = crossing(trees.Run(8, **options(name, dtype), **FSDP_TENSOR))
    assert found == kinds and least <= size <= most, (name, dtype, found, size)


def case_an_int8_state_moves_to_another_mesh():
  """Saved with blocks over two devices, restored with other stages, experts and padding; it goes on the same."""
  layouts = [FSDP_TENSOR, PIPELINE]
  first = trees.Run(8, **options("adamw", "int8"), **layouts[0])
  saved, folder = stepped(first), tempfile.mkdtemp()
  saver = Checkpointer(folder, 3, 0, 600.0, lambda *a, **k: None)
  state = {"params": first.tree, "optimizer": first.state}
  saver.save(STEPS, state, leaves(first.as_program()), Meta(first.config.hash, to_json(first.config), "{}"))
  saver.close()
  second = trees.Run(8, ROWS, {"heads": 8, "vocab": 14}, **options("adamw", "int8"), **layouts[1])
  found = restore(folder, leaves(second.as_program())).state
  second.tree, second.state, second.step = found["params"], found["optimizer"], STEPS
  restored = trees.logical(second.whole, second.specs)
  assert restored.keys() == saved.keys() and any(x.dtype == np.int8 for x in restored.values())
  for path, x in saved.items():
    np.testing.assert_array_equal(restored[path], x, path)
  a, b = stepped(first, STEPS), stepped(second, STEPS)
  for path in a:
    if path.startswith("params/"):
      ref.assert_close(b[path], a[path], 2e-3, path)
