"""What an MLP does between its products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),  # JAX's has erfc, which kernels for TPU have not
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al., arXiv 2109.08668
}
LIMIT, ALPHA = 7.0, 1.702  # of the clamped SwiGLU


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))  # backward needs no more than the inputs
def hidden(kind: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
  """act(gate) * up (Shazeer, arXiv 2002.05202), or act(up) without a gate, in float32 between inputs and result.

  Args:
    kind: `model.activation`. `clamped_swiglu` is gpt-oss's: (up + 1) * gate * sigmoid(1.702 * gate), the gate at most
      7, up within +-7.
    gate, up: [..., F].

  Returns:
    [..., F] in the dtype of up.
  """
  return wide(kind, *(v.astype(jnp.float32) for v in (gate, up) if v is not None)).astype(up.dtype)


def wide(kind: str, *inputs: jax.Array) -> jax.Array:
  """`hidden` of (gate, up), or (up,), in float32."""
  *gate, up = inputs
  if kind == "clamped_swiglu":
    g = jnp.minimum(gate[0], LIMIT)  # config.check has seen to it that there is one
    return (jnp.clip(up, -LIMIT, LIMIT) + 1) * g * jax.nn.sigmoid(ALPHA * g)
  return ACTIVATIONS[kind](gate[0]) * up if gate else ACTIVATIONS[kind](up)
