"""Moments in less than float32: what is stored of one, and the way there and back.

Both kinds are rounded at random, up or down with the probabilities that make the mean right. An average
b2 * v + (1 - b2) * g**2 moves by less than half of a step of bfloat16 or of 8 bits: rounded to the nearest it would not
move at all (Zamirai et al., arXiv 2010.06192; Xu et al., arXiv 2505.00347).

int8: blocks of the last dimension (Dettmers et al., arXiv 2110.02861) have a float32 scale, the largest absolute value,
and codes on a logarithmic scale of 8 steps to a factor of two (Xu et al.): code c is scale * 2**((c - top) / 8). First
moments have a sign and 127 codes; second moments have 255, and none that is not zero becomes zero, by which an update
would be divided (Li et al., arXiv 2309.01507): what is below the last code becomes that code.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from maxscale.models.module import ParamSpec, path_key
from maxscale.optim.matrices import dimensions
from maxscale.sharding.rules import Rules

BLOCK = 128
STEPS = 8  # codes to a factor of two


def specs(moment: ParamSpec, dtype: str, rules: Rules | None) -> list[ParamSpec]:
  """The arrays that are stored of a moment, which the spec describes as float32; int8 has scales, too.

  Scales are split like the moment where they divide, which the rules say.
  """
  if dtype != "int8":
    return [dataclasses.replace(moment, dtype=dtype)]
  dim, blocks = _blocks(moment)
  divides = rules is not None and blocks % rules.factor(moment.names[dim], "state") == 0
  put = lambda values, value: (*values[:dim], value, *values[dim + 1 :])  # noqa: E731
  kind, _, path = moment.path.partition("/")
  scale = dataclasses.replace(
    moment, path=f"{kind}_scale/{path}", shape=put(moment.shape, blocks), logical=put(moment.logical, blocks),
    names=put(moment.names, moment.names[dim] if divides else None),
  )  # fmt: skip
  return [dataclasses.replace(moment, dtype="int8" if _signed(moment) else "uint8"), scale]


def encode(moment: ParamSpec, dtype: str, x: jax.Array, seed: int, step: jax.Array) -> list[jax.Array]:
  """A float32 moment as the arrays of `specs`. Rounding depends on (seed, path, layer, position, step) alone."""
  if dtype == moment.dtype:
    return [x]
  random = _random(moment, seed, step)
  if dtype == "bfloat16":
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (random >> 16)
    return [jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)]
  dim, blocks = _blocks(moment)
  split = lambda x: x.reshape(*x.shape[:dim], blocks, -1, *x.shape[dim + 1 :])  # noqa: E731
  top, absolute = _top(moment), split(jnp.abs(x))
  scale = absolute.max(dim + 1)
  share = absolute / jnp.expand_dims(jnp.where(scale > 0, scale, 1), dim + 1)
  low = jnp.clip(jnp.floor(top + STEPS * jnp.log2(share)), 0, top - 1)
  up = (share - _value(low, top)) / (_value(low + 1, top) - _value(low, top))
  code = low + (split((random >> 8).astype(jnp.float32) * 2.0**-24) < up)
  if not _signed(moment):
    return [jnp.maximum(code, share > 0).reshape(x.shape).astype(jnp.uint8), scale]
  return [jnp.copysign(code.reshape(x.shape), x).astype(jnp.int8), scale]


def decode(moment: ParamSpec, dtype: str, arrays: list[jax.Array]) -> jax.Array:
  """The inverse of `encode`, in float32."""
  if dtype != "int8":
    return arrays[0].astype(moment.dtype)
  code, scale = arrays[0].astype(jnp.float32), arrays[1]
  dim, blocks = _blocks(moment)
  scale = jnp.repeat(scale, code.shape[dim] // blocks, dim)
  return jnp.copysign(_value(jnp.abs(code), _top(moment)) * scale, code)


def _signed(moment: ParamSpec) -> bool:
  return not moment.path.startswith("nu/")


def _top(moment: ParamSpec) -> int:
  return 127 if _signed(moment) else 255


def _value(code: jax.Array, top: int) -> jax.Array:
  """What a code is of its scale."""
  return jnp.where(code > 0, jnp.exp2((code - top) / STEPS), 0)


def _blocks(moment: ParamSpec) -> tuple[int, int]:
  """The dimension of a matrix that is cut into blocks, and how many.

  It is never the last one: cut there, an array has another layout on a TPU, and each step would copy it. Where no
  other is a multiple of BLOCK, the last one is a single block. The rest has no padding.
  """
  d = dimensions(moment)
  for dim in (*d.inputs, *d.outputs)[:-1]:
    if moment.logical[dim] % BLOCK == 0 and moment.names[dim] not in ("vocab", "heads", "kv_heads"):
      return dim, moment.logical[dim] // BLOCK
  return len(moment.shape) - 1, 1


def _random(moment: ParamSpec, seed: int, step: jax.Array) -> jax.Array:
  """uint32 of the moment's shape: the same for an element whatever the stacking, sharding and padding."""
  key = jax.random.fold_in(path_key(seed, moment.path), step)
  lead = int(bool(moment.rows))
  salt = jax.vmap(lambda layer: jax.random.bits(jax.random.fold_in(key, layer)))(jnp.asarray(moment.rows or (0,)))
  place = salt.reshape(-1, *[1] * (len(moment.shape) - lead)) if lead else salt.reshape([1] * len(moment.shape))
  for dim in range(lead, len(moment.shape)):
    stride = math.prod(moment.logical[dim + 1 :]) * 0x9E3779B1 % 2**32
    place += jax.lax.broadcasted_iota(jnp.uint32, moment.shape, dim) * jnp.uint32(stride)
  # MurmurHash3's finaliser: a far cheaper generator than JAX's, and one operation with the rest of the update
  place = (place ^ (place >> 16)) * jnp.uint32(0x85EBCA6B)
  place = (place ^ (place >> 13)) * jnp.uint32(0xC2B2AE35)
  return place ^ (place >> 16)
