"""Sampling with a key-value cache: one program for the prompt, one scan for the rest."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maxscale.models import decoder
from maxscale.models.module import Tree
from maxscale.sharding import context


def sample(
  program: Any, params: Tree, prompt: np.ndarray, tokens: int, temperature: float, seed: int, stop: int = -1
) -> np.ndarray:
  """Continues a prompt. Every device computes the whole sequence, with parameters that it gathers a layer at a time.

  Args:
    program, params: a step.Program for sampling (`Program.for_sampling`), and the decoder's parameters on it.
    prompt: int [P], at least one token.
    tokens: how many to add.
    temperature: 0 takes the most likely token, 1 samples from the model's distribution.
    seed: of the sampling; token i depends on (seed, i).
    stop: a token that ends the text, or -1.

  Returns:
    int32 [up to `tokens`]: the new tokens, without the stop token.
  """
  f = functools.partial(_sample, program.skeleton, tokens, temperature)
  specs, whole = program.param_specs("state"), PartitionSpec()
  run = jax.jit(context.on_mesh(f, program.mesh, program.rules, (specs, whole, whole), whole))
  out = np.asarray(run(params, jnp.asarray(prompt, jnp.int32)[None], jax.random.key(seed)))
  ends = np.flatnonzero(out == stop)
  return out[: ends[0]] if len(ends) else out


def _sample(skeleton: Any, tokens: int, temperature: float, params: Tree, prompt: jax.Array, key: jax.Array) -> Any:
  model = skeleton.merge(params)
  length, layers = prompt.shape[1], jnp.arange(model.shape.L - model.shape.L_dense)

  def forward(ids: jax.Array, first: jax.Array | int, cache: Any) -> tuple[jax.Array, Any]:
    positions = first + jnp.arange(ids.shape[1])[None]
    batch = {"tokens": ids, "segments": jnp.ones_like(ids), "positions": positions}
    x, _, before = model.embed(batch, cache=cache[0])
    x, _, after = model.run_layers(x, layers, batch, cache=cache[1])
    return model.logits(x[:, -1:])[0, 0], (before, after)

  def pick(logits: jax.Array, i: jax.Array) -> jax.Array:
    if temperature == 0:
      return jnp.argmax(logits)
    return jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)

  def step(carry: Any, i: jax.Array) -> Any:
    logits, cache = carry
    token = pick(logits, i).astype(jnp.int32)
    return forward(token[None, None], length + i, cache), token

  cache = decoder.empty_cache(model.shape, 1, length + tokens)
  start = forward(prompt, 0, cache)
  return jax.lax.scan(step, start, jnp.arange(tokens))[1]
