"""Parameters: declared in NNX modules, one nested dict outside of them.

A module declares each parameter with its shape, the names of its dimensions and how it starts; it never creates an
array. `Skeleton` splits a module once: the graph that `apply` needs, and a `ParamSpec` for each path.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Tree = dict[str, Any]
ADAPTERS = ("_a", "_b")  # how the names of the thin matrices beside an adapted weight end


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """A parameter. `shape` is padded, `logical` is what the disk and fingerprints see.

  `rows`: where dimension 0 stacks layers, the layer in each row (pipeline stages interleave them); empty elsewhere.
  `trained`: whether it has a gradient and an optimizer's state.
  """

  path: str
  shape: tuple[int, ...]
  logical: tuple[int, ...]
  names: tuple[str | None, ...]
  dtype: str
  std: float | None  # of the truncated normal it starts from; None: it starts as ones
  rows: tuple[int, ...]
  trained: bool = True


def param(
  shape: Sequence[int], names: Sequence[str | None], std: float | None, logical: Sequence[int] = (), inputs: int = 0,
  trained: bool = True,
) -> nnx.Param:  # fmt: skip
  """Declares a parameter of a module.

  Args:
    shape, names: of its dimensions, padding included.
    std: of the values that it starts from; None: ones, 0: zeros.
    logical: the shape without padding, where there is some.
    inputs: of the weight of a product, how many leading dimensions (behind experts) the product sums over.
    trained: False where something else than the optimizer changes it.
  """
  return nnx.Param(
    jax.ShapeDtypeStruct(tuple(shape), jnp.float32),
    names=tuple(names), std=std, logical=tuple(logical or shape), inputs=inputs, trained=trained,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A module without its arrays: `merge(params)` gives it back with them; with some of them, for what needs no more."""

  graph: Any
  abstract: nnx.State
  specs: dict[str, ParamSpec]

  def merge(self, params: Tree) -> Any:
    state = jax.tree.map(lambda x: x, self.abstract)  # a copy: the replacement below is in place
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(self.graph, state)


def split(
  module: nnx.Module, dtype: str, stacks: dict[str, tuple[tuple[int, ...], str | None]], trained: Callable[[str], bool]
) -> Skeleton:
  """Splits a module.

  Args:
    stacks: name of a child whose parameters are stacked -> the layer in each row, and the name of that dimension.
    trained: of a path, whether the parameter may be trained.
  """
  graph, abstract = nnx.split(module)
  specs = {}
  for keys, variable in nnx.to_flat_state(abstract):
    path, meta = "/".join(map(str, keys)), variable.get_metadata()
    rows, name = stacks.get(str(keys[0]), ((), None))
    lead, names = ((len(rows),), (name,)) if rows else ((), ())
    shape = lead + tuple(variable.get_value().shape)
    specs[path] = ParamSpec(path, shape, lead + meta["logical"], names + meta["names"], dtype, meta["std"], rows,
                            meta["trained"] and trained(path))  # fmt: skip
  return Skeleton(graph, abstract, specs)


def nest(flat: dict[str, Any]) -> Tree:
  """{"a/b": x} -> {"a": {"b": x}}."""
  out: Tree = {}
  for path, value in flat.items():
    node, keys = out, path.split("/")
    for key in keys[:-1]:
      node = node.setdefault(key, {})
    node[keys[-1]] = value
  return out


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
  """The inverse of `nest`."""
  out = {}
  for key, value in tree.items():
    out.update(flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value})
  return out


def path_key(seed: int, path: str) -> jax.Array:
  """The key of a path: it depends on the name alone, so that adding a parameter changes no other."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


def initialise(spec: ParamSpec, seed: int) -> jax.Array:
  """The starting value: a function of (seed, path, layer), whatever the stacking, sharding and padding."""
  dtype = jnp.dtype(spec.dtype)

  def one(shape: tuple[int, ...], layer: jax.Array) -> jax.Array:
    if spec.std is None:
      return jnp.ones(shape, dtype)
    key = jax.random.fold_in(path_key(seed, spec.path), layer)
    # 0.8796 is the standard deviation of a normal truncated at two
    return (spec.std / 0.87962566 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)).astype(dtype)

  if spec.rows:
    value = jax.vmap(lambda layer: one(spec.logical[1:], layer))(jnp.asarray(spec.rows, jnp.int32))
  else:
    value = one(spec.logical, jnp.int32(0))
  return jnp.pad(value, [(0, p - n) for p, n in zip(spec.shape, spec.logical)])


def count(specs: dict[str, ParamSpec]) -> int:
  """Parameters, padding not counted."""
  return sum(math.prod(s.logical) for s in specs.values())


def map_specs(f: Callable[[ParamSpec], Any], specs: dict[str, ParamSpec]) -> Tree:
  """The nested dict of f(spec)."""
  return nest({path: f(spec) for path, spec in specs.items()})
