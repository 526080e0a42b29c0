"""A plan: the options and flags that a search found best for a config on a topology, as a JSON file. Imports no JAX."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from maxscale.config import ConfigError

VERSION = 1
TYPES = {"config": str, "topology": str, "slices": int, "overrides": dict, "flags": dict, "predicted": dict,
         "versions": dict}  # fmt: skip
FLAGS = ("compile", "init")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to run a config with.

  Attributes:
    config: path of the file.
    topology, slices: chips that it is for, as v5p:8x8x8, and how many slices of them.
    options: path of an option -> value; "overrides" in the file.
    flags: "compile" -> options of one compile; "init" -> flags that libtpu reads when it loads.
    predicted: what the step was expected to take when the plan was made.
    versions: of the packages that made it.
  """

  config: str
  topology: str
  slices: int = 1
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  flags: dict[str, dict[str, str]] = dataclasses.field(default_factory=lambda: {name: {} for name in FLAGS})
  predicted: dict[str, Any] = dataclasses.field(default_factory=dict)
  versions: dict[str, str] = dataclasses.field(default_factory=dict)

  def overrides(self) -> list[tuple[str, str]]:
    """(path, text) of each option, as `config.load` takes them."""
    return [(path, value if isinstance(value, str) else repr(value)) for path, value in self.options.items()]

  def to_json(self) -> str:
    tree = dataclasses.asdict(self)
    tree["overrides"] = tree.pop("options")
    return json.dumps({"version": VERSION, **{key: tree[key] for key in TYPES}}, indent=2)

  def save(self, path: str) -> None:
    with open(path, "w", encoding="utf-8") as f:
      f.write(self.to_json() + "\n")


def load(path: str) -> Plan:
  """Reads what `Plan.save` wrote.

  Raises:
    ConfigError: there is no such file, or it is no plan of this version.
  """
  if not os.path.isfile(path):
    raise ConfigError(f"there is no plan {path}; `python -m maxscale.plan --search --plan {path}` makes one")
  try:
    with open(path, encoding="utf-8") as f:
      tree = json.load(f)
  except ValueError as e:
    raise ConfigError(f"{path} is not JSON: {e}") from e
  if not isinstance(tree, dict) or "version" not in tree:
    raise ConfigError(f"{path} is not a plan: it has no version")
  if tree.pop("version") != VERSION:
    raise ConfigError(f"{path} is a plan of another version than {VERSION}; make it again")
  if missing := [key for key in TYPES if key not in tree]:
    raise ConfigError(f"{path} is not a whole plan: it has no {', '.join(missing)}")
  for key, value in tree.items():
    if key not in TYPES:
      raise ConfigError(f"{path} has an unknown key {key!r}; a plan has {', '.join(TYPES)}")
    if type(value) is not TYPES[key]:
      raise ConfigError(f"{path}: {key}={value!r} must be of type {TYPES[key].__name__}")
  for name, flags in tree["flags"].items():
    if name not in FLAGS or not isinstance(flags, dict):
      raise ConfigError(f"{path}: flags has {name!r}={flags!r}; it holds {' and '.join(FLAGS)}, each a group")
  tree["flags"] = {name: tree["flags"].get(name, {}) for name in FLAGS}
  return Plan(options=tree.pop("overrides"), **tree)
