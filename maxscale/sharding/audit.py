"""The audit: every array of the state with its logical axes, its sharding in each role, and its bytes on a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from maxscale.config import ConfigError
from maxscale.sharding.rules import ROLES, Rules


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
  """What the audit needs to know of an array: padded shape, names of its dimensions, bytes of an element, its role."""

  path: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  itemsize: int
  role: str

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * self.itemsize


def split(info: ArrayInfo, rules: Rules, role: str) -> int:
  """Devices that hold different parts of the array in a role."""
  return math.prod(rules.factor(name, role) for name in info.names)


def bytes_per_device(infos: Iterable[ArrayInfo], rules: Rules) -> int:
  return sum(info.bytes // split(info, rules, info.role) for info in infos)


def check(infos: Iterable[ArrayInfo], rules: Rules, replicated_limit_mib: float) -> None:
  """Refuses a state that the rules cannot place, or that would silently hold a large array whole on every device.

  Raises:
    ConfigError: names the array, its shape, the rule and the mesh.
  """
  devices = math.prod(rules.sizes.values())
  for info in infos:
    for role in ROLES:
      rules.check(info.path, info.names, info.shape, role)
    whole = split(info, rules, info.role) == 1 and devices > 1
    sharded = [a for a in ("fsdp", "expert", "tensor", "pipeline") if rules.sizes[a] > 1]
    if whole and sharded and info.bytes > replicated_limit_mib * 2**20:
      raise ConfigError(
        f"{info.path} {info.shape} would be replicated: {info.bytes / 2**20:.0f} MiB on every device, though the mesh "
        f"has {', '.join(sharded)}; give one of its axes ({', '.join(n or '-' for n in info.names)}) a rule in "
        f"sharding.{info.role}, or raise sharding.replicated_limit"
      )


def table(infos: Iterable[ArrayInfo], rules: Rules) -> str:
  """The audit as text, one array a line, with the reason where an array is replicated."""
  rows: list[tuple[str, ...]] = [("array", "shape", "logical axes", *ROLES, "MiB/device", "")]
  infos = list(infos)
  for info in infos:
    specs = [_spec_text(info, rules, role) for role in ROLES]
    mib = f"{info.bytes / split(info, rules, info.role) / 2**20:.3f}"
    rows.append((info.path, "x".join(map(str, info.shape)) or "scalar", ",".join(n or "-" for n in info.names), *specs,
                 mib, _reason(info, rules)))  # fmt: skip
  widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
  lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
  total = bytes_per_device(infos, rules)
  whole = sum(i.bytes for i in infos)
  return "\n".join([*lines, f"state: {whole / 2**20:.1f} MiB in all, {total / 2**20:.1f} MiB on a device"])


def _spec_text(info: ArrayInfo, rules: Rules, role: str) -> str:
  parts = ["*".join(a for a in rules.axes(n, role) if rules.sizes[a] > 1) if n else "" for n in info.names]
  return ",".join(p or "-" for p in parts) or "-"


def _reason(info: ArrayInfo, rules: Rules) -> str:
  if split(info, rules, info.role) > 1 or math.prod(rules.sizes.values()) == 1:
    return ""
  if not info.shape:
    return "replicated: a scalar"
  return f"replicated: no rule splits {', '.join(dict.fromkeys(n or '-' for n in info.names))} in role {info.role}"
