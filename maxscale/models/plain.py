"""The decoder's loss as plain math on one device: what `maxscale.check` compares every layout with.

It shares nothing with the framework but the config, the paths of the parameters and the table of rotary frequencies,
and it is for reading and small sizes: a Python loop over the layers, attention with a whole mask, each expert for every
token, all logits at once, and no scan, remat, microbatches, kernels, communication or gradients of its own.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.config import Config
from maxscale.models import rope

Tree = dict[str, Any]


def loss(config: Config, params: Tree, batch: Tree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """The objective of a training step without dropout, a mean over the targets of the batch.

  Args:
    params: nested, without padding, each stack of layers in the order of the layers; float32.
    batch: tokens, targets, segments, positions: int32 [B, T].

  Returns:
    The objective, and (its plain part, the smallest router margin in each sequence, [B]: how much the score of the
    next expert, or group, is below that of the last that a token chose, as a fraction; 1 where there is no choice).
  """
  x, auxiliary, margin = _layers(config, params, batch)
  x = _norm(config, x, params["final_norm"])
  nll, z_loss = _cross_entropy(config, _head(config, params, x), batch["targets"])
  total, modules = nll + z_loss, config.model.mtp
  for k in range(modules):
    w = _row(params["mtp"], k)
    x, losses, gap = _further(config, w, x, _embed(config, params, _ahead(batch, "tokens", k + 1)), batch, k)
    x = _norm(config, x, w["final_norm"])
    both = _cross_entropy(config, _head(config, params, x), _ahead(batch, "targets", k + 1))
    total += config.loss.mtp / modules * sum(both)
    auxiliary, margin = auxiliary + losses, jnp.minimum(margin, gap)
  count = jnp.maximum((batch["targets"] >= 0).sum(), 1)
  return (total + auxiliary) / count, (nll / count, margin)


def logits(config: Config, params: Tree, batch: Tree) -> jax.Array:
  """Logits [B, T, V] of the next token; the batch needs tokens, segments and positions."""
  return _head(config, params, _norm(config, _layers(config, params, batch)[0], params["final_norm"]))


# ---- the pieces: what the layers are between, and further tokens (DeepSeek-AI, arXiv 2412.19437, 2.2)


def _layers(config: Config, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The residual stream after the last layer, the sum of the routers' losses, and the margins [B]."""
  m, x = config.model, _embed(config, params, batch["tokens"])
  if m.max_positions:
    x += params["positions"][batch["positions"]]
  auxiliary, margin = jnp.float32(0), jnp.ones(x.shape[0])
  first = m.moe.dense_layers if m.experts else 0
  for i in range(m.layers):
    w = _row(params["dense_layers"], i) if i < first else _row(params["layers"], i - first)
    x, losses, gap = _layer(config, w, x, batch, i)
    auxiliary, margin = auxiliary + losses, jnp.minimum(margin, gap)
  return x, auxiliary, margin


def _row(stack: Tree, i: int) -> Tree:
  return jax.tree.map(lambda a: a[i], stack)


def _embed(config: Config, params: Tree, tokens: jax.Array) -> jax.Array:
  """Scaled rows of the table, zeros where a token is -1."""
  x = params["embedding"][tokens] * (config.model.embedding_scale or config.model.embed**0.5)
  return jnp.where(tokens[..., None] >= 0, x, 0)


def _head(config: Config, params: Tree, x: jax.Array) -> jax.Array:
  head = params["embedding"] if config.model.tied_embeddings else params["head"]
  return _softcap(jnp.einsum("btd,vd->btv", x, head), config.model.logit_softcap)


def _cross_entropy(config: Config, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums over the positions that have a target (>= 0): -log p, and the z-loss with its weight."""
  log_z, valid = jax.nn.logsumexp(logits, -1), targets >= 0
  target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
  return jnp.sum(jnp.where(valid, log_z - target, 0)), config.loss.z_loss * jnp.sum(jnp.where(valid, log_z**2, 0))


def _ahead(batch: Tree, name: str, places: int) -> jax.Array:
  """What is so many places further on in the same segment, -1 where the segment has ended."""
  there = lambda a: jnp.pad(a, ((0, 0), (0, places)), constant_values=-1)[:, places:]  # noqa: E731
  return jnp.where(there(batch["segments"]) == batch["segments"], there(batch[name]), -1)


def _further(config: Config, w: Tree, x: jax.Array, embedded: jax.Array, batch: Tree, k: int) -> Any:
  both = [_norm(config, x, w["hidden_norm"]), _norm(config, embedded, w["embedding_norm"])]
  return _layer(config, w["layer"], jnp.concatenate(both, -1) @ w["projection"], batch, config.model.layers + k)


# ---- a layer


def _layer(config: Config, w: Tree, x: jax.Array, batch: Tree, layer: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The residual stream after a layer (counted from 0), the sum of its router's losses, the margins [B]."""
  m, losses, margin = config.model, jnp.float32(0), jnp.ones(x.shape[0])
  after = lambda y, name: _norm(config, y, w[name]) if m.post_norms else y  # noqa: E731
  normed = _norm(config, x, w["attention_norm"])
  x = x + after(_attention(config, w["attention"], normed, batch, layer), "attention_post_norm")
  if not m.parallel_block:
    normed = _norm(config, x, w["mlp_norm"])
  if "router" in w["mlp"]:
    y, losses, margin = _experts(config, w["mlp"], normed, batch["segments"] > 0)
  else:
    y = _mlp(config, w["mlp"], normed)
  return x + after(y, "mlp_post_norm"), losses, margin


def _norm(config: Config, x: jax.Array, w: Tree) -> jax.Array:
  if config.model.norm == "layer":
    return _rms(config, x - jnp.mean(x, -1, keepdims=True), w["scale"]) + w["bias"]
  return _rms(config, x, w["scale"])


def _rms(config: Config, x: jax.Array, scale: jax.Array, eps: float | None = None) -> jax.Array:
  if config.model.norm == "rms_plus_one":
    scale = 1 + scale
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + (config.model.norm_eps if eps is None else eps)) * scale


def _softcap(x: jax.Array, cap: float) -> jax.Array:
  return cap * jnp.tanh(x / cap) if cap else x


def _mlp(config: Config, w: Tree, x: jax.Array) -> jax.Array:
  up = x @ w["up"] + w.get("up_bias", 0)
  gate = x @ w["gate"] + w.get("gate_bias", 0) if config.model.gated else up
  kind = config.model.activation
  if kind == "clamped_swiglu":  # OpenAI, gpt-oss: arXiv 2508.10925
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0) + 1
    hidden = gate * jax.nn.sigmoid(1.702 * gate)
  elif kind == "gelu":
    hidden = gate * (1 + jax.lax.erf(gate / math.sqrt(2))) / 2
  elif kind == "gelu_tanh":
    hidden = gate * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
  elif kind == "silu":
    hidden = gate * jax.nn.sigmoid(gate)
  else:
    hidden = jnp.maximum(gate, 0) ** {"relu": 1, "relu2": 2}[kind]
  return (hidden * up if config.model.gated else hidden) @ w["down"] + w.get("down_bias", 0)


# ---- attention


def _attention(config: Config, w: Tree, x: jax.Array, batch: Tree, layer: int) -> jax.Array:
  m = config.model
  window = m.windows[layer % len(m.windows)] if m.windows else 0
  q, k, v = (_latent if m.mla.kv_rank else _grouped)(config, w, x, batch["positions"], window > 0)
  scale = (m.query_scale or q.shape[-1] ** -0.5) * (rope.logit_factor(m.rope_scaling) if m.mla.kv_rank else 1)
  logits = _softcap(jnp.einsum("btnh,bsnh->bnts", q, k) * scale, m.attention_softcap)
  queries, keys = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])[None]
  seen = (batch["segments"][:, :, None] == batch["segments"][:, None, :]) & (queries >= keys)
  if window and m.window_kind == "sliding":
    seen &= queries - keys < window
  elif window:
    chunk = batch["positions"] // window
    seen &= chunk[:, :, None] == chunk[:, None, :]
  logits = jnp.where(seen[:, None], logits, -jnp.inf)
  if m.attention_sinks:  # one more key for each query, with a logit and no value
    sinks = jnp.broadcast_to(w["sinks"][None, :, None, None], (*logits.shape[:3], 1))
    logits = jnp.concatenate([logits, sinks], -1)
  weights = jax.nn.softmax(logits, -1)[..., : x.shape[1]]
  return jnp.einsum("bnts,bsnh,nhd->btd", weights, v, w["out"]) + w.get("out_bias", 0)


def _grouped(config: Config, w: Tree, x: jax.Array, positions: jax.Array, local: bool) -> tuple[jax.Array, ...]:
  """Queries, keys and values [B, T, N, H]."""
  q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[n]) + w.get(f"{n}_bias", 0) for n in ("query", "key", "value"))
  if config.model.qk_norm:
    q, k = _rms(config, q, w["query_norm"]), _rms(config, k, w["key_norm"])
  q, k = _rotate(config, q, positions, local), _rotate(config, k, positions, local)
  k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))  # a key head serves neighbouring queries
  return q, k, v


def _latent(config: Config, w: Tree, x: jax.Array, positions: jax.Array, local: bool) -> tuple[jax.Array, ...]:
  """The same of multi-head latent attention, with values [B, T, N, v_dim] (DeepSeek-AI, arXiv 2405.04434, 2.1)."""
  mla = config.model.mla
  if mla.q_rank:
    q = jnp.einsum(
      "btr,rnh->btnh", _rms(config, x @ w["query_down"], w["query_down_norm"], mla.norm_eps), w["query_up"]
    )
  else:
    q = jnp.einsum("btd,dnh->btnh", x, w["query"])
  q, q_rope = q[..., : mla.nope_dim], q[..., mla.nope_dim :]
  latent, k_rope = jnp.split(x @ w["kv_down"], [mla.kv_rank], -1)
  kv = jnp.einsum("btr,rnh->btnh", _rms(config, latent, w["kv_down_norm"], mla.norm_eps), w["kv_up"])
  k, v = kv[..., : mla.nope_dim], kv[..., mla.nope_dim :]
  q_rope, k_rope = (_rotate(config, y, positions, local) for y in (q_rope, k_rope[:, :, None]))
  k_rope = jnp.repeat(k_rope, q.shape[2], axis=2)  # one for all heads
  return jnp.concatenate([q, q_rope], -1), jnp.concatenate([k, k_rope], -1), v


def _rotate(config: Config, x: jax.Array, positions: jax.Array, local: bool) -> jax.Array:
  """Pairs (i, i + H/2) of [B, T, N, H] turned by position * frequency of the pair."""
  m, half = config.model, x.shape[-1] // 2
  if m.max_positions:
    return x
  local = local and m.rope_local_theta > 0
  theta, scaling = (m.rope_local_theta, {}) if local else (m.rope_theta, m.rope_scaling)
  frequencies, factor = rope.frequencies(theta, x.shape[-1], scaling)
  angle = positions[:, :, None, None] * frequencies
  cos, sin, a, b = factor * jnp.cos(angle), factor * jnp.sin(angle), x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# ---- experts


def _experts(config: Config, w: Tree, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All experts for every token, weighted by 0 where not chosen; the two losses, summed; the margins [B]."""
  moe, experts, chosen = config.model.moe, config.model.experts, config.model.experts_per_token
  logits = x @ w["router"] + w.get("router_bias", 0)
  scores = jax.nn.softmax(logits, -1) if moe.score == "softmax" else jax.nn.sigmoid(logits)
  choice, gap = _choose(config, scores, scores + w.get("correction", 0))
  gates = scores * choice
  if moe.normalise:
    gates = gates / (jnp.sum(gates, -1, keepdims=True) + (1e-20 if moe.score == "sigmoid" else 0))
  choice = choice * valid[..., None]
  if moe.capacity:
    room = math.ceil(moe.capacity * x.shape[1] * chosen / experts)
    gates = gates * (jnp.cumsum(choice, 1) <= room)
  every = {name: w[name] for name in w if name not in ("router", "router_bias", "correction", "shared")}
  outputs = jax.vmap(lambda w: _mlp(config, w, x))(every)  # [E, B, T, D]
  y = moe.scale * jnp.einsum("bte,ebtd->btd", gates, outputs)
  if moe.shared:
    y += _mlp(config, w["shared"], x)
  share = choice.sum(1) / jnp.maximum(valid.sum(1), 1)[:, None] / chosen  # of a sequence: [B, E]
  probs = scores / jnp.sum(scores, -1, keepdims=True)
  balance = experts * jnp.sum(share[:, None] * probs * valid[..., None])
  router_z = jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * valid)
  losses = config.loss.balance_loss * balance + config.loss.router_z_loss * router_z
  return y, losses, jnp.where(valid, gap, 1).min(1)


def _choose(config: Config, scores: jax.Array, corrected: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which experts a token chooses by its corrected scores, 0 or 1 [B, T, E], and how clearly [B, T]."""
  moe, gap = config.model.moe, jnp.ones(scores.shape[:-1])
  if moe.groups > 1:
    best = 1 if moe.group_score == "max" else 2
    groups = lambda a: jax.lax.top_k(a.reshape(*a.shape[:-1], moe.groups, -1), best)[0].sum(-1)  # noqa: E731
    group, gap = _best(groups(corrected), groups(scores), moe.groups_per_token)
    corrected = jnp.where(jnp.repeat(group, scores.shape[-1] // moe.groups, axis=-1) > 0, corrected, -jnp.inf)
  choice, gap_inside = _best(corrected, scores, config.model.experts_per_token)
  return choice, jnp.minimum(gap, gap_inside)


def _best(values: jax.Array, scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """1 for the `count` best values, else 0; how far the next is below them, as a fraction of the scores, at most 1."""
  total = values.shape[-1]
  best, ids = jax.lax.top_k(values, min(count + 1, total))
  choice = jax.nn.one_hot(ids[..., :count], total).sum(-2)
  if count == total:
    return choice, jnp.ones(values.shape[:-1])
  size = jnp.take_along_axis(scores, ids[..., -2:], -1).max(-1)
  return choice, jnp.minimum((best[..., -2] - best[..., -1]) / size, 1)
