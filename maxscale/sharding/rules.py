"""Rules: logical axis -> mesh axes, in three roles.

  state    master weights, optimizer moments and summed gradients: `param` with the config's `sharding.state` on top
           (ZeRO-1 adds `data` to an axis).
  param    parameters between uses, and gradients while they are accumulated. FSDP is `embed -> fsdp` here.
  compute  parameters in use, and activations. FSDP gathers a parameter because `embed` has no mesh axis here.

For a dimension of a parameter, each role's mesh axes begin with those of the role below it: going from state to param
to compute only gathers, and the gradient's way back only reduces and scatters.

An array is described by the names of its dimensions; nothing is sharded, or left replicated, by anything else. A name
"a+b" is a dimension of `a` that also has the mesh axes of `b`, behind its own: so FSDP splits the experts' down
projection over its inputs, because a gather of its last dimension would leave a copy to the layout of kernels. The
same tables serve dense and mixture-of-experts models: the rule of an axis that no array has does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from maxscale.config import MESH_AXES, ConfigError, Sharding

ROLES = ("param", "state", "compute")
Table = Mapping[str, tuple[str, ...]]

PARAM: Table = {
  "layers": ("pipeline",),  # a stage holds its own layers
  "vocab": ("pipeline", "tensor"),  # every stage has its part of the embedding and of the head
  "embed": ("fsdp",),
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "rank": ("fsdp",),  # of the latents of attention
  "experts": ("expert",),
  "norm": (),  # scales of norms: a few KiB, needed whole by every device
  "scalar": (),
}
COMPUTE: Table = {
  **PARAM,
  "embed": (),
  "rank": (),
  "batch": ("data", "fsdp", "expert"),
  "length": ("context",),  # inside attention and MLPs
  "residual_length": ("context", "tensor"),  # norms and the residual stream
}
TOKENS = ("batch", "length", "residual_length")
WHOLE = ("embed", "rank", "head_dim", "norm", "scalar")  # operations need all of these dimensions


@dataclasses.dataclass(frozen=True)
class Rules:
  """The tables of the three roles on a mesh.

  Attributes:
    tables: role -> logical axis -> mesh axes.
    sizes: mesh axis -> devices along it.
    slices: mesh axis -> slices along it (its DCN factor), where that is more than one.
  """

  tables: Mapping[str, Table]
  sizes: Mapping[str, int]
  slices: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def split(self, name: str, role: str) -> tuple[str, ...]:
    """Mesh axes of more than one device that a logical axis is split over."""
    return tuple(a for a in self.axes(name, role) if self.sizes[a] > 1)

  def axes(self, name: str, role: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis.

    Raises:
      ConfigError: no rule names it.
    """
    if "+" in name:
      return tuple(axis for part in name.split("+") for axis in self.axes(part, role))
    table = self.tables[role]
    if name not in table:
      raise ConfigError(f"the logical axis {name!r} has no rule in role {role}; known: {', '.join(sorted(table))}")
    return table[name]

  def spec(self, names: Sequence[str | None], role: str) -> Any:
    """PartitionSpec of an array whose dimensions have these names (None: never sharded)."""
    from jax.sharding import PartitionSpec

    parts = [self.split(n, role) if n else () for n in names]
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
      lower = {"param": "compute", "state": "param"}.get(role)
      if lower and name and "+" in name and self.split(name, role)[: len(own := self.split(name, lower))] != own:
        raise ConfigError(
          f"{where}: {name} is split over {_text(self.split(name, role))}, which does not begin with those of role "
          f"{lower}, {_text(own)}; give {name.split('+')[0]} the same rule in both roles"
        )
      factor = self.factor(name, role)
      if size % factor:
        rule = " * ".join(f"{a}={self.sizes[a]}" for a in self.split(name or "", role))
        rules = " or ".join(f"sharding.{role}.{part}" for part in (name or "").split("+"))
        raise ConfigError(
          f"{where}: {name}={size} is not divisible by {rule}; change the mesh, the rule {rules}, "
          f"or {PADDING.get(name or '', f'make {name} a multiple of {factor}')}; the nearest {name} that fits: "
          f"{' or '.join(str(n) for n in (size // factor * factor, -(-size // factor) * factor) if n)}"
        )


PADDING = {
  "vocab": "raise model.vocab_multiple",
  "heads": "pad with model.kv_head_multiple",
  "kv_heads": "pad with model.kv_head_multiple",
  "experts": "pad with model.expert_multiple",
  "residual_length": "change data.length",
  "batch": "change data.batch_size or sharding.microbatches",
}


def make(sharding: Sharding, sizes: Mapping[str, int], slices: Mapping[str, int] | None = None) -> Rules:
  """The default tables with the config's own rules on top, checked; `sizes` and `slices` as in `Rules`.

  Raises:
    ConfigError: a rule names an unknown logical or mesh axis, or the roles do not fit together.
  """
  param = _merge("param", PARAM, sharding.param)
  rules = Rules(
    {
      "param": param,
      "state": _merge("state", param, sharding.state),
      "compute": _merge("compute", COMPUTE, sharding.compute),
    },
    sizes,
    slices or {},
  )
  _check_roles(rules)
  return rules


def _check_roles(rules: Rules) -> None:
  """Refuses tables whose meaning no operation has; they would be wrong numbers without an error."""
  for low, high in (("compute", "param"), ("param", "state")):
    for name in PARAM:
      a, b = rules.split(name, low), rules.split(name, high)
      if b[: len(a)] != a:
        raise ConfigError(
          f"sharding.{high}.{name}={_text(b)} does not begin with sharding.{low}.{name}={_text(a)}; a parameter is "
          f"gathered from role {high} to role {low}, never moved: list {_text(a)} first"
        )
  for name in WHOLE:
    if rules.split(name, "compute"):
      raise ConfigError(f"sharding.compute.{name}={_text(rules.split(name, 'compute'))}: operations need all of "
                        f"{name}; split it in sharding.param or sharding.state instead")  # fmt: skip
  tokens = {a for name in TOKENS for a in rules.split(name, "compute")}
  both = tokens.intersection(rules.split("layers", "compute"))
  if both:
    raise ConfigError(f"sharding.compute.layers makes stages along {_text(sorted(both))}, along which tokens are split, "
                      "too: a stage would work on other tokens than the one before; take it from one of them")  # fmt: skip
  for name in ("layers", "norm"):
    if rules.split(name, "param") != rules.split(name, "compute"):
      raise ConfigError(f"sharding.param.{name}={_text(rules.split(name, 'param'))} is not sharding.compute.{name}="
                        f"{_text(rules.split(name, 'compute'))}: it is not gathered for use; split it in sharding.state, "
                        "which is gathered once a step")  # fmt: skip
  for role in ("param", "state"):
    for name in PARAM:
      more = set(rules.split(name, role)) - set(rules.split(name, "compute")) - tokens
      if more:
        raise ConfigError(
          f"sharding.{role}.{name} splits it over {_text(sorted(more))}, along which devices hold the same tokens, so "
          f"that a gradient cannot be summed and scattered there; add it to sharding.compute.batch, or leave it out"
        )
  length, residual = rules.split("length", "compute"), rules.split("residual_length", "compute")
  if residual[: len(length)] != length:
    raise ConfigError(f"sharding.compute.residual_length={_text(residual)} does not begin with "
                      f"sharding.compute.length={_text(length)}")  # fmt: skip
  for name in ("heads", "kv_heads", "mlp", "vocab"):
    missing = set(residual[len(length) :]) - set(rules.split(name, "compute"))
    if missing:
      raise ConfigError(
        f"sharding.compute.residual_length splits sequences over {_text(sorted(missing))}, but {name} is not split "
        f"over it: a block would be computed twice; give {name} that axis, or set sharding.compute.residual_length="
        f"{_text(length)}"
      )
  if rules.split("heads", "compute") != rules.split("kv_heads", "compute"):
    raise ConfigError(
      f"sharding.compute splits heads over {_text(rules.split('heads', 'compute'))} and kv_heads over "
      f"{_text(rules.split('kv_heads', 'compute'))}, but a query head must be where its key and value head is; give "
      "both the same rule, and pad with model.kv_head_multiple"
    )
  extra = set(rules.split("experts", "compute")) - set(rules.split("batch", "compute"))
  if extra:
    raise ConfigError(f"sharding.compute.experts is split over {_text(sorted(extra))}, which sharding.compute.batch is "
                      "not: its devices would send the same tokens; add it there")  # fmt: skip


def _text(axes: Sequence[str]) -> str:
  return repr(list(axes))


def _merge(role: str, base: Table, own: Mapping[str, Any]) -> Table:
  out = dict(base)
  for name, axes in own.items():
    if not isinstance(axes, str | list | tuple | None):
      raise ConfigError(f"sharding.{role}.{name}={axes!r} must be a mesh axis or a list of them")
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    if name not in base:
      raise ConfigError(f"sharding.{role}.{name}: no array has that logical axis; known: {', '.join(sorted(base))}")
    for axis in axes:
      if axis not in MESH_AXES:
        raise ConfigError(f"sharding.{role}.{name}={axis!r} is not a mesh axis; known: {', '.join(MESH_AXES)}")
    out[name] = axes
  return out
