"""A Hugging Face checkpoint as plain floating-point tensors: config.json, the files, quantised tensors in bfloat16."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np

from maxscale.interop import InteropError, quantised, safetensors
from maxscale.interop.safetensors import Stored

FLOATS = {np.dtype(safetensors.DTYPES[name]) for name in ("F32", "F16", "BF16")}
SCHEMES = ("fp8", "mxfp4")


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor, and the scales of one that is quantised. `dtype` and `shape` are those that `open` gives."""

  stored: Stored
  scales: Stored | None
  dtype: np.dtype
  shape: tuple[int, ...]
  block: tuple[int, int] = (0, 0)

  @property
  def where(self) -> str:
    return self.stored.where

  @property
  def nbytes(self) -> int:
    """Bytes that it takes while it is open."""
    held = self.stored.nbytes
    return held + math.prod(self.shape) * self.dtype.itemsize if self.scales else held

  def open(self) -> np.ndarray:
    if self.scales is None:
      return self.stored.open()
    if self.stored.dtype == quantised.FP8:
      return quantised.fp8(self.stored, self.scales, self.block)
    return quantised.mxfp4(self.stored, self.scales)


class Source:
  """A checkpoint in a folder. `tensors`: name -> tensor, those of quantisation put together.

  Raises:
    InteropError: a file is missing or damaged, or a tensor is none that a model can be made of.
  """

  def __init__(self, folder: str):
    if not os.path.isdir(folder):
      raise InteropError(f"there is no folder {folder}; give that of a Hugging Face checkpoint")
    self.folder = folder
    self.config = self._read_config()
    self.stored = safetensors.open_folder(folder)
    self.quantised = False
    self.tensors = self._put_together()

  def complete(self, prefix: str) -> None:
    """Gives names their first part, which a checkpoint of a model without its head lacks (the published GPT-2 is one)."""
    if not any(name.startswith(prefix) for name in self.tensors):
      self.tensors = {prefix + name: entry for name, entry in self.tensors.items()}

  def _read_config(self) -> dict[str, Any] | None:
    path = os.path.join(self.folder, "config.json")
    if not os.path.exists(path):
      return None
    try:
      with open(path, encoding="utf-8") as f:
        config = json.load(f)
    except ValueError as e:
      raise InteropError(f"{path} is not JSON: {e}; fetch it again") from e
    if not isinstance(config, dict):
      raise InteropError(f"{path} is not a config.json; fetch it again")
    return config

  def _put_together(self) -> dict[str, Entry]:
    how = (self.config or {}).get("quantization_config") or {}
    if how and how.get("quant_method") not in SCHEMES:
      raise InteropError(
        f"{self.folder}: config.json says quantization {how.get('quant_method')!r}; known: {', '.join(SCHEMES)}. Use the "
        "checkpoint that is not quantised"
      )
    rows, columns = how.get("weight_block_size") or (128, 128)
    out, rest = {}, dict(self.stored)
    for name in self.stored:
      if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in rest:
        weight = rest.pop(name.removesuffix("_scale_inv"))
        out[weight.name] = _fp8(weight, rest.pop(name), (rows, columns))
      if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in rest:
        base = name.removesuffix("_scales")
        out[base] = _mxfp4(rest.pop(f"{base}_blocks"), rest.pop(name))
    self.quantised = bool(out)
    out.update({name: Entry(tensor, None, tensor.dtype, tensor.shape) for name, tensor in rest.items()})
    return out


def _fp8(weight: Stored, scale: Stored, block: tuple[int, int]) -> Entry:
  if weight.dtype != quantised.FP8 or len(weight.shape) != 2:
    raise InteropError(
      f"{weight.where} has scales, but is {weight.dtype}{list(weight.shape)}, not float8_e4m3 [out, in]"
    )
  want = tuple(-(-n // b) for n, b in zip(weight.shape, block))
  if scale.shape != want or scale.dtype not in FLOATS:
    raise InteropError(
      f"{scale.where} is {scale.dtype}{list(scale.shape)}; {weight.name} {list(weight.shape)} needs float scales {list(want)}, "
      f"one for each block of {block[0]} x {block[1]}"
    )
  return Entry(weight, scale, quantised.BF16, weight.shape, block)


def _mxfp4(blocks: Stored, scales: Stored) -> Entry:
  for tensor in (blocks, scales):
    if tensor.dtype != np.uint8:
      raise InteropError(f"{tensor.where} is {tensor.dtype}; MXFP4 blocks and scales are uint8")
  if len(blocks.shape) < 3 or blocks.shape != (*scales.shape, 16):
    raise InteropError(f"{blocks.where} {list(blocks.shape)} must have the shape of {scales.name}, {list(scales.shape)}, "
                       "and behind it 16")  # fmt: skip
  return Entry(blocks, scales, quantised.BF16, quantised.mxfp4_shape(blocks.shape))
