"""Shuffles without memory: a keyed bijection of [0, size), evaluated at any index."""

from __future__ import annotations

import hashlib
import math

import numpy as np

ROUNDS = 6


def key(*parts: object) -> int:
  """A 64-bit key of anything with a stable `repr`."""
  return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
  """A 64-bit hash of each element of a uint64 array (the finaliser of splitmix64, itself a bijection)."""
  x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64, copy=False)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int, epoch: np.ndarray) -> np.ndarray:
  """Where each index goes in the permutation of [0, size) that (key, its epoch) names.

  A Feistel network over the grid a x b >= size: each round adds a hash of one coordinate to the other, which can be
  undone, so it is a bijection of the grid. What lands outside [0, size), fewer than `a` cells, walks on along its
  cycle until it is inside, which keeps it a bijection.

  Args:
    index: int64 [N] in [0, size).
    size: at most 2**62.
    key: 64 bits.
    epoch: int64 [N]; each epoch has a permutation of its own.

  Returns:
    int64 [N] in [0, size).
  """
  a = math.isqrt(size - 1) + 1
  b = -(-size // a)
  keys = mix(np.asarray(epoch).astype(np.uint64) ^ np.uint64(key))
  x = np.array(index, np.uint64)
  todo = np.arange(x.size)
  while todo.size:
    x[todo] = _rounds(x[todo], np.uint64(a), np.uint64(b), keys[todo])
    todo = todo[x[todo] >= size]
  return x.astype(np.int64)


def _rounds(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
  left, right = np.divmod(x, b)
  for r in range(ROUNDS):
    round_key = mix(keys + np.uint64(r))
    if r % 2:
      right = (right + mix(left ^ round_key) % b) % b
    else:
      left = (left + mix(right ^ round_key) % a) % a
  return left * b + right
