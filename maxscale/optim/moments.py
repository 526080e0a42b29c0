"""Moments in less than float32: what is stored of one, and the way there and back.

Both kinds are rounded at random, up or down with the probabilities that make the mean right. An average
b2 * v + (1 - b2) * g**2 moves by less than half of a step of bfloat16 or of 8 bits: rounded to the nearest it would not
move at all (Zamirai et al., arXiv 2010.06192; Xu et al., arXiv 2505.00347).

int8: blocks of a matrix have a float32 scale, their largest absolute value (Dettmers et al., arXiv 2110.02861). The
share that a value is of it becomes a small float, 3 bits of mantissa behind 4 bits of exponent for first moments, which
have a sign, and 5 for second moments: relative steps of 1/8 to 1/16, about the logarithmic code that Xu et al. find
right for second moments. An offset, the smallest of these floats, makes zero one of them. A second moment that is not
zero never becomes zero, which would divide an update (Li et al., arXiv 2309.01507).
"""

from __future__ import annotations

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp

from maxscale.models.module import ParamSpec
from maxscale.optim.matrices import dimensions
from maxscale.sharding.rules import Rules

BLOCK = 128
ONE = 0x3F8  # the upper 12 bits of 1.0 as a float32


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
  names, cut = list(blocks.names), inner - 1
  if blocks.shape != moment.shape and not (rules and blocks.shape[cut] % rules.factor(names[cut], "state") == 0):
    names[cut] = None
  drop = lambda values: (*values[:inner], *values[inner + 1 :])  # noqa: E731
  kind, _, path = moment.path.partition("/")
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
  absolute, first = jnp.abs(x), _first(moment)
  scale = absolute.max(inner, keepdims=True)
  share = absolute / jnp.where(scale > 0, scale, 1) + _float(first)
  code = (jax.lax.bitcast_convert_type(share, jnp.uint32) + (random >> 12) >> 20).astype(jnp.int32) - first
  code = jnp.minimum(code, ONE - first)
  code = jnp.where(x < 0, -code, code) if _signed(moment) else jnp.maximum(code, x > 0)
  code = code.astype("int8" if _signed(moment) else "uint8")
  return [leave(moment, code), scale.squeeze(inner)]


def decode(moment: ParamSpec, dtype: str, arrays: list[jax.Array]) -> jax.Array:
  """The inverse of `encode`, in float32."""
  if dtype != "int8":
    return arrays[0].astype(moment.dtype)
  code, first = enter(moment, dtype, arrays[0]).astype(jnp.int32), _first(moment)
  share = _float(jnp.abs(code) + first) - _float(first)
  return jnp.sign(code) * share * jnp.expand_dims(arrays[1], view(moment, dtype)[1])


def _signed(moment: ParamSpec) -> bool:
  return not moment.path.startswith("nu/")


def _first(moment: ParamSpec) -> int:
  """The upper 12 bits of the float32 that code 0 is."""
  return ONE - (127 if _signed(moment) else 255)


def _float(upper: jax.Array | int) -> jax.Array:
  """The float32 with these upper 12 bits (sign, exponent and 3 bits of the mantissa), the others zero."""
  return jax.lax.bitcast_convert_type(jnp.int32(upper) << 20, jnp.float32)


def _random(moment: ParamSpec, seed: int, step: jax.Array) -> jax.Array:
  """uint32 of the moment's shape: the same for an element whatever the stacking, sharding and padding.

  Hashes of hashes: far cheaper than JAX's generator, and one operation with the rest of the update.
  """
  lead, shape = int(bool(moment.rows)), moment.shape
  word = _mix(jnp.uint32(zlib.crc32(f"{seed}/{moment.path}".encode())) + step.astype(jnp.uint32))
  place = _mix(word + jnp.asarray(moment.rows or (0,), jnp.uint32)).reshape(-1, *[1] * (len(shape) - 1))
  for dim in range(lead, len(shape)):
    stride = math.prod(moment.logical[dim + 1 :]) * 0x9E3779B1 % 2**32
    place += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
  return _mix(place)


def _mix(word: jax.Array) -> jax.Array:
  """MurmurHash3's finaliser of uint32, in which every bit depends on every other."""
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> 16)
