"""Devices of a TPU topology that is not here: what programs are traced, lowered and compiled for."""

from __future__ import annotations

import math
import os
from typing import Any

from maxscale.config import ConfigError
from maxscale.perf.hardware import CHIPS

# Shapes of a slice that Google Cloud's documentation lists. Of three dimensions, larger ones are multiples of 4, up to a
# pod's chips. The compiler itself takes some shapes that nobody can have.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
  "v4": _SMALL, "v5e": _FLAT, "v5p": _SMALL, "v6e": _FLAT, "tpu7x": ((1, 1, 1), *_SMALL),
}  # fmt: skip
PODS = {"v4": 4096, "v5p": 8960, "tpu7x": 9216}
_LONGEST = 32  # chips along a dimension


def check(topology: str) -> None:
  """Refuses a name that is no slice of a TPU, such as v5p:8x8x8, before anything is loaded.

  Raises:
    ConfigError: the chip is none that can be compiled for, or it has no slice of this shape; names those that it has.
  """
  kind, colon, text = topology.partition(":")
  sizes = text.split("x")
  if kind not in SHAPES:
    others = [chip.name for chip in CHIPS if not chip.torus]
    gpu = next((name for name in others if kind.lower().startswith(name.lower())), "")
    if gpu or kind.lower() in ("cpu", "gpu"):
      raise ConfigError(f"mesh.topology={topology!r}: programs are compiled ahead for TPUs alone ({', '.join(SHAPES)}); "
                        f"{f'for {gpu} --search ranks layouts by the closed form' if gpu else 'this one runs where it is'}")  # fmt: skip
    raise ConfigError(f"mesh.topology={topology!r}: no such chip; those with a compiler here are {', '.join(SHAPES)}, "
                      "as in v5p:8x8x8")  # fmt: skip
  wanted = tuple(int(n) for n in sizes if n.isdecimal())
  if not colon or len(wanted) != len(sizes) or wanted not in shapes(kind):
    raise ConfigError(f"mesh.topology={topology!r}: {kind} has no slice of that shape; it has {_listed(kind)}"
                      f"{_nearest(kind, wanted)}")  # fmt: skip


def shapes(kind: str) -> list[tuple[int, ...]]:
  """Every shape of a slice of a chip of `SHAPES`, the fewest chips first; of as many, the most compact first."""
  sides = range(4, _LONGEST + 1, 4)
  cubes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= PODS.get(kind, 0)]
  return sorted([*SHAPES[kind], *cubes], key=lambda s: (math.prod(s), sum(s)))


def _listed(kind: str) -> str:
  names = ", ".join("x".join(map(str, s)) for s in SHAPES[kind])
  pod = PODS.get(kind)
  return f"{names}, and AxBxC with A <= B <= C, all multiples of 4, up to {pod} chips" if pod else names


def _nearest(kind: str, wanted: tuple[int, ...]) -> str:
  """The legal shape with the nearest number of chips, and of those the one of the nearest dimensions."""
  if not wanted or not all(wanted):
    return ""
  dims = sorted(wanted)

  def distance(shape: tuple[int, ...]) -> tuple[float, float]:
    padded = (*dims, *[1] * len(shape))[: len(shape)]
    return (abs(math.log(math.prod(shape) / math.prod(wanted))),
            sum(abs(math.log(a / b)) for a, b in zip(sorted(shape), sorted(padded))))  # fmt: skip

  best = min(shapes(kind), key=distance)
  return f"; the nearest is {kind}:{'x'.join(map(str, best))}"


def devices(topology: str, slices: int = 1) -> list[Any]:
  """The devices of `slices` slices of chips such as v5p:8x8x8, by the TPU compiler (libtpu), which runs on any CPU.

  Raises:
    ConfigError: libtpu is not installed, or there is no such topology.
  """
  check(topology)
  # Without these libtpu asks a metadata server for a TPU, and aborts while another process compiles.
  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  from jax.experimental import topologies

  more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if math.prod(map(int, topology.partition(":")[2].split("x"))) == 1:  # a host of one chip; others have four or more
    more["chips_per_host_bounds"] = [1, 1, 1]
  try:
    return list(topologies.get_topology_desc(topology, "tpu", **more).devices)
  except Exception as e:  # the library raises bare RuntimeError and XlaRuntimeError
    if "libtpu" in str(e):
      raise ConfigError('the TPU compiler is not installed: pip install "maxscale[plan]"') from e
    raise ConfigError(f"mesh.topology={topology!r}: {str(e).splitlines()[0]}") from e
