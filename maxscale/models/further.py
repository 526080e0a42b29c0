"""The batch of multi-token prediction: for each place, tokens and targets of places further on in its segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def with_places(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
  """The batch with tokens_k and targets_k, int32 [B, T], for k from 1 to `count`: those k places on, -1 where the
  segment has ended."""
  out = dict(batch)
  for k in range(1, count + 1):
    later = {key: jnp.pad(batch[key][:, k:], ((0, 0), (0, k))) for key in ("tokens", "targets", "segments")}
    same = (later["segments"] == batch["segments"]) & (batch["segments"] > 0)
    out |= {f"{key}_{k}": jnp.where(same, later[key], -1) for key in ("tokens", "targets")}
  return out
