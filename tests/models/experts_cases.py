"""Cases of experts that are split over devices, on 8 simulated ones (tests/multidevice.py runs them).

`python -m tests.models.experts_cases` compiles them for four v5p chips, which need not be here, and prints what the
test looks at, as JSON.
"""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from maxscale import config
from maxscale.models import experts, kernels
from maxscale.sharding import context, rules
from tests.models import reference as ref

E, A, D, F, M = 8, 2, 16, 24, 12  # M: tokens of a device
ALL = tuple(range(E))
FEW = (0, 1, 3)  # the other experts, and with them devices, receive nothing
WHOLE = {"expert": 1, "data": 2, "tensor": 2}  # every device has all experts
LAYOUTS = [{"expert": 2, "data": 4}, {"expert": 4, "fsdp": 2}, {"expert": 8}, {"expert": 2, "tensor": 2, "fsdp": 2}]

if __name__ != "__main__":  # on a TPU memory is what it was; here, whoever reads it shows
  jax.lax.empty = lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)


def layout(devices=None, **sizes):
  """The mesh and the rules of a layout."""
  sizes = {axis: sizes.get(axis, 1) for axis in config.MESH_AXES}
  grid = np.asarray(devices or jax.devices()[: math.prod(sizes.values())]).reshape(*sizes.values())
  return jax.sharding.Mesh(grid, config.MESH_AXES), rules.make(config.Sharding(), sizes)


def blocks(sizes):
  """Devices that hold different tokens."""
  return math.prod(size for axis, size in sizes.items() if axis != "tensor")


def inputs(tokens, ids=None, chosen=ALL, seed=0):
  """x, gates, ids, the weights gate, up, down, and dy, for all devices."""
  rng = np.random.default_rng(seed)
  if ids is None:
    ids = np.stack([rng.permutation(chosen)[:A] for _ in range(tokens)])
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  weights = normal(E, D, F) / D**0.5, normal(E, D, F) / D**0.5, normal(E, F, D) / F**0.5
  return normal(tokens, D), jax.nn.softmax(normal(tokens, A)), jnp.asarray(ids, jnp.int32), weights, normal(tokens, D)


def step(mesh, table, factor, dtype="float32", wrap=lambda f: f):
  """A function of `inputs` on the devices of a mesh: y, rows dropped by each device, gradients of x, gates, weights."""
  names = (("experts", "embed", "mlp"),) * 2 + (("experts", "mlp", "embed"),)
  rows, weights = table.spec(("batch",), "compute"), tuple(table.spec(n, "param") for n in names)

  def local(x, gates, ids, weights, dy):
    def f(x, gates, weights):
      weights = [kernels.Weight.of(w, n, dtype, "float32") for w, n in zip(weights, names)]
      return experts.experts(x, gates, ids, weights, factor)

    y, pull, stats = jax.vjp(wrap(f), x.astype(dtype), gates, weights, has_aux=True)
    dx, dgates, dweights = pull(dy.astype(dtype))
    y, dx, dgates = (context.psum(v, "mlp") for v in (y, dx, dgates))
    dweights = tuple(jax.lax.psum(w, context.unsummed(n)) for w, n in zip(dweights, names))
    return y, stats["dropped"][None], dx, dgates, dweights

  in_specs, out_specs = (rows, rows, rows, weights, rows), (rows, rows, rows, rows, weights)
  return jax.jit(context.on_mesh(local, mesh, table, in_specs, out_specs))


@functools.cache
def program(sizes, *more):
  return step(*layout(**dict(sizes)), *more)


def split(sizes, args, factor, *more):
  """What `step` gives on a layout, as numpy."""
  return jax.tree.map(np.asarray, program(tuple(sizes.items()), factor, *more)(*args))


@jax.jit
def plain(args, fits):
  """The same from each expert for each token; fits: bool [tokens, A], choices that count."""
  x, gates, ids, weights, dy = args

  def f(x, gates, weights):
    share = jnp.sum(jax.nn.one_hot(ids, E) * (gates * fits)[..., None], 1)
    return sum(share[:, e : e + 1] * ref.gated(x, *(w[e] for w in weights)) for e in range(E))

  y, pull = jax.vjp(f, x, gates, weights)
  return y, *pull(dy)


def fitting(ids, parts, factor):
  """Choices that fit, by counting: bool [tokens, A]. M tokens of a device, `parts` devices exchange."""
  ids = np.asarray(ids).reshape(-1, parts, M, A)  # group, source, token, choice
  fits = np.zeros(ids.shape, bool)
  for group in range(len(ids)):
    for receiver in range(parts):
      free = math.ceil(factor * M * A)
      for source in range(parts):
        for expert in range(receiver * E // parts, (receiver + 1) * E // parts):
          for token, choice in np.argwhere(ids[group, source] == expert):
            fits[group, source, token, choice] = free > 0
            free -= 1
  return fits.reshape(-1, A)


def check(sizes, args, factor, *more, tolerance=1e-5):
  """A layout against the plain computation; returns the rows dropped by each device."""
  fits = fitting(args[2], sizes["expert"], factor)
  y, dropped, dx, dgates, dweights = split(sizes, args, factor, *more)
  np.testing.assert_array_equal(dropped, (~fits).reshape(blocks(sizes), -1).sum(1))
  names = ("y", "dx", "dgates", "dgate", "dup", "ddown")
  expected = dict(zip(names, jax.tree.leaves(plain(args, fits))))
  ref.assert_close(dict(zip(names, (y, dx, dgates, *dweights))), expected, tolerance, str(sizes))
  assert not dgates[~fits].any()
  return dropped


def case_every_layout_is_the_plain_computation():
  for sizes in [WHOLE, *LAYOUTS]:
    for chosen in (ALL, FEW):  # of the few, all rows go to half of the devices or fewer
      assert not check(sizes, inputs(blocks(sizes) * M, chosen=chosen), sizes["expert"]).any()


def case_rows_that_do_not_fit_are_dropped_and_counted():
  for sizes in LAYOUTS[1::2]:
    assert check(sizes, inputs(blocks(sizes) * M, chosen=FEW), 1.0).any()


def case_later_devices_then_later_experts_lose():
  args = inputs(2 * M, ids=np.tile([0, 1], (2 * M, 1)))  # both devices send 12 rows to each of experts 0 and 1
  for factor, lost in {1.0: 24, 1.25: 18, 1.75: 6, 9.0: 0}.items():
    np.testing.assert_array_equal(check({"expert": 2}, args, factor), [0, lost])
  y, _, dx, dgates, _ = split({"expert": 2}, args, 1.25)  # 30 rows: of the second device the first 6 for expert 0
  assert not y[M + 6 :].any() and not dx[M + 6 :].any() and not dgates[M + 6 :].any()
  assert (y[: M + 6] != 0).any(1).all() and dgates[M : M + 6, 0].all() and not dgates[M:, 1].any()


def case_balanced_rows_fit_exactly():
  ids = np.arange(8 * M * A).reshape(-1, A) % E
  assert not check({"expert": 8}, inputs(8 * M, ids=ids), 1.0).any()


def case_choices_of_no_expert_take_no_room():
  """Every second token is padding; the rest fill the room of the first device to the last row."""
  ids = np.tile([0, 1], (2 * M, 1))
  ids[::2] = -1
  args = inputs(2 * M, ids=ids)
  fits = fitting(args[2], 2, 1.0)
  assert fits.sum() == 2 * M and (fits == (ids >= 0)).all()
  y, dropped, dx, dgates, dweights = split({"expert": 2}, args, 1.0)
  assert not dropped.any()
  for a, b in zip((y, dx, dgates, *dweights), jax.tree.leaves(plain(args, fits))):
    ref.assert_close(a, np.asarray(b), 1e-5)
  assert not y[::2].any() and not dx[::2].any()


def case_rows_that_nobody_filled_change_nothing():
  """With the most careless kernel: it leaves garbage in those rows, and reads them for the gradient of the weights."""
  real = kernels.grouped_matmul
  garbage = lambda y, sizes: jnp.where((jnp.arange(len(y)) < sizes.sum())[:, None], y, jnp.nan)  # noqa: E731
  all_rows = lambda x, sizes: sizes.at[-1].add(len(x) - sizes.sum())  # noqa: E731

  @jax.custom_vjp
  def careless(x, w, sizes):
    return garbage(real(x, w, all_rows(x, sizes)), sizes)

  def backward(saved, dy):
    x, w, sizes = saved
    dx, dw, _ = jax.vjp(real, x, w, all_rows(x, sizes))[1](dy)
    return garbage(dx, sizes), dw, None

  careless.defvjp(lambda *args: (careless(*args), args), backward)
  program.cache_clear()
  kernels.grouped_matmul = careless
  try:
    check(LAYOUTS[1], inputs(8 * M, chosen=FEW), 1.5)
    check(LAYOUTS[1], inputs(8 * M), 1.5)
  finally:
    kernels.grouped_matmul = real
    program.cache_clear()


def case_remat_changes_nothing():
  policy = jax.checkpoint_policies.save_only_these_names("gate", "up")
  check(LAYOUTS[1], inputs(8 * M, chosen=FEW), 1.0, "float32", functools.partial(jax.checkpoint, policy=policy))


def case_bfloat16():
  args = inputs(8 * M, chosen=FEW)
  y, _, dx, *_ = split(LAYOUTS[1], args, 1.0, "bfloat16")
  assert y.dtype == dx.dtype == jnp.bfloat16
  check(LAYOUTS[1], args, 1.0, "bfloat16", tolerance=3e-2)


def case_the_program_does_not_grow_with_the_devices():
  def lines(sizes, copies=1):
    x, gates, ids, weights, dy = inputs(8 * M)
    weights = tuple(jnp.concatenate([w] * copies) for w in weights)
    return len(step(*layout(**sizes), 1.5).lower(x, gates, ids, weights, dy).as_text().splitlines())

  few = lines({"expert": 2, "data": 4})
  assert few == lines({"expert": 4, "data": 2}) == lines({"expert": 2, "data": 4}, 4)


# ---- the collective


def exchange(operand, output, begin, send, place, receive):
  """The semantics of ragged_all_to_all as its documentation has them: the first dimension of all is the device."""
  result, devices = output.copy(), len(operand)
  each = begin.shape[1] // devices
  for source in range(devices):
    for i in range(begin.shape[1]):
      to, slot = i // each, source * each + i % each
      assert send[source, i] == receive[to, slot]
      rows = operand[source, begin[source, i] :][: send[source, i]]
      result[to, place[source, i] :][: len(rows)] = rows
  return result


def random_slices(rng, devices, each, rows):
  """begin, send, place, receive: slices apart from each other on both sides, some empty, in an order of their own."""
  send = rng.integers(0, 4, (devices, devices * each)) * rng.integers(0, 2, (devices, devices * each))
  receive = send.reshape(devices, devices, each).swapaxes(0, 1).reshape(send.shape)

  def spots(sizes):
    out = np.zeros_like(sizes)
    for device, row in enumerate(sizes):
      gaps = rng.multinomial(rows - row.sum(), np.full(len(row) + 1, 1 / (len(row) + 1)))
      at = 0
      for gap, i in zip(gaps, rng.permutation(len(row))):
        out[device, i] = at + gap
        at += gap + row[i]
    return out

  begin, landed = spots(send), spots(receive)
  place = landed.reshape(devices, devices, each).swapaxes(0, 1).reshape(send.shape)
  return begin, send, place, receive


def case_the_collective_on_cpu_is_the_documented_one():
  rng, rows = np.random.default_rng(0), 40
  for axis, devices, shape in (("expert", 4, (3,)), (("fsdp", "expert"), 8, ()), (("data", "fsdp"), 2, (2, 2))):
    mesh, table = layout(fsdp=2, expert=4)
    slices = random_slices(rng, devices, 2, rows)
    operand, output, dy = (rng.normal(size=(devices, rows + extra, *shape)) for extra in (5, 0, 0))

    def local(*args):
      operand, output, dy, *slices = (v[0] for v in args)
      f = lambda a, b: experts.ragged_all_to_all(a, b, *slices, axis=axis)  # noqa: E731, B023
      y, pull = jax.vjp(f, operand, output)
      return jax.tree.map(lambda v: v[None], (y, *pull(dy)))

    f = jax.jit(context.on_mesh(local, mesh, table, P(axis), P(axis)))
    args = [v.astype(np.float32) for v in (operand, output, dy)] + [v.astype(np.int32) for v in slices]
    y, doperand, doutput = map(np.asarray, f(*args))
    np.testing.assert_array_equal(y, exchange(args[0], args[1], *slices))
    # Transposed: what arrived goes back to where it was read, and the output keeps what nothing was written to.
    written = exchange(np.ones_like(args[0]), np.zeros_like(args[1]), *slices)
    sources = exchange(np.arange(args[0].size, dtype=float).reshape(args[0].shape), np.zeros_like(args[1]), *slices)
    expected = np.zeros(args[0].size)
    np.add.at(expected, sources[written == 1].astype(int), args[2][written == 1])
    np.testing.assert_allclose(doperand.ravel(), expected, rtol=1e-6)
    np.testing.assert_array_equal(doutput, np.where(written == 1, 0, args[2]))


# ---- the TPU's program


def main():
  from jax.experimental import topologies

  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
  mesh, table = layout(devices, expert=4)
  tokens, width, hidden = 4 * 512, 256, 512
  shapes = [(tokens, width), (tokens, A), (tokens, A), (E, width, hidden), (E, hidden, width), (tokens, width)]
  names = [("batch",)] * 3 + [("experts", "embed", "mlp"), ("experts", "mlp", "embed"), ("batch",)]
  dtypes = [jnp.bfloat16, jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.bfloat16]
  x, gates, ids, wide, narrow, dy = (
    jax.ShapeDtypeStruct(
      s, t, sharding=jax.sharding.NamedSharding(mesh, table.spec(n, "param" if "embed" in n else "compute"))
    )
    for s, t, n in zip(shapes, dtypes, names)
  )
  text = step(mesh, table, 1.25, "bfloat16").lower(x, gates, ids, (wide, wide, narrow), dy).compile().as_text() or ""
  print(json.dumps({
    "exchanges": re.findall(r"= (\w+)\[(\d+)[\d,]*\]\S* ragged-all-to-all\(", text),
    "others": re.findall(r"= \(?(\w+)\[.* (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*\(", text),
  }))  # fmt: skip


if __name__ == "__main__":
  main()
