"""Seconds that a collective takes on a torus of links, between slices, or through switches: bandwidth and latency.

Formulas of a torus: the scaling book (jax-ml.github.io/scaling-book, "Sharded matrices and how to multiply them"); for
an all-to-all over several dimensions its bisection: with v bytes on each chip and M chips along the longest dimension,
the links across its middle carry half of all bytes, which takes v M / (8 w) where it is a ring and v M / (4 w) where it
is open, with w bytes/s of a link one way. Formulas through switches: XLA's `sol_gpu_cost_model`.
"""

from __future__ import annotations

import math

from maxscale.perf.hardware import Chip

Dims = tuple[tuple[int, bool], ...]  # chips along each dimension of the torus that a group spans, and whether it closes

HOP_SECONDS = 1e-6  # of one ICI hop; the scaling book
DCN_SECONDS = 1e-4  # of a transfer between slices, whatever its size: an assumption, no public figure
# Of H100 nodes, the defaults of XLA's model: launch, round trip, a chunk's preparation, bytes of a chunk.
SWITCH_LAUNCH, ROUND_TRIP, CHUNK_SECONDS, CHUNK_BYTES = 45e-6, 31e-6, 6e-6, 4 * 2**20
_REDUCING = {"all-reduce": 2.0}  # a reduce-scatter and an all-gather


def seconds(kind: str, bytes: float, chip: Chip, dims: Dims, share: float = 1.0, hops: float = 1.0) -> float:
  """A collective of one group inside a slice.

  Args:
    kind, bytes: as in `perf.compiled.collectives`: the whole array of an all-gather or reduction, a device's of every other.
    dims: what the group spans. Empty: the devices of one chip, which share its memory.
    share: of the chip's links that this group has (a half where the two devices of a chip are in different groups).
    hops: of a permutation, the mean from source to target: all devices send at once, so as many share a link.
  """
  if not dims:
    return 0.0
  link = chip.link_bytes * share
  latency = HOP_SECONDS * sum(n / 2 if wraps else n - 1 for n, wraps in dims)
  chips = math.prod(n for n, _ in dims)
  if kind == "collective-permute":
    return bytes * hops / link + latency
  if kind in ("all-to-all", "ragged-all-to-all"):
    longest = max(n / (8 if wraps else 4) for n, wraps in dims)
    return bytes * longest / link + latency
  bandwidth = link * sum(2 if wraps else 1 for _, wraps in dims)
  times = _REDUCING.get(kind, 1.0)
  return times * (bytes * (chips - 1) / chips / bandwidth + latency)


def dcn_seconds(kind: str, bytes: float, chip: Chip, slices: int) -> float:
  """A collective of a device with those of the other slices. bytes: those that `perf.compiled.collectives` says, of a device."""
  if slices < 2:
    return 0.0
  times = _REDUCING.get(kind, 1.0) * (1.0 if kind == "collective-permute" else (slices - 1) / slices)
  return times * bytes * chip.devices / chip.dcn_bytes + DCN_SECONDS


def switch_seconds(kind: str, bytes: float, chip: Chip, group: int, nodes: int) -> float:
  """A collective of `group` GPUs in `nodes` nodes (domains of NVLink or xGMI): first inside them, then across.

  Args:
    bytes: the whole array of an all-gather or reduction, a device's of every other.
  """
  if group < 2:
    return 0.0
  each = group // nodes
  inside, times = chip.links * chip.link_bytes, _REDUCING.get(kind, 1.0)
  if kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
    away = (group - each) / group if nodes > 1 else 0.0
    return SWITCH_LAUNCH + max(bytes * (1 - away) / inside, bytes * away / chip.dcn_bytes) + ROUND_TRIP * (nodes > 1)
  total = bytes * (each - 1) / each / inside + SWITCH_LAUNCH
  if nodes > 1:
    part = bytes / each  # what each GPU sends on: its rail has one GPU of every node
    chunks = math.ceil(part / nodes / CHUNK_BYTES)
    total += (nodes - 1) * (part / nodes / chip.dcn_bytes + chunks * CHUNK_SECONDS) + ROUND_TRIP
  return times * total
