"""A Hugging Face checkpoint as a checkpoint of ours: checked whole before anything is written, then streamed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from maxscale import config as config_lib
from maxscale import storage
from maxscale.checkpoint import commit, host
from maxscale.config import Config
from maxscale.interop import InteropError, links, work
from maxscale.interop.links import Tensor, Tensors
from maxscale.interop.quantised import BF16
from maxscale.interop.safetensors import NAMES
from maxscale.interop.source import FLOATS, Entry, Source
from maxscale.models import families, family
from maxscale.models.module import ParamSpec

ORIGINAL = "hf.json"  # in a converted checkpoint: what writing it back needs of the original
# Files beside the tensors that are kept: of the tokenizer, and of generation.
KEPT = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
BLOCK = 64 * 2**20  # bytes of a file, at most


@dataclasses.dataclass(frozen=True)
class Report:
  """What a conversion did: bytes read and written, seconds, the peak of memory (None: not known here), the largest tensor."""

  read: int
  written: int
  seconds: float
  peak: int | None
  tracked: int
  largest: int


def from_hf(folder: str, out: str, preset: str = "") -> Report:
  """Converts the checkpoint in a folder to one of ours, of step 0, in the new folder `out`.

  Args:
    preset: name of a public size that the model is; config.json is not asked.

  Raises:
    InteropError: a file or tensor is missing, damaged or not what config.json says; nothing was written.
  """
  with work.new_folder(out) as writing, work.Clock() as clock:
    source = Source(folder)
    config = _config(source, out, preset)
    specs = parameters(config)
    tensors = links.tensors(families.get(config.model.family), specs, config.model)
    check(source, config, tensors)
    return _write(source, config, specs, tensors, writing, clock)


def _config(source: Source, out: str, preset: str) -> Config:
  if source.config is None and not preset:
    raise InteropError(f"{source.folder} has no config.json, which says what model it is; fetch it, or give --preset")
  options = families.find_preset(preset) if preset else families.options_of(source.config or {})
  tokenizer = next((n for n in ("tokenizer.json", "tokenizer.model") if n in os.listdir(source.folder)), "")
  tree = {
    "run": {"name": os.path.basename(os.path.normpath(out)), "dir": out},
    "model": family.nested(options),
    "data": {"tokenizer": os.path.join(out, tokenizer) if tokenizer else "bytes"},
  }
  config = config_lib.from_json(json.dumps(tree))
  config_lib.check(config)
  return config


def parameters(config: Config) -> dict[str, ParamSpec]:
  """Path -> spec of each parameter of a config's model, the adapters of LoRA included."""
  from maxscale.models import decoder
  from maxscale.models.parts import Shape

  shape = Shape.of(config, config.model.vocab_size)
  return decoder.skeleton(shape, tuple(range(shape.L - shape.L_dense))).specs


# ---- checks


def check(source: Source, config: Config, tensors: Tensors) -> None:
  """Compares names, shapes and dtypes with what the model has, and copies with what they repeat.

  Raises:
    InteropError: names the file and the tensor; of names, all that are left over on either side.
  """
  _check_names(source, config, tensors)
  for name, tensor in {**tensors.holders, **tensors.copies}.items():
    if name in source.tensors:
      _check_tensor(source.tensors[name], tensor, config)
  for name, tensor in tensors.copies.items():
    if name in source.tensors:
      _check_copy(source, tensor, tensors)


def _check_names(source: Source, config: Config, tensors: Tensors) -> None:
  ignored = families.get(config.model.family).ignored
  known = tensors.holders.keys() | tensors.copies.keys()
  unknown = [n for n in source.tensors if n not in known and not any(re.fullmatch(i, n) for i in ignored)]
  missing = tensors.holders.keys() - source.tensors.keys()
  problems = []
  if unknown:
    problems.append(f"tensors of the checkpoint that the model has no parameter for: {links.summary(unknown)}")
  if missing:
    problems.append(f"tensors of the model that the checkpoint lacks: {links.summary(missing)}")
  if tensors.unlinked:
    problems.append(f"parameters that the family has no tensor for: {', '.join(tensors.unlinked)}")
  if problems:
    raise InteropError(
      f"{source.folder} is not the {config.model.family} model that "
      f"{'its config.json' if source.config else 'the preset'} says:\n  " + "\n  ".join(problems)
    )


def _check_tensor(entry: Entry, tensor: Tensor, config: Config) -> None:
  if entry.dtype not in FLOATS:
    raise InteropError(
      f"{entry.where} is {entry.dtype}; weights are float32, float16 or bfloat16"
      + (", or float8 with scales in a tensor ..._scale_inv" if entry.dtype.itemsize == 1 else "")
    )
  if entry.shape != tensor.shape:
    vocab = f" (vocab_size={config.model.vocab_size})" if "v" in tensor.link.dims[1] else ""
    raise InteropError(
      f"{entry.where} has shape {list(entry.shape)}; the config says {list(tensor.shape)}{vocab}: config.json and the "
      "tensors are not of one model"
    )


def _check_copy(source: Source, copy: Tensor, tensors: Tensors) -> None:
  part = copy.parts[0]
  holder = next(t for t in tensors.holders.values() if part in t.parts)
  a = copy.view(source.tensors[copy.name].open(), 0)
  b = holder.view(source.tensors[holder.name].open(), holder.parts.index(part))
  rows = max(1, BLOCK // (a[:1].size * 4))
  if any((a[i : i + rows] != b[i : i + rows]).any() for i in range(0, len(a), rows)):
    raise InteropError(
      f"{source.tensors[copy.name].where} differs from {holder.name}, which it repeats in a model with "
      f"tied_embeddings={tensors and True}; set tie_word_embeddings in config.json to what the checkpoint is"
    )
