"""Rules: logical axis -> mesh axes, in three roles.

  param    parameters between uses. FSDP is `embed -> fsdp` here.
  state    master weights and optimizer moments. It is `param` with the config's `sharding.state` on top (ZeRO-1 adds
           `data` to an axis).
  compute  parameters in use, and activations. FSDP gathers a parameter because `embed` has no mesh axis here.

An array is described by the names of its dimensions; nothing is sharded, or left replicated, by anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from maxscale.config import MESH_AXES, ConfigError, Sharding

ROLES = ("param", "state", "compute")
Table = Mapping[str, tuple[str, ...]]

PARAM: Table = {
  "layers": (),
  "vocab": ("tensor",),
  "embed": ("fsdp",),
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "experts": ("expert",),
  "norm": (),  # scales of norms: a few KiB, needed whole by every device
  "scalar": (),
}
COMPUTE: Table = {
  **PARAM,
  "embed": (),
  "batch": ("data", "fsdp", "expert"),
  "length": ("context",),  # inside attention and MLPs
  "residual_length": ("context",),  # norms and the residual stream
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """The tables of the three roles on a mesh of the given sizes (mesh axis -> devices)."""

  tables: Mapping[str, Table]
  sizes: Mapping[str, int]

  def axes(self, name: str, role: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis.

    Raises:
      ConfigError: no rule names it.
    """
    table = self.tables[role]
    if name not in table:
      raise ConfigError(f"the logical axis {name!r} has no rule in role {role}; known: {', '.join(sorted(table))}")
    return table[name]

  def spec(self, names: Sequence[str | None], role: str) -> Any:
    """PartitionSpec of an array whose dimensions have these names (None: never sharded)."""
    from jax.sharding import PartitionSpec

    parts = [tuple(a for a in self.axes(n, role) if self.sizes[a] > 1) if n else () for n in names]
    return PartitionSpec(*(p[0] if len(p) == 1 else (p or None) for p in parts))

  def factor(self, name: str | None, role: str) -> int:
    """Devices that a dimension of this name is split over."""
    out = 1
    for axis in self.axes(name, role) if name else ():
      out *= self.sizes[axis]
    return out

  def check(self, path: str, names: Sequence[str | None], shape: Sequence[int], role: str) -> None:
    """Refuses an array that the rules cannot place.

    Raises:
      ConfigError: a mesh axis is used twice or a dimension does not divide; lists array, shape, rule and mesh.
    """
    where = f"{path} {tuple(shape)} ({', '.join(n or '-' for n in names)}) in role {role}"
    used: dict[str, str | None] = {}
    for name, size in zip(names, shape, strict=True):
      for axis in self.axes(name, role) if name else ():
        if axis in used and self.sizes[axis] > 1:
          raise ConfigError(f"{where}: mesh axis {axis!r} is used by both {used[axis]!r} and {name!r}")
        used[axis] = name
      if size % self.factor(name, role):
        rule = " * ".join(f"{a}={self.sizes[a]}" for a in self.axes(name or "", role))
        raise ConfigError(
          f"{where}: {name}={size} is not divisible by {rule}; change the mesh, the rule sharding.{role}.{name}, "
          f"or {PADDING.get(name or '', f'make {name} a multiple of {self.factor(name, role)}')}"
        )


PADDING = {
  "vocab": "raise model.vocab_multiple",
  "heads": "pad with model.kv_head_multiple",
  "kv_heads": "pad with model.kv_head_multiple",
  "experts": "pad with model.expert_multiple",
  "batch": "change data.batch_size or sharding.microbatches",
}


def make(sharding: Sharding, sizes: Mapping[str, int]) -> Rules:
  """The default tables with the config's own rules on top, checked.

  Raises:
    ConfigError: a rule names an unknown logical or mesh axis.
  """
  param = _merge("param", PARAM, sharding.param)
  tables = {
    "param": param,
    "state": _merge("state", param, sharding.state),
    "compute": _merge("compute", COMPUTE, sharding.compute),
  }
  return Rules(tables, sizes)


def _merge(role: str, base: Table, own: Mapping[str, Any]) -> Table:
  out = dict(base)
  for name, axes in own.items():
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    if name not in base:
      raise ConfigError(f"sharding.{role}.{name}: no array has that logical axis; known: {', '.join(sorted(base))}")
    for axis in axes:
      if axis not in MESH_AXES:
        raise ConfigError(f"sharding.{role}.{name}={axis!r} is not a mesh axis; known: {', '.join(MESH_AXES)}")
    out[name] = axes
  return out
