"""The one place where a logical name becomes a constraint: models call `constrain` and know nothing of meshes."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxscale.sharding.rules import Rules

Names = Sequence[str | None]
_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Within it, and in what is traced within it, logical names mean these rules on this mesh."""
  token = _active.set((mesh, rules))
  try:
    yield
  finally:
    _active.reset(token)


def constrain(x: jax.Array, names: Names, role: str = "compute") -> jax.Array:
  """Shards x by the logical names of its dimensions; without a mesh, x itself."""
  active = _active.get()
  if active is None:
    return x
  mesh, rules = active
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(names, role)))


class Gradient(tuple):
  """Names of a parameter's gradient as a result of `on_shards`: f returns what `reduce_gradient` makes of it."""


def on_shards(f: Callable, in_names: Any, out_names: Any) -> Callable:
  """f run on each device's shard (role compute) of its arguments; without a mesh, f itself.

  `in_names` is a tuple with the names of each argument, `out_names` those of the result (a tuple of them for several).
  f must reduce over the mesh axes that it sums over itself, with `psum` or `reduce_gradient`.
  """
  active = _active.get()
  if active is None:
    return f
  mesh, rules = active

  def spec(names: Names) -> PartitionSpec:
    if isinstance(names, Gradient):
      return PartitionSpec(*((*mesh_axes(n), *_scattered(n)) or None if n else None for n in names))
    return rules.spec(names, "compute")

  many = bool(out_names) and isinstance(out_names[0], tuple)
  out_specs = tuple(spec(n) for n in out_names) if many else spec(out_names)
  in_specs = tuple(spec(n) for n in in_names)
  return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_axes(name: str) -> tuple[str, ...]:
  """Mesh axes of more than one device that a logical axis is split over in role compute."""
  active = _active.get()
  return () if active is None else tuple(a for a in active[1].axes(name, "compute") if active[1].sizes[a] > 1)


def parts(name: str) -> int:
  """Devices that a logical axis is split over in role compute."""
  active = _active.get()
  return 1 if active is None else active[1].factor(name, "compute")


def psum(x: jax.Array, name: str) -> jax.Array:
  """Inside `on_shards`: the sum over the devices that the logical axis is split over."""
  return jax.lax.psum(x, mesh_axes(name)) if mesh_axes(name) else x


def reduce_gradient(x: jax.Array, names: Names) -> jax.Array:
  """Inside `on_shards`: the sum of a parameter's gradient over the devices that hold different tokens.

  Where role param splits a dimension over some of these devices, each receives only its part: a reduce-scatter, and
  no device holds the whole. The result belongs to an output that is named `Gradient(names)`.
  """
  over = [*mesh_axes("batch"), *mesh_axes("length")]
  for dim, name in enumerate(names):
    for axis in _scattered(name) if name else ():
      x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
      over.remove(axis)
  return jax.lax.psum(x, tuple(over)) if over else x


def _scattered(name: str) -> tuple[str, ...]:
  """Mesh axes that split the batch in role compute, and this axis of parameters in role param."""
  active = _active.get()
  if active is None:
    return ()
  tokens = (*mesh_axes("batch"), *mesh_axes("length"))
  return tuple(a for a in active[1].axes(name, "param") if a in tokens and a not in mesh_axes(name))


def pmax(x: jax.Array, name: str) -> jax.Array:
  """Inside `on_shards`: the maximum over the devices that the logical axis is split over."""
  return jax.lax.pmax(x, mesh_axes(name)) if mesh_axes(name) else x


def shard_index(name: str) -> jax.Array | int:
  """Inside `on_shards`: which part of the logical axis this device holds."""
  return jax.lax.axis_index(mesh_axes(name)) if mesh_axes(name) else 0


def platform() -> str:
  """Platform that the program is compiled for: the mesh's (which may not be here), or this process's."""
  active = _active.get()
  return active[0].devices.flat[0].platform if active else jax.default_backend()
