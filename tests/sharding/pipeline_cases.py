"""Cases on 8 simulated devices: what the compiled pipeline holds and executes (tests/multidevice.py runs them)."""

import re

import jax
import numpy as np

from maxscale.models import module
from maxscale.perf.compiled import program as reader
from tests.models import reference as ref

BASE = {**ref.DENSE, "model.vocab_multiple": 8, "model.layers": 8, "mesh.pipeline": 4, "mesh.fsdp": 2}


def program(microbatches, repeats=1, remat="full", **options):
  """Microbatches of two rows, one for each device along fsdp."""
  changes = {"sharding.microbatches": microbatches, "data.batch_size": 2 * microbatches, "sharding.repeats": repeats,
             "remat.policy": remat, **options}  # fmt: skip
  return ref.program({**BASE, **changes}, 8)


def compiled(p):
  d = p.config.data
  return p.train().lower(p.abstract_state(), p.abstract_batch(d.batch_size, d.length)).compile()


def ticks(executable):
  """Trips of the loops over ticks: how often the loops of layers inside them run."""
  steps = reader.read(executable.as_text()).steps()
  return sorted({s.times for s in steps if s.depth == 1 and s.instruction.opcode == "while"})


def case_temporaries_do_not_grow_with_the_microbatches():
  for repeats in (1, 2):
    few, many = (compiled(program(m, repeats)).memory_analysis().temp_size_in_bytes for m in (8, 32))
    grown = 24 * 2 * 32 * 4 * 6 * 2  # of the batch itself: five kinds of int32 rows, reordered by microbatch
    assert many - few <= grown, f"{repeats} repeats: {few} bytes at 8 microbatches, {many} at 32"


def case_without_the_ring_they_would_grow():
  """The control: microbatches one after another under plain AD keep what each leaves."""

  def temp(m):
    x = jax.ShapeDtypeStruct((m, 2, 32, 32), np.float32)
    f = jax.grad(lambda x: jax.lax.map(jax.checkpoint(lambda a: jax.numpy.tanh(a @ a.mT).sum()), x).sum())
    return jax.jit(lambda x: f(x * 2)).lower(x).compile().memory_analysis().temp_size_in_bytes

  assert temp(32) > 2 * temp(8)


def case_trip_counts_give_the_bubble():
  for stages, repeats, m in ((4, 1, 8), (4, 2, 8)):
    p = program(m, repeats, **{"model.layers": 16})
    s = p.schedule
    assert (s.stages, s.repeats, s.microbatches) == (stages, repeats, m)
    trips = ticks(compiled(p))
    fill, both = repeats * stages - 1, repeats * (m - stages) + stages
    assert trips == sorted({fill, both}), (trips, fill, both)
    executed, useful = fill + both, repeats * m  # ticks of a direction
    assert abs((1 - useful / executed) - s.bubble) < 1e-12
    assert s.bubble == (stages - 1) / (repeats * m + stages - 1)


def case_collectives_of_a_cpu_meet_in_channels_of_their_own():
  """XLA:CPU runs loops beside what follows them: in one channel, devices would meet in different collectives."""

  def f(x):
    def body(c, _):
      return jax.lax.psum(c, "a"), None

    y = jax.lax.scan(body, x, None, length=3)[0]
    return y, jax.lax.psum(x * 2, "a"), jax.lax.ppermute(x, "a", [(0, 1)])

  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("a",))
  P = jax.sharding.PartitionSpec("a")
  f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P, out_specs=P, check_vma=False))
  x = jax.ShapeDtypeStruct((8,), np.float32)

  def channels(text):
    return re.findall(r"channel_handle = #stablehlo.channel_handle<handle = (\d+)", text)

  text = f.lower(x).as_text()
  assert len(channels(text)) == len(set(channels(text))) == 3, text
  assert text == f.trace(x).lower().as_text(), "a program's text must not depend on those lowered before it"
  assert channels(f.trace(x).lower(lowering_platforms=("tpu",)).as_text()) == ["1"] * 3


def case_every_remat_policy_gives_the_same_gradients():
  batch = ref.batch(8, seed=3)
  scale = np.float32(1 / (batch["targets"] >= 0).sum())
  results = {}
  for remat in ("none", "full", "attention", "projections"):
    p = program(4, remat=remat, **{"model.dropout": 0.2})
    params = p.initialise()()["params"]
    grads, loss, _ = jax.jit(p.on_mesh)(params, ref.place(p, batch), np.int32(3), scale)
    results[remat] = {**ref.host(grads), "loss": np.asarray(loss)}
  for remat, found in results.items():
    ref.assert_close(found, results["none"], 1e-5, remat)


def case_rows_are_where_the_stages_want_them():
  p = program(4, repeats=2)
  rows = p.skeleton.specs["layers/mlp/gate"].rows
  assert rows == (0, 4, 1, 5, 2, 6, 3, 7)
  plain = ref.program({**BASE, "mesh.pipeline": 1, "mesh.fsdp": 8, "data.batch_size": 8}, 8)
  a, b = (module.flatten(q.initialise()()["params"])["layers/mlp/gate"] for q in (p, plain))
  np.testing.assert_allclose(np.asarray(a), np.asarray(b)[list(rows)], atol=1e-6)
  shard = a.addressable_shards[0].data
  assert shard.shape == (2, 16, 48)
