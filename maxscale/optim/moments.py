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


def view(spec: ParamSpec, dtype: str) -> tuple[ParamSpec, int]:
  """A matrix as its update is computed, and the dimension of it that has one scale: int8 cuts a dimension into blocks.

  That is never the last one: cut there, an array has another layout on a TPU, and each step would copy it. Where no
  other is a multiple of BLOCK, a row of the last one is a block. None of these is padded.
  """
  d = dimensions(spec)
  for dim in (*d.inputs, *d.outputs)[:-1] if dtype == "int8" and d.is_matrix else ():
    if spec.logical[dim] % BLOCK == 0 and spec.names[dim] not in ("vocab", "heads", "kv_heads"):
      cut = lambda values, *new: (*values[:dim], *new, *values[dim + 1 :])  # noqa: B023, E731
      shape = cut(spec.shape, spec.shape[dim] // BLOCK, BLOCK)
      logical = cut(spec.logical, spec.logical[dim] // BLOCK, BLOCK)
      return dataclasses.replace(
        spec, shape=shape, logical=logical, names=cut(spec.names, spec.names[dim], None)
      ), dim + 1
  return spec, len(spec.shape) - 1


def specs(moment: ParamSpec, dtype: str, rules: Rules | None) -> list[ParamSpec]:
  """The arrays that are stored of a moment, which the spec describes as float32; int8 has scales, too.

  Blocks are split like the dimension that they are of, where they divide, which the rules say.
  """
  if dtype != "int8":
    return [dataclasses.replace(moment, dtype=dtype)]
  blocks, inner = view(moment, dtype)
  split = lambda name, n: name if name and rules and n % rules.factor(name, "state") == 0 else None  # noqa: E731
  names = tuple(map(split, blocks.names, blocks.shape))
  kind, _, path = moment.path.partition("/")
  drop = lambda values: values[:inner] + values[inner + 1 :]  # noqa: E731
  scale = dataclasses.replace(
    moment, path=f"{kind}_scale/{path}", shape=drop(blocks.shape), logical=drop(blocks.logical), names=drop(names)
  )
  return [dataclasses.replace(moment, dtype="int8" if _signed(moment) else "uint8"), scale]


def enter(spec: ParamSpec, dtype: str, x: jax.Array) -> jax.Array:
  """An array of the spec's shape in the shape of `view`."""
  shape = view(spec, dtype)[0].shape
  # Without the barriers the compiler moves reshapes into the update, which for a TPU is then no longer one operation.
  return x if shape == spec.shape else jax.lax.optimization_barrier(x.reshape(shape))


def leave(spec: ParamSpec, x: jax.Array) -> jax.Array:
  """The inverse of `enter`."""
  return x if x.shape == spec.shape else jax.lax.optimization_barrier(x).reshape(spec.shape)


def encode(moment: ParamSpec, dtype: str, x: jax.Array, seed: int, step: jax.Array) -> list[jax.Array]:
  """A float32 moment, as in `view`, as the arrays of `specs`. Rounding depends on (seed, path, layer, place, step)."""
  if dtype == moment.dtype:
    return [x]
  blocks, inner = view(moment, dtype)
  random = _random(blocks, seed, step)
  if dtype == "bfloat16":
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (random >> 16)
    return [jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)]
  top, absolute = _top(moment), jnp.abs(x)
  scale = absolute.max(inner, keepdims=True)
  share = absolute / jnp.where(scale > 0, scale, 1)
  low = jnp.clip(jnp.floor(top + STEPS * jnp.log2(share)), 0, top - 1)
  up = (share - _value(low, top)) / (_value(low + 1, top) - _value(low, top))
  code = low + ((random >> 8).astype(jnp.float32) * 2.0**-24 < up)
  code = jnp.copysign(code, x).astype(jnp.int8) if _signed(moment) else jnp.maximum(code, share > 0).astype(jnp.uint8)
  return [leave(moment, code), scale.squeeze(inner)]


def decode(moment: ParamSpec, dtype: str, arrays: list[jax.Array]) -> jax.Array:
  """The inverse of `encode`, in float32."""
  if dtype != "int8":
    return arrays[0].astype(moment.dtype)
  _, inner = view(moment, dtype)
  code = enter(moment, dtype, arrays[0]).astype(jnp.float32)
  return jnp.copysign(_value(jnp.abs(code), _top(moment)) * jnp.expand_dims(arrays[1], inner), code)


def _signed(moment: ParamSpec) -> bool:
  return not moment.path.startswith("nu/")


def _top(moment: ParamSpec) -> int:
  return 127 if _signed(moment) else 255


def _value(code: jax.Array, top: int) -> jax.Array:
  """What a code is of its scale."""
  return jnp.where(code > 0, jnp.exp2((code - top) / STEPS), 0)


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
