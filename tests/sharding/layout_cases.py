"""Cases on 8 simulated devices: every layout is the one-device program (tests/multidevice.py runs them)."""

import functools
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxscale.models import module
from maxscale.sharding import audit
from tests.models import reference as ref

# A large epsilon: Adam's division would otherwise turn the rounding of a tiny gradient into a whole step.
COMMON = {"optimizer.eps": 1e-2, "optimizer.learning_rate": 0.01, "model.vocab_multiple": 8, "remat.policy": "full"}
STEPS = 3
BATCHES = [ref.batch(8, seed=step) for step in range(STEPS)]


def options(family, **layout):
  return {**ref.FAMILIES[family], **COMMON, **{key.replace("__", "."): value for key, value in layout.items()}}


@functools.cache
def start(family):
  """The initial state of one device, path -> logical numpy array."""
  program = ref.program(options(family))
  return logical(program, ref.initial(program))


def logical(program, state):
  return {p: v[tuple(slice(n) for n in program.specs[p].logical)] for p, v in ref.host(state).items()}


def placed(program, flat):
  """A logical state on the devices of a program, padded with zeros."""
  return module.nest({p: jax.device_put(padded(flat[p], s), program.sharding(s)) for p, s in program.specs.items()})


def padded(value, spec):
  out = np.zeros(spec.shape, value.dtype)
  out[tuple(slice(n) for n in value.shape)] = value
  return out


def steps(program, family):
  """(logical state, metrics) after each step from the initial state of one device."""
  state, out = placed(program, start(family)), []
  train = program.train()
  for batch in BATCHES:
    state, metrics = train(state, ref.place(program, batch))
    out.append((logical(program, state), {key: float(value) for key, value in metrics.items()}))
  return out, state


@functools.cache
def one_device(family, dropout=0.0):
  return steps(ref.program(options(family, model__dropout=dropout)), family)[0]


def compare(family, dropout=0.0, **layout):
  """Gradients, metrics and three steps of a layout against one device; returns its program and last state."""
  program = ref.program(options(family, model__dropout=dropout, **layout), 8)
  out, state = steps(program, family)
  for i, ((a, metrics), (b, expected)) in enumerate(zip(out, one_device(family, dropout))):
    if i == 0:  # the first moments are the gradients
      ref.assert_close(moments(a), moments(b), 1e-5, "gradients")
      assert all(np.abs(m).max() > 1e-6 for m in moments(b).values())
    ref.assert_close({p: v for p, v in a.items() if v.ndim}, {p: v for p, v in b.items() if v.ndim}, 1e-5, f"step {i}")
    assert metrics.keys() == expected.keys()
    size = {**expected, "router_margin": 1.0}  # a difference of probabilities
    wrong = {k: (v, expected[k]) for k, v in metrics.items() if not abs(v - expected[k]) <= 1e-5 * abs(size[k])}
    assert not wrong, f"metrics of step {i}: {wrong}"
  check_bytes(program, state)
  return program, state


def moments(state):
  return {path: value for path, value in state.items() if path.startswith("optimizer/mu/")}


def check_bytes(program, state):
  """The audit's bytes are those of the shards that a device holds."""
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(state):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  assert set(held.values()) == {audit.bytes_per_device(program.infos(), program.rules)}, held


def shard(state, path):
  return module.flatten(state)[path].addressable_shards[0].data.shape


def case_dense_fsdp8():
  _, state = compare("dense")
  assert shard(state, "params/layers/mlp/gate") == (2, 4, 48)
  assert shard(state, "optimizer/nu/layers/attention/out") == (2, 4, 8, 4)


def case_dense_data2_fsdp2_tensor2():
  _, state = compare("dense", mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  assert shard(state, "params/layers/mlp/gate") == (2, 16, 24)
  assert shard(state, "params/embedding") == (32, 16)


def case_dense_fsdp4_tensor2_microbatches():
  compare("dense", mesh__fsdp=4, mesh__tensor=2, sharding__microbatches=2)


def case_dense_tensor4_with_padded_heads():
  program, state = compare("dense", mesh__fsdp=2, mesh__tensor=4, model__kv_head_multiple=4)
  assert (program.shape.K_pad, program.shape.N_pad) == (4, 8)
  assert shard(state, "params/layers/attention/key") == (2, 16, 1, 8)


def case_dense_data8():
  _, state = compare("dense", mesh__data=8, mesh__fsdp=1)
  assert shard(state, "params/layers/mlp/gate") == (2, 32, 48)


def case_dense_zero1():
  state_rule = {"embed": ["fsdp", "data"]}
  program, state = compare("dense", mesh__data=4, mesh__fsdp=2, sharding__state=state_rule)
  assert shard(state, "optimizer/mu/layers/mlp/gate") == (2, 4, 48)
  assert program.rules.spec(("embed",), "param") == P("fsdp")


def case_dense_two_slices():
  program, state = compare("dense", mesh__slices=2, mesh__fsdp=2, mesh__tensor=2)
  assert program.rules.sizes["data"] == 2
  first = {d.id for d in program.mesh.devices[:, 0].flat}
  assert first == {0, 1, 2, 3}, "the slices are split along data"
  assert shard(state, "params/layers/mlp/gate") == (2, 16, 24)


def case_moe_fsdp8():
  compare("moe")


def case_moe_data2_fsdp2_tensor2_microbatches():
  _, state = compare("moe", mesh__data=2, mesh__fsdp=2, mesh__tensor=2, sharding__microbatches=2)
  assert shard(state, "params/layers/mlp/down") == (2, 4, 6, 32), "split over its inputs by tensor and fsdp"


def case_moe_tensor4_padded_zero1_two_slices():
  compare("moe", mesh__slices=2, mesh__fsdp=1, mesh__tensor=4, sharding__state={"embed": ["fsdp", "data"]},
          model__kv_head_multiple=4, model__expert_multiple=3)  # fmt: skip


def case_dropout_masks_are_those_of_one_device():
  compare("dense", 0.3, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, sharding__microbatches=2)
  assert abs(one_device("dense", 0.3)[0][1]["loss"] - one_device("dense")[0][1]["loss"]) > 1e-3


def case_initial_values_are_those_of_one_device():
  for layout in ({"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
                 {"mesh__fsdp": 2, "mesh__tensor": 4, "model__kv_head_multiple": 4}):  # fmt: skip
    program = ref.program(options("moe", **layout), 8)
    state = ref.initial(program)
    for path, value in logical(program, state).items():
      # the draws are the same bits; the normal made of them may be rounded differently in another fusion
      np.testing.assert_allclose(value, start("moe")[path], rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=path)
    assert shard(state, "params/layers/mlp/gate")[-1] < 24


def case_loss_of_a_chunk_on_shards_of_the_vocabulary():
  """The loss alone, where positions and vocabulary are both split and chunks are small."""
  whole = ref.program(options("dense"))
  program = ref.program(options("dense", mesh__fsdp=4, mesh__tensor=2, loss__chunk=16), 8)
  params = {p.removeprefix("params/"): v for p, v in start("dense").items() if p.startswith("params/")}
  results = []
  for p in (program, whole):
    values = {path: padded(v, p.skeleton.specs[path]) for path, v in params.items()}
    results.append(ref.loss_and_gradients(p, module.nest(values), BATCHES[0]))
  (loss, _, grads), (expected, _, expected_grads) = results
  assert abs(loss - expected) < 1e-5 * expected
  ref.assert_close(grads, expected_grads, 1e-5)


CONTROL = "from here on the partitioner is meant to give up"


def case_last_of_all_a_resharding_that_the_partitioner_cannot_do():
  """Shows that its warning, which no layout above may print, would reach stderr."""
  mesh = ref.program(options("dense", mesh__data=2, mesh__fsdp=2, mesh__tensor=2), 8).mesh
  print(CONTROL, file=sys.stderr, flush=True)
  place = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
  f = lambda x: place(jax.numpy.cos(place(x, "fsdp", None)) * 2, None, ("data", "fsdp", "tensor"))  # noqa: E731
  jax.jit(f).lower(jax.ShapeDtypeStruct((64, 64), np.float32)).compile()
