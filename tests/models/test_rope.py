"""Rotary embeddings: frequencies as transformers has them, the rotation and its gradient, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.config import ConfigError
from maxscale.models import rope

LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
CASES = {
  "none": (10000.0, 64, {}),
  "linear": (1e6, 128, {"type": "linear", "factor": 8.0}),
  "Llama 3.1": (5e5, 128, LLAMA3),
  "Llama 3.2, small heads": (5e5, 8, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64}),
  "yarn": (1e6, 128, {**YARN, "factor": 4.0, "original_max_position_embeddings": 32768}),
  "DeepSeek-V3": (10000.0, 64, {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}),
  "DeepSeek, two different mscale": (10000.0, 64, {**YARN, "mscale": 1.5, "mscale_all_dim": 0.707}),
  "gpt-oss": (150000.0, 64, {**YARN, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}),
  "Kimi K2": (50000.0, 64, {**YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
  "one bound": (50000.0, 64, {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}),
  "its own factor": (10000.0, 64, {**YARN, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2}),
  "bounds of yarn at the ends": (10000.0, 8, {**YARN, "original_max_position_embeddings": 16}),
}  # fmt: skip


def transformers_config(theta, dim, scaling):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  pytest.importorskip("torch", reason="torch is not installed")
  parameters = {"rope_theta": theta, "rope_type": scaling.get("type", "default")}
  parameters |= {key: value for key, value in scaling.items() if key != "type"}
  return transformers.DeepseekV3Config(
    hidden_size=4 * dim, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1, qk_rope_head_dim=dim,
    max_position_embeddings=1 << 16, rope_parameters=parameters,
  )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factors_are_those_of_transformers(name):
  theta, dim, scaling = CASES[name]
  config = transformers_config(theta, dim, scaling)
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

  expected = modeling.DeepseekV3RotaryEmbedding(config)
  found, factor = rope.frequencies(theta, dim, scaling)
  assert found.dtype == np.float32 and found.shape == (dim // 2,)
  np.testing.assert_allclose(found, expected.inv_freq.numpy(), rtol=1e-6, atol=0)
  assert factor == pytest.approx(expected.attention_scaling, rel=1e-7)
  logit_factor = modeling.yarn_apply_mscale(config.rope_parameters, 1.0)
  assert rope.logit_factor(scaling) == pytest.approx(logit_factor, rel=1e-7)
  rope.check(scaling)


def test_every_scaling_changes_something():
  plain = rope.frequencies(10000.0, 64, {})[0]
  for _, _, scaling in CASES.values():
    found = rope.frequencies(10000.0, 64, scaling)[0]
    assert bool(scaling) == bool(np.any(found != plain))
  assert rope.logit_factor(CASES["DeepSeek-V3"][2]) == pytest.approx((0.1 * math.log(40) + 1) ** 2)


def test_rotation_is_a_product_of_complex_numbers_and_so_is_its_gradient():
  rng = np.random.default_rng(0)
  x, dy = rng.standard_normal((2, 3, 5, 4, 8)).astype(np.float32)
  positions = rng.integers(0, 1000, (3, 5)).astype(np.int32)
  frequencies, factor = rope.frequencies(10000.0, 8, {"type": "linear", "factor": 3.0})[0], 1.5
  y, vjp = jax.vjp(lambda x: rope.rotate(x, jnp.asarray(positions), frequencies, factor), x)
  turn = factor * np.exp(1j * positions[..., None, None] * np.float64(frequencies))
  halves = lambda z: z[..., :4] + 1j * z[..., 4:]  # noqa: E731
  np.testing.assert_allclose(halves(np.asarray(y)), halves(x) * turn, atol=2e-4)  # float32 angles of up to 333
  np.testing.assert_allclose(halves(np.asarray(vjp(dy)[0])), halves(dy) * turn.conj(), atol=2e-4)
  low = rope.rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions), frequencies, factor)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(low), y, atol=0.1)


def test_the_dimensions_before_those_that_turn_stay():
  rng = np.random.default_rng(0)
  x, dy = rng.standard_normal((2, 3, 5, 4, 14)).astype(np.float32)
  positions, frequencies = jnp.asarray(rng.integers(0, 99, (3, 5))), rope.frequencies(10000.0, 8, {})[0]
  rotate = lambda x: rope.rotate(x, positions, frequencies, 1.5)  # noqa: E731
  (y, vjp), (last, last_vjp) = jax.vjp(rotate, x), jax.vjp(rotate, x[..., 6:])
  for whole, part, still in ((y, last, x), (vjp(dy)[0], last_vjp(dy[..., 6:])[0], dy)):
    np.testing.assert_array_equal(whole[..., 6:], part)
    np.testing.assert_array_equal(whole[..., :6], still[..., :6])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_that_swaps_pairs_is_exact(dtype):
  """Against slices and a concatenation, to the bit."""
  x = jax.random.normal(jax.random.key(0), (2, 16, 4, 64)).astype(dtype)
  positions, frequencies = jnp.tile(jnp.arange(16), (2, 1)), rope.frequencies(10000.0, 64, {})[0]

  def plain(x):
    angle = positions[..., None, None] * frequencies
    (a, b), sin, cos = jnp.split(x.astype(jnp.float32), 2, axis=-1), jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

  for f in (lambda f: f, lambda f: jax.grad(lambda x: (f(x).astype(jnp.float32) * jnp.arange(64)).sum())):
    np.testing.assert_array_equal(
      jax.jit(f(lambda x: rope.rotate(x, positions, frequencies)))(x).astype(jnp.float32),
      jax.jit(f(plain))(x).astype(jnp.float32),
    )


@pytest.mark.parametrize(
  ("scaling", "message"),
  [
    ({"factor": 2.0}, "type=None is not one of linear, llama3, yarn"),
    ({"type": "yran", "factor": 2.0}, "did you mean 'yarn'"),
    ({"type": "linear"}, "has no factor"),
    ({"type": "linear", "factor": 2.0, "beta_fast": 32}, "unknown key 'beta_fast'"),
    ({**YARN, "beta_fsat": 16}, "did you mean 'beta_fast'"),
    ({"type": "yarn", "factor": 2.0}, "has no original_max_position_embeddings"),
    ({**YARN, "factor": 0}, "factor=0 must be a number above 0"),
    ({**YARN, "attention_factor": None}, "attention_factor=None must be a number"),
    ({**YARN, "truncate": 1}, "truncate=1 must be true or false"),
    ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_slow=2 must not be above beta_fast=1"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
  ],
)
def test_what_is_wrong_is_named(scaling, message):
  with pytest.raises(ConfigError, match=r"^model\.rope_scaling") as error:
    rope.check(scaling)
  assert message in str(error.value)
