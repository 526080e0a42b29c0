"""Communication by logical name: inside the one `shard_map` of a step, models call these and know nothing of meshes.

A step is manual over the whole mesh: model code works on the shards of one device and reads as if it were alone. Two
layouts of activations exist. RESIDUAL, [batch, residual_length, embed], is where norms, routers and sums live: there
every value, and every cotangent, is complete. Between `gather` and `reduce` lies a region whose weights are split
(heads, mlp or vocab): there activations are [batch, length, ...], outputs and cotangents are partial sums over the
devices that split them, and only `reduce` (forward) and the transpose of `gather` (backward) complete them. Without a
mesh every function here does nothing, and the same code is the one-device program.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from maxscale.sharding import channels
from maxscale.sharding.rules import TOKENS, Rules

channels.use_own()

Names = Sequence[str | None]
custom_vjp: Any = jax.custom_vjp  # its own type loses the signature behind a partial
_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Within it, and in what is traced within it, logical names mean these rules on this mesh."""
  token = _active.set((mesh, rules))
  try:
    yield
  finally:
    _active.reset(token)


def on_mesh(f: Callable, mesh: Mesh, rules: Rules, in_specs: Any, out_specs: Any) -> Callable:
  """f run by every device on its own shards, with the functions of this module at work inside."""

  def shard(*args: Any) -> Any:
    with use(mesh, rules):
      return f(*args)

  return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# ---- what a device is


def mesh_axes(name: str, role: str = "compute") -> tuple[str, ...]:
  """Mesh axes of more than one device that a logical axis is split over."""
  active = _active.get()
  return () if active is None else active[1].split(name, role)


def parts(name: str) -> int:
  """Devices that a logical axis is split over in role compute."""
  active = _active.get()
  return 1 if active is None else active[1].factor(name, "compute")


def shard_index(name: str) -> jax.Array | int:
  """Which part of the logical axis this device holds."""
  return lax.axis_index(mesh_axes(name)) if mesh_axes(name) else 0


def platform() -> str:
  """Platform that the program is compiled for: the mesh's (which may not be here), or this process's."""
  active = _active.get()
  return active[0].devices.flat[0].platform if active else jax.default_backend()


# ---- sums and maxima that have no gradient, or whose gradient the caller makes


def psum(x: Any, name: str) -> Any:
  """The sum over the devices that the logical axis is split over."""
  return lax.psum(x, mesh_axes(name)) if mesh_axes(name) else x


def pmax(x: jax.Array, name: str) -> jax.Array:
  """The maximum over the devices that the logical axis is split over."""
  return lax.pmax(x, mesh_axes(name)) if mesh_axes(name) else x


# ---- activations


def _sequence_axes() -> tuple[str, ...]:
  """Mesh axes that split the residual stream's sequences but not those inside blocks."""
  return mesh_axes("residual_length")[len(mesh_axes("length")) :]


def _rest(name: str) -> tuple[str, ...]:
  return tuple(a for a in mesh_axes(name) if a not in _sequence_axes())


@functools.partial(custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, name: str) -> jax.Array:
  """[b, residual_length, ...] -> [b, length, ...], into a region whose weights are split along `name`.

  Its transpose sums the cotangents, which are partial there, and gives each device its part of the sequence.
  """
  axes = _sequence_axes()
  return lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


@functools.partial(custom_vjp, nondiff_argnums=(1,))
def reduce(x: jax.Array, name: str) -> jax.Array:
  """[b, length, ...], partial sums over the devices that split `name` -> [b, residual_length, ...], complete."""
  axes, rest = _sequence_axes(), _rest(name)
  x = lax.psum(x, rest) if rest else x
  return lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) if axes else x


gather.defvjp(lambda x, name: (gather(x, name), None), lambda name, _, dy: (reduce(dy, name),))
reduce.defvjp(lambda x, name: (reduce(x, name), None), lambda name, _, dy: (gather(dy, name),))


@functools.partial(custom_vjp, nondiff_argnums=(1,))
def spread(x: jax.Array, name: str) -> jax.Array:
  """A parameter that all devices of a region have the same of, ready for use inside it: each of them has a part of its
  gradient, and this sums what the sum over tokens does not."""
  return x


spread.defvjp(lambda x, name: (x, None), lambda name, _, dy: (lax.psum(dy, _rest(name)) if _rest(name) else dy,))


@custom_vjp
def whole_length(x: Any) -> Any:
  """Sums over this device's part of the residual stream -> over the places of `length`; the gradient is the part's."""
  axes = _sequence_axes()
  return lax.psum(x, axes) if axes else x


whole_length.defvjp(lambda x: (whole_length(x), None), lambda _, dy: (dy,))


def own_part(x: jax.Array) -> jax.Array:
  """[b, length, ...] that every device of the sequence axes holds whole -> its part [b, residual_length, ...]."""
  axes = _sequence_axes()
  if not axes:
    return x
  size = x.shape[1] // lax.axis_size(axes)
  return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, 1)


# ---- parameters and their gradients


def gather_param(x: jax.Array, names: Names, role: str = "param", to: str = "compute") -> jax.Array:
  """A parameter's shard of one role made whole as far as the next role wants it."""
  for dim, axes in enumerate(_more(names, role, to)):
    x = lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x
  return x


def scatter_gradient(x: jax.Array, names: Names, role: str = "param", to: str = "compute") -> jax.Array:
  """The transpose of `gather_param`: a gradient summed over the devices among which the parameter is split."""
  for dim, axes in enumerate(_more(names, role, to)):
    for axis in axes:
      x = _reduce_scatter(x, axis, dim)
  return x


def _reduce_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """The sum over a mesh axis, of which each device keeps its part of a dimension; inside slices before between them.

  Left alone, the TPU compiler sums a reduce-scatter over an axis of both kinds whole inside a slice first, as an
  all-reduce.
  """
  active = _active.get()
  assert active is not None
  slices = active[1].slices.get(axis, 1)
  inside = active[1].sizes[axis] // slices
  if slices == 1 or inside == 1:
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
  shape = x.shape
  ids = [[s * inside + i for i in range(inside)] for s in range(slices)]
  x = x.reshape(*shape[:dim], slices, shape[dim] // slices, *shape[dim + 1 :])
  x = lax.psum_scatter(x, axis, scatter_dimension=dim + 1, axis_index_groups=ids, tiled=True)
  x = lax.psum_scatter(x, axis, scatter_dimension=dim, axis_index_groups=list(zip(*ids)), tiled=True)
  return x.reshape(*shape[:dim], -1, *shape[dim + 1 :])


def _more(names: Names, role: str, to: str) -> list[tuple[str, ...]]:
  """For each dimension, the mesh axes that split it in `role` beyond those of `to`, which they begin with."""
  return [mesh_axes(n, role)[len(mesh_axes(n, to)) :] if n else () for n in names]


def complete_gradients(gradients: dict[str, jax.Array], names: Mapping[str, Names], dtype: str) -> dict[str, jax.Array]:
  """Accumulated gradients, each in role param -> in role state, summed over all devices that hold other tokens.

  Each crosses those devices once a step, after all microbatches: role param's axes were summed and scattered at each
  use (FSDP), role state's are scattered here (ZeRO-1), the others are summed. On the way it is `dtype`.
  """
  out: dict[str, jax.Array] = {}
  groups: dict[tuple[str, ...], list[str]] = {}
  for path, x in gradients.items():
    x = scatter_gradient(x.astype(dtype) if any(_more(names[path], "state", "param")) else x,
                         names[path], "state", "param")  # fmt: skip
    out[path] = x
    groups.setdefault(unsummed(names[path]), []).append(path)
  for axes, paths in groups.items():
    if axes:  # one reduction of many arrays
      out.update(zip(paths, lax.psum([out[p].astype(dtype) for p in paths], axes)))
  return {path: x.astype(gradients[path].dtype) for path, x in out.items()}


def unsummed(names: Names) -> tuple[str, ...]:
  """Mesh axes over which a gradient is still to be summed once role state's axes have been scattered."""
  done = {a for n in names if n for role in ("compute", "param", "state") for a in mesh_axes(n, role)}
  return tuple(dict.fromkeys(a for n in TOKENS for a in mesh_axes(n) if a not in done))


def token_sum(x: Any, residual: bool) -> Any:
  """Partial sums over this device's tokens -> over all tokens; `residual`: they were counted in the residual layout."""
  axes = (*mesh_axes("batch"), *mesh_axes("residual_length" if residual else "length"))
  return lax.psum(x, axes) if axes else x


def token_max(x: jax.Array, residual: bool) -> jax.Array:
  """As `token_sum`, of maxima."""
  axes = (*mesh_axes("batch"), *mesh_axes("residual_length" if residual else "length"))
  return lax.pmax(x, axes) if axes else x


# ---- stages


def stage() -> jax.Array | int:
  """Which stage of the pipeline this device is in."""
  return shard_index("layers")


def from_stage(x: Any, which: int) -> Any:
  """What one stage holds, on every stage."""
  axes = mesh_axes("layers")
  if not axes:
    return x
  mine = stage() == which
  return jax.tree.map(lambda a: lax.psum(jnp.where(mine, a, 0), axes), x)


def to_next_stage(x: Any, step: int) -> Any:
  """Each stage's x to the stage `step` (1 or -1) further on, around the ring."""
  return around(x, mesh_axes("layers"), step)


def around(x: Any, axes: tuple[str, ...], step: int) -> Any:
  """x to the device `step` further on around the ring that these mesh axes are, the first of them outermost."""
  if not axes:
    return x
  active = _active.get()
  assert active is not None
  # ppermute numbers devices in the order of the mesh, whatever the order of its axes (seen in jax 0.10.2)
  in_mesh = [axis for axis in active[0].axis_names if axis in axes]
  numbers = np.arange(math.prod(active[1].sizes[a] for a in axes)).reshape([active[1].sizes[a] for a in in_mesh])
  ring = numbers.transpose([in_mesh.index(axis) for axis in axes]).reshape(-1)
  pairs = list(zip(ring.tolist(), np.roll(ring, -step).tolist()))
  return jax.tree.map(lambda a: lax.ppermute(a, axes, pairs), x)
