"""Products in int8 and fp8: operands are quantised at each use (by qwix) and summed wide; masters stay float32.

A scale belongs to a row of x, to an output channel of w, and likewise of dy: to an index of all dimensions that the
product keeps. With kinds `*_tensor` it belongs to the whole array.

  kind  x and w  dx                            dw
  int8  int8     int8 dy times forward's w     x times dy, not quantised: it sums over so many tokens that rounding
                                               tells (SwitchBack: Wortsman et al., arXiv 2304.13013)
  fp8   e4m3     e5m2 dy times forward's w     e5m2 dy times forward's x (Micikevicius et al., arXiv 2209.05433)

Rounding is to the nearest, and gradients pass it as if it were not there (straight-through); so is qwix's quantised
training with `bwd_qtype`. What has no unit for a dtype emulates it, slowly: fp8 before TPU7x, int8 on TPU7x.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.config import ConfigError

# (einsum of two operands, left, right, dtype of the result) -> product; kernels.py has one dense and one grouped
Multiply = Callable[[str, jax.Array, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Kind:
  """How the products of a weight are quantised.

  Attributes:
    forward: dtype of x and w.
    dx, dw: dtype of dy in the product for dx and in that for dw; "": that product is not quantised.
    sums: dtype of the sums.
    channels: a scale for each row and channel, not one for the array.
  """

  forward: str
  dx: str
  dw: str
  sums: str
  channels: bool


KINDS = {
  "int8": Kind("int8", "int8", "", "int32", True),
  "int8_tensor": Kind("int8", "int8", "", "int32", False),
  "fp8": Kind("float8_e4m3fn", "float8_e5m2", "float8_e5m2", "float32", True),
  "fp8_tensor": Kind("float8_e4m3fn", "float8_e5m2", "float8_e5m2", "float32", False),
}


# ---- which weights


def check(table: Mapping[str, str]) -> None:
  """Refuses a `model.quantize` that cannot run.

  Raises:
    ConfigError: a pattern or a kind is wrong, or qwix is not installed.
  """
  for pattern, kind in table.items():
    if kind not in list(KINDS):
      raise ConfigError(f"model.quantize: {pattern!r} has the kind {kind!r}, which is not one of {', '.join(KINDS)}")
    try:
      re.compile(pattern)
    except re.error as e:
      raise ConfigError(f"model.quantize: {pattern!r} is not a regular expression: {e}") from None
  if table:
    _qwix()


def rule(table: Mapping[str, str], name: str) -> str:
  """The kind of the first pattern that matches the whole name ("attention/query"); "" for none.

  A router is never quantised, whatever the table says: its float32 logits decide who computes a token.
  """
  if name.endswith("/router"):
    return ""
  return next((kind for pattern, kind in table.items() if re.fullmatch(pattern, name)), "")


def _qwix() -> Any:
  try:
    import qwix  # late: most runs do without
  except ImportError:
    raise ConfigError("model.quantize needs qwix, which is not installed: pip install qwix") from None
  return qwix


# ---- products


def letters(spec: str) -> tuple[str, str, str]:
  """The dimensions of both operands and of the result of an einsum: "md,df->mf" has md, df and mf."""
  operands, result = spec.split("->")
  left, right = operands.split(",")
  return left, right, result


def product(kind: str, spec: str, x: jax.Array, w: jax.Array, multiply: Multiply) -> jax.Array:
  """einsum(spec, x, w) of the quantised operands, in float32.

  A device quantises what it holds. Where a dimension that is summed over is split, its partial product has scales of
  its own; rescaled, it is a term of the sum like any other, so no scale crosses devices. Layouts then round
  differently: "one loss, any layout" holds up to the quantisation error.
  """
  k, (a, b, y) = KINDS[kind], letters(spec)
  x_q, w_q = _quantised(x, a, y, k.forward, k.channels), _quantised(w, b, y, k.forward, k.channels)
  return multiply(spec, x_q.qvalue, w_q.qvalue, k.sums) * _along(x_q.scale, a, y) * _along(w_q.scale, b, y)


# Backward uses the quantised operand of forward once more. Its scales lie along dimensions that are now summed over, so
# they go into dy before that is quantised.


def input_gradient(kind: str, spec: str, dy: jax.Array, w: jax.Array, multiply: Multiply) -> jax.Array:
  """dx of `product`, in float32."""
  k, (a, b, y) = KINDS[kind], letters(spec)
  w_q = _quantised(w, b, y, k.forward, k.channels)
  dy_q = _quantised(dy * _along(w_q.scale, b, y), y, a, k.dx, k.channels)
  return multiply(f"{y},{b}->{a}", dy_q.qvalue, w_q.qvalue, k.sums) * _along(dy_q.scale, y, a)


def weight_gradient(kind: str, spec: str, x: jax.Array, dy: jax.Array, multiply: Multiply) -> jax.Array:
  """dw of `product`, in float32, for kinds that quantise it."""
  k, (a, b, y) = KINDS[kind], letters(spec)
  x_q = _quantised(x, a, y, k.forward, k.channels)
  dy_q = _quantised(dy * _along(x_q.scale, a, y), y, b, k.dw, k.channels)
  return multiply(f"{a},{y}->{b}", x_q.qvalue, dy_q.qvalue, k.sums) * _along(dy_q.scale, y, b)


def _quantised(x: jax.Array, dims: str, kept: str, dtype: str, channels: bool) -> Any:
  """x, with these dimensions, as a qwix.QArray, with a scale for each index of those that a product keeps.

  In float32 even where x is bfloat16, whose quotients would be rounded twice; a TPU is no slower at it.
  """
  axes = [i for i, letter in enumerate(dims) if channels and letter in kept]
  return _qwix().quantize(x.astype(jnp.float32), dtype, channelwise_axes=axes)


def _along(scale: jax.Array, dims: str, of: str) -> jax.Array:
  """Scales of an array with these dimensions, in the places of those of another; they are 1 long where it has none."""
  shared = "".join(letter for letter in of if letter in dims)
  scale = jnp.einsum(f"{dims}->{shared}", scale)
  return jnp.expand_dims(scale, [i for i, letter in enumerate(of) if letter not in dims])
