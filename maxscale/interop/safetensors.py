"""The safetensors format: a header in JSON, then the tensors one after another. Nothing is read that is not asked for.

https://huggingface.co/docs/safetensors: 8 bytes, the length of the header; the header, {name: {dtype, shape, data_offsets}};
then the bytes that the offsets count from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from maxscale.interop import InteropError

# fmt: off
DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}.items()}
# fmt: on
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file: `offset` and the size of its dtype and shape say where its bytes are."""

  name: str
  file: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  @property
  def where(self) -> str:
    """For messages."""
    return f"{self.file}: {self.name}"

  def open(self, writable: bool = False) -> np.ndarray:
    """The tensor, mapped from its file."""
    if not self.nbytes:
      return np.empty(self.shape, self.dtype)
    # Mapped as bytes, since a tensor may begin anywhere.
    mapped = np.memmap(self.file, np.uint8, "r+" if writable else "r", self.offset, (self.nbytes,))
    return np.ndarray(self.shape, self.dtype, mapped)


def open_folder(folder: str) -> dict[str, Stored]:
  """Name -> tensor, of all files of a checkpoint; no tensor is read.

  Raises:
    InteropError: a file is missing, truncated or damaged, or the checkpoint is not in safetensors files.
  """
  index = os.path.join(folder, INDEX)
  if os.path.exists(index):
    return _open_shards(folder, index)
  names = [n for n in sorted(os.listdir(folder)) if n.endswith(".safetensors")]
  if names == [SINGLE] or len(names) == 1:
    return read_header(os.path.join(folder, names[0]))
  if names:
    raise InteropError(
      f"{folder} has {len(names)} safetensors files and no {INDEX}, which says what is in each; fetch it"
    )
  pickles = [n for n in sorted(os.listdir(folder)) if n.endswith(PICKLES)]
  if pickles:
    raise InteropError(
      f"{os.path.join(folder, pickles[0])} is a pickle, which can run any code when it is opened, and is not read. Where "
      "you trust it, load it with transformers, AutoModelForCausalLM.from_pretrained(DIR), and save_pretrained(NEW) "
      "writes safetensors files"
    )
  raise InteropError(f"{folder} has no safetensors file")


def _open_shards(folder: str, index: str) -> dict[str, Stored]:
  try:
    with open(index, encoding="utf-8") as f:
      weight_map = json.load(f)["weight_map"]
    files = sorted(set(weight_map.values()))
  except (ValueError, KeyError, AttributeError, TypeError) as e:
    raise InteropError(f"{index} is damaged: {type(e).__name__}: {e}") from e
  missing = [name for name in files if not os.path.exists(os.path.join(folder, name))]
  if missing:
    raise InteropError(f"{folder} lacks {', '.join(missing)}, named in {INDEX}; fetch the missing files")
  tensors: dict[str, Stored] = {}
  for name in files:
    found = read_header(os.path.join(folder, name))
    named = {tensor for tensor, file in weight_map.items() if file == name}
    if found.keys() != named:
      only = sorted(found.keys() ^ named)
      raise InteropError(f"{os.path.join(folder, name)} and {INDEX} disagree on {', '.join(only)}; fetch both again")
    tensors.update(found)
  return tensors


def read_header(file: str) -> dict[str, Stored]:
  """Name -> tensor, of one file.

  Raises:
    InteropError: the file is truncated or damaged.
  """
  size = os.path.getsize(file)
  try:
    with open(file, "rb") as f:
      length = int.from_bytes(f.read(8), "little")
      if size < 8 or length > size - 8:
        raise InteropError(
          f"{file} is truncated or no safetensors file: {size} bytes, less than its header; fetch it again"
        )
      header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, file, entry, 8 + length) for name, entry in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise InteropError(f"{file} is damaged: its header is not one: {type(e).__name__}: {e}; fetch it again") from e
  end = 8 + length
  for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
    if tensor.offset != end:
      raise InteropError(f"{tensor.where} begins at byte {tensor.offset}, not at {end} where the one before it ends")
    end += tensor.nbytes
    if end > size:
      raise InteropError(
        f"{tensor.where}: the file is truncated: {size} bytes, and the tensor ends at {end}; fetch it again"
      )
  if end != size:
    raise InteropError(f"{file} is damaged: {size - end} bytes behind its last tensor; fetch it again")
  return tensors


def _stored(name: str, file: str, entry: dict[str, Any], base: int) -> Stored:
  if entry["dtype"] not in DTYPES:
    raise InteropError(f"{file}: {name} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
  begin, end = entry["data_offsets"]
  tensor = Stored(name, file, DTYPES[entry["dtype"]], tuple(entry["shape"]), base + begin)
  if end - begin != tensor.nbytes:
    raise InteropError(
      f"{tensor.where} is {entry['dtype']}{list(tensor.shape)}, {tensor.nbytes} bytes, but has {end - begin} in the file"
    )
  return tensor


def create_folder(folder: str, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
  """Makes the files of a checkpoint with all but the tensors' bytes, which are zero until they are written.

  Args:
    tensors: (name, dtype, shape), in their order in the files, each of up to `SHARD_BYTES`.
  """
  shards: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
  sizes = [0]
  for tensor in tensors:
    nbytes = math.prod(tensor[2]) * tensor[1].itemsize
    if sizes[-1] and sizes[-1] + nbytes > SHARD_BYTES:
      shards.append([])
      sizes.append(0)
    shards[-1].append(tensor)
    sizes[-1] += nbytes
  out: dict[str, Stored] = {}
  for i, shard in enumerate(shards):
    name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    out.update(_create(os.path.join(folder, name), shard))
  if len(shards) > 1:
    weight_map = {name: os.path.basename(tensor.file) for name, tensor in out.items()}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as f:
      json.dump(index, f, indent=2)
  return out


def _create(file: str, tensors: list[tuple[str, np.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file that does not say so
  end = 0
  for name, dtype, shape in tensors:
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
  with open(file, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    f.truncate(8 + len(text) + end)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash where a mapped page is written
      os.posix_fallocate(f.fileno(), 0, 8 + len(text) + end)
  return read_header(file)
