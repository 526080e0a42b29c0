"""Where mesh axes lie on the machine: closed forms for TPU slices that need not be here, and simulated hosts.

`python -m tests.sharding.test_topology` describes the TPU meshes and prints them; it is a process of its own, because
libtpu reads its environment once.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from maxscale.config import Dcn
from maxscale.config import Mesh as Factors
from maxscale.sharding import mesh as meshes
from maxscale.sharding import topology

AXES = ("a", "b")
# name -> topology, slices, sizes of the axes a and b over the devices by z, y and x, or scrambled
PLAIN = {
  "square": ("v5p:4x4x4", 1, (4, 16)),
  "whole": ("v5p:4x4x4", 1, (1, 64)),
  "scrambled": ("v5p:4x4x4", 1, (4, 16)),
  "open": ("v5p:2x2x1", 1, (2, 2)),
  "cores": ("tpu7x:2x2x1", 1, (4, 2)),
  "slices": ("v5p:2x2x1", 2, (2, 4)),
  "part slices": ("v5p:2x2x1", 2, (4, 2)),
}
# (topology, slices, factors of the mesh) -> axis -> what it spans, the most hops, and ring, box or neither
MADE = {
  ("v5p:4x4x4", 1, "fsdp=64"): {"fsdp": ("xyz", 3, "box")},
  ("v5p:4x4x4", 1, "data=4,fsdp=16"): {"data": ("z", 1, "ring"), "fsdp": ("xy", 2, "box")},
  ("v5p:4x4x4", 1, "fsdp=16,tensor=4"): {"fsdp": ("yz", 2, "box"), "tensor": ("x", 1, "ring")},
  ("v5p:4x4x4", 1, "data=4,fsdp=4,tensor=4"): {
    "data": ("z", 1, "ring"), "fsdp": ("y", 1, "ring"), "tensor": ("x", 1, "ring")},
  # Two axes share a dimension: the inner one has its neighbours, the outer one steps over them.
  ("v5p:4x4x4", 1, "fsdp=8,tensor=8"): {"fsdp": ("yz", 3, ""), "tensor": ("xy", 2, "box")},
  ("v5p:4x4x4", 1, "data=2,fsdp=32"): {"data": ("z", 2, ""), "fsdp": ("xyz", 3, "box")},
  ("v5p:8x8x16", 1, "fsdp=64,tensor=16"): {"fsdp": ("xy", 2, "box"), "tensor": ("z", 1, "ring")},
  ("v5p:8x8x16", 1, "fsdp=128,tensor=8"): {"fsdp": ("yz", 2, "box"), "tensor": ("x", 1, "ring")},
  ("v5p:8x8x16", 1, "fsdp=256,tensor=4"): {"fsdp": ("xyz", 6, ""), "tensor": ("x", 1, "box")},
  ("v6e:16x16", 1, "fsdp=256"): {"fsdp": ("xy", 2, "box")},
  ("v6e:16x16", 1, "fsdp=16,tensor=16"): {"fsdp": ("y", 1, "ring"), "tensor": ("x", 1, "ring")},
  ("v6e:16x16", 1, "data=2,fsdp=128"): {"data": ("y", 8, ""), "fsdp": ("xy", 8, "box")},
  ("v6e:8x16", 1, "fsdp=8,tensor=16"): {"fsdp": ("x", 1, "box"), "tensor": ("y", 1, "ring")},  # 8 do not close
  ("v6e:4x4", 1, "fsdp=16"): {"fsdp": ("xy", 1, "ring")},  # a closed path through the square
  ("v5e:16x16", 1, "fsdp=16,tensor=16"): {"fsdp": ("y", 1, "ring"), "tensor": ("x", 1, "ring")},
  ("tpu7x:4x4x4", 1, "fsdp=64,tensor=2"): {"fsdp": ("xyz", 3, "box"), "tensor": ("core", 0, "box")},
  ("tpu7x:4x4x4", 1, "fsdp=16,tensor=8"): {"fsdp": ("yz", 2, "box"), "tensor": ("xcore", 1, "ring")},
  ("v5p:4x4x4", 2, "data=4,fsdp=16"): {"data": ("slicez", 1, "box"), "fsdp": ("xy", 2, "box")},
}  # fmt: skip


def described():
  """What `topology` says about every case. In a process of its own."""
  from jax.experimental import topologies
  from jax.sharding import Mesh

  def devices(name, slices):
    options = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

  def describe(mesh):
    return {a.name: dataclasses.asdict(a) for a in topology.axes(mesh)}, topology.table(mesh)

  out = {}
  for name, (chips, slices, sizes) in PLAIN.items():
    found = devices(chips, slices)  # listed by host
    order = sorted(found, key=lambda d: (getattr(d, "slice_index", 0), *d.coords[::-1], d.core_on_chip))
    if name == "scrambled":
      order = np.random.default_rng(0).permutation(np.asarray(order))
    out[name] = describe(Mesh(np.asarray(order).reshape(sizes), AXES))
  for chips, slices, factors in MADE:
    found = devices(chips, slices)
    sizes = {axis: int(n) for axis, n in (f.split("=") for f in factors.split(","))}
    shape = meshes.resolve(Factors(**sizes, dcn=Dcn()), len(found), slices)
    out[f"{chips} {slices} {factors}"] = describe(meshes.make(shape, found))
  return out


@pytest.fixture(scope="module")
def tpu():
  pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  out = subprocess.run([sys.executable, "-m", "tests.sharding.test_topology"], capture_output=True, text=True, env=env,
                       cwd=pathlib.Path(__file__).parents[2], timeout=600)  # fmt: skip
  assert out.returncode == 0, out.stderr[-3000:]
  return json.loads(out.stdout.splitlines()[-1])


def test_axes_of_a_closed_torus(tpu):
  a, b = tpu["square"][0].values()
  assert a == {"name": "a", "size": 4, "spans": ["z"], "hosts": 4, "hops": 1, "mean_hops": 1, "ring": True, "box": True}
  # Along rows of 4, and from a row to the next by one link of y and the one of x that closes the row.
  assert (b["spans"], b["hops"], b["mean_hops"]) == (["x", "y"], 2, pytest.approx((12 * 1 + 3 * 2) / 15))
  assert (b["ring"], b["box"], b["hosts"]) == (False, True, 4)
  (b,) = tpu["whole"][0].values()
  assert (b["spans"], b["hops"], b["hosts"]) == (["x", "y", "z"], 3, 16)
  assert b["mean_hops"] == pytest.approx((48 * 1 + 12 * 2 + 3 * 3) / 63)


def test_a_scrambled_order_has_more_hops(tpu):
  good, bad = tpu["square"][0], tpu["scrambled"][0]
  for axis in AXES:
    assert bad[axis]["mean_hops"] > 2 * good[axis]["mean_hops"]
    assert not bad[axis]["ring"] and not bad[axis]["box"]


def test_a_slice_below_a_cube_is_open(tpu):
  axes, text = tpu["open"]
  assert [(x["spans"], x["hops"], x["ring"], x["box"]) for x in axes.values()] == [
    (["y"], 1, False, True), (["x"], 1, False, True),
  ]  # fmt: skip
  assert "2x2x1 chips a slice, closed in no dimension" in text


def test_two_devices_of_a_chip_have_no_link_between_them(tpu):
  a, b = tpu["cores"][0].values()
  assert (b["spans"], b["hops"], b["mean_hops"], b["ring"]) == (["core"], 0, 0, False)
  assert (a["spans"], a["hops"]) == (["x", "y"], 2)


def test_slices(tpu):
  a, b = tpu["slices"][0].values()
  assert (a["spans"], a["hops"], a["ring"], a["hosts"]) == (["slice"], 0, False, 2)
  assert (b["spans"], b["hops"], b["hosts"]) == (["x", "y"], 2, 1)
  a, b = tpu["part slices"][0].values()
  assert (a["spans"], a["hops"], a["mean_hops"], a["ring"]) == (["slice", "y"], 1, 1, False)
  assert tpu["slices"][1].startswith("8 TPU v5 devices, 2 slices, 2 hosts, 4 devices a host, 2x2x1 chips")


@pytest.mark.parametrize("case", MADE, ids=lambda case: " ".join(map(str, case)))
def test_the_meshes_that_are_made(tpu, case):
  """An axis that has whole dimensions is a box, and one that has one alone steps from neighbour to neighbour."""
  axes, text = tpu[" ".join(map(str, case))]
  got = {n: ("".join(a["spans"]), a["hops"], "ring" if a["ring"] else "box" if a["box"] else "")
         for n, a in axes.items()}  # fmt: skip
  assert got == MADE[case]
  assert len(text.splitlines()) == 2 + len(axes)


@pytest.mark.parametrize("kind, shape, expected", [
  ("TPU v4", (4, 4, 4), (True, True, True)),
  ("TPU v5", (4, 4, 8), (True, True, True)),
  ("TPU v5", (2, 4, 4), (False, False, False)),
  ("TPU7x", (8, 16, 16), (True, True, True)),
  ("TPU v5 lite", (16, 16, 1), (True, True, False)),
  ("TPU v6 lite", (8, 16, 1), (False, True, False)),
  ("TPU v6 lite", (8, 8, 1), (False, False, False)),
  ("TPU v99", (16, 16, 16), (False, False, False)),
])  # fmt: skip
def test_which_dimensions_close(kind, shape, expected):
  assert topology.wraps(kind, shape) == expected


def hosts(grid, devices_a_host):
  """A mesh of GPUs in order."""
  device = [types.SimpleNamespace(id=n, process_index=n // devices_a_host, platform="gpu", device_kind="NVIDIA H100")
            for n in range(int(np.prod(grid)))]  # fmt: skip
  return types.SimpleNamespace(devices=np.array(device).reshape(grid), axis_names=("data", "fsdp"))


def test_hosts_of_a_machine_without_a_torus():
  outer, inner = topology.axes(hosts((4, 8), 8))
  assert (outer.spans, outer.hosts) == (("host",), 4) and (inner.spans, inner.hosts) == (("device",), 1)
  assert (outer.hops, outer.mean_hops, outer.ring, outer.box) == (0, 0, False, False)
  outer, inner = topology.axes(hosts((2, 16), 8))
  assert (inner.spans, inner.hosts) == (("host", "device"), 2)
  text = topology.table(hosts((4, 8), 8))
  assert text.splitlines()[0] == "32 NVIDIA H100 devices, 1 slice, 4 hosts, 8 devices a host"


def test_a_device_alone_has_no_axes():
  mesh = hosts((1, 1), 1)
  assert topology.axes(mesh) == [] and topology.table(mesh).splitlines()[0].startswith("1 NVIDIA H100 device, 1 slice")


if __name__ == "__main__":
  print(json.dumps(described()))
