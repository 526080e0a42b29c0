"""The named baseline: a training step of the same model as an expert would write it by hand, for one device.

It shares no code with the framework but the attention kernel: parameters in a dict, layers in a scan, whole logits,
gradients by plain AD, AdamW from Optax. Weights are cast to the compute dtype once, so their gradients have that dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxscale.models import attention
from maxscale.models.parts import Shape

Tree = dict[str, Any]


def init(s: Shape, key: jax.Array) -> Tree:
  """Float32 parameters."""
  shapes = {"embed": (s.V_pad, s.D), "head": (s.V_pad, s.D), "norm": (s.D,)}
  layer = {"n1": (s.D,), "n2": (s.D,), "q": (s.D, s.N, s.H), "k": (s.D, s.K, s.H), "v": (s.D, s.K, s.H),
           "o": (s.N, s.H, s.D), "gate": (s.D, s.F), "up": (s.D, s.F), "down": (s.F, s.D)}  # fmt: skip
  if s.E:
    layer |= {"router": (s.D, s.E), "gate": (s.E, s.D, s.F), "up": (s.E, s.D, s.F), "down": (s.E, s.F, s.D)}
  draw = lambda shape: 0.02 * jax.random.normal(key, shape)  # noqa: E731
  return {k: draw(v) for k, v in shapes.items()} | {"layers": {k: draw((s.L, *v)) for k, v in layer.items()}}


def step(s: Shape, attention: Callable, z_loss: float) -> tuple[Callable, Callable]:
  """(optimizer state of parameters, train step (params, state, batch) -> (params, state, loss))."""
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1))

  def train(params: Tree, state: Any, batch: Tree) -> tuple[Tree, Any, jax.Array]:
    loss, grads = jax.value_and_grad(lambda p: _loss(s, attention, z_loss, p, batch))(params)
    updates, state = tx.update(grads, state, params)
    new: Any = optax.apply_updates(params, updates)
    return new, state, loss

  return tx.init, train


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  y = x.astype(jnp.float32)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps) * scale).astype(x.dtype)


def _rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  half = x.shape[-1] // 2
  angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _layer(s: Shape, attention: Callable, batch: Tree, x: jax.Array, w: Tree) -> tuple[jax.Array, jax.Array]:
  c = {k: v.astype(x.dtype) for k, v in w.items()}
  y = _norm(x, w["n1"], s.m.norm_eps)
  q = _rope(jnp.einsum("btd,dnh->btnh", y, c["q"]), batch["positions"], s.m.rope_theta)
  k = _rope(jnp.einsum("btd,dkh->btkh", y, c["k"]), batch["positions"], s.m.rope_theta)
  v = jnp.einsum("btd,dkh->btkh", y, c["v"])
  x = x + jnp.einsum("btnh,nhd->btd", attention(q, k, v, batch["segments"], batch["segments"]), c["o"])
  y = _norm(x, w["n2"], s.m.norm_eps)
  if s.E:
    y, aux = _moe(s, y, w["router"], c)
    return x + y, aux
  y = y.reshape(-1, s.D)
  hidden = jax.nn.silu(y @ c["gate"]) * (y @ c["up"])
  return x + (jax.lax.optimization_barrier(hidden) @ c["down"]).reshape(x.shape), jnp.zeros(())


def _moe(s: Shape, x: jax.Array, router: jax.Array, c: Tree) -> tuple[jax.Array, jax.Array]:
  """Dropless top-k with ragged_dot, as its documentation suggests."""
  logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router)
  probs = jax.nn.softmax(logits)
  gates, ids = jax.lax.top_k(probs, s.A)
  gates = (gates / gates.sum(-1, keepdims=True)).astype(x.dtype)
  flat, order = x.reshape(-1, s.D), jnp.argsort(ids.reshape(-1))
  sizes = jnp.bincount(ids.reshape(-1), length=s.E).astype(jnp.int32)
  rows = flat[order // s.A]
  hidden = jax.nn.silu(jax.lax.ragged_dot(rows, c["gate"], sizes)) * jax.lax.ragged_dot(rows, c["up"], sizes)
  out = jax.lax.ragged_dot(hidden, c["down"], sizes) * gates.reshape(-1)[order][:, None]
  y = out[jnp.argsort(order)].reshape(-1, s.A, s.D).sum(1).reshape(x.shape)
  share = jax.nn.one_hot(ids, s.E).sum(2).mean(1) / s.A
  balance = jnp.sum(share * probs.mean(1)) * s.E / x.shape[0]
  return y, 0.01 * balance + 0.001 * jnp.mean(jax.nn.logsumexp(logits, -1) ** 2)


def _loss(s: Shape, attention: Callable, z_loss: float, params: Tree, batch: Tree) -> jax.Array:
  x = params["embed"].astype(s.m.compute_dtype)[batch["tokens"]] * jnp.sqrt(s.D).astype(s.m.compute_dtype)
  x, aux = jax.lax.scan(lambda x, w: _layer(s, attention, batch, x, w), x, params["layers"])
  head = params["head"].astype(s.m.compute_dtype)
  logits = jnp.einsum("btd,vd->btv", _norm(x, params["norm"], s.m.norm_eps), head, preferred_element_type=jnp.float32)
  valid = batch["targets"] >= 0
  log_z = jax.nn.logsumexp(logits, -1)
  target = jnp.take_along_axis(logits, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
  return jnp.sum((log_z - target + z_loss * log_z**2) * valid) / valid.sum() + aux.sum()


def attention_for(platform: str) -> Callable:
  """The same attention as the framework's, so that the comparison is of all the rest."""
  return functools.partial(attention.attention, backend="tpu" if platform == "tpu" else "xla")
