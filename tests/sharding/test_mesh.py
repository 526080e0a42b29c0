"""Sizes of the mesh, and messages that say what would fit."""

import dataclasses
import re
import types

import numpy as np
import pytest

from maxscale.config import MESH_AXES, ConfigError, Dcn, Mesh, nearest_divisors
from maxscale.sharding import mesh


def sizes(devices, slices=1, dcn=None, **ici):
  shape = mesh.resolve(Mesh(**ici, dcn=Dcn(**(dcn or {}))), devices, slices)
  return {axis: n for axis, n in shape.sizes.items() if n > 1}


@pytest.mark.parametrize("devices, slices, ici, dcn, expected", [
  (1, 1, {}, {}, {}),
  (8, 1, {}, {}, {"fsdp": 8}),
  (8, 1, {"tensor": 2}, {}, {"fsdp": 4, "tensor": 2}),
  (8, 1, {"data": -1, "fsdp": 2}, {}, {"data": 4, "fsdp": 2}),
  (8, 1, {"data": 2, "fsdp": 2, "tensor": 2}, {}, {"data": 2, "fsdp": 2, "tensor": 2}),
  (12, 1, {"data": 3, "tensor": 4}, {}, {"data": 3, "tensor": 4}),
  (16, 2, {"tensor": 2}, {}, {"data": 2, "fsdp": 4, "tensor": 2}),
  (16, 4, {"data": 2}, {"data": 2, "fsdp": 2}, {"data": 4, "fsdp": 4}),
  (16, 2, {}, {"data": 1, "fsdp": -1}, {"fsdp": 16}),
  (8192, 4, {"tensor": 8}, {}, {"data": 4, "fsdp": 256, "tensor": 8}),
])  # fmt: skip
def test_sizes(devices, slices, ici, dcn, expected):
  assert sizes(devices, slices, dcn, **ici) == expected
  shape = mesh.resolve(Mesh(**ici, dcn=Dcn(**dcn)), devices, slices)
  assert shape.devices == devices and tuple(shape.sizes) == MESH_AXES


@pytest.mark.parametrize("devices, slices, ici, dcn, says", [
  (8, 1, {"tensor": 3}, {}, ["tensor=3 is 3", "8 devices"]),
  (8, 1, {"data": 2, "fsdp": 2}, {}, ["data=2 * fsdp=2 is 4", "8 devices", "mesh.tensor=2"]),
  (6, 1, {"data": 4, "fsdp": 1}, {}, ["data=4 is 4", "6 devices", "mesh.data=6"]),
  (16, 2, {"fsdp": 16}, {}, ["fsdp=16 is 16", "8 devices of a slice", "mesh.fsdp=8"]),
  (16, 2, {}, {"data": 4}, ["mesh.dcn: data=4 is 4", "2 slices", "mesh.dcn.data=2"]),
  (8, 3, {}, {}, ["mesh.slices=3 does not divide 8", "2 or 4"]),
  (1, 1, {"data": 2, "fsdp": 2, "tensor": 2}, {}, ["is 8", "1 devices", "mesh.fsdp=-1"]),
])  # fmt: skip
def test_refusals_say_what_would_fit(devices, slices, ici, dcn, says):
  with pytest.raises(ConfigError) as e:
    mesh.resolve(Mesh(**ici, dcn=Dcn(**dcn)), devices, slices)
  for text in says:
    assert text in str(e.value)
  for group, axis, value in re.findall(r"(mesh|mesh\.dcn)\.(\w+)=(-?\d+)", str(e.value).partition("would fit")[2]):
    changed = (ici if group == "mesh" else dcn) | {axis: int(value)}  # each suggestion alone is enough
    ici_, dcn_ = (changed, dcn) if group == "mesh" else (ici, changed)
    assert mesh.resolve(Mesh(**ici_, dcn=Dcn(**dcn_)), devices, slices).devices == devices


def test_the_text_of_a_shape():
  assert str(mesh.resolve(Mesh(tensor=2), 16, 2)) == "data=2 fsdp=4 tensor=2 over 2 slices"
  assert str(mesh.resolve(Mesh(), 1)) == "one device"


@pytest.mark.parametrize("n, value, text", [(12, 5, "4 or 6"), (12, 13, "12"), (7, 3, "1 or 7"), (8, 0, "1")])
def test_nearest_divisors(n, value, text):
  assert nearest_divisors(n, value) == text


def devices(n, slices=1):
  return [types.SimpleNamespace(id=i, platform="cpu", slice_index=i * slices // n) for i in range(n)]


def test_slices_come_from_the_devices_or_are_simulated():
  assert mesh.count_slices(devices(8), Mesh()) == 1
  assert mesh.count_slices(devices(8, 4), Mesh()) == 4
  assert mesh.count_slices(devices(8), Mesh(slices=2)) == 2
  assert mesh.count_slices([types.SimpleNamespace()], Mesh()) == 1


def test_the_axes_of_a_slice_stay_in_it(monkeypatch):
  """Only the outer part of an axis with a DCN factor crosses slices."""
  import jax

  monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, axes, axis_types: grid)
  shape = mesh.resolve(Mesh(data=2, fsdp=2, tensor=2, dcn=Dcn(data=2, fsdp=2)), 32, 4)
  grid = mesh.make(shape, devices(32, 4))
  assert grid.shape == (1, 4, 4, 1, 1, 2)
  slice_of = np.vectorize(lambda d: d.slice_index)(grid)[0, :, :, 0, 0]
  assert (slice_of[:, :, 0] == slice_of[:, :, 1]).all()
  for outer_data in (0, 1):
    for outer_fsdp in (0, 1):
      block = slice_of[2 * outer_data : 2 * outer_data + 2, 2 * outer_fsdp : 2 * outer_fsdp + 2]
      assert len(set(block.flat)) == 1
  assert len(set(slice_of.flat)) == 4
  assert len({d.id for d in grid.flat}) == 32


def test_sizes_of_the_whole_mesh_cross_slices_along_data_or_pipeline():
  whole = mesh.resolve(Mesh(pipeline=2, expert=2, fsdp=2, tensor=-1), 8, 2)
  assert whole.sizes == {"pipeline": 2, "data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 1}
  assert whole.slices == {"pipeline": 2}
  assert mesh.resolve(Mesh(data=4, fsdp=2), 8, 2).slices == {"data": 2}
  with pytest.raises(ConfigError, match="there are 4 devices of a slice"):
    mesh.resolve(Mesh(fsdp=8), 8, 2)  # fsdp crosses slices only when asked
  asked = dataclasses.replace(Mesh(fsdp=4), dcn=Dcn(data=1, fsdp=2))
  assert mesh.resolve(asked, 8, 2).slices == {"fsdp": 2}


@pytest.mark.parametrize("extent, cores, ici, box, next_fsdp", [
  ((16, 16, 16), 1, {"fsdp": 512, "expert": 8}, (2, 2, 2, 1), 2),
  ((4, 4, 4), 1, {"fsdp": 16, "expert": 4}, (1, 2, 2, 1), 2),
  ((4, 4, 4), 1, {"data": 2, "fsdp": 2, "expert": 16}, (2, 2, 4, 1), 2),
  ((4, 4, 4), 2, {"fsdp": 16, "expert": 8}, (1, 2, 2, 2), 2),
  ((4, 4, 1), 1, {"fsdp": 4, "expert": 4}, (2, 2, 1, 1), 2),
  ((4, 4, 1), 1, {"fsdp": 16}, (1, 1, 1, 1), 1),
])  # fmt: skip
def test_the_groups_of_a_boxed_axis_are_boxes(extent, cores, ici, box, next_fsdp):
  x, y, z = extent
  kind = "TPU7x" if cores == 2 else "TPU v5p"
  chips = [mesh.Chip((i % x, i // x % y, i // x // y), core, kind) for i in range(x * y * z) for core in range(cores)]
  shape = tuple(ici.get(axis, 1) for axis in MESH_AXES)
  grid = mesh.place(shape, chips, "expert")
  assert grid.shape == shape and len(set(grid.flat)) == len(chips)
  at = np.array([(*d.coords, d.core_on_chip) for d in grid.flat]).reshape(*shape, 4)
  groups = np.moveaxis(at, MESH_AXES.index("expert"), -2).reshape(-1, ici.get("expert", 1), 4)
  assert (np.ptp(groups, axis=1) + 1 == box).all()
  fsdp = at[0, 0, :, 0, 0, 0]
  assert np.abs(fsdp[1] - fsdp[0]).max() == next_fsdp, "the next of another axis is in the next box"


def test_a_line_is_no_worse_where_no_box_is_as_large():
  chips = [mesh.Chip((i % 4, i // 4, 0), 0, "TPU v6e") for i in range(16)]
  shape = tuple({"expert": 16}.get(axis, 1) for axis in MESH_AXES)
  assert len(set(mesh.place(shape, chips, "expert").flat)) == 16
