"""Muon's orthogonal updates: Optax's Newton-Schulz iterations, on matrices that are whole on a device."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import lax

from maxscale.models.module import ParamSpec, Tree, flatten, nest
from maxscale.optim.matrices import dimensions, size
from maxscale.sharding.rules import Rules


def applies(spec: ParamSpec) -> bool:
  """Whether Muon is for this parameter: matrices of layers, without routers; not embedding, head, norms and biases."""
  return bool(spec.rows) and dimensions(spec).is_matrix and spec.path.rpartition("/")[2] != "router"


def orthogonalize(
  specs: dict[str, ParamSpec], dtype: str, mesh: jax.sharding.Mesh | None, rules: Rules | None
) -> optax.GradientTransformation:
  """Each matrix U S V' of the parameters in `specs` becomes about U V', times 0.2 sqrt(max(inputs, outputs)).

  That factor gives it the root mean square that AdamW's updates have, whose learning rates thus carry over (Liu et al.,
  arXiv 2502.16982). The iterations multiply in `dtype`. On a mesh, updates are in role state, and the devices that
  split them share the work: sharding.state (ZeRO-1) divides it over replicas, too.
  """

  def run(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    if rules is None:
      return {path: _newton_schulz(specs[path], x) for path, x in flat.items()}
    return {path: _newton_schulz_on_shards(specs[path], x, rules) for path, x in flat.items()}

  def update(updates: Any, params: Any) -> Tree:
    del params
    flat, f = flatten(updates), run
    if mesh is not None and rules is not None:
      where = {path: rules.spec(spec.names, "state") for path, spec in specs.items()}
      f = jax.shard_map(run, mesh=mesh, in_specs=(where,), out_specs=where, check_vma=False)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
      done = f({path: flat[path].reshape(spec.shape).astype(dtype) for path, spec in specs.items()})
    for path, x in done.items():
      d = dimensions(specs[path])
      scale = 0.2 * max(size(specs[path], d.inputs), size(specs[path], d.outputs)) ** 0.5
      flat[path] = scale * x.reshape(flat[path].shape).astype(flat[path].dtype)
    return nest(flat)

  return optax.stateless(update)


def _newton_schulz(spec: ParamSpec, x: jax.Array) -> jax.Array:
  """Newton-Schulz on whole matrices, [*batch, *inputs, *outputs]."""
  optimizer = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)  # without momentum that is all that it does

  def f(matrix: jax.Array) -> Any:
    return optimizer.update(matrix, optimizer.init(matrix))[0]

  d = dimensions(spec)
  for _ in d.batch:  # not Optax's own batch: it has one dimension, in which layers and experts could not both be split
    f = jax.vmap(f)
  batch, inputs = x.shape[: len(d.batch)], math.prod(x.shape[dim] for dim in d.inputs)
  return f(x.reshape(*batch, inputs, -1)).reshape(x.shape)


def _newton_schulz_on_shards(spec: ParamSpec, x: jax.Array, rules: Rules) -> jax.Array:
  """The same of a device's part of each matrix: it exchanges that for the whole of some of them, and back.

  Each mesh axis that splits the matrices splits the batch of them instead: experts or layers where they divide,
  otherwise layers, with zeros for those that are missing. The iterations then need no communication.
  """
  d, moved = dimensions(spec), []
  for dim in (*d.inputs, *d.outputs):
    name = spec.names[dim]
    for axis in reversed(rules.split(name, "state") if name else ()):
      n = rules.sizes[axis]
      to = next((b for b in reversed(d.batch) if x.shape[b] % n == 0), 0)
      moved.append((axis, dim, to, x.shape[to]))
      x = jnp.pad(x, [(0, -x.shape[to] % n if b == to else 0) for b in range(x.ndim)])
      x = lax.all_to_all(x, axis, to, dim, tiled=True)
  y = _newton_schulz(spec, x)
  for axis, dim, to, length in reversed(moved):
    y = lax.slice_in_dim(lax.all_to_all(y, axis, dim, to, tiled=True), 0, length, axis=to)
  return y
