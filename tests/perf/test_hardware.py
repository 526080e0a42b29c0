"""The table of chips: what JAX calls them, and that its numbers agree with each other."""

import dataclasses
import types

import jax
import pytest

from maxscale.perf import hardware


@pytest.mark.parametrize(
  "kind, name, bf16",
  [
    ("TPU v4", "TPU v4", 275e12),
    ("TPU v5 lite", "TPU v5e", 197e12),
    ("TPU v5", "TPU v5p", 459e12),
    ("TPU v5p", "TPU v5p", 459e12),
    ("TPU v6 lite", "TPU v6e", 918e12),
    ("TPU7x", "TPU7x", 1153.5e12),  # a device is half a chip
    ("NVIDIA H100 80GB HBM3", "H100", 989e12),
    ("NVIDIA GB200", "GB200", 2500e12),
    ("AMD Instinct MI300X", "MI300X", 1307e12),
  ],
)
def test_peak_of_a_device(kind, name, bf16):
  peak = hardware.peak_flops(types.SimpleNamespace(device_kind=kind))
  assert peak.flops == bf16 and peak.source.startswith(name)


def test_no_peak_is_invented():
  for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "TPU v5 litest", ""):
    assert hardware.peak_flops(types.SimpleNamespace(device_kind=kind)) is None
  h100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
  assert hardware.peak_flops(h100, "float8_e4m3fn").flops == 1979e12
  assert hardware.peak_flops(h100, "float32") is None
  assert hardware.peak_flops(jax.devices("cpu")[0]) is None


def test_table_is_consistent():
  kinds = [kind for chip in hardware.CHIPS for kind in chip.kinds]
  assert len(kinds) == len(set(kinds)) and len(hardware.CHIPS) == 14
  for chip in hardware.CHIPS:
    numbers = [v for v in dataclasses.asdict(chip).values() if isinstance(v, float)]
    assert all(v > 0 for v in numbers) and chip.source and chip.wrap
    # units: a wrong power of ten in a row breaks one of these
    assert 100 < chip.bf16 / chip.hbm_bytes < 600 and 0.01 < chip.hbm / chip.hbm_bytes < 0.05
    assert chip.link_bytes * chip.links < chip.hbm_bytes and chip.dcn_bytes <= chip.link_bytes * chip.links
    assert (chip.torus > 0) == chip.name.startswith("TPU")


def test_clock_explains_the_peak():
  for name, macs in {"TPU v4": 2 * 4 * 128**2, "TPU v5e": 4 * 128**2, "TPU v5p": 2 * 4 * 128**2}.items():
    chip = next(c for c in hardware.CHIPS if c.name == name)
    assert 2 * macs * chip.clock == pytest.approx(chip.bf16, rel=0.01)


def test_measured_speed_is_labelled():
  peak = hardware.measured_matmul_flops("float32", seconds=0.05, size=256)
  assert 1e8 < peak.flops < 1e15 and peak.source.startswith("measured") and peak.dtype == "float32"
