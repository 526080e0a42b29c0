"""A checkpoint of ours, of a run on any mesh or of a conversion, as a Hugging Face checkpoint: streamed and verified."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from maxscale import config as config_lib
from maxscale import storage
from maxscale.checkpoint import host
from maxscale.checkpoint.layout import CheckpointError, Region, slices
from maxscale.config import Config
from maxscale.data.tokenizers import load_tokenizer
from maxscale.interop import InteropError, importing, links, safetensors, work
from maxscale.interop.links import Tensor, Tensors
from maxscale.interop.safetensors import DTYPES, Stored
from maxscale.models import families, family
from maxscale.models.family import Family
from maxscale.models.module import ADAPTERS, ParamSpec

TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as config.json calls them
ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"}


def to_hf(run_dir: str, out: str, step: int | None = None, dtype: str = "", family_name: str = "") -> work.Report:
  """Writes a checkpoint of a run as a Hugging Face checkpoint, in the new folder `out`.

  Args:
    step: of the checkpoint; None: the newest.
    dtype: of every tensor, as safetensors names it; empty: those of the original that the run came from, else BF16.
    family_name: the model family; empty: that of the config.

  Raises:
    InteropError: the model has no Hugging Face form, or `out` holds something.
    CheckpointError: there is no checkpoint, or it is damaged.
  """
  meter = work.Meter()
  with work.new_folder(out) as writing:
    reader = host.Reader(run_dir, step)
    config = _config(reader, run_dir, family_name)
    specs, own = importing.parameters(config), families.get(config.model.family)
    plain = {path: spec for path, spec in specs.items() if not (config.lora.rank and path.endswith(ADAPTERS))}
    tensors = links.tensors(own, plain, config.model)
    _check(reader, specs, tensors, own)
    original = _original(run_dir, config, own)
    about = _about(own, config, original, dtype)
    copies = {name: tensor for name, tensor in tensors.copies.items() if name in original.get("copies", ())}
    names = dict(sorted({**tensors.holders, **copies}.items(), key=lambda item: _by_number(item[0])))
    dtypes = original.get("dtypes", {}) if not dtype else {}
    main = dtype or original.get("dtype", "BF16")
    stored = safetensors.create_folder(writing, ((n, DTYPES[dtypes.get(n, main)], t.shape) for n, t in names.items()))
    meter.largest = max(4 * math.prod(tensor.shape) for tensor in names.values())
    work.run(_jobs(reader, config, plain, names, stored), meter.budget(meter.largest * 5 // 2))
    for file in {tensor.file for tensor in stored.values()}:
      with open(file, "rb") as f:
        os.fsync(f.fileno())
    storage.write(storage.path(writing) / "config.json", json.dumps(about, indent=2) + "\n")
    importing.keep(_folder_of_tokenizer(run_dir, config), writing)
  return meter.report(
    sum(4 * math.prod(s.logical) for s in specs.values()), sum(tensor.nbytes for tensor in stored.values())
  )


def _config(reader: host.Reader, run_dir: str, family_name: str) -> Config:
  """The config of the checkpoint, with its family, and its vocabulary where that was the tokenizer's."""
  config = config_lib.from_json(reader.marker["meta"]["config"])
  name = family_name or config.model.family
  if not name:
    known = ", ".join(families.NAMES)
    raise InteropError(
      f"the config of {run_dir} has no model.family, by which tensors are named; give --family, one of {known}"
    )
  vocab = reader.shape("params/embedding", 0) or (0,)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, family=name, vocab_size=vocab[0]))


def _check(reader: host.Reader, specs: Mapping[str, ParamSpec], tensors: Tensors, own: Family) -> None:
  held = {p.removeprefix("params/") for p in reader.marker["table"] if p.startswith("params/")}
  if held != specs.keys():
    raise CheckpointError(
      f"the checkpoint of step {reader.step} and its config differ: only it has {sorted(held - specs.keys())}, only the "
      f"config {sorted(specs.keys() - held)}"
    )
  for path, spec in specs.items():
    shape = spec.logical[bool(spec.rows) :]
    for layer in spec.rows or (0,):
      if reader.shape(f"params/{path}", layer) != shape:
        found = reader.shape(f"params/{path}", layer)
        raise CheckpointError(f"params/{path}: layer {layer} has shape {found}, and {shape} by the config")
  if tensors.unlinked:
    raise InteropError(
      f"a {own.name} model has no tensor for {', '.join(tensors.unlinked)}; give the --family that has"
    )


def _by_number(name: str) -> list[Any]:
  """Sorts layer 10 behind layer 9, so that a layer is in one shard."""
  return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


# ---- what the original said


def _original(run_dir: str, config: Config, own: Family) -> dict[str, Any]:
  """What a conversion kept of the checkpoint that the run came from; empty where it came from none of the family."""
  for folder in (run_dir, config.run.init_from):
    file = storage.path(folder) / importing.ORIGINAL
    if folder and file.exists():
      original = json.loads(file.read_text())
      about = original["config"]
      return original if not about or families.for_architecture(about) is own else {}
  return {}


def _about(own: Family, config: Config, original: dict[str, Any], dtype: str) -> dict[str, Any]:
  """The config.json: the original one, where it says what the model is; else with what differs."""
  entries, before = own.json_of(config.model), original.get("config")
  main = TORCH[dtype or original.get("dtype", "BF16")]
  if not before:
    return dict(own.extra) | _sizes(config, own) | {"dtype": main} | entries
  model = config_lib.from_json(json.dumps({"model": family.nested(own.options_of(before))})).model
  meant = own.json_of(model)
  changed = {key: value for key, value in entries.items() if meant.get(key) != value}
  # A change is written under one name, whatever others the original has for it.
  gone = changed.keys() | (ROPE if "rope_parameters" in changed else set())
  about = {k: v for k, v in before.items() if own.aliases.get(k, k) not in gone} | changed
  if dtype:
    about["torch_dtype" if "torch_dtype" in about else "dtype"] = main
  return about


def _sizes(config: Config, own: Family) -> dict[str, Any]:
  """What a config.json says besides the model: the longest sequence trained on, and the ids that begin and end a text."""
  tokenizer = load_tokenizer(config.data.tokenizer)
  scaling = config.model.rope_scaling
  length = max(phase.length for phase in config_lib.phases(config.data))
  length = max(length, int(scaling.get("factor", 1) * scaling.get("original_max_position_embeddings", 0)))
  ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
  return ids | ({"max_position_embeddings": length} if "max_position_embeddings" in own.extra else {})


def _folder_of_tokenizer(run_dir: str, config: Config) -> str:
  """The first folder that has files of a tokenizer: a conversion's, or that of data.tokenizer."""
  for folder in (run_dir, config.run.init_from, os.path.dirname(os.path.expanduser(config.data.tokenizer))):
    if folder and set(storage.listdir(folder)) & set(importing.KEPT):
      return folder
  return run_dir


# ---- the tensors


def _jobs(
  reader: host.Reader, config: Config, specs: Mapping[str, ParamSpec], tensors: Mapping[str, Tensor],
  stored: Mapping[str, Stored],
) -> Iterator[tuple[int, Callable[[], None]]]:  # fmt: skip
  """One job for each layer of a parameter, which is read once, whichever tensors it goes to."""
  targets: dict[tuple[str, int], list[tuple[Tensor, int]]] = {}
  for tensor in tensors.values():
    for i, part in enumerate(tensor.parts):
      targets.setdefault((part.path, part.row), []).append((tensor, i))
  for (path, row), found in targets.items():
    mapped = max(stored[tensor.name].nbytes for tensor, _ in found)
    chunk = reader.chunk_bytes(f"params/{path}", row)  # twice: as it is read, and in the dtype of theirs
    job = functools.partial(_job, reader, path, row, found, stored, _adapters(reader, config, path, row))
    yield mapped + 2 * chunk, job


def _job(
  reader: host.Reader, path: str, row: int, targets: list[tuple[Tensor, int]], stored: Mapping[str, Stored],
  adapters: Callable[[Region], Any] | None,
) -> None:  # fmt: skip
  for where, data in reader.chunks(f"params/{path}", row):
    if adapters:
      data = data + adapters(where)
    for tensor, i in targets:
      _put(tensor, i, where, data, stored[tensor.name])


def _put(tensor: Tensor, i: int, where: Region, data: np.ndarray, stored: Stored) -> None:
  """Writes what a tensor has of a region of a layer."""
  expert = tensor.parts[i].expert
  if expert >= 0:
    (first, end), where = where[0], where[1:]
    if not first <= expert < end:
      return
    data = data[expert - first]
  bits = f"u{stored.dtype.itemsize}"  # NumPy moves integers much faster than bfloat16
  view = tensor.view(stored.open(writable=True).view(bits), i)
  view[tensor.index(i, where)] = data.astype(stored.dtype).view(bits)


def _adapters(reader: host.Reader, config: Config, path: str, row: int) -> Callable[[Region], Any] | None:
  """Region of a layer -> what its adapters add there; None where it has none."""
  if not config.lora.rank or reader.shape(f"params/{path}_a", row) is None:
    return None
  a, b = (reader.layer(f"params/{path}{suffix}", row) for suffix in ADAPTERS)
  scale, inputs = np.float32(config.lora.alpha / config.lora.rank), a.ndim - 1
  return lambda where: scale * np.tensordot(a[slices(where[:inputs])], b[(slice(None), *slices(where[inputs:]))], 1)
