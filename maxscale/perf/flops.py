"""Model FLOPs and MFU under one named rule, and the matmul FLOPs that a traced program really executes.

The rule "maxscale-1", per token:
  counted      every matmul of the model (2 FLOPs per parameter and token), the output head and the router among them;
               of experts those that a token uses; the two matmuls of attention; the backward pass as twice the forward
  not counted  the embedding lookup, norms, softmax and other elementwise work, the optimizer, and recomputation
  attention    a causal query sees T/2 keys on average (exactly it is (T+1)/2, which differs by 1/T); a causal window of
               W <= T keys leaves W - W^2/(2T); `causal=False` counts T, or W

`mfu` counts causal attention so; `mfu_full_mask` counts T keys, as some published tables do; hfu is `jaxpr_flops` of
the step over time and peak.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from maxscale.config import Config

FLOP_RULE = "maxscale-1"


@dataclasses.dataclass(frozen=True)
class Attention:
  """`layers` layers of attention of the same shape; qk_dim and v_dim are of one head, window in keys (None: all)."""

  layers: int
  heads: int
  qk_dim: int
  v_dim: int
  window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelFlops:
  """What the rule counts of a model.

  Attributes:
    params: parameters of the matmuls that one token goes through (active experts and router, output head).
    attention: its attention layers.
  """

  params: int
  attention: tuple[Attention, ...]


def from_config(config: Config, vocab: int) -> ModelFlops:
  """What is counted of the decoder of a config.

  Args:
    vocab: tokens of the vocabulary, without padding.
  """
  m, moe, mla = config.model, config.model.moe, config.model.mla
  n, kv, h, v = m.heads, config.kv_heads, config.head_dim, config.value_dim
  if mla.kv_rank:
    queries = m.embed * mla.q_rank + mla.q_rank * n * h if mla.q_rank else m.embed * n * h
    attention = queries + m.embed * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * n * (mla.nope_dim + v)
  else:
    attention = m.embed * (n * h + kv * h + kv * v)
  attention += n * v * m.embed
  products = 3 if m.gated else 2
  last = products * m.embed * m.mlp
  if m.experts:
    last = last * m.experts_per_token + m.embed * m.experts + products * m.embed * moe.shared
  dense = products * m.embed * (moe.dense_mlp or m.mlp)
  layers, first = m.layers + m.mtp, config.dense_layers
  windows = collections.Counter(m.windows[i % len(m.windows)] if m.windows else 0 for i in range(layers))
  return ModelFlops(
    params=layers * attention + first * dense + (layers - first) * last + (1 + m.mtp) * m.embed * vocab
    + m.mtp * 2 * m.embed * m.embed,
    attention=tuple(Attention(count, n, h, v, window or None) for window, count in windows.items()),
  )  # fmt: skip


def flops_per_token(model: ModelFlops, length: int, causal: bool = True) -> float:
  """FLOPs of the forward and backward pass per token of sequences of `length` tokens."""
  forward = 2.0 * model.params
  for a in model.attention:
    window = min(a.window or length, length)
    keys = window - window**2 / (2 * length) if causal else window
    forward += 2 * a.layers * a.heads * (a.qk_dim + a.v_dim) * keys
  return 3 * forward


def mfu(model: ModelFlops, length: int, tokens_per_second: float, peak: float) -> float:
  """Model FLOPs utilisation, causal attention counted half.

  Args:
    tokens_per_second: per device (or of all).
    peak: FLOP/s of a device (or of all).
  """
  return flops_per_token(model, length) * tokens_per_second / peak


def mfu_full_mask(model: ModelFlops, length: int, tokens_per_second: float, peak: float) -> float:
  """As `mfu`, with attention counted over the full mask: comparable with tables that do so, and larger."""
  return flops_per_token(model, length, causal=False) * tokens_per_second / peak


def jaxpr_flops(jaxpr: Any, notes: list[str] | None = None, kernels: bool = True) -> float:
  """Matmul FLOPs (dot, ragged dot, convolution) that a program executes, over all devices, recomputation included.

  A scan counts its length, a cond its dearest branch, a shard_map every device of its manual axes. The program is
  counted as it was traced: what the compiler drops as unused is still in it.

  Args:
    jaxpr: of `jax.make_jaxpr`, or of `jitted.trace(...).jaxpr`.
    notes: is given a line for each thing that could not be counted exactly: a while loop (its body counts once), a
      Pallas kernel without cost estimate (counts 0).
    kernels: whether Pallas kernels count, as their cost estimates say.
  """
  notes = [] if notes is None else notes
  return math.fsum(_equation_flops(eqn, notes, kernels) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(eqn: Any, notes: list[str], kernels: bool) -> float:
  name, params = eqn.primitive.name, eqn.params
  if name in _MATMULS:
    return _MATMULS[name](eqn)
  if name == "pallas_call":
    if not kernels:
      return 0.0
    if params["cost_estimate"] is None:
      notes.append(f"the Pallas kernel {params['name']} has no cost estimate: counted as 0")
      return 0.0
    return float(params["cost_estimate"].flops)
  inner = [jaxpr_flops(jaxpr, notes, kernels) for jaxpr in inner_jaxprs(params.values())]
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "cond":
    return max(inner)
  if name == "shard_map":
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
  if name == "while" and sum(inner):
    notes.append("a while loop has matmuls: counted as one trip")
  return sum(inner)


def dots(jaxpr: Any, times: float = 1) -> Iterable[tuple[Any, float]]:
  """(dot_general equation, times that it runs) of a program on one device."""
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn, times
    for inner in inner_jaxprs(eqn.params.values()):
      yield from dots(inner, times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1))


def inner_jaxprs(values: Iterable[Any]) -> Iterable[Any]:
  """The jaxprs among the parameters of an equation: bare, closed, or in a tuple."""
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from inner_jaxprs(value)
    elif hasattr(getattr(value, "jaxpr", value), "eqns"):
      yield value


def dot_flops(eqn: Any) -> float:
  """Of an equation `dot_general`: two for each element of the result and each element that is contracted."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[d] for d in contracted)


def _ragged_dot(eqn: Any) -> float:
  """Each row meets one group; where the rows are contracted, each of the groups' outputs sums over its own rows."""
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  (contracted, _), _ = numbers.dot_dimension_numbers
  lhs, groups = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape[-1]
  flops = 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[d] for d in contracted)
  return flops / groups if set(numbers.lhs_ragged_dimensions) <= set(contracted) else flops


def _convolution(eqn: Any) -> float:
  kernel = eqn.invars[1].aval
  features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * eqn.outvars[0].aval.size * kernel.size / features


_MATMULS = {"dot_general": dot_flops, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}
