"""Adafactor's scaling. Optax's factors the two largest dimensions, which in a stack may be layers and experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxscale.models.module import ParamSpec, Tree, flatten, nest
from maxscale.optim.matrices import dimensions, size

TINY = 1e-30  # keeps the roots of zeros finite
CLIP = 1.0  # largest root mean square of a matrix's update


class FactoredState(NamedTuple):
  """Second moments: of matrices the means of rows and of columns, of vectors all. [*batch, *inputs] and so on."""

  count: jax.Array
  v_row: Tree
  v_col: Tree
  v: Tree


def scale_by_factored_rms(specs: dict[str, ParamSpec], b2: float) -> optax.GradientTransformation:
  """Gradients over the roots of their factored second moments, clipped matrix by matrix.

  Shazeer and Stern, arXiv 1804.04235, with the decay 1 - t**-0.8 held below b2 as in Zhai et al., arXiv 2106.04560.
  Means are over logical sizes, so that no number depends on the padding.
  """
  parts = {path: dimensions(spec) for path, spec in specs.items()}
  matrices = [path for path, d in parts.items() if d.is_matrix]
  vectors = [path for path in specs if path not in matrices]

  def mean(path: str, x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, dims, keepdims=True) / size(specs[path], dims)

  def init(params: Any) -> FactoredState:
    del params
    rest = lambda path, dims: [n for dim, n in enumerate(specs[path].shape) if dim not in dims]  # noqa: E731
    return FactoredState(
      jnp.zeros((), jnp.int32),
      nest({path: jnp.zeros(rest(path, parts[path].outputs)) for path in matrices}),
      nest({path: jnp.zeros(rest(path, parts[path].inputs)) for path in matrices}),
      nest({path: jnp.zeros(specs[path].shape) for path in vectors}),
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Tree, FactoredState]:
    del params
    count = state.count + 1
    decay = jnp.minimum(b2, 1 - count.astype(jnp.float32) ** -0.8)
    rows, columns, whole = flatten(state.v_row), flatten(state.v_col), flatten(state.v)
    out = {}
    for path, gradient in flatten(updates).items():
      d, g = parts[path], gradient.reshape(specs[path].shape)
      square, root = g * g, lambda x: jax.lax.rsqrt(jnp.maximum(x, TINY))
      if d.is_matrix:
        row = decay * jnp.expand_dims(rows[path], d.outputs) + (1 - decay) * mean(path, square, d.outputs)
        column = decay * jnp.expand_dims(columns[path], d.inputs) + (1 - decay) * mean(path, square, d.inputs)
        rows[path], columns[path] = row.squeeze(d.outputs), column.squeeze(d.inputs)
        u = g * root(row / jnp.maximum(mean(path, row, d.inputs), TINY)) * root(column)
      else:
        whole[path] = decay * whole[path] + (1 - decay) * square
        u = g * root(whole[path])
      u /= jnp.maximum(1, jnp.sqrt(mean(path, u * u, d.inputs + d.outputs)) / CLIP)
      out[path] = u.reshape(gradient.shape)
    return nest(out), FactoredState(count, nest(rows), nest(columns), nest(whole))

  return optax.GradientTransformation(init, update)
