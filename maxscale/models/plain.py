"""The decoder's loss as plain math on one device: what `maxscale.check` compares every layout with.

It shares nothing with the framework but the config and the paths of the parameters, and it is for reading and small
sizes: a Python loop over the layers, attention with a whole mask, each expert for every token, all logits at once, and
no scan, remat, microbatches, kernels, communication or gradients of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxscale.config import Config

Tree = dict[str, Any]


def loss(config: Config, params: Tree, batch: Tree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """The objective of a training step without dropout, a mean over the targets of the batch.

  Args:
    params: nested, without padding, each stack of `layers` in the order of the layers; float32.
    batch: tokens, targets, segments, positions: int32 [B, T].

  Returns:
    The objective, and (its plain part, the smallest router margin in each sequence, [B]: how much less probable than
    the last expert that a token chose the next one is, as a fraction; 1 where there is no choice).
  """
  x = params["embedding"][batch["tokens"]] * config.model.embed**0.5
  auxiliary, margin = jnp.float32(0), jnp.ones(x.shape[0])
  for i in range(config.model.layers):
    w = jax.tree.map(lambda a: a[i], params["layers"])  # noqa: B023
    x = x + _attention(config, w["attention"], _norm(config, x, w["attention_norm"]), batch)
    y = _norm(config, x, w["mlp_norm"])
    if config.model.experts:
      y, losses, gap = _experts(config, w["mlp"], y, batch["segments"] > 0)
      auxiliary, margin = auxiliary + losses, jnp.minimum(margin, gap)
    else:
      y = _gated("btd,df->btf", "btf,fd->btd", y, w["mlp"])
    x = x + y
  head = params["embedding"] if config.model.tied_embeddings else params["head"]
  logits = jnp.einsum("btd,vd->btv", _norm(config, x, params["final_norm"]), head)
  log_z = jax.nn.logsumexp(logits, -1)
  valid = batch["targets"] >= 0
  target = jnp.take_along_axis(logits, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
  nll = jnp.sum(jnp.where(valid, log_z - target, 0))
  z_loss = config.loss.z_loss * jnp.sum(jnp.where(valid, log_z**2, 0))
  count = jnp.maximum(valid.sum(), 1)
  return (nll + z_loss + auxiliary) / count, (nll / count, margin)


def _norm(config: Config, x: jax.Array, w: Tree) -> jax.Array:
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.model.norm_eps) * w["scale"]


def _gated(wide: str, narrow: str, x: jax.Array, w: Tree) -> jax.Array:
  hidden = jax.nn.silu(jnp.einsum(wide, x, w["gate"])) * jnp.einsum(wide, x, w["up"])
  return jnp.einsum(narrow, hidden, w["down"])


def _attention(config: Config, w: Tree, x: jax.Array, batch: Tree) -> jax.Array:
  q, k, v = (jnp.einsum("btd,dnh->bnth", x, w[name]) for name in ("query", "key", "value"))
  q, k = (_rotate(y, batch["positions"], config.model.rope_theta) for y in (q, k))
  k, v = (jnp.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))  # a key head serves neighbouring queries
  same = batch["segments"][:, :, None] == batch["segments"][:, None, :]
  seen = same & jnp.tril(jnp.ones(same.shape[1:], bool))
  logits = jnp.einsum("bnth,bnsh->bnts", q, k) / q.shape[-1] ** 0.5
  weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), -1)
  return jnp.einsum("bnts,bnsh,nhd->btd", weights, v, w["out"])


def _rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Pairs (i, i + H/2) of [B, N, T, H] turned by position * theta**(-2i/H)."""
  half = x.shape[-1] // 2
  angle = positions[:, None, :, None] * theta ** (-jnp.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1)


def _experts(config: Config, w: Tree, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All experts for every token, weighted by 0 where not chosen; the two losses, summed; the margins [B]."""
  experts, chosen = config.model.experts, config.model.experts_per_token
  logits = x @ w["router"]
  probs = jax.nn.softmax(logits, -1)
  best, ids = jax.lax.top_k(probs, min(chosen + 1, experts))
  choice = jax.nn.one_hot(ids[..., :chosen], experts).sum(-2)  # [B, T, E]
  gates = probs * choice / jnp.sum(probs * choice, -1, keepdims=True)
  every = _gated("btd,edf->btef", "btef,efd->bted", x, w)
  share = (choice * valid[..., None]).sum(1) / jnp.maximum(valid.sum(1), 1)[:, None] / chosen  # of a sequence: [B, E]
  balance = experts * jnp.sum(jax.lax.stop_gradient(share)[:, None] * probs * valid[..., None])
  router_z = jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * valid)
  gap = 1 - best[..., -1] / best[..., chosen - 1] if chosen < experts else jnp.ones(valid.shape)
  margin = jnp.where(valid, gap, 1).min(1)
  losses = config.loss.balance_loss * balance + config.loss.router_z_loss * router_z
  return jnp.einsum("bte,bted->btd", gates, every), losses, margin
