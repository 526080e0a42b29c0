"""Devices of a TPU topology that is not here: what programs are traced, lowered and compiled for."""

from __future__ import annotations

import os
from typing import Any

from maxscale.config import ConfigError


def devices(topology: str, slices: int = 1) -> list[Any]:
  """The devices of `slices` slices of chips such as v5p:8x8x8, by the TPU compiler (libtpu), which runs on any CPU.

  Raises:
    ConfigError: libtpu is not installed, or knows no such topology.
  """
  # Without these libtpu asks a metadata server for a TPU, and aborts while another process compiles.
  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  from jax.experimental import topologies

  several = {"num_slices": slices} if slices > 1 else {}
  try:
    return list(topologies.get_topology_desc(topology, "tpu", **several).devices)
  except Exception as e:  # the library raises bare RuntimeError and XlaRuntimeError
    if "libtpu" in str(e):
      raise ConfigError('the TPU compiler is not installed: pip install "maxscale[plan]"') from e
    raise ConfigError(f"mesh.topology={topology!r}: {str(e).splitlines()[0]}") from e
