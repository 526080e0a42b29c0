"""What a checkpoint holds: leaves, the layers in their rows, and which device owns which part of an array.

An array of the state is a *leaf*. The thing that training updates is a *parameter*, one value for each layer (a
parameter outside the layer stack has one layer, 0). Which leaf and row hold which layer is a matter of stacking and of
pipeline order; disk and fingerprints are addressed by (parameter, layer), so either side may change.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from maxscale.errors import UserError

Region = tuple[tuple[int, int], ...]  # (start, stop) of each dimension


class CheckpointError(UserError):
  """A checkpoint that cannot be written or read. The message names what failed and says what to change."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of the state.

  Attributes:
    path: where it is in the state, e.g. "params/layers/attention/query".
    logical_shape: shape on disk and in fingerprints.
    padded_shape: shape in memory; the padding is at the end of each dimension, and zero.
    dtype: of the array.
    sharding: of the array in memory.
    layer_dims: leading dimensions that count layers: 0 (one layer or none), 1 ([L, ...]), 2 ([stages, L/stages, ...]).
    rows: the layer in each row (rows counted over the layer dimensions in C order); empty: 0, 1, 2, ...
    parameter: name that stays the same whatever the stacking; empty: the path.
  """

  path: str
  logical_shape: tuple[int, ...]
  padded_shape: tuple[int, ...]
  dtype: np.dtype
  sharding: NamedSharding
  layer_dims: int = 0
  rows: tuple[int, ...] = ()
  parameter: str = ""

  def __post_init__(self):
    object.__setattr__(self, "dtype", np.dtype(self.dtype))
    object.__setattr__(self, "parameter", self.parameter or self.path)
    object.__setattr__(self, "rows", self.rows or tuple(range(math.prod(self.logical_shape[: self.layer_dims]))))
    if len(self.rows) != math.prod(self.logical_shape[: self.layer_dims]):
      raise CheckpointError(f"{self.path}: {len(self.rows)} rows, but its layer dimensions hold {self.logical_shape}")

  @property
  def layer_shape(self) -> tuple[int, ...]:
    """Logical shape of one layer."""
    return self.logical_shape[self.layer_dims :]

  @property
  def padded(self) -> bool:
    return self.logical_shape != self.padded_shape


@functools.lru_cache(maxsize=4096)
def owners(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[Any, Region]:
  """The device that writes each distinct shard of an array (the first of its replicas), and the shard's region.

  Every process computes the same answer, so nothing has to be agreed.
  """
  first: dict[Region, Any] = {}
  for device, index in sharding.devices_indices_map(shape).items():
    first.setdefault(region(index, shape), device)
  return {device: where for where, device in first.items()}


def region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def clip(where: Region, shape: tuple[int, ...]) -> Region:
  """The part of a region that is inside a shape; some start equals its stop where there is none."""
  return tuple((min(a, n), min(b, n)) for (a, b), n in zip(where, shape))


def slices(where: Region) -> tuple[slice, ...]:
  return tuple(slice(a, b) for a, b in where)


def size(where: Region) -> int:
  return math.prod(b - a for a, b in where)


def layers_in(leaf: Leaf, where: Region) -> np.ndarray:
  """Layer of each row of a region of the padded array, in C order, int [rows]; -1 in rows that are padding."""
  table = np.full(leaf.padded_shape[: leaf.layer_dims], -1)
  lead = leaf.logical_shape[: leaf.layer_dims]
  table[tuple(slice(n) for n in lead)] = np.reshape(leaf.rows, lead)
  return table[slices(where[: leaf.layer_dims])].reshape(-1)


def layer_counts(leaves: tuple[Leaf, ...]) -> dict[str, int]:
  """Parameter -> its number of layers (the highest one in the leaves, plus one)."""
  counts: dict[str, int] = {}
  for leaf in leaves:
    counts[leaf.parameter] = max(counts.get(leaf.parameter, 0), max(leaf.rows) + 1)
  return counts


def flatten(state: dict[str, Any]) -> dict[str, jax.Array]:
  """Nested dict -> {"params/layers/attention/query": array}."""
  out = {}
  for key, value in state.items():
    out |= {f"{key}/{k}": v for k, v in flatten(value).items()} if isinstance(value, dict) else {key: value}
  return out


def unflatten(arrays: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  out: dict[str, Any] = {}
  for path, value in arrays.items():
    *folders, name = path.split("/")
    node = out
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = value
  return out


def arrays_of(state: dict[str, Any], leaves: tuple[Leaf, ...]) -> list[jax.Array]:
  """The arrays of the leaves, in their order.

  Raises:
    CheckpointError: state and leaves do not describe the same arrays.
  """
  arrays, known = flatten(state), {leaf.path for leaf in leaves}
  if arrays.keys() != known:
    raise CheckpointError(
      f"the leaves do not describe the state: only in the state {sorted(arrays.keys() - known)}, "
      f"only in the leaves {sorted(known - arrays.keys())}"
    )
  for leaf in leaves:
    x = arrays[leaf.path]
    if x.shape != leaf.padded_shape or x.dtype != leaf.dtype or not x.sharding.is_equivalent_to(leaf.sharding, x.ndim):
      raise CheckpointError(
        f"{leaf.path} is {x.dtype}{x.shape} {x.sharding}, but its leaf says "
        f"{leaf.dtype}{leaf.padded_shape} {leaf.sharding}"
      )
  return [arrays[leaf.path] for leaf in leaves]
