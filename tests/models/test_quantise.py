"""Quantised products against numpy with the same rounding, their error, the TPU programs made of them, and training.

`python -m tests.models.test_quantise` compiles products for chips that need not be here and prints what they multiply;
it is a process of its own, because libtpu reads its environment once.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxscale.config import ConfigError
from maxscale.models import activations, expert_mlp, kernels, quantise
from tests.models import reference as ref

ROOT = pathlib.Path(__file__).parents[2]
f32, bf16 = jnp.float32, jnp.bfloat16
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2

# Einsum: shapes of x and w; the axes of x, w, dy (for dx) and dy (for dw) that have no scale of their own.
SPECS = {
  "btd,dnh->btnh": ((2, 6, 16), (16, 3, 4), (2,), (0,), (2, 3), (0, 1)),
  "btnh,nhd->btd": ((2, 6, 3, 4), (3, 4, 16), (2, 3), (0, 1), (2,), (0, 1)),
  "btd,df->btf": ((2, 6, 16), (16, 8), (2,), (0,), (2,), (0, 1)),
  "btf,fd->btd": ((2, 6, 8), (8, 16), (2,), (0,), (2,), (0, 1)),
  "md,edf->mef": ((6, 16), (3, 16, 8), (1,), (1,), (1, 2), (0,)),
  "mef,efd->md": ((6, 3, 8), (3, 8, 16), (1, 2), (0, 1), (1,), (0,)),
}  # fmt: skip
SIZES = [5, 0, 17, 2]


def spread(*shape, seed=0, dtype=f32, least=-1.0):
  """Random numbers from least to 1, times factors that make some rows and channels larger than others."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(least, 1, shape)
  for axis, n in enumerate(shape):
    x = x * np.exp(rng.normal(size=n) / 2).reshape([n if a == axis else 1 for a in range(len(shape))])
  return jnp.asarray(x, dtype)


def mostly_positive(*shape, **how):
  """The largest of each block is positive. A largest negative one is -127.5 steps of int8, a tie that may go either way."""
  return spread(*shape, least=-0.2, **how)


def weight(w, kind, dtype=f32, grad_dtype="float32"):
  return kernels.Weight.of(w, (None,) * w.ndim, dtype, grad_dtype, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped(x, w, sizes, backend=None):
  """A product of rows and their experts, as `expert_mlp` makes it and its gradients."""
  (y,), _ = expert_mlp.Products(sizes, backend).forward(x, (w,), lambda ys, *_: (ys, ()))
  return y


def _grouped_bwd(backend, kept, dy):
  x, w, sizes = kept
  products = expert_mlp.Products(sizes, backend)
  (dx,), _ = products.backward(dy, w, lambda ys, *_: (ys, ()))
  return dx, products.weight(w, x, dy), None


grouped.defvjp(lambda x, w, sizes, backend: (grouped(x, w, sizes, backend), (x, w.residual(), sizes)), _grouped_bwd)


def gradients(f, *args):
  """The result of f, the cotangent given to it, and what comes back for the arguments."""
  out, pull = jax.vjp(f, *args)
  dy = mostly_positive(*out.shape, seed=9, dtype=out.dtype)
  return out, dy, *pull(dy)


# ---- the same in numpy


def rounded(x, axes, dtype):
  """x as integers or fp8 numbers (in float64), and the scale of each block of `axes`."""
  x = np.asarray(x, np.float32)
  assert dtype != "int8" or (x.max(axes) >= -x.min(axes)).all(), "see mostly_positive"
  top = np.float32(127.5 if dtype == "int8" else ml_dtypes.finfo(dtype).max)
  scale = np.abs(x).max(axes, keepdims=True) / top
  scale = np.where(scale == 0, np.float32(1), scale)
  values = np.clip(np.rint(x / scale), -128, 127) if dtype == "int8" else np.clip(x / scale, -top, top).astype(dtype)
  return values.astype(np.float64), scale.astype(np.float64)


def forward_dtype(kind):
  return "int8" if kind.startswith("int8") else E4M3


def axes_of(kind, x, axes):
  return tuple(range(np.ndim(x))) if kind.endswith("_tensor") else axes


def quantised(kind, x, axes, dtype=None):
  values, scale = rounded(x, axes_of(kind, x, axes), dtype or forward_dtype(kind))
  return values * scale


def on_rows(scale, like):
  """The scales of x in the places of dy, whose first dimensions are those of x that have one."""
  kept = [n for n in scale.shape if n > 1]
  return scale.reshape(kept + [1] * (np.ndim(like) - len(kept)))


def on_channels(scale):
  """The scales of w in the places of dy, whose last dimensions are those of w that have one."""
  return scale.reshape([n for n in scale.shape if n > 1] or [1])


def expected(kind, spec, x, w, dy):
  """y, dx and dw in float64."""
  _, _, x_axes, w_axes, dx_axes, dw_axes = SPECS[spec]
  (a, b), y = spec.split("->")[0].split(","), spec.split("->")[1]
  backward = "int8" if kind.startswith("int8") else E5M2
  x_values, x_scale = rounded(x, axes_of(kind, x, x_axes), forward_dtype(kind))
  w_values, w_scale = rounded(w, axes_of(kind, w, w_axes), forward_dtype(kind))
  dy = np.asarray(dy, np.float64)
  out = np.einsum(spec, x_values * x_scale, w_values * w_scale)
  dx = np.einsum(f"{y},{b}->{a}", quantised(kind, dy * on_channels(w_scale), dx_axes, backward), w_values)
  if kind.startswith("int8"):
    return out, dx, np.einsum(f"{a},{y}->{b}", np.asarray(x, np.float64), dy)
  return out, dx, np.einsum(f"{a},{y}->{b}", x_values, quantised(kind, dy * on_rows(x_scale, dy), dw_axes, backward))


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_matmul_and_its_gradients(spec, kind):
  x_shape, w_shape, *_ = SPECS[spec]
  x, w = mostly_positive(*x_shape), mostly_positive(*w_shape, seed=1)
  y, dy, *back = gradients(lambda x, w: kernels.matmul(spec, x, weight(w, kind)), x, w)
  for actual, wanted, what in zip((y, *back), expected(kind, spec, x, w, dy), ("y", "dx", "dw")):
    ref.assert_close(actual, wanted, 1e-5, what)


@pytest.mark.parametrize(
  "kind, backend", [*((kind, None) for kind in quantise.KINDS), ("int8", "interpret"), ("fp8", "interpret")]
)
def test_products_of_experts_and_their_gradients(kind, backend):
  m, rows = sum(SIZES), sum(SIZES) + 3  # the last rows are of no expert
  x, w = mostly_positive(rows, 16), mostly_positive(4, 16, 8, seed=1)
  y, dy, dx, dw = gradients(lambda x, w: grouped(x, weight(w, kind), jnp.int32(SIZES), backend), x, w)
  backward, dy64 = "int8" if kind.startswith("int8") else E5M2, np.asarray(dy, np.float64)
  x_values, x_scale = rounded(x, axes_of(kind, x, (1,)), forward_dtype(kind))
  w_values, w_scale = rounded(w, axes_of(kind, w, (0, 1)), forward_dtype(kind))  # the experts share their scales
  for_dx = quantised(kind, dy64 * w_scale[0], (1,), backward)
  for_dw = quantised(kind, dy64 * x_scale, (0,), backward)
  left = (np.asarray(x, np.float64), dy64) if kind.startswith("int8") else (x_values, for_dw)
  wanted_y, wanted_dx, wanted_dw = np.zeros((m, 8)), np.zeros((m, 16)), np.zeros((4, 16, 8))
  for e, end in enumerate(np.cumsum(SIZES)):
    own = slice(end - SIZES[e], end)
    wanted_y[own] = (x_values * x_scale)[own] @ (w_values * w_scale)[e]
    wanted_dx[own] = for_dx[own] @ w_values[e].T
    wanted_dw[e] = left[0][own].T @ left[1][own]
  ref.assert_close(y[:m], wanted_y, 1e-5, "y")
  ref.assert_close(dx[:m], wanted_dx, 1e-5, "dx")
  ref.assert_close(dw, wanted_dw, 1e-5, "dw")


@pytest.mark.parametrize("backend", [None, "interpret"])
@pytest.mark.parametrize("kind", quantise.KINDS)
def test_the_mlp_of_experts_is_made_of_these_products(kind, backend):
  m, sizes = sum(SIZES), jnp.int32(SIZES)  # the last rows are of no expert
  x, gates, down = spread(m + 3, 16), 1 + spread(m + 3, seed=1) / 2, spread(4, 8, 16, seed=2)
  wide = [spread(4, 16, 8, seed=seed) for seed in (3, 4)]

  def mlp(x, gates, gate, up, down):
    w = expert_mlp.Weights(*(weight(w, kind) for w in (gate, up, down)))
    return expert_mlp.expert_mlp(x, gates, sizes, w, "silu", backend)

  def one_by_one(x, gates, gate, up, down):
    product = lambda x, w: grouped(x, weight(w, kind), sizes, backend)  # noqa: E731
    return product(activations.hidden("silu", product(x, gate), product(x, up)) * gates[:, None], down)

  for actual, wanted in zip(*(gradients(f, x, gates, *wide, down) for f in (mlp, one_by_one)), strict=True):
    own = slice(m) if len(wanted) == m + 3 else slice(None)
    ref.assert_close(actual[own], wanted[own], 1e-6)


def step(x, axes, dtype):
  """The most that rounding changes each number: half a step of int8, or half the last bit of fp8."""
  if dtype == "int8":
    return np.broadcast_to(np.abs(x).max(axes, keepdims=True) / 255, x.shape)
  _, scale = rounded(x, axes, dtype)
  info = ml_dtypes.finfo(dtype)
  return np.maximum(np.abs(x) * float(info.eps) / 2, scale * float(info.smallest_subnormal) / 2)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_the_error_of_a_product_is_within_the_rounding_of_its_operands(kind):
  x, w = spread(64, 128), spread(128, 32, seed=1)
  y = np.asarray(kernels.matmul("md,df->mf", x, weight(w, kind)), np.float64)
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  dx, dw = step(x, axes_of(kind, x, (1,)), forward_dtype(kind)), step(w, axes_of(kind, w, (0,)), forward_dtype(kind))
  bound = dx @ np.abs(w) + np.abs(x) @ dw + dx @ dw
  error = np.abs(y - x @ w)
  assert (error <= 1.0001 * bound + 1e-5 * np.abs(x @ w).max()).all()
  assert np.linalg.norm(error) > 1e-3 * np.linalg.norm(x @ w), "nothing was quantised"


def test_a_row_or_channel_beside_much_larger_ones_keeps_its_digits_only_with_a_scale_of_its_own():
  x, w = spread(4, 128).at[1:].multiply(1000), spread(128, 4, seed=1).at[:, 1:].multiply(1000)
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  error = {k: np.abs(kernels.matmul("md,df->mf", x, weight(w, k)) / exact - 1)[0, 0] for k in ("int8", "int8_tensor")}
  assert error["int8"] < 0.05 and error["int8_tensor"] > 0.5, error


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_dtypes_are_those_of_x_and_of_the_master(kind):
  x, w = mostly_positive(8, 16, dtype=bf16), mostly_positive(16, 4, seed=1)
  experts = lambda x, w: grouped(x, weight(w[None], kind, bf16), jnp.int32([8]))  # noqa: E731
  dense = lambda x, w: kernels.matmul("md,df->mf", x, weight(w, kind, bf16))  # noqa: E731
  for f in (dense, experts):
    y, dy, dx, dw = gradients(f, x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (bf16, bf16, f32)
    ref.assert_close(y, expected(kind, "md,edf->mef", x, w.astype(bf16)[None], dy[:, None])[0][:, 0], 2**-8)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_gradient_of_the_master_is_made_in_grad_dtype(kind):
  x, w = spread(64, 16), spread(16, 4, seed=1)
  for dtype in ("float32", "bfloat16"):
    dw = jax.grad(lambda w: jnp.sum(kernels.matmul("md,df->mf", x, weight(w, kind, f32, dtype)) ** 2))(w)  # noqa: B023
    assert dw.dtype == f32
    assert (dw == dw.astype(bf16)).all() == (dtype == "bfloat16")


def test_zeros_stay_zeros_and_what_is_not_finite_stays_that():
  x, w = jnp.zeros((3, 8)).at[1].set(1).at[2, 4].set(jnp.nan), spread(8, 4)
  for kind in ("int8", "fp8"):
    y = np.asarray(kernels.matmul("md,df->mf", x, weight(w, kind)))
    assert not y[0].any() and np.isfinite(y[1]).all() and np.isnan(y[2]).all()


def test_a_backward_pass_keeps_the_kind_and_no_master():
  kept = weight(spread(8, 4), "int8").residual()
  assert kept.quantize == "int8" and kept.master.size == 0


# ---- which weights


def test_the_first_pattern_that_matches_a_whole_name_decides():
  table = {"mlp/down": "fp8", "mlp/.*": "int8", "attention/(query|out)": "fp8_tensor"}
  names = (
    "mlp/down",
    "mlp/up",
    "mlp/shared/up",
    "attention/query",
    "attention/query_norm",
    "attention/key",
    "mlp/router",
  )
  assert [quantise.rule(table, n) for n in names] == ["fp8", "int8", "int8", "fp8_tensor", "", "", ""]
  assert quantise.rule({}, "mlp/up") == "" and quantise.rule({".*": "int8"}, "mlp/router") == ""


@pytest.mark.parametrize(
  "table, message",
  [
    ({"mlp/.*": "int4"}, r"'mlp/\.\*' has the kind 'int4', which is not one of int8, int8_tensor, fp8, fp8_tensor"),
    ({"mlp/.*": ["int8"]}, "'mlp/.*' has the kind"),
    ({"mlp/(": "int8"}, r"'mlp/\(' is not a regular expression"),
  ],
)
def test_a_wrong_table_is_refused(table, message):
  with pytest.raises(ConfigError, match=message):
    quantise.check(table)


def test_without_qwix_a_quantised_config_is_refused_and_others_run(monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)  # as if it were not installed
  with pytest.raises(ConfigError, match=r"model\.quantize needs qwix, which is not installed: pip install qwix"):
    quantise.check({"mlp/.*": "int8"})
  quantise.check({})
  kernels.matmul("md,df->mf", spread(2, 4), weight(spread(4, 3), ""))


# ---- training

STEPS = 60


def batches():
  """New sequences each step: nine tokens in ten are a function of the one before."""
  rng, batch = np.random.default_rng(0), ref.batch(full=True)
  follows = rng.permutation(ref.VOCAB)
  for _ in range(STEPS):
    tokens = rng.integers(0, ref.VOCAB, (8, 33)).astype(np.int32)
    for t in range(32):
      tokens[:, t + 1] = np.where(rng.random(8) < 0.9, follows[tokens[:, t]], tokens[:, t + 1])
    yield {**batch, "tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def losses(family, table):
  options = {"run.steps": STEPS, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 5, "loss.z_loss": 1e-4}
  program = ref.program({**ref.FAMILIES[family], **options}, model__quantize=table)
  state, train, out = ref.initial(program), program.train(), []
  for batch in batches():
    state, metrics = train(state, ref.place(program, batch))
    out.append(float(metrics["loss"]))
  return np.array(out)


def learns_like_float32(family, kinds):
  plain = losses(family, {})
  assert plain[:3].mean() > 4 and plain[-10:].mean() < 0.85, plain
  for kind in kinds:
    quantised = losses(family, {".*": kind})
    assert 0 < np.abs(quantised - plain).max() < 0.1, (kind, quantised - plain)
    assert np.abs(quantised - plain)[-10:].mean() < 0.01, (kind, quantised - plain)


def test_a_decoder_learns_in_int8_and_fp8_as_in_float32():
  learns_like_float32("dense", ["int8", "fp8"])


@pytest.mark.slow
@pytest.mark.parametrize("family, kinds", [("dense", ["int8_tensor", "fp8_tensor"]), ("moe", quantise.KINDS)])
def test_other_kinds_and_experts_learn_as_in_float32(family, kinds):
  learns_like_float32(family, kinds)


# ---- TPU programs

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROWS, WIDTH, OUT, EXPERTS = 512, 1024, 384, 4


def compiled():
  """Chip and kind -> dtypes of what the products of a dense and a grouped matmul read. In a process of its own."""
  from jax.experimental import topologies
  from jax.sharding import PartitionSpec

  from maxscale.perf.compiled import program
  from maxscale.sharding import context, mesh, rules

  def gradients(kind, x, w, experts, dy, sizes):
    dense = lambda x, w: kernels.matmul("md,df->mf", x, weight(w, kind, bf16))  # noqa: E731
    sparse = lambda x, w: grouped(x, weight(w, kind, bf16), sizes)  # noqa: E731
    pulled = [jax.vjp(f, x, v) for f, v in ((dense, w), (sparse, experts))]
    return [(y, pull(dy)) for y, pull in pulled]

  def read(p, step):
    """Dtypes of the operands of a product, which may be inside a fusion."""
    i, where = step.instruction, step.computation
    for name in p.matmuls.intersection(i.called.get("calls", ())):
      i, where = next(c for c in p.computations[name] if c.opcode in ("convolution", "dot")), name
    return "*".join(
      p.definitions[where][o].type.strip().split("[")[0] for o in i.operands[-2:]
    )  # of a kernel: the last

  jax.config.update("jax_exec_time_optimization_effort", -1.0)  # three times faster; the schedule is not looked at
  out = {}
  for chip, topology in TOPOLOGIES.items():
    c = ref.config(ref.DENSE, mesh__fsdp=1)
    shape, one = mesh.for_config(c, topologies.get_topology_desc(topology, "tpu").devices[:1])
    table = rules.make(c.sharding, shape.sizes, shape.slices)
    shapes = [(ROWS, WIDTH), (WIDTH, OUT), (EXPERTS, WIDTH, OUT), (ROWS, OUT)]
    arrays = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, (bf16, f32, f32, bf16))]
    for kind in ("int8", "fp8_tensor"):
      f = context.on_mesh(lambda *a, k=kind: gradients(k, *a), one, table, PartitionSpec(), PartitionSpec())
      lowered = jax.jit(f).lower(*arrays, jax.ShapeDtypeStruct((EXPERTS,), jnp.int32))
      p = program.read(lowered.compile().as_text() or "")
      found = [(p.kind(s.instruction), read(p, s)) for s in p.steps() if s.instruction.operands]
      out[f"{chip} {kind}"] = {
        k: sorted(r for kind, r in found if kind == k and "*" in r) for k in ("matmul", "kernel")
      }
  return out


@pytest.fixture(scope="module")
def tpu():
  pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  out = subprocess.run([sys.executable, "-m", "tests.models.test_quantise"], capture_output=True, text=True, env=env,
                       cwd=ROOT, timeout=600)  # fmt: skip
  assert out.returncode == 0, out.stderr[-3000:]
  return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_a_tpu_multiplies_what_was_quantised(tpu, chip):
  """A dense product reads 8 bits on every chip; the kernel of a grouped one only where the chip multiplies them."""
  int8, fp8 = tpu[f"{chip} int8"], tpu[f"{chip} fp8_tensor"]
  assert int8["matmul"] == ["bf16*bf16", "s8*s8", "s8*s8"]  # dw, y and dx of the dense one
  e4m3, e5m2 = "f8e4m3fn", "f8e5m2"
  assert fp8["matmul"] == [f"{e4m3}*{e4m3}", f"{e4m3}*{e5m2}", f"{e5m2}*{e4m3}"]
  dw, emulated = "bf16*bf16", ["f32*f32", "f32*f32"]
  assert int8["kernel"] == [dw, *(emulated if chip == "tpu7x" else ["s8*s8", "s8*s8"])]
  assert fp8["kernel"] == [dw, *([f"{e4m3}*{e4m3}", f"{e5m2}*{e4m3}"] if chip == "tpu7x" else emulated)]


if __name__ == "__main__":
  print(json.dumps(compiled()))
