"""Which tensor of theirs holds which parameters of ours, and where each is inside it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from maxscale.checkpoint.layout import Region, slices
from maxscale.config import Model
from maxscale.models.family import Family, FamilyError, Link
from maxscale.models.module import ParamSpec

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """What a tensor holds of a parameter: a layer, or one expert of it.

  Attributes:
    path: of the parameter.
    row: of the layer in its stack; 0 where it stacks none.
    expert: number of the expert; -1: all, or there are none.
    shape: of the layer, without the dimension of experts where it is one expert.
  """

  path: str
  row: int
  expert: int
  shape: Shape

  def in_layer(self, where: Region) -> Region:
    """A region of the part as one of the layer."""
    return where if self.expert < 0 else ((self.expert, self.expert + 1), *where)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of theirs and its parts. `pairs`: elements of the link's rotary dimension that are pairs; 0: all."""

  name: str
  link: Link
  parts: tuple[Part, ...]
  pairs: int

  @property
  def shape(self) -> Shape:
    """The shape that it must have."""
    return tuple(sum(self._sizes(group)) for group in self.link.dims[0])

  def _letters(self, part: Part) -> dict[str, int]:
    return dict(zip(self.link.dims[1], part.shape))

  def _sizes(self, group: str) -> list[int]:
    """Sizes along a dimension of theirs: of each part where they follow each other, else of all together."""
    sizes = [math.prod(self._letters(part)[c] for c in group if c != "j") for part in self.parts]
    return sizes if group[0] == "j" else [sizes[0] * (len(sizes) if "j" in group else 1)]

  def view(self, array: np.ndarray, part: int) -> np.ndarray:
    """A part inside the tensor, with our dimensions; never a copy."""
    groups, ours = self.link.dims
    for axis, group in enumerate(groups):
      if group[0] == "j":
        sizes = self._sizes(group)
        array = array[(slice(None),) * axis + (slice(sum(sizes[:part]), sum(sizes[: part + 1])),)]
    letters = "".join(group.removeprefix("j") for group in groups)
    sizes = self._letters(self.parts[part]) | {"j": len(self.parts)}
    array = array.reshape([sizes[c] for c in letters])
    if "j" in letters:
      array = array[(slice(None),) * letters.index("j") + (part,)]
      letters = letters.replace("j", "")
    return array.transpose([letters.index(c) for c in ours])

  def index(self, part: int, where: Region) -> tuple:
    """What of the view of a part a region of ours is, where the order of elements along a dimension differs, too."""
    out: list = list(slices(where))
    for letter in (self.link.rotary, self.link.swapped):
      if letter:
        axis = self.link.dims[1].index(letter)
        out[axis] = self._order(self.parts[part].shape[axis])[out[axis]]
    return tuple(out)

  def _order(self, n: int) -> np.ndarray:
    """Where each of our n elements is in theirs."""
    if self.link.swapped:
      return np.roll(np.arange(n), n // 2)
    pairs = np.arange(n - (self.pairs or n), n)  # side by side there, halves apart here
    return np.concatenate([np.arange(n - len(pairs)), pairs[0::2], pairs[1::2]])


@dataclasses.dataclass(frozen=True)
class Tensors:
  """All tensors of a model. `copies` repeat what `holders` hold; `unlinked` are parameters that no tensor holds."""

  holders: dict[str, Tensor]
  copies: dict[str, Tensor]
  unlinked: list[str]


def tensors(family: Family, specs: Mapping[str, ParamSpec], model: Model) -> Tensors:
  """The tensors of a model.

  Raises:
    FamilyError: the family's links contradict each other.
  """
  holders: dict[str, Tensor] = {}
  copies: dict[str, Tensor] = {}
  held: dict[tuple[str, int, int], str] = {}
  for link in family.links:
    for tensor in _of(link, specs, model):
      if link.copy:
        copies[tensor.name] = tensor
        continue
      twice = next(
        (held[p] for p in map(_key, tensor.parts) if p in held), tensor.name if tensor.name in holders else ""
      )
      if twice:
        raise FamilyError(f"two links of {family.name} say that {tensor.name} and {twice} hold {link.parts}")
      holders[tensor.name] = tensor
      held.update(dict.fromkeys(map(_key, tensor.parts), tensor.name))
  copies = {name: tensor for name, tensor in copies.items() if name not in holders}
  linked = {path for path, _, _ in held}
  return Tensors(holders, copies, sorted(specs.keys() - linked))


def _key(part: Part) -> tuple[str, int, int]:
  return part.path, part.row, part.expert


def _of(link: Link, specs: Mapping[str, ParamSpec], model: Model) -> Iterable[Tensor]:
  for layer in range(model.layers + model.mtp) if "{layer}" in link.theirs else (0,):
    where = [_locate(path, layer, model) for path in link.parts]
    if not all(path in specs and _fits(link, specs[path]) for path, _ in where):
      continue
    for expert in range(_layer(specs[where[0][0]])[0]) if "{expert}" in link.theirs else (-1,):
      parts = tuple(Part(p, row, expert, _layer(specs[p])[expert >= 0 :]) for p, row in where)
      yield Tensor(link.theirs.format(layer=layer, expert=expert), link, parts, _pairs(model))


def _locate(path: str, layer: int, model: Model) -> tuple[str, int]:
  """The path and row that a link's path means in a layer; a path that no model has where it means none."""
  kind, _, rest = path.partition("/")
  dense = model.moe.dense_layers if model.experts else 0
  if kind == "mtp":
    return (path, layer - model.layers) if layer >= model.layers else ("", 0)
  if kind != "layers":
    return path, 0
  if layer >= model.layers:
    return f"mtp/layer/{rest}", layer - model.layers
  return (f"dense_layers/{rest}", layer) if layer < dense else (path, layer - dense)


def _layer(spec: ParamSpec) -> Shape:
  """Logical shape of one layer of a parameter."""
  return spec.logical[bool(spec.rows) :]


def _fits(link: Link, spec: ParamSpec) -> bool:
  return len(link.dims[1]) + ("{expert}" in link.theirs) == len(_layer(spec))


def _pairs(model: Model) -> int:
  return model.mla.rope_dim if model.mla.kv_rank else 0


def summary(names: Iterable[str]) -> str:
  """Names with their numbers gathered: "layers.{0-3}.mlp.up, norm"."""
  groups: dict[str, list[list[int]]] = {}
  for name in names:
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    columns = groups.setdefault(re.sub(r"\d+", "#", name), [[] for _ in numbers])
    for column, number in zip(columns, numbers):
      column.append(number)
  out = []
  for name, columns in sorted(groups.items()):
    for column in columns:
      name = name.replace("#", _ranges(sorted(set(column))), 1)
    out.append(name)
  return ", ".join(out)


def _ranges(numbers: list[int]) -> str:
  if len(numbers) == 1:
    return str(numbers[0])
  runs: list[list[int]] = []
  for n in numbers:
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
