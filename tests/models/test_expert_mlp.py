"""The MLPs of experts against plain float64 ones: values, gradients, and what the kernels of a TPU read, keep and take."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic import tpu_info  # of what TPU a program is for where there is none
from jax.experimental.pallas import tpu as pltpu

from maxscale.models import activations, expert_mlp, grouped, kernels
from maxscale.perf import compiler, flops
from tests.models import reference as ref

f32, bf16 = jnp.float32, jnp.bfloat16
BACKENDS = ("blocks", "interpret", "xla")
WIDE = ("gate", "up")
KINDS = [*((kind, gated) for kind in activations.ACTIVATIONS for gated in (True, False)), ("clamped_swiglu", True)]


def inputs(sizes, m, d, f, gated=True, biased=True, dtype=f32, backend="blocks"):
  """x, gates, parameters by name, and dy, as numpy; the rows past the sum of sizes are what a backend may be given."""
  rng, e = np.random.default_rng(0), len(sizes)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  names = WIDE[not gated :]
  params = {name: normal(e, d, f) * d**-0.5 for name in names} | {"down": normal(e, f, d) * f**-0.5}
  if biased:
    params |= {f"{name}_bias": normal(e, f) for name in names}
  x, gates, dy = 4 * normal(m, d), 0.1 + rng.random(m, np.float32), normal(m, d)  # x: so large that clamps clamp
  if backend == "interpret":  # of no one, and the kernels do not read them
    for rows in (x, gates, dy):
      rows[sum(sizes) :] = np.nan
  return np.asarray(x, dtype), gates, params, np.asarray(dy, dtype)


def weights(params, dtype=f32, grad_dtype="float32", kind=""):
  """`expert_mlp.Weights` of parameters by name."""
  of = lambda w: kernels.Weight.of(w, (None,) * 3, dtype, grad_dtype, kind)  # noqa: E731
  return expert_mlp.Weights(**{"gate": None, **{k: v if "bias" in k else of(v) for k, v in params.items()}})


def run(args, sizes, activation, backend, dtype=f32, grad_dtype="float32"):
  """y and the gradients by name, of rows those of an expert."""
  x, gates, params, dy = args

  @jax.jit
  def f(x, gates, params, dy):
    def mlp(x, gates, params):
      w = weights(params, dtype, grad_dtype)
      return expert_mlp.expert_mlp(x, gates, jnp.int32(sizes), w, activation, backend)

    y, pull = jax.vjp(mlp, x, gates, params)
    return y, *pull(dy)

  y, dx, dgates, dparams = f(x, gates, params, dy)
  assert y.dtype == dx.dtype == dtype and all(v.dtype == f32 for v in (dgates, *dparams.values()))
  n = sum(sizes)
  return {"y": y[:n], "x": dx[:n], "gates": dgates[:n], **dparams}


def plain(args, sizes, activation, dtype=f32):
  """The same in float64, by products of all experts and ones where a row is theirs; rounded is what `run` keeps."""
  x, gates, params, dy = args
  n, none = sum(sizes), np.zeros((len(sizes), 1))
  params = {k: np.asarray(v if "bias" in k else np.asarray(v, dtype), np.float64) for k, v in params.items()}
  x, gates, dy = (np.asarray(v[:n], np.float64) for v in (x, gates, dy))
  own = np.eye(len(sizes))[np.repeat(np.arange(len(sizes)), sizes)]
  rounded = lambda v: v + jax.lax.stop_gradient(v.astype(dtype).astype(v.dtype) - v)  # noqa: E731

  def f(x, gates, params):
    product = lambda v, name: jnp.einsum("me,md,edf->mf", own, v, params[name])  # noqa: E731
    wide = (rounded(product(x, k) + own @ params.get(f"{k}_bias", none)) for k in WIDE if k in params)
    return product(rounded(activations.wide(activation, *wide) * gates[:, None]), "down")

  with jax.enable_x64(True):
    y, pull = jax.vjp(f, x, gates, params)
    dx, dgates, dparams = pull(dy)
    return jax.tree.map(np.asarray, {"y": y, "x": dx, "gates": dgates, **dparams})


def check(sizes, m, d, f, activation="silu", gated=True, biased=True, dtype=f32, backend="interpret"):
  args = inputs(sizes, m, d, f, gated, biased, dtype, backend)
  actual, expected = run(args, sizes, activation, backend, dtype), plain(args, sizes, activation, dtype)
  if not sum(sizes):
    assert not any(np.asarray(actual.pop(name)).any() for name in args[2])
    return
  narrow = 2**-7 if backend == "interpret" else 2**-6  # the others also round products before they add biases
  ref.assert_close(actual, expected, 1e-5 if dtype == f32 else narrow, f"{activation} {backend}")


# Tiles have 128 rows, or 256 where groups are large, blocks 8 to 256; rows past the sum of sizes are of no one.
GROUPS = {"small": ([5, 0, 17, 2], 27, 6, 5), "the first": ([24, 0, 0, 0], 24, 6, 5), "the last": ([0, 0, 0, 24], 24, 6, 5),
          "equal": ([6, 6, 6, 6], 24, 6, 5), "one row": ([0, 1, 0, 23], 24, 6, 5),
          "parts of tiles": ([255, 0, 174, 0, 1], 500, 24, 200), "whole tiles": ([0, 128, 256], 384, 150, 130),
          "large": ([1050, 0], 1100, 16, 24), "many blocks": ([700, 3, 0, 1025, 300], 2048, 4, 3),
          "none": ([0, 0], 40, 8, 8)}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("sizes, m, d, f", GROUPS.values(), ids=GROUPS)
def test_experts_and_their_gradients_for_groups_of_rows(sizes, m, d, f, dtype, backend):
  check(sizes, m, d, f, dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("activation, gated", KINDS)
def test_experts_and_their_gradients_for_activations(activation, gated, biased, backend):
  check([25, 0, 44, 6], 80, 12, 20, activation, gated, biased, backend=backend)


CHIPS = {"v4": (pltpu.ChipVersion.TPU_V4, 2), "v5e": (pltpu.ChipVersion.TPU_V5E, 1), "v5p": (pltpu.ChipVersion.TPU_V5P, 2),
         "v6e": (pltpu.ChipVersion.TPU_V6E, 1), "tpu7x": (pltpu.ChipVersion.TPU_7X, 1)}  # fmt: skip


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
@pytest.mark.parametrize("activation, gated", [("silu", True), ("relu2", False)])
def test_tiles_of_columns_of_which_the_last_is_partial(monkeypatch, activation, gated, chip):
  info = pltpu.get_tpu_info_for_chip(*CHIPS[chip])  # v5p has 128 rows in a tile, v6e 256
  monkeypatch.setattr(grouped, "_chip", lambda backend: info)
  monkeypatch.setattr(grouped, "_widths", lambda chip, sizes, *_: tuple(min(128, n) for n in sizes))
  check([100, 0, 270], 400, 200, 300, activation, gated)


def test_where_no_tile_fits_products_are_those_of_xla(monkeypatch):
  widths = grouped._widths
  monkeypatch.setattr(grouped, "_widths", lambda chip, sizes, *a: widths(chip, sizes, *a) if len(sizes) > 1 else None)
  args, sizes = inputs([25, 0, 44, 6], 80, 12, 20), [25, 0, 44, 6]
  ref.assert_close(run(args, sizes, "silu", "interpret"), plain(args, sizes, "silu"), 1e-5)


# ---- what is kept, and in which dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_weights_has_the_dtype_of_the_master_and_is_made_in_grad_dtype(backend):
  x, sizes = jnp.asarray(np.random.default_rng(0).random((512, 4)), bf16), [400, 112]
  up, down = jnp.ones((2, 4, 4)) + jnp.eye(4), jnp.stack([jnp.eye(4)] * 2)  # positive, so that relu does nothing
  for master, grad_dtype in ((f32, "float32"), (bf16, "float32"), (f32, "bfloat16")):

    def f(up, down):
      w = weights({"up": up, "down": down}, bf16, grad_dtype)  # noqa: B023
      return expert_mlp.expert_mlp(x, jnp.ones(512), jnp.int32(sizes), w, "relu", backend)

    y, pull = jax.vjp(f, up.astype(master), down.astype(master))
    dup, ddown = pull(jnp.ones_like(y))
    assert y.dtype == bf16 and dup.dtype == ddown.dtype == master
    narrow = bf16 in (master, jnp.dtype(grad_dtype))
    for dw, rows in ((dup, x), (ddown, y)):
      exact = np.stack([np.asarray(rows, np.float64)[at].sum(0) for at in (slice(400), slice(400, 512))])
      ref.assert_close(dw, np.repeat(exact[..., None], 4, -1), 1e-2 if narrow else 1e-5)
      assert (dw == dw.astype(bf16)).all() == narrow, f"made in {grad_dtype} for {master}"


def test_narrow_gradients_of_a_master_are_summed_in_float32_and_rounded_once():
  sizes, m, d, f = GROUPS["large"]  # several tiles of rows for an expert
  args = inputs(sizes, m, d, f, dtype=bf16, backend="interpret")
  wide, narrow = (run(args, sizes, "silu", "interpret", bf16, dtype) for dtype in ("float32", "bfloat16"))
  for name in ("gate", "up", "down"):
    np.testing.assert_array_equal(narrow[name], wide[name].astype(bf16).astype(f32))
    assert ref.different(narrow[name], wide[name], 1e-4)


def called(jaxpr):
  """Names of the kernels in a jaxpr of whose results one is used: XLA drops the others."""
  used, names = set(map(id, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if used.isdisjoint(map(id, eqn.outvars)):
      continue
    used.update(map(id, eqn.invars))
    if eqn.primitive.name == "pallas_call":
      names.append(eqn.params["name"])
    else:
      for inner in flops.inner_jaxprs(eqn.params.values()):
        names += called(getattr(inner, "jaxpr", inner))
  return names


def keep(*names):
  """A checkpoint that keeps what has one of these names."""
  return functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


def layers(count, wrap=lambda f: f):
  """The gradients of so many layers of experts, as a function of their inputs."""

  @wrap
  def layer(x, gates, params):
    y = expert_mlp.expert_mlp(x, gates, jnp.int32([5, 0, 17]), weights(params), "silu", "interpret")
    return jnp.where(jnp.arange(24)[:, None] < 22, y, 0)  # of no one's rows come garbage

  def gradients(x, gates, params, dy):
    f = layer if count == 1 else lambda *a: jax.lax.scan(lambda x, _: (layer(x, *a[1:]), None), a[0], length=count)[0]
    y, pull = jax.vjp(f, x, gates, params)
    return y, *pull(dy)

  return gradients


@pytest.mark.parametrize("gated", [True, False])
def test_what_a_policy_keeps_is_not_computed_again(gated):
  args = inputs([5, 0, 17], 24, 8, 8, gated)
  count = lambda *wrap: len(called(jax.make_jaxpr(layers(1, *wrap))(*args).jaxpr))  # noqa: E731
  assert count() == (8 if gated else 6)  # forward 2; backward dh, and of each weight its gradient, of the wide ones dx
  assert count(jax.checkpoint) == count() + 1
  assert count(keep("up")) == count() + gated
  assert count(keep("gate", "up")) == count()


def test_recomputation_changes_no_number():
  args = inputs([5, 0, 17], 24, 8, 8)
  plain, *others = (jax.jit(layers(2, *wrap))(*args) for wrap in ((), (jax.checkpoint,), (keep("gate", "up"),)))
  for other in others:
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
      np.testing.assert_array_equal(a, b)


# ---- what the kernels do


@pytest.mark.parametrize(
  "sizes, m", [([255, 0, 174, 0, 1], 500), ([0, 0, 128, 256, 0], 384), ([0, 0], 40), ([3] * 99, 300)]
)
def test_visits_are_the_tiles_of_each_group_in_order(sizes, m):
  visits, count = grouped.Visits.of(jnp.int32(sizes), m, 128)
  found = [(int(visits.group[v]), int(visits.tile(v))) for v in range(int(count))]
  end, wanted = 0, []
  for e, n in enumerate(sizes):
    wanted += [(e, t) for t in sorted({row // 128 for row in range(end, end + n)} or {min(end, m - 1) // 128})]
    end += n
  assert found == wanted and count <= len(visits.group)


def program(experts, gated=True, dtype=bf16, kind="", m=512, d=32, f=16):
  """The jaxpr of all gradients of experts with as many rows each."""
  x, gates, params, dy = inputs([m // experts] * experts, m, d, f, gated, False, dtype)

  def gradients(x, gates, params):
    w, sizes = weights(params, dtype, kind=kind), jnp.full(experts, m // experts)
    y, pull = jax.vjp(lambda *a: expert_mlp.expert_mlp(*a[:2], sizes, a[2], "silu", "interpret"), x, gates, w)
    return y, pull(dy)

  return jax.make_jaxpr(gradients)(x, gates, params)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in flops.inner_jaxprs(eqn.params.values()):
      yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("experts", [4, 64])
@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
@pytest.mark.parametrize("gated", [True, False])
def test_a_tpu_multiplies_each_row_once_however_many_experts_there_are(gated, kind, experts):
  made = program(experts, gated, kind=kind)
  products = 3 + gated - 1  # forward, and twice as many backward
  assert flops.jaxpr_flops(made) == 3 * products * 2 * 512 * 32 * 16
  for eqn in equations(made):
    assert "dot" not in eqn.primitive.name or eqn.outvars[0].aval.shape not in ((experts, 32, 16), (experts, 16, 32))


@pytest.mark.parametrize("dtype, highest", [(f32, True), (bf16, False)])
def test_float32_products_of_a_tpu_are_float32(dtype, highest):
  products = [eqn for eqn in equations(program(2, dtype=dtype, m=8)) if eqn.primitive.name == "dot_general"]
  precise = [jax.lax.Precision.HIGHEST in (eqn.params["precision"] or ()) for eqn in products]
  assert precise == [highest] * 12, products  # each of the three kernels for dw has two: one masks rows


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("activation, gated", KINDS)
def test_the_kernels_are_made_for_a_tpu_whatever_the_activation(monkeypatch, activation, gated, dtype):
  monkeypatch.setitem(tpu_info.registry, "cpu", lambda: pltpu.get_tpu_info_for_chip(*CHIPS["v5p"]))
  x, gates, params, dy = inputs([100, 156], 256, 128, 256, gated, dtype=dtype)

  def gradients(x, gates, params):
    w, sizes = weights(params, dtype), jnp.int32([100, 156])
    y, pull = jax.vjp(lambda *a: expert_mlp.expert_mlp(*a[:2], sizes, a[2], activation, "tpu"), x, gates, w)
    return y, pull(dy)

  text = jax.jit(gradients).trace(x, gates, params).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("@tpu_custom_call") == (8 if gated else 6)


WIDTHS = [(7168, 2048), (4096, 14336), (4096, 1792), (2880, 2880), (1536, 24)]


def calls_of(monkeypatch, chip, d, f):
  """Shape of the result and arguments of each kernel of experts on a chip, of 4096 rows and 8 experts."""
  info, calls = pltpu.get_tpu_info_for_chip(*CHIPS[chip]), []

  def call(kernel, out, **how):
    calls.append((jax.tree.leaves(out)[0].shape, how))
    return lambda *_: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out)

  monkeypatch.setattr(grouped, "_chip", lambda backend: info)
  monkeypatch.setattr(grouped.pl, "pallas_call", call)

  def gradients(x, gates, params, dy):
    w, sizes = weights(params, bf16), jnp.full(8, 512)
    y, pull = jax.vjp(lambda *a: expert_mlp.expert_mlp(*a[:2], sizes, a[2], "silu", "tpu"), x, gates, w)
    return y, pull(dy)

  shapes = {"gate": (8, d, f), "up": (8, d, f), "down": (8, f, d), "gate_bias": (8, f), "up_bias": (8, f)}
  params = {name: jax.ShapeDtypeStruct(shape, f32) for name, shape in shapes.items()}
  x = jax.ShapeDtypeStruct((4096, d), bf16)
  jax.eval_shape(gradients, x, jax.ShapeDtypeStruct((4096,), f32), params, x)
  assert len(calls) == 8 or chip == "v4"  # in its VMEM not even the smallest tiles of some products fit
  return info, calls


@pytest.mark.parametrize("d, f", WIDTHS)
@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_fit_in_vmem_waste_little_and_keep_both_cores_busy(monkeypatch, chip, d, f):
  info, calls = calls_of(monkeypatch, chip, d, f)
  ridge = info.bf16_ops_per_second / info.mem_bw_bytes_per_second
  for shape, how in calls:
    spec, columns = how["grid_spec"], shape[1:]
    tile = [n for n in jax.tree.leaves(spec.out_specs)[0].block_shape if n][-len(columns) :]
    assert how["compiler_params"].vmem_limit_bytes <= info.vmem_capacity_bytes
    assert spec.grid[0] == math.prod(-(-n // t) for n, t in zip(columns, tile))
    assert all(t % info.mxu_column_size == 0 or t == n for n, t in zip(columns, tile))
    if min(columns) >= 1024:
      rounds = -(-spec.grid[0] // info.num_cores)
      assert rounds * info.num_cores * math.prod(tile) <= 1.2 * math.prod(columns)
      products = how["cost_estimate"].flops / (2 * 4096 * d * f)  # of rows that are read once
      # To read the rows and matrices of a tile takes about as long as its products, or less.
      assert ridge * sum(1 / t for t in tile) / products <= (1.25 if chip != "v4" else 2)


@pytest.mark.parametrize("d, f", WIDTHS)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_kernel_takes_no_more_vmem_than_a_fusion_may(monkeypatch, chip, d, f):
  """XLA may fuse a kernel with the write of its result into a stack of layers, and then only gives it that."""
  given = compiler.resolve(compiler.chip_of_topology(chip), {"moe"}).compile
  limit = int(given.get("xla_tpu_scoped_vmem_limit_kib", 2**20))  # v4 has none of its own
  taken = [how["compiler_params"].vmem_limit_bytes / 2**10 for _, how in calls_of(monkeypatch, chip, d, f)[1]]
  assert max(taken) <= limit
