"""Options of the TPU compiler by generation, as data: what each is for, and where it was seen to help.

They go to one compile (`lowered.compile(compiler_options=...)`), never into the environment.
"""

from __future__ import annotations

import dataclasses

from maxscale.perf.hardware import chip_of


@dataclasses.dataclass(frozen=True)
class Option:
  """A compiler option. `chips`: names in the hardware table, of those that accept it and gain from it."""

  name: str
  value: str
  chips: tuple[str, ...]
  reason: str


# Seen on schedules for v5p (4x4x4, fsdp 64) and v6e (16x16, fsdp 256), libtpu 0.0.42: without these, explicit gathers
# and scatters become synchronous all-reduces, which move twice the bytes. v5e has no SparseCores.
_SPARSECORE = ("TPU v5p", "TPU v6e", "TPU7x")
OPTIONS = (
  Option("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true", _SPARSECORE,
         "gathers of parameters run on the SparseCores, beside the matmuls"),
  Option("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", "true", _SPARSECORE,
         "the same where an axis spans a plane of the torus"),
  Option("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true", _SPARSECORE,
         "scatters of gradients run on the SparseCores"),
  Option("xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", "true", _SPARSECORE,
         "a scatter stays one: not an all-reduce of the whole that is cut afterwards"),
  Option("xla_tpu_prefer_async_allgather_to_allreduce", "true", _SPARSECORE,
         "a gather stays one: not an all-reduce of zeros"),
)  # fmt: skip


def options(device_kind: str) -> dict[str, str | bool]:
  """The compiler options for a device kind; none for one that the table lacks."""
  chip = chip_of(device_kind)
  return {o.name: o.value for o in OPTIONS if chip and chip.name in o.chips}
