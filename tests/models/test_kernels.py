"""Every operation with a gradient of its own, against the plain one: values, gradients and their dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.models import kernels, loss, parts
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


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_parts_of_a_matmul_and_their_gradients(quantize):
  """Against slices of the product of the whole weight; zeros behind a part are zeros of the result."""
  if quantize:
    pytest.importorskip("qwix")
  spec, x, w = "btd,dnh->btnh", normal(2, 6, 16), normal(16, 3, 7, seed=1)
  made = lambda w: dataclasses.replace(weight(w), quantize=quantize)  # noqa: E731

  def parts(x, w):
    first, last = kernels.matmul_parts(spec, ((5, 3), (2, 0)), x, made(w))
    assert first.shape == (2, 6, 3, 8) and last.shape == (2, 6, 3, 2)
    return jnp.concatenate([first, last], -1)

  def plain(x, w):
    y = kernels.matmul(spec, x, made(w))
    return jnp.concatenate([y[..., :5], jnp.zeros_like(y[..., :3]), y[..., 5:]], -1)

  for a, b, what in zip(gradients(parts, x, w), gradients(plain, x, w), ("y", "dx", "dw")):
    # quantised, dy has a scale for each row of a part, not for each whole row
    ref.assert_close(a, b, 2e-2 if quantize and what == "dx" else 1e-6, what)


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
