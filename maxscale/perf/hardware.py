"""Accelerators as data, the peak of a JAX device, and the measured speed of a machine that has no published peak.

Peaks are dense (no sparsity) and as the vendor publishes them; what a matmul reaches is less (70 to 90% of them).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

_CUBES = "every dim wraps once the slice is at least 4x4x4 with each dim a multiple of 4; below that none does"
_SIXTEEN = "a dim wraps only when it is 16 long"
_SWITCH = "all to all through switches"
_MESH = "every pair of the 8 of a node has a link"
_TPU_DOCS = "Google Cloud TPU documentation"
_BOOK = "The scaling book (jax-ml.github.io/scaling-book)"
_JAX = "jax/_src/pallas/mosaic/tpu_info.py"
_GPU = "stas00/ml-engineering accelerator tables"


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator. Per chip, in FLOP/s (int8: operations/s), bytes and bytes/s; None: not published.

  Attributes:
    kinds: the `device_kind` strings that JAX gives its devices.
    links: ICI links of a TPU (NVLink or xGMI links of a GPU), each of `link_bytes` usable bytes/s one way.
    dcn_bytes: bytes/s one way between slices or nodes, per chip.
    devices: JAX devices of a chip.
    clock: Hz.
    torus: dims of the torus of a slice; 0 where chips are switched or fully connected.
    wrap: which dims of a slice wrap around.
    tile: rows and columns of a matrix unit, to which the dimensions of a product are padded.
    node: chips of a host.
    domain: chips that NVLink or xGMI connects; 0 where it is a whole slice (ICI).
    matmul: fraction of the bf16 peak that long products were measured at.
    stream: fraction of `hbm_bytes` that copies were measured at.
    host_bytes: bytes/s one way between a chip and its host's memory.
    vmem: bytes of a chip's vector memory (TPU).
  """

  name: str
  kinds: tuple[str, ...]
  bf16: float
  fp8: float | None
  int8: float | None
  hbm: float
  hbm_bytes: float
  links: int
  link_bytes: float
  dcn_bytes: float
  devices: int
  clock: float | None
  torus: int
  wrap: str
  source: str
  tile: int
  node: int
  domain: int
  matmul: float | None
  stream: float | None
  host_bytes: float | None
  vmem: float | None

  def peak(self, dtype: str = "bfloat16") -> float | None:
    """Published FLOP/s of matmuls in bfloat16 (float16), fp8 or int8 operands; None where none is published."""
    by_dtype = {"bfloat16": self.bf16, "float16": self.bf16, "fp8": self.fp8, "int8": self.int8}
    return by_dtype.get("fp8" if dtype.startswith("float8") else dtype)


@dataclasses.dataclass(frozen=True)
class Peak:
  """What MFU is divided by: FLOP/s of one JAX device, for operands of `dtype`, and where the number is from."""

  flops: float
  dtype: str
  source: str


G, T, MIB, GIB = 1e9, 1e12, 2.0**20, 2.0**30
# Measured fractions: v6e and TPU7x by AI-Hypercomputer/tpu-recipes microbenchmarks (8192^3 by the clock, 32768^3; copies
# of 32 MiB and 8 GiB), GPUs by the achievable matmul table of stas00/ml-engineering, which has the host links (PCIe,
# NVLink C2C of GB200 and GB300), too. Host links and VMEM of TPUs: their documentation and jax's tpu_info.py.
# fmt: off
CHIPS: tuple[Chip, ...] = (
  # name, kinds, FLOP/s in bf16, fp8, int8, HBM bytes and bytes/s,
  #    links, bytes/s of one, DCN bytes/s, devices, clock, torus dims, wrap, source,
  #    tile, node, domain, measured fractions of matmul peak and of HBM, host bytes/s, VMEM bytes
  Chip("TPU v4", ("TPU v4",),                     275 * T,  None,     275 * T,  32 * GIB, 1228 * G,
       6, 45 * G, 3.1 * G, 1, 1.05e9, 3, _CUBES, f"{_TPU_DOCS}: v4; links and DCN: {_BOOK}; clock: from the peak",
       128, 4, 0, None, None, 16 * G, 32 * MIB),
  Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"),     197 * T,  None,     394 * T,  16 * GIB, 819 * G,
       4, 45 * G, 3.1 * G, 1, 1.5e9, 2, _SIXTEEN, f"{_TPU_DOCS}: v5e; links and DCN: {_BOOK}; clock: from the peak",
       128, 8, 0, None, None, 15 * G, 128 * MIB),
  Chip("TPU v5p", ("TPU v5", "TPU v5p"),          459 * T,  459 * T,  918 * T,  95 * GIB, 2765 * G,
       6, 90 * G, 6.25 * G, 1, 1.75e9, 3, _CUBES,
       f"{_TPU_DOCS}: v5p (fp8 is not faster than bf16); links and DCN: {_BOOK}; clock: from the peak",
       128, 4, 0, None, None, 15 * G, 128 * MIB),
  Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"),     918 * T,  918 * T,  1836 * T, 32 * GIB, 1638 * G,
       4, 90 * G, 12.5 * G, 1, None, 2, _SIXTEEN, f"{_TPU_DOCS}: v6e; links and DCN: {_BOOK}",
       256, 8, 0, 0.82, 0.83, 32 * G, 128 * MIB),
  Chip("TPU7x", ("TPU7x",),                       2307 * T, 4614 * T, None,     192 * GIB, 7380 * G,
       6, 89 * G, 12.5 * G, 2, None, 3, _CUBES,
       f"{_TPU_DOCS}: TPU7x; devices: {_JAX}; link: all-gather of AI-Hypercomputer/tpu-recipes microbenchmarks",
       256, 4, 0, 0.83, 0.87, None, 128 * MIB),
  Chip("TPU8t", ("TPU8t",),                       996 * T,  5977 * T, 996 * T,  216 * GIB, 6528 * G,
       6, 200 * G, 50 * G, 1, None, 3, "not published; assumed as TPU7x",
       f"{_JAX}; memory, links and DCN: Hot Chips 2026 (links, DCN derived)",
       256, 4, 0, None, None, None, 128 * MIB),
  Chip("A100", ("NVIDIA A100-SXM4-80GB",),        312 * T,  None,     624 * T,  80 * GIB, 2039 * G,
       12, 25 * G, 25 * G, 1, 1.41e9, 0, _SWITCH, f"NVIDIA A100 SXM 80GB datasheet; {_GPU}",
       64, 8, 8, 0.87, None, 31 * G, None),
  Chip("H100", ("NVIDIA H100 80GB HBM3",),        989 * T,  1979 * T, 1979 * T, 80 * GIB, 3350 * G,
       18, 25 * G, 50 * G, 1, 1.83e9, 0, _SWITCH, f"NVIDIA H100 SXM datasheet; {_GPU}",
       64, 8, 8, 0.80, None, 63 * G, None),
  Chip("H200", ("NVIDIA H200",),                  989 * T,  1979 * T, 1979 * T, 141 * GIB, 4800 * G,
       18, 25 * G, 50 * G, 1, 1.83e9, 0, _SWITCH, f"NVIDIA H200 SXM datasheet; {_GPU}",
       64, 8, 8, 0.80, None, 63 * G, None),
  Chip("B200", ("NVIDIA B200",),                  2250 * T, 4500 * T, 4500 * T, 180 * GIB, 8000 * G,
       18, 50 * G, 50 * G, 1, None, 0, _SWITCH, f"NVIDIA HGX B200 datasheet; {_GPU}",
       128, 8, 8, 0.78, None, 63 * G, None),
  Chip("GB200", ("NVIDIA GB200",),                2500 * T, 5000 * T, 5000 * T, 186 * GIB, 8000 * G,
       18, 50 * G, 50 * G, 1, None, 0, _SWITCH, f"NVIDIA GB200 NVL72 datasheet; {_GPU}",
       128, 4, 72, 0.73, None, 450 * G, None),
  Chip("GB300", ("NVIDIA GB300",),                2500 * T, 5000 * T, None,     288e9,    8000 * G,
       18, 50 * G, 100 * G, 1, None, 0, _SWITCH, f"NVIDIA GB300 NVL72 datasheet (its int8 figures disagree); {_GPU}",
       128, 4, 72, 0.79, None, 450 * G, None),
  Chip("MI300X", ("AMD Instinct MI300X",),        1307 * T, 2614 * T, 2614 * T, 192 * GIB, 5300 * G,
       7, 64 * G, 50 * G, 1, 2.1e9, 0, _MESH, f"AMD MI300X datasheet; {_GPU}",
       64, 8, 8, 0.51, None, 63 * G, None),
  Chip("MI355X", ("AMD Instinct MI355X",),        2500 * T, 5000 * T, 5000 * T, 288 * GIB, 8000 * G,
       7, 76.5 * G, 50 * G, 1, 2.4e9, 0, _MESH, f"AMD MI355X datasheet; {_GPU}",
       64, 8, 8, 0.68, None, 63 * G, None),
)
# fmt: on


def chip_of(device_kind: str) -> Chip | None:
  """The chip whose devices JAX calls so; None if it is not in the table.

  Names must match whole: an "NVIDIA H100 PCIe" or an A100 of 40 GB is another chip than the one in the table.
  """
  return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def peak_flops(device: Any, dtype: str = "bfloat16") -> Peak | None:
  """The published peak of one JAX device, a half of the chip on TPU7x; None where there is none: it is never invented.

  Args:
    device: a JAX device, or any object with its `device_kind`.
    dtype: of the operands.
  """
  chip = chip_of(device.device_kind)
  flops = chip.peak(dtype) if chip else None
  if chip is None or flops is None:
    return None
  share = f" / {chip.devices} devices" if chip.devices > 1 else ""
  return Peak(flops / chip.devices, dtype, f"{chip.name}{share}: {chip.source}")


def measured_matmul_flops(dtype: str = "float32", seconds: float = 0.3, size: int = 1024) -> Peak:
  """The speed of a [size, size] x [size, size] matmul on JAX's first device, measured for about `seconds`.

  It stands in for a peak where none is published. On a CPU it is that of the whole machine, however many devices are
  simulated on it: divide it by their number for one device.
  """
  import jax
  import jax.numpy as jnp

  device = jax.local_devices()[0]
  x = jax.device_put(jnp.full((size, size), 1 / size, dtype), device)
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  best, end = float("inf"), time.perf_counter() + seconds
  while best == float("inf") or time.perf_counter() < end:
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return Peak(2 * size**3 / best, dtype, f"measured: {size}x{size} matmul, {dtype}, {device.device_kind}")
