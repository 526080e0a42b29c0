"""Every operation with a gradient of its own, against the plain one: values, gradients and their dtypes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from maxscale.models import grouped, kernels, loss, parts
from maxscale.perf import flops
from tests.models import reference as ref

f32, bf16 = jnp.float32, jnp.bfloat16


def normal(*shape, seed=0, dtype=f32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients(f, *args):
  """The result of f and the gradients of its product with fixed random numbers, by each argument."""
  out, pull = jax.vjp(f, *args)
  return out, *pull(normal(*out.shape, seed=99, dtype=out.dtype))


def weight(w, dtype=f32, grad_dtype="float32"):
  return kernels.Weight.of(w, (None,) * w.ndim, dtype, grad_dtype)


# ---- matmul


@pytest.mark.parametrize("spec, w_shape", [("btd,dnh->btnh", (16, 3, 5)), ("btd,df->btf", (16, 7))])
def test_matmul_and_its_gradients(spec, w_shape):
  x, w = normal(2, 6, 16), normal(*w_shape, seed=1)
  actual = gradients(lambda x, w: kernels.matmul(spec, x, weight(w)), x, w)
  for a, b, what in zip(actual, gradients(lambda x, w: jnp.einsum(spec, x, w), x, w), ("y", "dx", "dw")):
    ref.assert_close(a, b, 1e-6, what)


def test_the_weight_gradient_of_a_bfloat16_matmul_is_made_in_float32():
  x, w, dy = normal(1, 4096, 4, dtype=bf16), normal(4, 4, seed=1), normal(1, 4096, 4, seed=2, dtype=bf16)
  exact = np.einsum("btd,btf->df", *(np.asarray(a, np.float64) for a in (x, dy)))
  errors = {}
  for dtype in ("float32", "bfloat16"):
    y, pull = jax.vjp(lambda x, w: kernels.matmul("btd,df->btf", x, weight(w, bf16, dtype)), x, w)  # noqa: B023
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (bf16, bf16, f32)
    errors[dtype] = ref.error(dw, exact)
  assert errors["float32"] < 1e-5, errors
  assert errors["bfloat16"] > 1e-4, f"grad_dtype is not used: {errors}"


# ---- lookup


def test_lookup_and_its_gradient():
  table, tokens = normal(11, 8), np.array([[3, 3, 0], [10, 3, 7]])
  f = lambda table: kernels.lookup(weight(table), tokens)  # noqa: E731
  out, dw = gradients(f, table)
  np.testing.assert_array_equal(out, np.asarray(table)[tokens])
  expected = np.zeros((11, 8))
  np.add.at(expected, tokens, normal(2, 3, 8, seed=99))
  ref.assert_close(dw, expected, 1e-6)


def test_lookup_of_a_token_that_is_there_a_thousand_times_sums_in_float32():
  table, tokens = normal(3, 4), np.full((2, 2048), 1)
  f = lambda table: kernels.lookup(weight(table, bf16), tokens)  # noqa: E731
  out, pull = jax.vjp(f, table)
  dy = normal(2, 2048, 4, dtype=bf16)
  (dw,) = pull(dy)
  assert out.dtype == bf16 and dw.dtype == f32
  ref.assert_close(dw[1], np.asarray(dy, np.float64).sum((0, 1)), 1e-5)
  assert not dw[0].any() and not dw[2].any()


# ---- grouped matmul


@pytest.mark.parametrize("sizes", [[5, 0, 17, 2], [24, 0, 0, 0], [0, 0, 0, 24], [6, 6, 6, 6], [0, 1, 0, 23]])
def test_grouped_matmul_and_its_gradients(sizes):
  m, x, w = sum(sizes), normal(sum(sizes), 6), normal(4, 6, 5, seed=1)
  one_hot = jnp.eye(4)[np.repeat(np.arange(4), sizes)]
  actual = gradients(lambda x, w: kernels.grouped_matmul(x, weight(w), jnp.int32(sizes)), x, w)
  expected = gradients(lambda x, w: jnp.einsum("me,md,edf->mf", one_hot, x, w), x, w)
  assert actual[0].shape == (m, 5)
  for a, b, what in zip(actual, expected, ("y", "dx", "dw")):
    ref.assert_close(a, b, 1e-6, what)


def test_grouped_matmul_of_many_blocks():
  sizes = [700, 3, 0, 1025, 320]  # blocks of 256 rows: whole ones, parts, none
  x, w = normal(2048, 4), normal(5, 4, 3, seed=1)
  one_hot = jnp.eye(5)[np.repeat(np.arange(5), sizes)]
  actual = jax.jit(functools.partial(gradients, lambda x, w: kernels.grouped_matmul(x, weight(w), jnp.int32(sizes))))(
    x, w
  )
  expected = gradients(lambda x, w: jnp.einsum("me,md,edf->mf", one_hot, x, w), x, w)
  for a, b, what in zip(actual, expected, ("y", "dx", "dw")):
    ref.assert_close(a, b, 1e-5, what)


def test_the_gradient_of_grouped_weights_has_the_dtype_of_the_master():
  x, w, sizes = normal(512, 4, dtype=bf16), normal(2, 4, 4, seed=1), jnp.int32([400, 112])
  exact = np.stack([np.asarray(x, np.float64)[s].sum(0) for s in (slice(400), slice(400, 512))])
  for dtype in (f32, bf16):
    y, pull = jax.vjp(lambda w: kernels.grouped_matmul(x, weight(w, bf16), sizes),
                      w.astype(dtype))  # fmt: skip
    (dw,) = pull(jnp.ones_like(y))
    assert y.dtype == bf16 and dw.dtype == dtype
    ref.assert_close(dw[..., 0], exact, 1e-5 if dtype == f32 else 1e-2)


# Tiles have 128 rows, or 256 where groups are large; the last rows of x and dy are of no group.
GROUPS = {"parts of tiles": ([255, 0, 174, 0, 1], 500, 24, 200), "whole tiles": ([0, 128, 256], 384, 150, 130),
          "large": ([1050, 0], 1100, 16, 24), "none": ([0, 0], 40, 8, 8)}  # fmt: skip


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("sizes, m, d, f", GROUPS.values(), ids=GROUPS)
def test_the_kernels_of_a_tpu(sizes, m, d, f, dtype):
  own = np.arange(m)[:, None] < sum(sizes)
  x, dy = (jnp.where(own, normal(m, n, seed=n, dtype=dtype), jnp.nan) for n in (d, f))
  w = normal(len(sizes), d, f, seed=1)

  @jax.jit
  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: kernels.grouped_matmul(x, weight(w, dtype), jnp.int32(sizes), "interpret"), x, w)
    return y, *pull(dy)

  y, dx, dw = run(x, w, dy)
  assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, f32)
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w.astype(dtype), dy))
  rows, rounding = [slice(end - n, end) for end, n in zip(np.cumsum(sizes), sizes)], 1e-6 if dtype == f32 else 2**-8
  wanted = [np.concatenate([a[at] @ v for at, v in zip(rows, vs)]) for a, vs in ((x, w), (dy, w.swapaxes(1, 2)))]
  if sum(sizes):
    ref.assert_close(y[: sum(sizes)], wanted[0], rounding, "y")
    ref.assert_close(dx[: sum(sizes)], wanted[1], rounding, "dx")
  ref.assert_close(dw, np.stack([x[at].T @ dy[at] for at in rows]), 1e-6, "dw")


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


def test_the_kernels_of_a_tpu_are_recomputed_as_a_policy_says():
  x, w, sizes = normal(24, 8), normal(3, 8, 8, seed=1), jnp.int32([5, 0, 17])

  def run(wrap):
    @wrap
    def layer(x, w):
      h = checkpoint_name(kernels.grouped_matmul(x, weight(w), sizes, "interpret"), "up")
      return jnp.where(jnp.arange(24)[:, None] < 22, jnp.tanh(h), 0)

    def f(x, w):
      return jax.lax.scan(lambda x, _: (layer(x, w), None), x, length=2)[0]

    return jax.jit(functools.partial(gradients, f))(x, w)

  plain = run(lambda f: f)
  policy = jax.checkpoint_policies.save_only_these_names("up")
  for wrap in (jax.checkpoint, functools.partial(jax.checkpoint, policy=policy)):
    for a, b in zip(run(wrap), plain):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("experts", [4, 64])
@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
def test_a_tpu_multiplies_each_row_once_however_many_experts_there_are(kind, experts):
  x, w, sizes = normal(512, 32, dtype=bf16), normal(experts, 32, 16), jnp.full(experts, 512 // experts)
  quantised = lambda w: kernels.Weight.of(w, (None,) * 3, bf16, "float32", kind)  # noqa: E731
  f = lambda x, w: kernels.grouped_matmul(x, quantised(w), sizes, "interpret").sum()  # noqa: E731
  assert flops.jaxpr_flops(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w)) == 3 * 2 * 512 * 32 * 16
  for eqn in equations(jax.make_jaxpr(jax.grad(f, 1))(x, w)):
    assert "dot" not in eqn.primitive.name or eqn.outvars[0].aval.shape != w.shape, eqn


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in flops.inner_jaxprs(eqn.params.values()):
      yield from equations(getattr(inner, "jaxpr", inner))


CHIPS = {"v4": (pltpu.ChipVersion.TPU_V4, 2), "v5e": (pltpu.ChipVersion.TPU_V5E, 1), "v5p": (pltpu.ChipVersion.TPU_V5P, 2),
         "v6e": (pltpu.ChipVersion.TPU_V6E, 1), "tpu7x": (pltpu.ChipVersion.TPU_7X, 1)}  # fmt: skip


@pytest.mark.parametrize("d, f", [(7168, 2048), (4096, 1792), (2880, 2880), (1536, 24)])
@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_fit_in_vmem_waste_little_and_keep_both_cores_busy(monkeypatch, chip, d, f):
  info, calls = pltpu.get_tpu_info_for_chip(*CHIPS[chip]), []
  monkeypatch.setattr(grouped, "_chip", lambda backend: info)
  monkeypatch.setattr(grouped.pl, "pallas_call", lambda *a, **k: calls.append(k) or (lambda *_: jnp.zeros(a[1].shape)))
  x, w, dy = (jax.ShapeDtypeStruct(s, bf16) for s in ((4096, d), (8, d, f), (4096, f)))
  sizes = jnp.full(8, 512)
  jax.eval_shape(lambda x, w: grouped.product(x, w, sizes, bf16, None, False, "tpu"), x, w)
  jax.eval_shape(lambda x, w: grouped.product(x, w, sizes, bf16, None, True, "tpu"), dy, w)
  jax.eval_shape(lambda x, dy: grouped.outer(x, dy, sizes, None, "tpu"), x, dy)
  for call, columns in zip(calls, ((f,), (d,), (d, f)), strict=True):
    spec = call["grid_spec"]
    tile = [n for n in spec.out_specs.block_shape if n][-len(columns) :]
    assert call["compiler_params"].vmem_limit_bytes <= info.vmem_capacity_bytes
    assert spec.grid[0] == math.prod(-(-n // t) for n, t in zip(columns, tile))
    assert all(t % info.mxu_column_size == 0 or t == n for n, t in zip(columns, tile))
    if min(columns) >= 1024:
      rounds = -(-spec.grid[0] // info.num_cores)
      assert rounds * info.num_cores * math.prod(tile) <= 1.2 * math.prod(columns)
      assert min(tile) >= (512 if chip != "v4" else 128)


@pytest.mark.parametrize("dtype, highest", [(f32, True), (bf16, False)])
def test_float32_products_of_a_tpu_are_float32(dtype, highest):
  def f(x, w):
    y = kernels.grouped_matmul(x, weight(w, dtype), jnp.int32([5, 3]), "interpret")
    return kernels.matmul("md,df->mf", y, weight(w[0].T, dtype)).sum()

  program = jax.make_jaxpr(jax.grad(f, (0, 1)))(normal(8, 6, dtype=dtype), normal(2, 6, 5, seed=1))
  products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
  precise = [jax.lax.Precision.HIGHEST in (eqn.params["precision"] or ()) for eqn in products]
  assert precise == [highest] * 7, products  # the kernel for dw has two: one masks rows


# ---- the loss


def test_cross_entropy_against_logits_in_numpy():
  x, table = normal(2, 5, 8), normal(7, 8, seed=1)
  targets = np.array([[4, -1, 0, 2, 2], [-1, -1, 3, 4, 1]])
  spec = loss.LossSpec(5, 0.2, 5)  # 5 tokens of 7 are real
  total, nll = loss.cross_entropy(spec, x, weight(table), targets, jnp.float32(0.25))
  logits = (np.asarray(x, np.float64) @ np.asarray(table, np.float64).T)[..., :5]
  log_z = np.log(np.exp(logits).sum(-1))
  valid = targets >= 0
  each = log_z - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
  assert float(nll) == pytest.approx(each[valid].sum(), rel=1e-6)
  assert float(total) == pytest.approx(0.25 * (each + 0.2 * log_z**2)[valid].sum(), rel=1e-6)
  f = lambda x, table: loss.cross_entropy(spec, x, weight(table), targets, jnp.float32(0.25))[0]  # noqa: E731
  dx, dw = jax.grad(f, (0, 1))(x, table)
  step = 1e-2
  for name, gradient, at in (("x", dx, (0, 2, 3)), ("table", dw, (4, 1)), ("table", dw, (2, 7))):
    values = {"x": np.asarray(x), "table": np.asarray(table)}
    high, low = ({**values, name: values[name].copy()} for _ in range(2))
    high[name][at] += step
    low[name][at] -= step
    difference = (float(f(**high)) - float(f(**low))) / (2 * step)
    assert float(gradient[at]) == pytest.approx(difference, abs=2e-4), (name, at)
  assert not dw[5:].any() and not dx[~valid].any()


def test_cross_entropy_of_large_logits_is_finite():
  spec = loss.LossSpec(4, 1e-4, 0)
  x, table = 1e3 * jnp.ones((1, 2, 1)), jnp.float32([[1], [-1], [0.5], [1]])
  total, nll = loss.cross_entropy(spec, x, weight(table), np.array([[0, 3]]), jnp.float32(1))
  assert float(nll) == pytest.approx(2 * np.log(2), rel=1e-4) and np.isfinite(float(total))


@pytest.mark.parametrize("rows, vocab, wanted", [(96, 50, 0), (96, 50, 7), (96, 50, 96), (97, 50, 10), (64, 2**26, 0)])
def test_the_chunks_of_a_loss_divide_its_rows_and_hold_to_the_limit(rows, vocab, wanted):
  size = loss._chunk_size(rows, vocab, wanted)
  assert rows % size == 0 and 1 <= size <= (wanted or rows)
  assert size * vocab <= max(loss.CHUNK_LOGITS, vocab)


# ---- parts


def test_the_norm_is_computed_in_float32():
  program = ref.program(ref.DENSE, model__compute_dtype="bfloat16")
  norm = parts.Norm(program.shape)
  norm.scale.set_value(2 * jnp.ones(32))
  x = normal(1, 3, 32, dtype=bf16)
  y = norm(x)
  exact = np.asarray(x, np.float64)
  exact = 2 * exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
  assert y.dtype == bf16
  np.testing.assert_array_equal(y, jnp.asarray(exact, f32).astype(bf16))
