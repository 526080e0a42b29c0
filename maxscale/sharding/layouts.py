"""Layouts of a config: the options that say where and in which order a program runs, not what it computes.

A layout is written as `--mesh` of `maxscale.check` takes it: `data=2,tensor=4`, with the options of `mesh` by their own
name, any other by its path, and `+` in a list: `fsdp=2,sharding.context=gather,sharding.state.embed=fsdp+data`.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

from maxscale import config as config_lib
from maxscale.config import MESH_AXES, RUNTIME, Config, ConfigError
from maxscale.sharding import mesh

Layout = dict[str, Any]  # path of an option -> its value
DEVICES = 16
GROUPS = ("mesh", "sharding", "model", "loss", "remat")  # whose runtime options a layout may have

# Six meshes of four axes, 2 along each, which hold every three of the six axes; then what else a layout can be.
FOUR_AXES = ("data fsdp expert context", "data fsdp expert tensor", "data fsdp expert pipeline",
             "data context tensor pipeline", "fsdp context tensor pipeline", "expert context tensor pipeline")  # fmt: skip
OTHERS = (
  "",
  "data=8",
  "fsdp=8",
  "expert=8",
  "expert=4,tensor=2",
  "expert=4,fsdp=2,sharding.experts=gather",
  "context=8,sharding.context=ring",
  "context=4,fsdp=2,sharding.context=gather",
  "context=4,data=2,sharding.context=ulysses",
  "tensor=8",
  "pipeline=4,data=2",
  "pipeline=2,fsdp=2,tensor=2,sharding.repeats=2,sharding.microbatches=4",
  "data=2,fsdp=2,tensor=2,sharding.microbatches=4",
  "fsdp=2,context=2,tensor=2,sharding.compute.residual_length=context",
  "data=4,fsdp=2,sharding.state.embed=fsdp+data",
  "slices=2,dcn.data=2,fsdp=2,tensor=2",
  "slices=2,dcn.data=2,fsdp=4,sharding.state.embed=fsdp+data",
  "slices=2,dcn.data=2,data=2,fsdp=2,sharding.state.embed=fsdp+data",
  "slices=2,dcn.fsdp=2,fsdp=2,tensor=2",
  "slices=2,dcn.pipeline=2,fsdp=2,tensor=2",
)


def every(config: Config, small: Config) -> list[Layout]:
  """The layouts to compare for a config and its scaled-down copy, from one device on; the config's own is the second."""
  fours = [",".join(f"{axis}=2" for axis in axes.split()) for axes in FOUR_AXES]
  others = [text for text in OTHERS if small.model.experts or "expert" not in text]
  layouts = [own(config) if text is None else parse(text) for text in [others[0], None, *fours, *others[1:]]]
  most = 2 ** (small.model.experts.bit_length() - 1) if small.model.experts else 1  # devices that experts give work to
  layouts = [{p: min(v, most) if p.endswith(".expert") else v for p, v in layout.items()} for layout in layouts]
  layouts = [fitted(small, {p: v for p, v in layout.items() if v != 1}) for layout in layouts]
  return list({frozenset((path, str(v)) for path, v in layout.items()): layout for layout in layouts}.values())


def parse(text: str) -> Layout:
  """The inverse of `name`.

  Raises:
    ConfigError: not of that form, or an option that is no layout's.
  """
  options = [p for p, (_, f) in config_lib.flatten(Config()).items() if f.metadata["kind"] == RUNTIME]
  layout: Layout = {}
  for part in filter(None, text.split(",")):
    key, equals, value = part.partition("=")
    path = key if key.split(".")[0] in GROUPS else f"mesh.{key}"
    layout[path] = value.split("+") if "+" in value else _value(value)
    size = not path.startswith("mesh.") or (type(layout[path]) is int and layout[path] >= 1)
    if not equals or not size or not any(path == p or path.startswith(f"{p}.") for p in options):
      raise ConfigError(f"--mesh {text}: {part!r} is not axis=size with an axis of {', '.join(MESH_AXES)}, nor another "
                        "option that says where a program runs, such as sharding.microbatches=2")  # fmt: skip
  return layout


def _value(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def name(layout: Layout) -> str:
  text = lambda v: "+".join(v) if isinstance(v, list) else v  # noqa: E731
  return ",".join(f"{path.removeprefix('mesh.')}={text(v)}" for path, v in layout.items()) or "one device"


def devices(layout: Layout) -> int:
  return layout.get("mesh.slices", 1) * math.prod(layout.get(f"mesh.{axis}", 1) for axis in MESH_AXES)


def apply(config: Config, options: Layout) -> Config:
  """The config with some options changed, checked.

  Raises:
    ConfigError: an option is unknown or wrong.
  """
  tree = dataclasses.asdict(config)
  config_lib.change(tree, options)
  out = config_lib.from_json(json.dumps(tree))
  config_lib.check(out)
  return out


def subsets(layout: Layout) -> Iterator[Layout]:
  """Every part of a layout, fewest options first: nothing comes first, the whole last."""
  for n in range(len(layout) + 1):
    for paths in itertools.combinations(layout, n):
      yield {path: layout[path] for path in paths}


def own(config: Config) -> Layout:
  """The config's mesh, or, where the scaled-down copy is too small for it, 2 along its axes (the first four)."""
  m = config.mesh
  sizes = [getattr(m, axis) for axis in MESH_AXES]
  slices = m.slices or math.prod(max(1, getattr(m.dcn, axis)) for axis in MESH_AXES)
  given = slices * math.prod(max(1, size) for size in sizes) * (2 if -1 in sizes else 1)
  shape = mesh.resolve(m, config.run.simulated_devices or given, slices)
  factors = {f"mesh.{axis}": size for axis, size in zip(MESH_AXES, shape.ici) if size > 1}
  factors |= {f"mesh.dcn.{axis}": size for axis, size in zip(MESH_AXES, shape.dcn) if size > 1}
  rows = math.prod(shape.sizes[axis] for axis in ("data", "fsdp", "expert"))
  parts = max(shape.sizes["pipeline"], min(config.sharding.microbatches, 2))
  if shape.devices > DEVICES or shape.devices & (shape.devices - 1) or parts > 4 or rows * parts > 16:
    factors = dict.fromkeys(list(factors)[: DEVICES.bit_length() - 1], 2)
  slices = math.prod(size for path, size in factors.items() if path.startswith("mesh.dcn."))
  layout: Layout = factors | ({"mesh.slices": slices} if slices > 1 else {})
  return layout | ({"sharding.repeats": 2} if _stages(layout) == 2 and config.sharding.repeats > 1 else {})


def _stages(layout: Layout) -> int:
  return layout.get("mesh.pipeline", 1) * layout.get("mesh.dcn.pipeline", 1)


def fitted(small: Config, layout: Layout) -> Layout:
  """The layout with what it needs to be possible: microbatches for its stages, heads padded for its devices."""
  out = dict(layout)
  stages, microbatches = _stages(layout), small.sharding.microbatches
  if microbatches % stages:
    out.setdefault("sharding.microbatches", -(-microbatches // stages) * stages)
  ulysses = layout.get("sharding.context", small.sharding.context) == "ulysses"
  parts = layout.get("mesh.tensor", 1) * (layout.get("mesh.context", 1) if ulysses else 1)
  if parts > small.model.kv_head_multiple:
    out.setdefault("model.kv_head_multiple", parts)
  return out
