"""Which dimensions of a parameter make a matrix: a stack of layers, or of experts, is a batch of matrices."""

from __future__ import annotations

import dataclasses
import math

from maxscale.models.module import ParamSpec


@dataclasses.dataclass(frozen=True)
class Dimensions:
  """Numbers of a parameter's dimensions: [*batch, *inputs, *outputs]. A vector has no inputs."""

  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def is_matrix(self) -> bool:
    return bool(self.inputs)


def dimensions(spec: ParamSpec) -> Dimensions:
  """The dimensions of a parameter; heads and what is inside a head are one dimension of a matrix."""
  stacked = int(bool(spec.rows))
  batch = stacked + (spec.names[stacked : stacked + 1] == ("experts",))
  groups: list[tuple[int, ...]] = []
  for dim in range(batch, len(spec.names)):
    if groups and spec.names[dim] == "head_dim":
      groups[-1] += (dim,)
    else:
      groups.append((dim,))
  assert len(groups) <= 2, f"{spec.path} {spec.names} is neither vector nor matrix"
  inputs, outputs = ((), (), *groups)[-2:]
  return Dimensions(tuple(range(batch)), inputs, outputs)


def size(spec: ParamSpec, dims: tuple[int, ...]) -> int:
  """Elements along some dimensions, padding not counted."""
  return math.prod(spec.logical[dim] for dim in dims)
