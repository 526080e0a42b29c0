"""A Hugging Face checkpoint as a checkpoint of ours: checked whole before anything is written, then streamed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from maxscale import config as config_lib
from maxscale import storage
from maxscale.checkpoint import commit, host
from maxscale.config import Config, Data
from maxscale.interop import InteropError, links, work
from maxscale.interop.links import Tensor, Tensors
from maxscale.interop.quantised import BF16
from maxscale.interop.safetensors import NAMES
from maxscale.interop.source import FLOATS, Entry, Source
from maxscale.models import decoder, families, family
from maxscale.models.module import ParamSpec
from maxscale.models.parts import Shape

ORIGINAL = "hf.json"  # in a converted checkpoint: what writing it back needs of the original
# Files beside the tensors that are kept: of the tokenizer, and of generation.
KEPT = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
BLOCK = 64 * 2**20  # bytes of a file, at most


def from_hf(folder: str, out: str, preset: str = "") -> work.Report:
  """Converts the checkpoint in a folder to one of ours, of step 0, in the new folder `out`.

  Args:
    preset: name of a public size that the model is; config.json is not asked.

  Raises:
    InteropError: a file or tensor is missing, damaged or not what config.json says; nothing was written.
  """
  meter = work.Meter()
  with work.new_folder(out) as writing:
    source = Source(folder)
    config = _config(source, out, preset)
    source.complete(families.get(config.model.family).links[0].theirs.partition(".")[0] + ".")
    config, specs, tensors = _model(source, config)
    check(source, config, tensors)
    read, written = _write(source, config, specs, tensors, writing, meter)
  return meter.report(read, written)


def _config(source: Source, out: str, preset: str) -> Config:
  if source.config is None and not preset:
    raise InteropError(f"{source.folder} has no config.json, which says what model it is; fetch it, or give --preset")
  options = families.find_preset(preset) if preset else families.options_of(source.config or {})
  tokenizer = next((n for n in ("tokenizer.json", "tokenizer.model") if n in os.listdir(source.folder)), "")
  tree = {
    "run": {"name": os.path.basename(os.path.normpath(out))},
    "model": family.nested(options),
    "data": {"tokenizer": os.path.join(out, tokenizer) if tokenizer else "bytes"},
  }
  if options.get("max_positions"):
    tree["data"]["length"] = min(Data().length, options["max_positions"])
  config = config_lib.from_json(json.dumps(tree))
  config_lib.check(config)
  return config


def _model(source: Source, config: Config) -> tuple[Config, dict[str, ParamSpec], Tensors]:
  """The config, its parameters and their tensors. Modules that predict further tokens are left out where the checkpoint
  has nothing of them: transformers drops their tensors, and goes on counting them in config.json."""
  specs = parameters(config)
  tensors = links.tensors(families.get(config.model.family), specs, config.model)
  further = [n for n, tensor in tensors.holders.items() if tensor.parts[0].path.startswith("mtp/")]
  if further and not any(name in source.tensors for name in further):
    return _model(source, dataclasses.replace(config, model=dataclasses.replace(config.model, mtp=0)))
  return config, specs, tensors


def parameters(config: Config) -> dict[str, ParamSpec]:
  """Path -> spec of each parameter of a config's model, the adapters of LoRA included."""
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
      f"{source.tensors[copy.name].where} differs from {holder.name}, which it repeats in the model that config.json "
      "says (tie_word_embeddings); change config.json to what the checkpoint is"
    )


# ---- writing


def _write(
  source: Source, config: Config, specs: Mapping[str, ParamSpec], tensors: Tensors, out: str, meter: work.Meter
) -> tuple[int, int]:
  """Writes the checkpoint; returns the bytes of the tensors and of the arrays."""
  leaves = tuple(host.leaf_of(f"params/{path}", spec.logical, spec.rows) for path, spec in specs.items())
  meter.largest = max(4 * math.prod(tensor.shape) for tensor in tensors.holders.values())
  files = _files(tensors, min(BLOCK, max(2**20, meter.largest // 4)))
  writer = host.Writer(out, 0, leaves, {f"params/{path}": shape for path, shape in files.items()})
  budget = meter.budget(meter.largest * 5 // 2)
  work.run(_jobs(source, tensors, files, writer), budget)
  storage.write(storage.path(out) / "config.json", config_lib.to_json(config))
  storage.write(storage.path(out) / ORIGINAL, json.dumps(_original(source, tensors), indent=2))
  keep(source.folder, out)
  writer.commit(commit.Meta(config_hash=config.hash, config=config_lib.to_json(config), data_fingerprint="{}"))
  return sum(entry.stored.nbytes for entry in source.tensors.values()), writer.bytes


def _files(tensors: Tensors, limit: int) -> dict[str, host.Shape]:
  """Path -> shape of a file of a layer: of one expert where a tensor of theirs is one, and at most `limit` bytes."""
  out = {}
  for part in (part for tensor in tensors.holders.values() for part in tensor.parts):
    shape = list(part.shape)
    for i, n in enumerate(shape):
      shape[i] = max(1, min(n, limit // (4 * math.prod(shape[i + 1 :]))))
      if shape[i] > 1:  # the dimensions behind are whole: a file is contiguous in its layer
        break
    out[part.path] = (1,) * (part.expert >= 0) + tuple(shape)
  return out


def _jobs(
  source: Source, tensors: Tensors, files: Mapping[str, host.Shape], writer: host.Writer
) -> Iterator[tuple[int, Callable[[], None]]]:
  for name, tensor in tensors.holders.items():
    block = max(4 * math.prod(files[part.path]) for part in tensor.parts)  # twice: itself, and encoded
    yield source.tensors[name].nbytes + 2 * block, functools.partial(_job, source, tensor, files, writer)


def _job(source: Source, tensor: Tensor, files: Mapping[str, host.Shape], writer: host.Writer) -> None:
  array = source.tensors[tensor.name].open()
  for i, part in enumerate(tensor.parts):
    view = tensor.view(array, i)
    for where in host.blocks(part.shape, files[part.path][part.expert >= 0 :]):
      data = to_float32(view[tensor.index(i, where)])
      writer.write(f"params/{part.path}", part.row, part.in_layer(where), data)


def to_float32(x: np.ndarray) -> np.ndarray:
  """A contiguous copy in float32."""
  if x.dtype != BF16:
    return np.array(x, np.float32, order="C")
  out = np.zeros(x.shape, np.float32)  # bfloat16 is the high half of float32; NumPy's own cast is many times slower
  out.view(np.uint16).reshape(*x.shape, 2)[..., 1] = x.view(np.uint16)
  return out


def _original(source: Source, tensors: Tensors) -> dict[str, Any]:
  """What writing back needs: the config.json, the dtype of most tensors, those that differ, and copies that were there."""
  kept = (tensors.holders.keys() | tensors.copies.keys()) & source.tensors.keys()
  dtypes = {name: NAMES[source.tensors[name].dtype] for name in sorted(kept)}
  main = Counter(dtypes.values()).most_common(1)[0][0]
  config = {k: v for k, v in (source.config or {}).items() if k != "quantization_config"}
  return {
    "config": config or None,
    "dtype": main,
    "dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != main},
    "copies": sorted(tensors.copies.keys() & source.tensors.keys()),
  }


def keep(folder: str, out: str) -> None:
  """Copies the files of the tokenizer and of generation."""
  for name in KEPT:
    file = storage.path(folder) / name
    if file.exists():
      storage.write(storage.path(out) / name, file.read_bytes())
