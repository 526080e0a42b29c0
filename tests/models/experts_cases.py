"""Cases of experts that are split over devices, on 8 simulated ones (tests/multidevice.py runs them).

`python -m tests.models.experts_cases` compiles them for four v5p chips, which need not be here, and prints what the
test looks at, as JSON.
"""

import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from maxscale import config
from maxscale.models import expert_mlp, experts, kernels, router
from maxscale.sharding import context, rules
from tests.models import reference as ref

E, A, D, F, M = 8, 2, 16, 24, 12  # M: tokens of a device
ALL = tuple(range(E))
FEW = (0, 1, 3)  # the other experts, and with them devices, receive nothing
WHOLE = {"expert": 1, "data": 2, "tensor": 2}  # every device has all experts
LAYOUTS = [{"expert": 2, "data": 4}, {"expert": 4, "fsdp": 2}, {"expert": 8}, {"expert": 2, "tensor": 2, "fsdp": 2}]

WIDE = {"gate": ("experts", "embed", "mlp"), "up": ("experts", "embed", "mlp")}
NARROW = {"down": ("experts", "mlp", "embed")}
BIASES = {"gate_bias": ("experts", "mlp"), "up_bias": ("experts", "mlp"), "down_bias": ("experts", None)}
NAMES = WIDE | NARROW | BIASES
KINDS = {"silu": (*WIDE, *NARROW), "clamped_swiglu": tuple(NAMES), "relu2": ("up", "down", "up_bias", "down_bias")}
PLAIN = {
  "silu": lambda g, u: g / (1 + jnp.exp(-g)) * u,
  "clamped_swiglu": lambda g, u: (
    (jnp.where(abs(u) < 7, u, 7 * jnp.sign(u)) + 1)
    * (jnp.where(g < 7, g, 7) / (1 + jnp.exp(-1.702 * jnp.where(g < 7, g, 7))))
  ),
  "relu2": lambda _, u: jnp.where(u > 0, u, 0) ** 2,
}

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


def inputs(tokens, ids=None, chosen=ALL, seed=0, kind="silu"):
  """x, gates, ids, the weights by name, and dy, for all devices."""
  rng = np.random.default_rng(seed)
  if ids is None:
    ids = np.stack([rng.permutation(chosen)[:A] for _ in range(tokens)])
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  sizes = {"experts": E, "embed": D, "mlp": F, None: D}
  weights = {name: normal(*(sizes[n] for n in NAMES[name])) for name in KINDS[kind]}
  weights = {name: 5 * w if "bias" in name else w / w.shape[1] ** 0.5 for name, w in weights.items()}  # clamps clamp
  return normal(tokens, D), jax.nn.softmax(normal(tokens, A)), jnp.asarray(ids, jnp.int32), weights, normal(tokens, D)


def step(mesh, table, factor, kind="silu", dtype="float32", route="sparse", exchange=True, wrap=lambda f: f):
  """A function of `inputs` on the devices of a mesh: y, rows dropped by each device, gradients of x, gates, weights."""
  names = {name: NAMES[name] for name in KINDS[kind]}
  rows, weights = table.spec(("batch",), "compute"), {name: table.spec(n, "param") for name, n in names.items()}
  ready = lambda name, w: w if "bias" in name else kernels.Weight.of(w, names[name], dtype, "float32")  # noqa: E731

  def local(x, gates, ids, weights, dy):
    def f(x, gates, weights):
      used = {"gate": None, **{name: ready(name, w) for name, w in weights.items()}}
      down_bias = used.pop("down_bias", None)
      mlp = expert_mlp.Weights(**used)
      return experts.experts(x, gates, ids, experts.Weights(mlp, down_bias), kind, factor, route, exchange)

    y, pull, stats = jax.vjp(wrap(f), x.astype(dtype), gates, weights, has_aux=True)
    dx, dgates, dweights = pull(dy.astype(dtype))
    y, dx, dgates = (context.psum(v, "mlp") for v in (y, dx, dgates))
    dweights = {name: jax.lax.psum(w, context.unsummed(names[name])) for name, w in dweights.items()}
    return y, stats["dropped"][None], dx, dgates, dweights

  in_specs, out_specs = (rows, rows, rows, weights, rows), (rows, rows, rows, rows, weights)
  return jax.jit(context.on_mesh(local, mesh, table, in_specs, out_specs))


@functools.cache
def program(sizes, *how, **more):
  return step(*layout(**dict(sizes)), *how, **more)


def split(sizes, args, *how, **more):
  """What `step` gives on a layout, as numpy."""
  return jax.tree.map(np.asarray, program(tuple(sizes.items()), *how, **more)(*args))


@functools.partial(jax.jit, static_argnums=2)
def plain(args, fits, kind="silu"):
  """The same from each expert for each token; fits: bool [tokens, A], choices that count."""
  x, gates, ids, weights, dy = args

  def expert(x, w):
    gate = x @ w["gate"] + w.get("gate_bias", 0) if "gate" in w else None
    return PLAIN[kind](gate, x @ w["up"] + w.get("up_bias", 0)) @ w["down"] + w.get("down_bias", 0)

  def f(x, gates, weights):
    share = jnp.sum(jax.nn.one_hot(ids, E) * (gates * fits)[..., None], 1)
    return sum(share[:, e : e + 1] * expert(x, {name: w[e] for name, w in weights.items()}) for e in range(E))

  y, pull = jax.vjp(f, x, gates, weights)
  return y, *pull(dy)


def fitting(ids, parts, factor, exchange=True):
  """Choices that fit, by counting: bool [tokens, A]. M tokens of a device, `parts` devices exchange or gather."""
  ids = np.asarray(ids).reshape(-1, parts, M, A)  # group, source, token, choice
  fits = np.zeros(ids.shape, bool)
  for group in range(len(ids)):
    for receiver in range(parts):
      free = math.ceil(factor * M * A)
      pairs = itertools.product(range(parts), range(receiver * E // parts, (receiver + 1) * E // parts))
      for source, expert in pairs if exchange else sorted(pairs, key=lambda pair: pair[::-1]):
        for token, choice in np.argwhere(ids[group, source] == expert):
          fits[group, source, token, choice] = free > 0
          free -= 1
  return fits.reshape(-1, A)


def check(sizes, args, factor, kind="silu", tolerance=1e-5, exchange=True, **more):
  """A layout against the plain computation; returns the rows dropped by each device."""
  fits = fitting(args[2], sizes["expert"], factor, exchange)
  y, dropped, dx, dgates, dweights = split(sizes, args, factor, kind, exchange=exchange, **more)
  lost = (~fits & (args[2] >= 0)).reshape(blocks(sizes), -1).sum(1)
  if exchange:
    np.testing.assert_array_equal(dropped, lost)
  assert dropped.sum() == lost.sum()
  by_name = lambda y, dx, dgates, dweights: {"y": y, "dx": dx, "dgates": dgates, **dweights}  # noqa: E731
  expected = by_name(*plain(args, fits, kind))
  ref.assert_close(by_name(y, dx, dgates, dweights), expected, tolerance, f"{sizes} {kind}")
  assert not dgates[~fits].any()
  return dropped


def case_every_layout_is_the_plain_computation():
  for sizes in [WHOLE, *LAYOUTS]:
    for chosen in (ALL, FEW):  # of the few, all rows go to half of the devices or fewer
      assert not check(sizes, inputs(blocks(sizes) * M, chosen=chosen), sizes["expert"]).any()


def case_biases_and_other_activations():
  for sizes in LAYOUTS[1::2]:
    for kind in ("clamped_swiglu", "relu2"):
      check(sizes, inputs(blocks(sizes) * M, kind=kind), sizes["expert"], kind)
  assert check(LAYOUTS[3], inputs(4 * M, chosen=FEW, kind="clamped_swiglu"), 1.0, "clamped_swiglu").any()


def with_gaps(tokens):
  """ids of which every third token has none in the first place."""
  return np.where(np.arange(A) + np.arange(tokens)[:, None] % 3, inputs(tokens)[2], -1)


def case_the_dense_route_is_the_same():
  for sizes in ({"expert": 1}, WHOLE):
    for kind in KINDS:
      args = inputs(blocks(sizes) * M, ids=with_gaps(blocks(sizes) * M), kind=kind)
      check(sizes, args, 1.0, kind, route="dense")
      check(sizes, args, 1.0, kind)
  try:
    split({"expert": 2}, inputs(2 * M), 2.0, route="dense")
  except config.ConfigError as e:
    assert "model.moe.route" in str(e)
  else:
    raise AssertionError("experts are split")


def case_rows_that_do_not_fit_are_dropped_and_counted():
  for sizes in LAYOUTS[1::2]:
    assert check(sizes, inputs(blocks(sizes) * M, chosen=FEW), 1.0).any()


def case_gathered_tokens_are_the_plain_computation():
  for sizes in LAYOUTS:
    tokens = blocks(sizes) * M
    assert not check(sizes, inputs(tokens), sizes["expert"], exchange=False).any()
    args = inputs(tokens, ids=with_gaps(tokens), kind="clamped_swiglu")
    assert not check(sizes, args, sizes["expert"], "clamped_swiglu", exchange=False).any()
    assert check(sizes, inputs(tokens, chosen=FEW), 1.0, exchange=False).any()


def case_sums_of_many_tokens_are_made_block_by_block():
  whole = experts.BLOCK
  try:
    for size in (8, 40):  # of 48 tokens
      experts.BLOCK = size
      program.cache_clear()
      check(LAYOUTS[1], inputs(8 * M, chosen=FEW), 1.5, exchange=False)
  finally:
    experts.BLOCK = whole
    program.cache_clear()


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
  assert fitting(args[2], 2, 1.0).sum() == 2 * M
  assert not check({"expert": 2}, args, 1.0).any()
  y, _, dx, *_ = split({"expert": 2}, args, 1.0)
  assert not y[::2].any() and not dx[::2].any()


def case_rows_that_nobody_filled_change_nothing():
  """With the most careless kernels: they leave garbage in those rows, and read them for the gradient of the weights."""
  mlp, products = expert_mlp.expert_mlp, expert_mlp.Products

  def rows(v, sizes, rest):
    own = jnp.arange(len(v)) < sizes.sum()
    return jnp.where(own.reshape(-1, *(1,) * (v.ndim - 1)), v, rest)

  class Careless(products):
    """All that they make of rows has garbage: y, dx, the gradient of gates. Their sums over rows do not read it."""

    def forward(self, *args, **beside):
      return jax.tree.map(lambda v: rows(v, self.sizes, jnp.nan), super().forward(*args, **beside))

    def backward(self, *args, **beside):
      return jax.tree.map(lambda v: rows(v, self.sizes, jnp.nan), super().backward(*args, **beside))

    def multiply(self, spec, a, b, dtype):
      if spec == "md,mf->edf":
        a, b = rows(a, self.sizes, 0), rows(b, self.sizes, 0)
      return super().multiply(spec, a, b, dtype)

  @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
  def careless(x, gates, sizes, weights, activation):
    return mlp(x, gates, sizes, weights, activation)

  def backward(activation, kept, dy):
    x, gates, sizes, weights = kept
    pull = jax.vjp(lambda x, gates, weights: mlp(x, gates, sizes, weights, activation), x, gates, weights)[1]
    dx, dgates, dweights = pull(dy)
    nothing = 0 * (x.sum() + dy.sum())  # if they are finite
    return dx, dgates, None, jax.tree.map(lambda dw: dw + nothing.astype(dw.dtype), dweights)

  careless.defvjp(lambda *args: (careless(*args), args[:4]), backward)
  program.cache_clear()
  expert_mlp.expert_mlp, expert_mlp.Products = careless, Careless
  try:
    check(LAYOUTS[1], inputs(8 * M, chosen=FEW), 1.5)
    check(LAYOUTS[1], inputs(8 * M), 1.5)
    kind = "clamped_swiglu"
    for exchange in (True, False):
      check(LAYOUTS[1], inputs(8 * M, chosen=FEW, kind=kind), 1.5, kind, exchange=exchange)
    check(WHOLE, inputs(2 * M, ids=with_gaps(2 * M), kind=kind), 1.0, kind)
  finally:
    expert_mlp.expert_mlp, expert_mlp.Products = mlp, products
    program.cache_clear()


def case_remat_changes_nothing():
  policy = jax.checkpoint_policies.save_only_these_names("gate", "up")
  wrap = functools.partial(jax.checkpoint, policy=policy)
  kind = "clamped_swiglu"
  check(LAYOUTS[1], inputs(8 * M, chosen=FEW, kind=kind), 1.0, kind, wrap=wrap)


def case_bfloat16():
  for kind in ("silu", "clamped_swiglu"):
    args = inputs(8 * M, chosen=FEW, kind=kind)
    y, _, dx, *_ = split(LAYOUTS[1], args, 1.0, kind, dtype="bfloat16")
    assert y.dtype == dx.dtype == jnp.bfloat16
    check(LAYOUTS[1], args, 1.0, kind, dtype="bfloat16", tolerance=3e-2)


def case_the_program_does_not_grow_with_the_devices():
  def lines(sizes, copies=1):
    x, gates, ids, weights, dy = inputs(8 * M)
    weights = {name: jnp.concatenate([w] * copies) for name, w in weights.items()}
    return len(step(*layout(**sizes), 1.5).lower(x, gates, ids, weights, dy).as_text().splitlines())

  few = lines({"expert": 2, "data": 4})
  assert few == lines({"expert": 4, "data": 2}) == lines({"expert": 2, "data": 4}, 4)


# ---- routers on split sequences


def routed(sizes, moe, logits, valid, dy):
  """Choices, what is counted, and the gradient of the losses and gates, on a layout of sequences."""
  mesh, table = layout(**sizes)
  whole = table.spec(("batch", "residual_length", None), "compute")

  def local(logits, valid, dy):
    def f(logits):
      choice = router.choose(moe, A, E, logits, None)
      out = router.balance(moe, choice, logits, valid[..., 0])
      objective = out["balance_loss"] + 0.1 * out["router_z_loss"] + jnp.sum(dy * choice.gates)
      return objective, (choice.ids, out)

    gradient, (ids, out) = jax.grad(f, has_aux=True)(logits)
    margin = -context.pmax(context.pmax(-out.pop("margin"), "batch"), "residual_length")
    return ids, gradient, {**context.token_sum(out, residual=True), "margin": margin}

  f = context.on_mesh(local, mesh, table, whole, (whole, whole, P()))
  return jax.tree.map(np.asarray, jax.jit(f)(logits, valid, dy))


def sequences(seed=0):
  """logits [4, 16, E + 2] with padded experts, valid [4, 16, 1], and cotangents of gates."""
  rng = np.random.default_rng(seed)
  valid = np.arange(16)[:, None] < np.array([16, 9, 3, 0])[:, None, None]
  shapes = (4, 16, E + 2), (4, 16, A)
  logits, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  return logits, jnp.asarray(valid), dy


def case_a_router_is_the_same_on_split_sequences():
  for moe in (config.Moe(), config.Moe(score="sigmoid", groups=4, groups_per_token=2, group_score="top2")):
    one = routed({}, moe, *sequences())
    for sizes in ({"tensor": 2, "data": 2}, {"tensor": 2, "context": 2, "expert": 2}, {"tensor": 8}):
      ids, gradient, out = routed(sizes, moe, *sequences())
      np.testing.assert_array_equal(ids, one[0])
      ref.assert_close({"gradient": gradient, **out}, {"gradient": one[1], **one[2]}, 1e-6, str(sizes))


def limited(sizes, ids, valid):
  """router.capacity on the gathered choices of a layout: ids, and the dropped of all tokens."""
  mesh, table = layout(**sizes)
  split, region = (table.spec(("batch", name, None), "compute") for name in ("residual_length", "length"))

  def local(ids, valid):
    ids, valid = context.gather(ids, "mlp"), context.gather(valid, "mlp")[..., 0]
    ids, dropped = router.capacity(0.75, E, ids, valid)
    return ids, context.token_sum(dropped, residual=False)

  return jax.tree.map(np.asarray, jax.jit(context.on_mesh(local, mesh, table, split, (region, P())))(ids, valid))


def case_capacity_is_the_same_on_split_sequences():
  logits, valid, _ = sequences()
  ids = router.choose(config.Moe(), A, E, logits, None).ids
  one, dropped = limited({}, ids, valid)
  assert dropped > 0 and (one[np.asarray(valid)[..., 0]] >= 0).sum() == valid.sum() * A - dropped
  for sizes in ({"tensor": 2, "data": 2}, {"tensor": 4, "expert": 2}, {"data": 4}):
    got = limited(sizes, ids, valid)
    np.testing.assert_array_equal(got[0], one)
    assert got[1] == dropped
  try:
    limited({"context": 2}, ids, valid)
  except config.ConfigError as e:
    assert "mesh.context=1" in str(e)
  else:
    raise AssertionError("a device sees a part of each sequence")


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
  text = (
    step(mesh, table, 1.25, "silu", "bfloat16")
    .lower(x, gates, ids, {"gate": wide, "up": wide, "down": narrow}, dy)
    .compile()
    .as_text()
    or ""
  )
  print(json.dumps({
    "exchanges": re.findall(r"= (\w+)\[(\d+)[\d,]*\]\S* ragged-all-to-all\(", text),
    "others": re.findall(r"= \(?(\w+)\[.* (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*\(", text),
  }))  # fmt: skip


if __name__ == "__main__":
  main()
