"""Which experts a token goes to, with which weights, and what keeps the experts equally busy. All of it is float32.

Legend: B sequences and T places of this device, A choices of a token, E experts, E_pad with padding, which comes last.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxscale.config import ConfigError, Moe
from maxscale.sharding import context as sharding

TINY = 1e-18  # keeps sums of sigmoids from zero; DeepSeek's 1e-20 has no square in float32, which the gradient needs


class Choice(NamedTuple):
  """The experts of each token, best first.

  Attributes:
    gates: [..., A], weights of the chosen experts.
    ids: int32 [..., A], the chosen experts.
    scores: [..., E], what the gates are taken from; no correction is in them.
    gap: [...], by how much the last expert (or group) that was chosen is better than the best that was not; without
      gradient, +inf where all are chosen.
  """

  gates: jax.Array
  ids: jax.Array
  scores: jax.Array
  gap: jax.Array


def choose(moe: Moe, chosen: int, experts: int, logits: jax.Array, correction: jax.Array | None) -> Choice:
  """Scores from logits [..., E_pad], the best experts by score + correction [E_pad], their scores as gates.

  With `moe.groups` a token's experts come from its best groups of consecutive experts (DeepSeek-AI, arXiv 2405.04434;
  the score of a group from its best two, and the correction: arXiv 2412.19437). Gradients go through gates and scores,
  not through the choice.
  """
  logits = logits[..., :experts].astype(jnp.float32)
  scores = jax.nn.softmax(logits) if moe.score == "softmax" else jax.nn.sigmoid(logits)
  ranked = jax.lax.stop_gradient(scores if correction is None else scores + correction[:experts])
  gap = jnp.full(ranked.shape[:-1], jnp.inf)
  if moe.groups_per_token < moe.groups:
    ranked, gap = _best_groups(moe, ranked)
  best, ids = jax.lax.top_k(ranked, min(chosen + 1, experts))
  if chosen < experts:
    gap, ids = jnp.minimum(gap, best[..., chosen - 1] - best[..., chosen]), ids[..., :chosen]
  gates = _pick(scores, ids)
  if moe.normalise:
    gates = gates / (jnp.sum(gates, -1, keepdims=True) + TINY)
  return Choice(gates * moe.scale, ids, scores, gap)


def _best_groups(moe: Moe, ranked: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[..., E] with -inf outside a token's best groups, and the gap between the last of these and the next."""
  groups = ranked.reshape(*ranked.shape[:-1], moe.groups, -1)
  score = jnp.max(groups, -1)
  if moe.group_score == "top2":  # not by `top_k`, which a TPU makes a padded sort of
    first = jnp.arange(groups.shape[-1]) == jnp.argmax(groups, -1, keepdims=True)
    score += jnp.max(jnp.where(first, -jnp.inf, groups), -1)
  best, ids = jax.lax.top_k(score, moe.groups_per_token + 1)
  inside = jnp.any(ids[..., :-1, None] == jnp.arange(moe.groups), -2)
  return jnp.where(inside[..., None], groups, -jnp.inf).reshape(ranked.shape), best[..., -2] - best[..., -1]


@functools.partial(jax.checkpoint, prevent_cse=False)  # or AD would keep the [..., A, E] comparison
def _pick(scores: jax.Array, ids: jax.Array) -> jax.Array:
  """scores[..., ids] without a gather, whose transpose, a scatter, is slow on a TPU."""
  return jnp.sum(jnp.where(ids[..., None] == jnp.arange(scores.shape[-1]), scores[..., None, :], 0), -1)


def balance(moe: Moe, choice: Choice, logits: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
  """The losses of a router and what is to be known of it, over the valid tokens of this device.

  Both losses are sums over sequences, so that they are the same whatever the microbatches and devices. For a sequence
  the balance loss is E * sum_e(share of choices of e * mean probability of e) * its tokens, where probabilities are
  the scores over their sum (DeepSeek-AI, arXiv 2412.19437, equations 17 to 20, times tokens).

  Args:
    choice: of `choose`. logits: [B, T, E_pad]. valid: [B, T], tokens that are not padding.

  Returns:
    balance_loss; router_z_loss, the sum of logsumexp(logits)**2 (Zoph et al., arXiv 2202.08906); expert_tokens [E],
    choices of each expert; entropy, the sum of the tokens' entropies in nats: all sums over this device's tokens, and
    margin: the smallest gap of a token, +inf if there is none.
  """
  experts, chosen = choice.scores.shape[-1], choice.ids.shape[-1]
  weight = valid.astype(jnp.float32)
  choices = jax.nn.one_hot(choice.ids, experts).sum(2) * weight[..., None]  # [B, T, E]
  # A sequence may be on several devices: its counts are summed over them, and carry no gradient.
  counts, tokens = sharding.psum((choices.sum(1), weight.sum(1)), "residual_length")  # [B, E], [B]
  share = counts / (jnp.maximum(tokens, 1.0)[:, None] * chosen)
  probs = choice.scores
  if moe.score == "sigmoid":
    probs = probs / (jnp.sum(probs, -1, keepdims=True) + TINY)
  log_z = jax.nn.logsumexp(logits[..., :experts].astype(jnp.float32), axis=-1)
  entropy = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(probs)), -1)
  return {
    "balance_loss": experts * jnp.sum(share * (probs * weight[..., None]).sum(1)),
    "router_z_loss": jnp.sum(log_z**2 * weight),
    "expert_tokens": choices.sum((0, 1)),
    "entropy": jnp.sum(entropy * weight),
    "margin": jnp.min(jnp.where(valid, choice.gap, jnp.inf), initial=jnp.inf),
  }


def capacity(factor: float, experts: int, ids: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Leaves an expert at most ceil(factor * T * A / E) choices of a sequence, the first by (place, rank of the choice).

  Args:
    factor: `model.moe.capacity`, above 0. ids: int32 [B, T, A], whole sequences. valid: bool [B, T]; padding takes no
      room.

  Returns:
    ids with -1 for choices that are dropped, and for those of padding; and int32 [], how many were dropped.

  Raises:
    ConfigError: sequences are split inside blocks.
  """
  if sharding.parts("length") > 1:
    raise ConfigError(
      f"model.moe.capacity={factor:g} counts along whole sequences, but they are split inside blocks; set mesh.context=1"
      ", or model.moe.capacity=0"
    )
  room = math.ceil(factor * ids.shape[1] * ids.shape[2] / experts)

  def first(choices: jax.Array) -> jax.Array:  # [T * A] of one sequence
    place = jnp.argsort(jnp.argsort(choices, stable=True))  # among all choices sorted by expert
    counts = jnp.bincount(choices, length=experts + 1)
    return place - (jnp.cumsum(counts) - counts)[choices] < room

  wanted = valid[..., None] & (ids >= 0)
  fits = jax.vmap(first)(jnp.where(wanted, ids, experts).reshape(ids.shape[0], -1)).reshape(ids.shape)
  return jnp.where(wanted & fits, ids, -1), jnp.sum(wanted & ~fits).astype(jnp.int32)


def corrected(correction: jax.Array, expert_tokens: jax.Array, rate: float) -> jax.Array:
  """The next correction [L, E_pad]: a step of `rate` up for experts with fewer tokens [L, E] than the mean, else down.

  Wang et al., arXiv 2408.15664, and DeepSeek-AI, arXiv 2412.19437.
  """
  tokens = expert_tokens.astype(jnp.float32)
  step = rate * jnp.sign(jnp.mean(tokens, -1, keepdims=True) - tokens)
  return correction.at[:, : tokens.shape[-1]].add(step)
