"""Cross-entropy whose logits exist only for a chunk of positions at a time, with its gradients made on the way."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.models import kernels
from maxscale.sharding import context as sharding

CHUNK_LOGITS = 2**27  # float32 logits of a chunk: 512 MiB


@dataclasses.dataclass(frozen=True)
class LossSpec:
  """V: real tokens of the vocabulary. chunk: positions whose logits exist at once (0: chosen). softcap: of logits."""

  V: int
  z_loss: float
  chunk: int
  softcap: float = 0.0


def softcapped(logits: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(logits / cap), which is within +-cap; logits where cap is 0."""
  return cap * jnp.tanh(logits / cap) if cap else logits


@functools.partial(kernels.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
  spec: LossSpec, x_btd: jax.Array, table: kernels.Weight, targets_bt: jax.Array, scale: jax.Array
) -> Any:
  """Sums over this device's positions with a target (>= 0) of the loss, and of its plain part.

  The loss of a position is scale * (-log p(target) + z_loss * (log sum exp logits)**2), in float32.

  Args:
    x_btd: final hidden states; their gradient is a partial sum over the devices that split the vocabulary.
    table: the head's [V, D], padded. targets_bt: int32, -1 where there is none.
    scale: float32 scalar, 1 / (targets of the whole step): it goes in here because the gradients are made here.

  Returns:
    (loss, nll), float32 scalars; nll is not scaled. Only `loss` has a gradient; `nll` is for reporting.
  """
  loss, nll, _, _ = _positions(spec, False, x_btd, table, targets_bt, scale)
  return loss, nll


def _fwd(spec: LossSpec, x_btd: jax.Array, table: kernels.Weight, targets_bt: jax.Array, scale: jax.Array) -> Any:
  loss, nll, dx, dw = _positions(spec, True, x_btd, table, targets_bt, scale)
  return (loss, nll), (dx, table.cotangent(dw))


def _bwd(spec: LossSpec, residuals: Any, cotangents: Any) -> Any:
  g = cotangents[0]
  return *jax.tree.map(lambda d: (d * g).astype(d.dtype), residuals), None, None


cross_entropy.defvjp(_fwd, _bwd)


def _chunk_size(rows: int, vocab: int, wanted: int) -> int:
  """The largest divisor of rows that is at most `wanted`, or that keeps a chunk's logits under CHUNK_LOGITS."""
  limit = max(1, min(rows, wanted or CHUNK_LOGITS // vocab))
  return next(c for c in range(limit, 0, -1) if rows % c == 0)


def _positions(
  spec: LossSpec, gradients: bool, x_btd: jax.Array, weight: kernels.Weight, targets_bt: jax.Array, scale: jax.Array
) -> Any:
  """(loss, nll, dx, dw) of one device's positions against its part of the vocabulary; the gradients may be None."""
  (b, t, d), table = x_btd.shape, weight.used
  size = _chunk_size(b * t, table.shape[0], spec.chunk)
  chunks = (x_btd.reshape(-1, size, d), targets_bt.reshape(-1, size))
  first = sharding.shard_index("vocab") * table.shape[0]
  zero = jnp.zeros((), jnp.float32)
  dw = jnp.zeros(table.shape, weight.grad_dtype) if gradients else None

  def step(carry: Any, chunk: Any) -> Any:
    loss, nll, dw = carry
    chunk_loss, chunk_nll, dx, chunk_dw = _chunk(spec, gradients, first, scale, weight, *chunk)
    dw = dw + chunk_dw if gradients else None
    return (loss + chunk_loss, nll + chunk_nll, dw), dx

  if chunks[0].shape[0] == 1:
    loss, nll, dx, dw = _chunk(spec, gradients, first, scale, weight, *(c[0] for c in chunks))
  else:
    (loss, nll, dw), dx = jax.lax.scan(step, (zero, zero, dw), chunks)
  return loss, nll, dx.reshape(x_btd.shape) if gradients else None, dw


def _chunk(
  spec: LossSpec, gradients: bool, first: Any, scale: Any, weight: kernels.Weight, x: jax.Array, targets: jax.Array
) -> Any:
  """x: [C, D], targets: [C]; weight: [V of this device, D], its first row is token `first` of the vocabulary."""
  table = weight.used
  ids = first + jnp.arange(table.shape[0])
  capped = softcapped(jnp.einsum("cd,vd->cv", x, table, preferred_element_type=jnp.float32), spec.softcap)
  logits = capped
  if sharding.parts("vocab") * table.shape[0] > spec.V:  # only a padded vocabulary pays for the mask
    logits = jnp.where(ids < spec.V, logits, -1e30)
  top = sharding.pmax(logits.max(-1), "vocab")
  log_z = jnp.log(sharding.psum(jnp.exp(logits - top[:, None]).sum(-1), "vocab")) + top
  hit = ids == targets[:, None]
  valid = (targets >= 0).astype(jnp.float32)
  row, mine = kernels.own_rows(table.shape[0], targets)
  target = jnp.where(mine, jnp.take_along_axis(logits, row[:, None], axis=1)[:, 0], 0)
  nll = (log_z - sharding.psum(target, "vocab")) * valid
  loss = scale * (nll + spec.z_loss * log_z**2 * valid)
  if not gradients:
    return loss.sum(), nll.sum(), None, None
  p = jnp.exp(logits - log_z[:, None])
  # Left in float32: the compiler then computes it inside both matmuls (which round it themselves, as their precision
  # says) instead of writing it out: 15% of the head's cycles on v5p.
  dlogits = (p * (1 + 2 * spec.z_loss * log_z)[:, None] - hit) * (scale * valid)[:, None]
  if spec.softcap:
    dlogits = dlogits * (1 - jnp.square(capped / spec.softcap))
  dx = _dot(dlogits, table, 1, 0, x.dtype)
  dw = _dot(dlogits, x, 0, 0, jnp.dtype(weight.grad_dtype))
  return loss.sum(), nll.sum(), dx, dw


def _dot(a: jax.Array, b: jax.Array, i: int, j: int, dtype: Any) -> jax.Array:
  """Contracts dimension i of a with j of b; operands may have different dtypes, which einsum would widen."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=dtype)
