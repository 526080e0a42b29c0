"""Mixture of experts: router, experts, and an MLP that every token passes beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxscale.models import expert_mlp, experts, router
from maxscale.models.module import param
from maxscale.models.parts import MLP, Shape, Weights
from maxscale.sharding import context as sharding


class MoE(Weights):
  """Top-k mixture of MLPs (Shazeer et al., arXiv 1701.06538): a token is computed by each expert that it chose.

  The router and its losses are float32. Both losses are sums over sequences, so that they are the same whatever the
  microbatches and devices (models/router.py).
  """

  part = "mlp"

  def __init__(self, shape: Shape):
    super().__init__(shape)
    s, m = shape, shape.m
    wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp+embed", None)
    self.router = param((s.D, s.E_pad), ("embed", None), s.D**-0.5, (s.D, s.E))
    if m.moe.router_bias:
      self.router_bias = param((s.E_pad,), (None,), 0.0, (s.E,))
    if m.moe.correction:
      self.correction = param((s.E_pad,), (None,), 0.0, (s.E,), trained=False)
    if m.gated:
      self.gate = param((s.E_pad, s.D, s.F), wide, s.D**-0.5, (s.E, s.D, s.F), inputs=1)
    self.up = param((s.E_pad, s.D, s.F), wide, s.D**-0.5, (s.E, s.D, s.F), inputs=1)
    self.down = param((s.E_pad, s.F, s.D), narrow, (2 * s.L * s.F) ** -0.5, (s.E, s.F, s.D), inputs=1)
    if m.mlp_bias:
      if m.gated:
        self.gate_bias = param((s.E_pad, s.F), ("experts", "mlp"), 0.0, (s.E, s.F))
      self.up_bias = param((s.E_pad, s.F), ("experts", "mlp"), 0.0, (s.E, s.F))
      self.down_bias = param((s.E_pad, s.D), ("experts", None), 0.0, (s.E, s.D))
    if m.moe.shared:
      self.shared = MLP(s, m.moe.shared, "mlp/shared")

  def __call__(self, x_btd: jax.Array, valid_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    s, moe = self.shape, self.shape.m.moe
    weights = self._experts(x_btd.dtype)
    if not s.exchange and sharding.parts("experts") > 1:
      x_btd, weights = _first_gathered(x_btd, weights)
    with jax.named_scope("router"):
      logits = self.biased(self.product("btd,de->bte", x_btd.astype(jnp.float32), "router"), "router_bias")
      logits = checkpoint_name(logits, "router")
      choice = router.choose(moe, s.A, s.E, logits, self.array("correction") if moe.correction else None)
      aux = router.balance(moe, choice, logits, valid_bt)
    x_btd, gates, ids, valid = (sharding.gather(v, "mlp") for v in (x_btd, choice.gates, choice.ids, valid_bt))
    ids, cut = jnp.where(valid[..., None], ids, -1), jnp.int32(0)  # padding must not take the room of tokens
    if moe.capacity:
      ids, cut = router.capacity(moe.capacity, s.E, ids, valid)
    rows, choices = x_btd.reshape(-1, s.D), (-1, s.A)
    y, dropped = experts.experts(rows, gates.reshape(choices), ids.reshape(choices), weights, s.m.activation,
                                 s.buffer, moe.route, s.exchange)  # fmt: skip
    y = y.reshape(x_btd.shape)
    if moe.shared:
      with jax.named_scope("shared"):
        y = y + self.shared.inside(x_btd)
    y = checkpoint_name(sharding.reduce(y, "mlp"), "mlp_out")
    return y, {**aux, "max_tie": -aux.pop("margin"), "dropped": dropped["dropped"] + cut}

  def _experts(self, dtype: jnp.dtype) -> experts.Weights:
    have = [name for name in ("gate", "up", "down") if hasattr(self, name)]
    values: dict[str, Any] = {"gate": None, **{name: self.weight(name, dtype) for name in have}}
    biases: dict[str, Any] = {
      f"{name}_bias": self.array(f"{name}_bias", "mlp") for name in have if hasattr(self, f"{name}_bias")
    }
    down_bias = biases.pop("down_bias", None)
    return experts.Weights(expert_mlp.Weights(**values, **biases), down_bias)


def _first_gathered(x: jax.Array, weights: experts.Weights) -> tuple[jax.Array, experts.Weights]:
  """Both as they are, but who reads x waits for the experts' matrices that rows meet first.

  The SparseCores of a TPU run one collective at a time. Routing for all tokens of a group has small ones that wait for
  each other; gathers of matrices would be put behind them, where nothing else is left to do, not beside attention.
  """
  mlp = weights.mlp
  wide = {name: w for name in ("gate", "up") if (w := getattr(mlp, name)) is not None}
  x, used = jax.lax.optimization_barrier((x, {name: w.used for name, w in wide.items()}))
  wide = {name: dataclasses.replace(w, used=used[name]) for name, w in wide.items()}
  return x, weights._replace(mlp=mlp._replace(**wide))
