"""Attention to a sequence that devices in a ring share: keys and values go around (Liu et al., arXiv 2310.01889).

Each device has two halves, low and high, of places in the balanced order of `maxscale.sharding.sequence`. At step j
device i has the keys of device (i - j) % parts, and two pairs of halves are to be computed whatever i is: its high
queries see all low keys; and its low queries see all low keys if these come from an earlier device, else its high
queries see all high keys. So all devices do the same work, and only step 0, on a device's own keys, has a causal mask.

What computes a pair is the caller's, `own` for step 0 (causal) and `rest` for the others (all is seen that has the same
segment):

  forward: f(queries, keys) -> output [b, n, t, h], log of the sum of exponentials [b, n, t] in float32
  backward: f(queries, keys) -> dq, dk, dv

Queries are (q, segments), for backward (q, segments, output, log-sum-exp, gradient of the output), where output and
log-sum-exp are those of the whole sequence. Keys are (k, v, segments).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.sharding import context as sharding

HIDDEN = -1e30  # logit of a key that a query does not see: finite, so that no difference of two is NaN


def forward(own: Callable, rest: Callable, axes: tuple[str, ...], parts: int, queries: Any, keys: Any) -> Any:
  """(output [b, n, t, h], log-sum-exp [b, n, t]) in float32, of all keys, inside a manual shard_map.

  Args:
    own, rest: what computes a pair, see above.
    axes: mesh axes of the ring. parts: its devices, at least 2.
    queries: (q [b, n, t, h], segments int32 [b, t]). keys: (k, v [b, k, t, h], segments), this device's.
  """
  send, halves = functools.partial(sharding.around, axes=axes, step=1), _halves(queries)

  def step(so_far: Any, keys: Any, arriving: Any, j: Any) -> Any:
    half = _half(axes, j)
    always = rest(_take(1, halves), _take(0, keys))
    other = rest(_take(half, halves), _take(half, keys))
    # The compiler does not know what a kernel costs, and would hide what is sent behind the sums below instead.
    always, other, arriving = jax.lax.optimization_barrier((always, other, arriving))
    return _merge(_merge(so_far, always, 1), other, half), arriving

  first = own(queries, keys)
  (o, lse), arriving = jax.lax.optimization_barrier((first, send(_halves(keys))))
  (so_far, keys), _ = jax.lax.scan(
    lambda carry, j: (step(*carry, send(carry[1]), j), None),
    (_halves((o.astype(jnp.float32), lse)), arriving),
    jnp.arange(1, parts - 1),
  )
  (o, lse), _ = step(so_far, keys, None, parts - 1)  # these keys go no further
  return _whole(o), _whole(lse)


def backward(own: Callable, rest: Callable, axes: tuple[str, ...], parts: int, queries: Any, keys: Any) -> Any:
  """dq, dk, dv in float32, of this device's queries and keys; see `forward`."""
  send, halves = functools.partial(sharding.around, axes=axes, step=1), _halves(queries)

  def step(gradients: Any, keys: Any, arriving: Any, j: Any) -> Any:
    half, (dq, *dkv) = _half(axes, j), gradients
    dkv = send(dkv)  # follow their keys
    always = rest(_take(1, halves), _take(0, keys))
    other = rest(_take(half, halves), _take(half, keys))
    always, other, dkv, arriving = jax.lax.optimization_barrier((always, other, dkv, arriving))
    sums = [x + _at(i, a) + _at(half, b) for x, i, a, b in zip((dq, *dkv), (1, 0, 0), always, other)]
    return sums, arriving

  first = own(queries, keys)
  first, arriving = jax.lax.optimization_barrier((first, send(_halves(keys))))
  (gradients, keys), _ = jax.lax.scan(
    lambda carry, j: (step(*carry, send(carry[1]), j), None),
    (_halves([x.astype(jnp.float32) for x in first]), arriving),
    jnp.arange(1, parts - 1),
  )
  (dq, *dkv), _ = step(gradients, keys, None, parts - 1)
  dk, dv = send(dkv)  # home
  return _whole(dq), _whole(dk), _whole(dv)


def _half(axes: tuple[str, ...], j: Any) -> jax.Array:
  """The half of queries and of keys that this device computes at step j beside its high queries with low keys."""
  return (j > jax.lax.axis_index(axes)).astype(jnp.int32)


def _halves(arrays: Any) -> list[jax.Array]:
  """[2, b, t/2], [2, b, n, t/2] or [2, b, n, t/2, h] of each array."""
  return [jnp.stack(jnp.split(x, 2, axis=min(2, x.ndim - 1))) for x in arrays]


def _whole(halves: jax.Array) -> jax.Array:
  return jnp.concatenate([*halves], axis=2)


def _take(half: Any, arrays: list[jax.Array]) -> list[jax.Array]:
  return [x[half] for x in arrays]


def _at(half: Any, x: jax.Array, fill: float = 0.0) -> jax.Array:
  """[2, ...] in float32: x in one half, `fill` in the other."""
  return jnp.where(jnp.arange(2).reshape(2, *[1] * x.ndim) == half, x.astype(jnp.float32), fill)


def _merge(so_far: Any, new: Any, half: Any) -> list[jax.Array]:
  """Attention to two sets of keys from the (output, log-sum-exp) of each; the new ones are of one half of the queries.

  A set that a query does not see has a log-sum-exp of about HIDDEN or less, and its weight is 0 exactly: what there is
  so far is never such a set, as it has the query's own key from step 0 on.
  """
  (o, lse), (o_new, lse_new) = so_far, (new[0], _at(half, new[1], HIDDEN))
  total = jnp.logaddexp(lse, lse_new)
  return [o * jnp.exp(lse - total)[..., None] + o_new * jnp.exp(lse_new - total)[..., None], total]
