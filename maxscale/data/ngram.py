"""Count models of a corpus: what a network must beat before it has learned more than which tokens follow which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maxscale.data.sources import Source

DISCOUNT = 0.75  # taken off every count and given to the shorter context (absolute discounting)
MAX_VOCAB = 1024  # above, counts of a few million tokens say nothing


def ngram_losses(
  train: Source, heldout: Source, vocab_size: int, orders: Sequence[int] = (2, 3, 4), limit: int = 20_000_000
) -> dict[int, float]:
  """Held-out loss of n-gram models, over the tokens that a model's loss is over: all but the first of each document.

  p_n(w | h) = max(count(hw) - D, 0) / count(h) + D types(h) / count(h) p_{n-1}(w | shorter h), down to a uniform p_0;
  a context that was never seen is the shorter one.

  Args:
    train: what is counted.
    heldout: what is predicted.
    vocab_size: of the tokenizer.
    orders: n, the tokens of a context and its successor; each at least 1.
    limit: tokens that are read of each.

  Returns:
    n -> nats per token; empty above `MAX_VOCAB` tokens, and for sources without documents.
  """
  if vocab_size > MAX_VOCAB or not len(train.blocks) or not len(heldout.blocks):
    return {}
  seen, asked = _context(train, vocab_size, max(orders), limit), _context(heldout, vocab_size, max(orders), limit)
  probability = np.full(asked.shape[1], 1 / vocab_size)
  losses = {}
  for order in range(1, max(orders) + 1):
    probability = _interpolate(_keys(seen, order, vocab_size), _keys(asked, order, vocab_size), vocab_size, probability)
    losses[order] = float(-np.log(probability).mean())
  return {order: losses[order] for order in orders}


def _context(source: Source, vocab_size: int, order: int, limit: int) -> np.ndarray:
  """[order, N]: each target, then the tokens before it; `vocab_size` stands for what is before its document."""
  columns, left = [], limit
  for block, size in enumerate(source.blocks.tolist()):
    tokens, starts = source.read(block, 0, min(size, left))
    index = np.arange(len(tokens))
    begin = np.zeros(len(tokens), np.int64)
    begin[starts] = starts
    begin = np.maximum.accumulate(begin)
    target = index > begin
    if source.loss_mask:
      target &= source.loss_mask(block, 0, len(tokens))
    before = [np.where(index - k >= begin, np.roll(tokens, k), vocab_size).astype(np.int32) for k in range(order)]
    columns.append(np.stack(before)[:, target])
    left -= len(tokens)
    if not left:
      break
  return np.concatenate(columns, axis=1)


def _keys(context: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
  """(context, target) of each column as one number: the target is its last digit."""
  key = np.zeros(context.shape[1], np.int64)
  for row in context[:order][::-1]:
    key = key * (vocab_size + 1) + row
  return key


def _interpolate(seen: np.ndarray, asked: np.ndarray, vocab_size: int, shorter: np.ndarray) -> np.ndarray:
  """p_n of the asked (context, target), from those seen and p_{n-1}."""
  grams, counts = np.unique(seen, return_counts=True)
  contexts, first = np.unique(grams // (vocab_size + 1), return_index=True)
  totals = np.add.reduceat(counts, first)
  types = np.diff(first, append=len(grams))
  count = _lookup(grams, counts, asked)
  total = _lookup(contexts, totals, asked // (vocab_size + 1))
  kinds = _lookup(contexts, types, asked // (vocab_size + 1))
  mixed = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * kinds * shorter) / np.maximum(total, 1)
  return np.where(total > 0, mixed, shorter)


def _lookup(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
  """values at asked keys, 0 where there is none."""
  at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
  return np.where(keys[at] == asked, values[at], 0)
