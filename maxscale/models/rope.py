"""Rotary embeddings (Su et al., arXiv 2104.09864), and how their frequencies are scaled for longer sequences."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxscale.config import ConfigError
from maxscale.models import kernels

# Type -> (keys that it needs, keys that it may have) in `model.rope_scaling`.
KEYS = {
  "linear": (("factor",), ()),
  "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
  "yarn": (("factor", "original_max_position_embeddings"),
           ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")),
}  # fmt: skip


def check(scaling: dict) -> None:
  """Refuses a wrong `model.rope_scaling`.

  Raises:
    ConfigError: its type or a key is unknown, a key is missing, or a value cannot be.
  """
  if not scaling:
    return
  kind, path = scaling.get("type"), "model.rope_scaling"
  if kind not in KEYS:
    raise ConfigError(f"{path}.type={kind!r} is not one of {', '.join(KEYS)}{_hint(str(kind), KEYS)}")
  needed, more = KEYS[kind]
  for key, value in scaling.items():
    if key not in ("type", *needed, *more):
      raise ConfigError(f"{path} of type {kind} has an unknown key {key!r}{_hint(key, (*needed, *more))}")
    if key == "truncate" and type(value) is not bool:
      raise ConfigError(f"{path}.truncate={value!r} must be true or false")
    if key not in ("type", "truncate") and (type(value) not in (int, float) or not 0 < value < math.inf):
      raise ConfigError(f"{path}.{key}={value!r} must be a number above 0")
  missing = [key for key in needed if key not in scaling]
  if missing:
    raise ConfigError(f"{path} of type {kind} has no {missing[0]}; it needs {', '.join(needed)}")
  if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
    raise ConfigError(
      f"{path}.low_freq_factor={scaling['low_freq_factor']} must be below high_freq_factor={scaling['high_freq_factor']}"
    )
  fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
  if kind == "yarn" and slow > fast:
    raise ConfigError(f"{path}.beta_slow={slow} must not be above beta_fast={fast}")


def _hint(key: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(key, list(known), 1)
  return f"; did you mean {near[0]!r}?" if near else ""


def frequencies(theta: float, dim: int, scaling: dict) -> tuple[np.ndarray, float]:
  """Radians that each pair turns by a position, float32 [dim / 2], and the factor of cosine and sine.

  Without scaling pair i turns by theta**(-2i/dim). Scaled by

    linear  all turn slower by `factor` (Chen et al., arXiv 2306.15595);
    llama3  those do that turn less than `low_freq_factor` times in the original length, those that turn more than
            `high_freq_factor` times do not, and between the two the share is linear (Llama 3.1, arXiv 2407.21783);
    yarn    the same between `beta_slow` and `beta_fast` turns, linear in the number of the pair, whose bounds are
            rounded outwards unless `truncate` is false; cosine and sine have a factor (Peng et al., arXiv 2309.00071):
            `attention_factor`, or 1 + ln(factor) / 10, or DeepSeek's ratio of that with `mscale` and `mscale_all_dim`.
  """
  inverse = theta ** (-np.arange(0, dim, 2) / dim)
  kind, factor, scale = scaling.get("type"), scaling.get("factor", 1.0), 1.0
  kept = np.float64(1)  # share of each frequency that is not scaled
  if kind == "linear":
    kept = np.float64(0)
  elif kind == "llama3":
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
  elif kind == "yarn":
    pair = lambda turns: (  # the pair, a real number, that turns so often in the original length  # noqa: E731
      dim * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * turns)) / (2 * math.log(theta))
    )
    first, last = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    kept = 1 - np.clip((np.arange(dim // 2) - first) / (last - first or 1e-3), 0, 1)
    scale = scaling.get("attention_factor") or _yarn_factor(scaling)
  return (inverse * kept + inverse / factor * (1 - kept)).astype(np.float32), float(scale)


def _yarn_factor(scaling: dict) -> float:
  mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if mscale and all_dim:
    return _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], all_dim)
  return _mscale(scaling["factor"], 1)


def _mscale(factor: float, weight: float) -> float:
  return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def logit_factor(scaling: dict) -> float:
  """Factor of the logits of latent attention: DeepSeek's second use of `mscale_all_dim`; 1 where there is none."""
  all_dim = scaling.get("mscale_all_dim")
  return _mscale(scaling["factor"], all_dim) ** 2 if all_dim else 1.0


def rotate(x_btnh: jax.Array, positions_bt: jax.Array, inv_freq: np.ndarray, factor: float = 1.0) -> jax.Array:
  """Of the last 2F dimensions of a head, pairs (i, i + F) turn by position * inv_freq [F], times factor.

  The dimensions before them stay as they are. In float32, returned in the dtype of x.
  """
  angle = positions_bt[..., None, None] * jnp.asarray(inv_freq, jnp.float32)
  before = ((0, 0),) * 3 + ((x_btnh.shape[-1] - 2 * len(inv_freq), 0),)
  twice = lambda y, still: jnp.pad(jnp.concatenate([y, y], -1), before, constant_values=still)  # noqa: E731
  return _turned(len(inv_freq), x_btnh, twice(factor * jnp.cos(angle), 1.0), twice(factor * jnp.sin(angle), 0.0))


@functools.partial(kernels.custom_vjp, nondiff_argnums=(0,))
def _turned(pairs: int, x_btnh: jax.Array, cos_bt1h: jax.Array, sin_bt1h: jax.Array) -> jax.Array:
  """x * cos + (x, its pairs swapped, the first with a minus) * sin.

  The swap is a product with a matrix of zeros and ones, which is exact: slices and concatenations of some of the lanes
  are passes through HBM of their own on a TPU, where a product has what follows it in its epilogue.
  """
  first = x_btnh.shape[-1] - 2 * pairs + np.arange(pairs)
  swap = np.zeros((x_btnh.shape[-1],) * 2, x_btnh.dtype)  # [from, to]
  swap[first + pairs, first], swap[first, first + pairs] = -1, 1
  swapped = jnp.einsum("btnh,hi->btni", x_btnh, swap, precision=kernels.precision(x_btnh),
                       preferred_element_type=jnp.float32)  # fmt: skip
  return (x_btnh.astype(jnp.float32) * cos_bt1h + swapped * sin_bt1h).astype(x_btnh.dtype)


def _turned_bwd(pairs: int, turn: tuple[jax.Array, jax.Array], g: jax.Array) -> Any:
  # Behind the barrier: what makes g, the sum of many partial ones, would be fused into both of its uses.
  return _turned(pairs, jax.lax.optimization_barrier(g), turn[0], -turn[1]), None, None


_turned.defvjp(lambda pairs, x, cos, sin: (_turned(pairs, x, cos, sin), (cos, sin)), _turned_bwd)
