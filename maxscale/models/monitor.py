"""What is looked at, and mended, layer by layer: gradient norms, update over weight, and QK-clip."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxscale.models.module import Tree, flatten, nest
from maxscale.models.parts import Shape


def layers(old: Tree, new: Tree, grads: Tree, order: np.ndarray) -> Tree:
  """Of each layer of the stack `layers`, float32 [L]: the norm of its gradient, and that of its update over its own.

  Args:
    old, new, grads: trained parameters before and after a step, and their gradients. order: row of each layer.
  """

  def norms(tree: Tree) -> jax.Array:
    squares = [jnp.square(x.astype(jnp.float32)).reshape(len(x), -1).sum(-1) for x in jax.tree.leaves(tree["layers"])]
    return jnp.sqrt(sum(squares))[order]

  update = norms(jax.tree.map(jnp.subtract, {"layers": new["layers"]}, {"layers": old["layers"]}))
  return {"layer_grad_norm": norms(grads), "layer_update_ratio": update / jnp.maximum(norms(old), 1e-30)}


def qk_clip(shape: Shape, limit: float, params: Tree, largest: dict[str, jax.Array]) -> Tree:
  """Shrinks the query and key weights of heads whose largest logit is above the limit, so that it would be the limit.

  Kimi Team, arXiv 2507.20534, section 2.1: with latent attention the parts of queries and keys without rotary
  embedding are shared out as the square root each, and the rotary query takes all, as its key serves all heads. Without
  it keys serve several heads, too, and the queries take all.

  Args:
    limit: 0: nothing is done.
    largest: stack (`layers`, `dense_layers`) -> [rows, N_pad].
  """
  if not limit:
    return params
  flat = flatten(params)
  for stack, logits in largest.items():
    # after a step that was skipped logits may be no numbers; they say nothing of the weights
    factor = jnp.where(jnp.isfinite(logits), jnp.minimum(1.0, limit / jnp.maximum(logits, 1e-30)), 1.0)
    for path, scale in _scales(shape, factor).items():
      if f"{stack}/attention/{path}" in flat:
        flat[f"{stack}/attention/{path}"] *= scale
  return nest(flat)


def _scales(shape: Shape, factor: jax.Array) -> dict[str, jax.Array]:
  """Parameter -> what it is multiplied by, for factors [rows, N_pad] of the logits."""
  mla = shape.m.mla
  if not mla.kv_rank:
    return {"query": factor[:, None, :, None], "query_bias": factor[:, :, None]}

  def heads(nope: jax.Array, rest: jax.Array, width: int) -> Any:  # [rows, 1, N_pad, nope_dim + width]
    parts = [jnp.broadcast_to(f[..., None], (*f.shape, n)) for f, n in ((nope, mla.nope_dim), (rest, width))]
    return jnp.concatenate(parts, -1)[:, None]

  query = heads(jnp.sqrt(factor), factor, mla.rope_dim)
  return {"query_up": query, "query": query, "kv_up": heads(jnp.sqrt(factor), jnp.ones_like(factor), mla.v_dim)}
