"""Quantised tensors of Hugging Face checkpoints, as bfloat16: FP8 with a scale for each block, and MXFP4.

FP8: `x.weight` is float8_e4m3 [out, in], `x.weight_scale_inv` [out / 128, in / 128] what each block of 128 x 128 is
multiplied by (DeepSeek-AI, arXiv 2412.19437, section 3.3.2). MXFP4: `x_blocks` is uint8 [..., rows, groups, 16], two
4-bit numbers a byte, the low half first; `x_scales` uint8 [..., rows, groups] is the exponent of a group of 32, plus 127
(Open Compute Project, Microscaling Formats 1.0); the tensor is [..., 32 * groups, rows].
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from maxscale.interop.safetensors import Stored

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
ROWS = 1024  # dequantised at once

E4M3 = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array(HALF + [-x for x in HALF], np.float32)
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], -1)  # byte -> its two numbers


def fp8(weight: Stored, scale: Stored, block: tuple[int, int]) -> np.ndarray:
  """bfloat16 [out, in]."""
  w, s = weight.open().view(np.uint8), scale.open().astype(np.float32)
  out = np.empty(w.shape, BF16)
  for start in range(0, len(w), ROWS):
    rows = slice(start, min(start + ROWS, len(w)))
    factors = s[np.arange(rows.start, rows.stop) // block[0]]  # a row of scales for each row
    factors = np.repeat(factors, block[1], axis=1)[:, : w.shape[1]]
    out[rows] = E4M3[w[rows]] * factors
  return out


def mxfp4(blocks: Stored, scales: Stored) -> np.ndarray:
  """bfloat16 [..., 32 * groups, rows], a view of [..., rows, 32 * groups]."""
  b, s = blocks.open(), scales.open()
  *lead, groups, _ = b.shape
  out = np.empty((*lead, groups, 32), BF16)
  flat, b, s = out.reshape(-1, groups, 32), b.reshape(-1, groups, 16), s.reshape(-1, groups)
  for start in range(0, len(b), ROWS):
    rows = slice(start, start + ROWS)
    exponents = s[rows].astype(np.int32)[..., None] - 127
    flat[rows] = np.ldexp(PAIRS[b[rows]].reshape(*b[rows].shape[:2], 32), exponents)
  return out.reshape(*lead, groups * 32).swapaxes(-1, -2)


def mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the tensor whose blocks have a shape."""
  *lead, rows, groups, _ = blocks
  return (*lead, groups * 32, rows)
