"""The model families. To add one: a file in this folder, and its name in `NAMES`."""

from __future__ import annotations

import difflib
import functools
import importlib
from typing import Any

from maxscale.models.family import Family, FamilyError, nested

NAMES = (
  "llama", "gpt2", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "deepseek_v2", "deepseek_v3",
  "kimi", "gpt_oss",
)  # fmt: skip


@functools.cache
def get(name: str) -> Family:
  """The family of a name.

  Raises:
    FamilyError: there is none.
  """
  if name not in NAMES:
    near = difflib.get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FamilyError(f"there is no model family {name!r}; known: {', '.join(NAMES)}{hint}")
  return importlib.import_module(f"{__name__}.{name}").FAMILY


def for_architecture(hf: dict[str, Any]) -> Family:
  """The family of a config.json, by its architecture, or its model_type where it names none.

  Raises:
    FamilyError: none reads it; names the family with the most similar keys, and the keys that differ.
  """
  named = hf.get("architectures") or ()
  # Families may share a class: the one whose model_type it is comes first.
  for family in sorted(map(get, NAMES), key=lambda family: family.model_type != hf.get("model_type")):
    if set(named) & set(family.architectures) or (not named and hf.get("model_type") == family.model_type):
      return family
  what = " ".join(named) or hf.get("model_type") or "a model without a name"
  keys = set(hf) - GENERAL
  near = max(map(get, NAMES), key=lambda family: len(keys & _keys(family)) / len(keys | _keys(family)))
  needed = {key for key in near.fields.values() if key not in near.defaults}
  more, fewer = sorted(keys - _keys(near)), sorted(needed - keys)
  raise FamilyError(
    f"config.json: no family reads {what}. The nearest is {near.name!r} (maxscale/models/families/{near.name}.py), which "
    f"does not know {', '.join(more) or 'nothing of it'}, and needs {', '.join(fewer) or 'nothing more'}. Add a family "
    "like it, or, if the model is one, name its class in architectures"
  )


# Keys that say nothing of what a model computes.
# fmt: off
GENERAL = frozenset({
  "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
  "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
  "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
  "_name_or_path",
})
# fmt: on


def _keys(family: Family) -> set[str]:
  keys = {"rope_parameters", "rope_scaling", "rope_theta"}
  return keys | {*family.fields.values(), *family.expected, *family.defaults, *family.extra} - GENERAL


def options_of(hf: dict[str, Any]) -> dict[str, Any]:
  """Options of `model` for a config.json: dotted name -> value.

  Raises:
    FamilyError: no family reads it, or it says what its family cannot mean.
  """
  return for_architecture(hf).options_of(hf)


def find_preset(name: str) -> dict[str, Any]:
  """Options of `model` of a public size: dotted name -> value.

  Raises:
    FamilyError: there is none of that name.
  """
  known = {preset: family for family in map(get, NAMES) for preset in family.presets}
  if name not in known:
    near = difflib.get_close_matches(name, known, 3, 0.3)
    raise FamilyError(f"there is no preset {name!r}; nearest: {', '.join(near) or ', '.join(known)}")
  return {"family": known[name].name, **known[name].options, **known[name].presets[name]}


def preset(config: Any, name: str) -> None:
  """Sets `config.model` of a ConfigDict to a public size, in a config file: `families.preset(c, "llama3-8b")`.

  Raises:
    FamilyError: there is none of that name.
  """
  config.model.update(nested(find_preset(name)))
