"""Moments in bfloat16 and int8: what rounding does to a number, to zeros, to averages; and that it knows no layout."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxscale.models.module import ParamSpec
from maxscale.optim import moments
from tests.optim import trees

FIRST, SECOND = "mu/layers/w", "nu/layers/w"


def spec(path, shape, names=("layers", "embed", "mlp"), rows=(0, 1), logical=()):
  return ParamSpec(path, shape, logical or shape, names, "float32", 1.0, rows)


def there(moment, dtype, x, step=0):
  """The stored arrays of x, numpy."""
  x = moments.enter(moment, dtype, jnp.asarray(x, jnp.float32))
  return [np.asarray(a) for a in moments.encode(moment, dtype, x, 0, jnp.int32(step))]


def back(moment, dtype, arrays):
  x = moments.decode(moment, dtype, [jnp.asarray(a) for a in arrays])
  return np.asarray(moments.leave(moment, x))


def rounded(moment, dtype, x, steps=1):
  """x after the way there and back, at each of some steps."""
  f = jax.jit(lambda x, i: moments.decode(
    moment, dtype, moments.encode(moment, dtype, moments.enter(moment, dtype, x), 0, i)))  # fmt: skip
  return np.stack([f(jnp.asarray(x, jnp.float32), i).reshape(moment.shape) for i in range(steps)])


def wide(path, shape, octaves, seed=0):
  """Numbers over many powers of two."""
  rng = np.random.default_rng(seed)
  x = 2.0 ** rng.uniform(-octaves, 0, shape)
  return np.float32(x if path.startswith("nu") else x * rng.choice([-1, 1], shape))


# ---- one number


@pytest.mark.parametrize("path", [FIRST, SECOND])
def test_int8_is_a_float_of_three_bits_and_a_scale_for_each_128(path):
  """Decoded by hand: code 0 is 0, and code c is (1 + m/8) * 2**e less that of code 0, of the scale."""
  moment = spec(path, (2, 256, 3))
  x = wide(path, moment.shape, 12)
  code, scale = there(moment, "int8", x)
  assert (code.dtype, scale.dtype) == (np.uint8 if path == SECOND else np.int8, np.float32)
  assert (code.shape, scale.shape) == ((2, 256, 3), (2, 2, 3))
  np.testing.assert_array_equal(scale, np.abs(x).reshape(2, 2, 128, 3).max(2))
  top = 255 if path == SECOND else 127
  assert np.abs(np.int32(code)).max() == top, "the largest of a block has the last code"
  upper = np.abs(np.int32(code)) + 127 * 8 - top  # the exponent of float32 and three bits
  small = lambda upper: (1 + upper % 8 / 8) * 2.0 ** (upper // 8 - 127)  # noqa: E731
  want = np.sign(code) * (small(upper) - small(127 * 8 - top)) * np.repeat(scale, 128, 1)
  np.testing.assert_allclose(back(moment, "int8", [code, scale]), want, rtol=1e-5)
  assert (np.sign(want) == np.sign(x)).all()
  assert np.abs(want / x - 1).max() <= 1 / 8 + 1e-2


@pytest.mark.parametrize(("path", "octaves"), [(FIRST, 20), (SECOND, 30)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounding_is_right_on_average(path, octaves, dtype):
  """Also for numbers far below the largest of their block."""
  moment, steps = spec(path, (2, 128, 2)), 400
  x = wide(path, moment.shape, octaves)
  got = rounded(moment, dtype, x, steps)
  offset = 1.125 * 2.0 ** (-16 if path == FIRST else -32)  # of the largest, which is about 1
  step = np.abs(x) / 128 if dtype == "bfloat16" else (np.abs(x) + offset) / 8  # between two codes
  assert (np.abs(got - x) <= 1.01 * step).all()
  assert (np.abs(got.mean(0) - x) < 5 * step / 2 / steps**0.5).all()
  assert (got.std(0) > 0).mean() > 0.9, "it rounds both ways"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("path", [FIRST, SECOND])
def test_zeros_stay_zeros(path, dtype):
  moment = spec(path, (2, 256, 4))
  x = wide(path, moment.shape, 4)
  x[0] = x[1, :, 2] = x[1, :128, 1] = x[1, 7] = 0
  for got in rounded(moment, dtype, x, 8):
    assert (got[x == 0] == 0).all() and (got[x != 0] != 0).all()


def test_a_second_moment_never_becomes_zero_nor_an_update_huge():
  """Adam divides by its root: next to a number 2**60 times as large, it is rounded up to 2**-35 of that."""
  moment = spec(SECOND, (2, 128, 2))
  x = np.full(moment.shape, 2.0**-60, np.float32)
  x[:, 5] = 1
  got = rounded(moment, "int8", x, 20)
  assert (got[:, x < 1] == np.float32(2.0**-35)).all()


# ---- blocks


@pytest.mark.parametrize(
  ("names", "shape", "codes", "scales"),
  [
    (("layers", "embed", "mlp"), (2, 256, 8), (2, 2, 128, 8), (2, 2, 8)),
    (("layers", "embed", "heads", "head_dim"), (2, 256, 128, 8), (2, 2, 128, 128, 8), (2, 2, 128, 8)),
    (("layers", "heads", "head_dim", "embed"), (2, 128, 128, 8), (2, 128, 1, 128, 8), (2, 128, 1, 8)),
    (("layers", "experts", "mlp", "embed"), (2, 128, 384, 8), (2, 128, 3, 128, 8), (2, 128, 3, 8)),
    (("layers", "embed", "mlp"), (2, 100, 256), (2, 100, 256), (2, 100)),
    (("vocab", "embed"), (256, 128), (256, 128), (256,)),
  ],
)
def test_blocks_are_of_a_dimension_without_padding_or_are_rows(names, shape, codes, scales):
  moment = spec(FIRST, shape, names, (0, 1) if names[0] == "layers" else ())
  blocks, _ = moments.view(moment, "int8")
  code, scale = moments.specs(moment, "int8", None)
  assert (blocks.shape, code.shape, scale.shape, scale.path) == (codes, shape, scales, "mu_scale/layers/w")
  for dtype in ("float32", "bfloat16"):
    assert moments.view(moment, dtype)[0] == moment and len(moments.specs(moment, dtype, None)) == 1


def test_scales_are_split_where_they_divide():
  for fsdp, names in ((2, ("layers", "embed", "mlp")), (4, ("layers", None, "mlp"))):  # two blocks
    rules = trees.rules.make(trees.ref.config({}).sharding, {**dict.fromkeys(trees.meshes.MESH_AXES, 1), "fsdp": fsdp})
    _, scale = moments.specs(spec(FIRST, (2, 256, 8)), "int8", rules)
    assert scale.names == names


# ---- layouts


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("path", [FIRST, SECOND])
def test_rounding_knows_neither_the_order_of_layers_nor_padding(path, dtype):
  rows = (2, 0, 3, 1)
  for names, logical in ((("layers", "heads", "head_dim", "embed"), (4, 3, 128, 5)),
                         (("layers", "embed", "heads", "head_dim"), (4, 128, 3, 5))):  # fmt: skip
    x, shape = wide(path, logical, 6), tuple(8 if name == "heads" else n for name, n in zip(names, logical))
    moment = spec(path, shape, names, rows, logical)
    want = there(spec(path, logical, names, (0, 1, 2, 3)), dtype, x, step=3)
    got = there(moment, dtype, np.pad(x[list(rows)], [(0, a - b) for a, b in zip(shape, logical)]), step=3)
    for stored, a, b in zip(moments.specs(moment, dtype, None), got, want):
      assert not trees.padding(a, stored).any()
      np.testing.assert_array_equal(trees.logical({path: a}, {path: stored})[path], b)


def test_rounding_differs_by_step_path_layer_and_place():
  moment = spec(SECOND, (2, 64, 64))
  x = np.full(moment.shape, 1 + 2**-8 / 3, np.float32)  # bfloat16 rounds a sixth of them up
  other = dataclasses.replace(moment, path="nu/layers/other")
  a, b, c = (there(m, "bfloat16", x, step)[0] > 1 for m, step in ((moment, 0), (moment, 1), (other, 0)))
  assert abs(a.mean() - 1 / 6) < 0.02
  independent = 2 * 1 / 6 * 5 / 6  # of two draws, how often they differ
  for mask in (a ^ b, a ^ c, a[0] ^ a[1], a[:, 1:] ^ a[:, :-1], a[:, :, 1:] ^ a[:, :, :-1]):
    assert abs(mask.mean() - independent) < 0.03


# ---- averages


def averaged(dtype, b2, squares, rounding=None):
  """b2 * v + (1 - b2) * squares, from 1, for 1500 steps in which v is kept in a dtype."""
  moment = spec(SECOND, (2, 128, 16))

  def body(step, v):
    v = b2 * v + (1 - b2) * squares
    if rounding:
      return rounding(v)
    return moments.decode(moment, dtype, moments.encode(moment, dtype, v, 0, step))

  start = moments.enter(moment, dtype, jnp.ones(moment.shape))
  return np.asarray(jax.jit(lambda v: jax.lax.fori_loop(0, 1500, body, v))(start))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_averages_follow_small_changes_of_a_slow_second_moment(dtype):
  """With b2 = 0.999 a step changes v by 0.1%, less than half of a step of bfloat16."""
  want = 0.5 + 0.5 * 0.999**1500
  got = averaged(dtype, 0.999, 0.5)
  assert abs(got.mean() / want - 1) < 0.01
  assert got.std() / want < (0.25 if dtype == "int8" else 0.05)
  nearest = averaged("float32", 0.999, 0.5, lambda v: v.astype(ml_dtypes.bfloat16).astype(jnp.float32))
  assert (nearest == 1).all(), "rounded to the nearest it would stand still"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_averages_of_noise_are_right(dtype):
  squares = jnp.asarray(np.random.default_rng(0).chisquare(1, (1, 2, 1, 128, 16)), jnp.float32)
  moment = spec(SECOND, (2, 128, 16))
  squares = squares.reshape(moments.view(moment, dtype)[0].shape)
  got, want = averaged(dtype, 0.99, squares), np.asarray(squares)
  assert abs((got / want).mean() - 1) < 0.02 and (got / want).std() < 0.3
