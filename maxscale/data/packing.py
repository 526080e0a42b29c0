"""Rows of T tokens out of blocks of documents, and the segments that keep the documents apart.

Row r of a block reads tokens [rT, rT + T + 1) of the block's token stream: inputs are the first T of them, targets the
last T. A block of n tokens has ceil(n / T) rows, so the sizes of blocks say where every row is. A document that a row
cuts goes on in the next row as a segment of its own; the row before still predicts its next token, so each token of a
document but its first is predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Batch = dict[str, np.ndarray]


def rows_of_blocks(blocks: np.ndarray, length: int) -> np.ndarray:
  """Rows of each block, int64 [blocks], for blocks of so many tokens and rows of `length`."""
  return -(-blocks // length)


def pack(
  read: Callable, blocks: np.ndarray, ends: np.ndarray, rows: np.ndarray, length: int, loss_mask: Callable | None = None
) -> Batch:
  """The examples of some rows.

  Args:
    read: (block, start, stop) -> tokens, and where in them documents start.
    blocks: tokens of each block, int64 [blocks].
    ends: number of rows up to the end of each block: the running sum of `rows_of_blocks`.
    rows: int64 [B], each below ends[-1].
    length: T.
    loss_mask: (block, start, stop) -> whether each of these tokens counts as a target; None: all do.

  Returns:
    what `examples` returns, int32 [B, T].
  """
  tokens = np.zeros((len(rows), length + 1), np.int32)
  first = np.zeros((len(rows), length + 1), bool)
  count = np.zeros(len(rows), np.int64)
  mask = np.ones(tokens.shape, bool)
  which = np.searchsorted(ends, rows, "right")
  starts = (rows - (ends - rows_of_blocks(blocks, length))[which]) * length
  stops = np.minimum(starts + length + 1, blocks[which])
  for i, (block, start, stop) in enumerate(zip(which.tolist(), starts.tolist(), stops.tolist())):
    tokens[i, : stop - start], documents = read(block, start, stop)
    first[i, documents] = True
    count[i] = stop - start
    if loss_mask:
      mask[i, : stop - start] = loss_mask(block, start, stop)
  return examples(tokens, first, count, mask if loss_mask else None)


def examples(tokens: np.ndarray, first: np.ndarray, count: np.ndarray, mask: np.ndarray | None = None) -> Batch:
  """Inputs, targets and segments of rows that were read.

  Args:
    tokens: int32 [B, T + 1].
    first: bool [B, T + 1], true where a document starts.
    count: int64 [B], how many of a row's tokens there are; the rest is padding.
    mask: bool [B, T + 1], whether a token counts as a target; None: all do.

  Returns:
    int32 [B, T] each: `tokens`; `targets`, the next token of the same document, or -1 where none counts;
    `segments`, counted from 1 along the row, 0 in padding; `positions` within the segment, from 0.
  """
  length = tokens.shape[1] - 1
  t = np.arange(length, dtype=np.int32)
  real = t < count[:, None]
  first[:, 0] = True
  segments = np.cumsum(first[:, :-1], axis=1, dtype=np.int32)
  positions = t - np.maximum.accumulate(np.where(first[:, :-1], t, 0), axis=1)
  none = first[:, 1:] | (t + 1 >= count[:, None])
  if mask is not None:
    none |= ~mask[:, 1:]
  targets = np.where(none, np.int32(-1), tokens[:, 1:])
  return {
    "tokens": tokens[:, :-1],
    "targets": targets,
    "segments": segments * real,
    "positions": positions * real,
  }
