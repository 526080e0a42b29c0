"""Where the axes of a mesh lie on the machine: dimensions of the torus, hops between neighbours, rings, slices, hosts."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from maxscale.perf.hardware import chip_of

_TORUS = ("x", "y", "z")


@dataclasses.dataclass(frozen=True)
class Axis:
  """One mesh axis of more than one device. A group of it is the devices along it, all else equal.

  Attributes:
    spans: what differs along it: "slice" (DCN); then, on TPU, the torus dimensions "x", "y", "z" and "core" (the two
      devices of a chip), elsewhere "host" and "device" (of a host).
    hosts: processes that have devices of one group, at most.
    hops: ICI links from a device to the next of its group, at most. Steps from slice to slice do not count; 0 between
      the cores of a chip, and where there is no torus.
    mean_hops: over all steps of all groups that count.
    ring: each group is a closed ring of more than two chips of a slice: no step has more than one hop, nor has the one
      from its last device to its first.
    box: each group fills a box of the torus, so that collectives can run along each of its dimensions. An axis of
      several whole dimensions has this; its steps from one row to the next take more than a hop, in any order that has
      the dimensions one inside the other.
  """

  name: str
  size: int
  spans: tuple[str, ...]
  hosts: int
  hops: int
  mean_hops: float
  ring: bool
  box: bool


def shape(mesh: Any) -> tuple[int, ...]:
  """Chips of a slice along x, y and z, as far as the mesh has them; () where devices have no coordinates."""
  places = [d.coords for d in mesh.devices.flat if d.platform == "tpu"]
  return tuple(int(n) for n in np.ptp(places, axis=0) + 1) if places else ()


def wraps(device_kind: str, shape: tuple[int, ...]) -> tuple[bool, ...]:
  """Whether each dimension of a slice of this shape closes, by the rules that `maxscale.perf.hardware.Chip.wrap` says.

  None closes for a chip that the table lacks. Twisted tori are taken as plain ones: devices do not tell them apart.
  """
  chip = chip_of(device_kind)
  if chip and chip.torus == 3:
    return (all(n % 4 == 0 for n in shape),) * len(shape)
  return tuple(chip is not None and n == 16 for n in shape)


def axes(mesh: Any) -> list[Axis]:
  """The axes of a `jax.sharding.Mesh` that have more than one device, in its order."""
  devices, extent = mesh.devices, shape(mesh)
  names, places = _places(list(devices.flat))
  places = places.reshape(*devices.shape, len(names))
  process = np.array([d.process_index for d in devices.flat]).reshape(devices.shape)
  closed = wraps(devices.flat[0].device_kind, extent)
  out = []
  for n, (name, size) in enumerate(zip(mesh.axis_names, devices.shape)):
    if size == 1:
      continue
    groups = np.moveaxis(places, n, 0).reshape(size, -1, len(names))
    step = np.abs(np.roll(groups, -1, axis=0) - groups)  # to the next device, and from the last to the first
    inside = step[..., 0] == 0  # the slice
    along = [np.minimum(step[..., 1 + dim], length - step[..., 1 + dim]) if wrap else step[..., 1 + dim]
             for dim, (length, wrap) in enumerate(zip(extent, closed))]  # fmt: skip
    hops = np.sum(along, axis=0, dtype=int) if along else np.zeros_like(step[..., 0])
    counted = hops[:-1][inside[:-1]]
    chips = len(np.unique(groups[:, 0, 1:4], axis=0)) if extent else 0
    out.append(
      Axis(
        name=name,
        size=size,
        spans=tuple(np.array(names)[(groups != groups[0]).any((0, 1))].tolist()),
        hosts=max(len(set(line)) for line in np.moveaxis(process, n, -1).reshape(-1, size).tolist()),
        hops=int(counted.max(initial=0)),
        mean_hops=float(counted.mean()) if counted.size else 0.0,
        ring=chips > 2 and bool(inside.all() and (hops <= 1).all()),
        box=bool(extent) and bool((np.prod(np.ptp(groups, axis=0) + 1, axis=-1) == size).all()),
      )
    )
  return out


def _places(devices: list[Any]) -> tuple[tuple[str, ...], np.ndarray]:
  """(names of the coordinates, [device, coordinate])."""
  slices = [getattr(d, "slice_index", 0) for d in devices]
  if devices[0].platform == "tpu":
    places = [(s, *d.coords, d.core_on_chip) for s, d in zip(slices, devices)]
    return ("slice", *_TORUS, "core"), np.array(places)
  of_host = collections.defaultdict(list)
  for d in sorted(devices, key=lambda d: d.id):
    of_host[d.process_index].append(d.id)
  number = {id_: n for ids in of_host.values() for n, id_ in enumerate(ids)}
  return ("slice", "host", "device"), np.array([(s, d.process_index, number[d.id]) for s, d in zip(slices, devices)])


def table(mesh: Any) -> str:
  """Text: what the devices are and how they are connected, then a line for each axis of more than one device."""
  devices, extent = list(mesh.devices.flat), shape(mesh)
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  hosts = len({d.process_index for d in devices})
  head = [_count(len(devices), f"{devices[0].device_kind} device"), _count(slices, "slice"), _count(hosts, "host"),
          _count(len(devices) // hosts, "device") + " a host"]  # fmt: skip
  if extent:
    closed = [dim for dim, wrap in zip(_TORUS, wraps(devices[0].device_kind, extent)) if wrap]
    head.append(f"{'x'.join(map(str, extent))} chips a slice, closed in {', '.join(closed) or 'no dimension'}")
  rows = [("axis", "devices", "spans", "hosts", "hops", "mean", "")]
  for a in axes(mesh):
    note = "ring" if a.ring else "box" if a.box else ""
    rows.append((a.name, str(a.size), "*".join(a.spans), str(a.hosts), str(a.hops), f"{a.mean_hops:.2f}", note))
  widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
  return "\n".join([", ".join(head), *(lines if len(rows) > 1 else [])])


def _count(n: int, what: str) -> str:
  return f"{n} {what}{'s' if n > 1 else ''}"
