"""The mesh: six named axes, each a product of an ICI factor (inside a slice) and a DCN factor (across slices)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from maxscale.config import MESH_AXES, Config, ConfigError, Dcn, Mesh, nearest_divisors


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """The resolved sizes of every axis of `MESH_AXES`, outermost first. Pure numbers: no device is needed."""

  ici: tuple[int, ...]
  dcn: tuple[int, ...]

  @property
  def sizes(self) -> dict[str, int]:
    """Mesh axis -> devices along it."""
    return {axis: i * d for axis, i, d in zip(MESH_AXES, self.ici, self.dcn)}

  @property
  def slices(self) -> dict[str, int]:
    """Mesh axis -> slices along it, for the axes that go from slice to slice."""
    return {axis: d for axis, d in zip(MESH_AXES, self.dcn) if d > 1}

  @property
  def devices(self) -> int:
    return math.prod(self.ici) * math.prod(self.dcn)

  def __str__(self) -> str:
    used = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1] or ["one device"]
    slices = math.prod(self.dcn)
    return " ".join(used) + (f" over {slices} slices" if slices > 1 else "")


def resolve(mesh: Mesh, devices: int, slices: int = 1) -> MeshShape:
  """Fills in the -1 of `mesh.*` and `mesh.dcn.*` for a number of devices in a number of equal slices.

  Where `mesh.dcn` is left alone and `mesh.*` multiplies to the devices of all slices instead of one, the sizes are those
  of the whole mesh, and `data` or else `pipeline` goes from slice to slice: the axes that bear a slow network.

  Raises:
    ConfigError: the factors do not multiply to the devices; the message says which would.
  """
  if devices % slices:
    raise ConfigError(f"mesh.slices={slices} does not divide {devices} devices; {nearest_divisors(devices, slices)} do")
  try:
    ici = _fill("mesh", mesh, devices // slices, "devices" if slices == 1 else "devices of a slice")
  except ConfigError:
    whole = _whole(mesh, devices, slices)
    if whole is None:
      raise
    return whole
  return MeshShape(ici, _fill("mesh.dcn", mesh.dcn, slices, "slices"))


def _whole(mesh: Mesh, devices: int, slices: int) -> MeshShape | None:
  """The shape whose ICI and DCN factors together are the sizes of `mesh.*`, or None where there is none by default."""
  if slices == 1 or mesh.dcn != Dcn():
    return None
  try:
    sizes: dict[str, int] = dict(zip(MESH_AXES, _fill("mesh", mesh, devices, "devices")))
  except ConfigError:
    return None
  across = next((axis for axis in ("data", "pipeline") if sizes[axis] % slices == 0), None)
  if across is None:
    return None
  sizes[across] //= slices
  return MeshShape(tuple(sizes.values()), tuple(slices if axis == across else 1 for axis in MESH_AXES))


def _fill(group: str, node: Any, total: int, what: str) -> tuple[int, ...]:
  sizes = {axis: getattr(node, axis) for axis in MESH_AXES}
  known = math.prod(size for size in sizes.values() if size != -1)
  free = next((axis for axis, size in sizes.items() if size == -1), None)
  given = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "all factors 1"
  if free is not None and total % known == 0:
    sizes[free] = total // known
  elif free is not None or known != total:
    raise ConfigError(f"{group}: {given} is {known}, but there are {total} {what}; {_would_fit(group, sizes, total)}")
  return tuple(sizes.values())


def _would_fit(group: str, sizes: dict[str, int], total: int) -> str:
  """Changes of one factor that make the product right, or the advice to leave one open."""
  fits = []
  for axis in ("data", "fsdp", "tensor"):
    others = math.prod(size for other, size in sizes.items() if other != axis and size != -1)
    if total % others == 0:
      fits.append(f"{group}.{axis}={total // others}")
  if fits:
    return "what would fit: " + ", or ".join(fits)
  return f"set {group}.fsdp=-1 and let the other factors divide {total}"


def count_slices(devices: Sequence[Any], mesh: Mesh) -> int:
  """Slices that the devices report, or those that `mesh.slices` simulates (a CPU reports one).

  Raises:
    ConfigError: the devices are TPUs, whose slices are real, and there are not that many.
  """
  found = len({getattr(d, "slice_index", 0) for d in devices})
  if mesh.slices and mesh.slices != found and devices[0].platform == "tpu":
    raise ConfigError(f"mesh.slices={mesh.slices}, but these TPU devices are in {found}; set mesh.slices=0")
  return mesh.slices or found


def make(shape: MeshShape, devices: Sequence[Any], boxed: str = "") -> Any:
  """A `jax.sharding.Mesh` with Auto axes over the devices, DCN outermost in every axis.

  On TPU the devices of a slice follow the physical torus (`place`, which says what `boxed` does); elsewhere their own
  order.
  """
  import jax
  import numpy as np

  slices = math.prod(shape.dcn)
  per_slice = [list(devices[i * len(devices) // slices : (i + 1) * len(devices) // slices]) for i in range(slices)]
  if devices[0].platform == "tpu":
    if slices > 1:
      by_slice: dict[int, list] = {}
      for d in devices:
        by_slice.setdefault(d.slice_index, []).append(d)
      per_slice = [by_slice[s] for s in sorted(by_slice)]
    blocks = [place(shape.ici, s, boxed) for s in per_slice]
  else:
    blocks = [np.asarray(s).reshape(shape.ici) for s in per_slice]
  grid = np.stack(blocks).reshape(shape.dcn + shape.ici)
  # (dcn axes, ici axes) -> interleaved, so that each mesh axis has its DCN factor outermost
  n = len(MESH_AXES)
  grid = grid.transpose([axis for i in range(n) for axis in (i, n + i)]).reshape(tuple(shape.sizes.values()))
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * n)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What `mesh_utils` asks of a device, for one that is not here."""

  coords: tuple[int, int, int]
  core_on_chip: int
  device_kind: str
  id: int = 0
  platform: str = "tpu"
  process_index: int = 0
  slice_index: int = 0


def place(ici: Sequence[int], devices: Sequence[Any], boxed: str = "") -> Any:
  """The TPU devices of a slice as an array [*ici], along the physical torus (jax.experimental.mesh_utils).

  Args:
    boxed: an axis whose groups are boxes of the torus instead, as near to a cube as they can be: a gather or scatter
      then has links in all of their dimensions, where a line that does not close has those of one. Other axes go from
      box to box.
  """
  import numpy as np
  from jax.experimental import mesh_utils

  along = lambda ici, devices: mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)  # noqa: E731
  axis = MESH_AXES.index(boxed) if boxed else 0
  kind, size = devices[0].device_kind, ici[axis]
  at = {(*d.coords, d.core_on_chip): d for d in devices}
  extent = [max(c[dim] for c in at) + 1 for dim in range(4)]
  box = _box(size, extent) if boxed and len(at) == math.prod(extent) else None
  if box is None:
    return along(ici, devices)
  inside = list(np.ndindex(*box))
  boxes = [Chip((x, y, z), core, kind) for z in range(extent[2] // box[2]) for y in range(extent[1] // box[1])
           for x in range(extent[0] // box[0]) for core in range(extent[3] // box[3])]  # fmt: skip
  out = np.empty(ici, dtype=object)
  placed: Any = along([n for dim, n in enumerate(ici) if dim != axis], boxes)
  for where in np.ndindex(*placed.shape):
    first = (*placed[where].coords, placed[where].core_on_chip)
    for n, step in enumerate(inside):
      out[(*where[:axis], n, *where[axis:])] = at[tuple(f * b + s for f, b, s in zip(first, box, step))]
  return out


def _box(size: int, extent: Sequence[int]) -> tuple[int, ...] | None:
  """The sides of a box of so many devices along x, y, z and the cores of a chip, of which it has all or one."""
  sides = [[b for b in range(1, n + 1) if n % b == 0] for n in extent]
  found = [b for b in itertools.product(*sides) if math.prod(b) == size and size > 1]
  return min(found, key=lambda b: (-b[3], max(b[:3]), sum(b[:3]), b), default=None)


def for_config(config: Config, devices: Sequence[Any]) -> tuple[MeshShape, Any]:
  """The resolved shape and the mesh of a config over the given devices."""
  shape = resolve(config.mesh, len(devices), count_slices(devices, config.mesh))
  return shape, make(shape, devices, boxed_axis(config))


def boxed_axis(config: Config) -> str:
  """The axis that `place` puts into boxes: experts wait for gathers of all tokens, other axes for less."""
  return "expert" if config.model.experts and config.sharding.experts == "gather" else ""
