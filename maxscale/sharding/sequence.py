"""Which positions of a sequence each device along the logical axis `length` holds."""

from __future__ import annotations

import numpy as np

from maxscale.config import ConfigError


def order(length: int, parts: int, balanced: bool) -> np.ndarray:
  """Natural index of the token at each place, int32 [T]: device i of `parts` holds the i-th of equal slices of places.

  Balanced is the zigzag order (cf. striped attention, Brandon et al., arXiv 2311.09431): of 2 * parts chunks device i
  holds i and 2 * parts - 1 - i, in this order, and every device has the same number of causal pairs of query and key.
  Otherwise the order is the natural one.

  Raises:
    ConfigError: the chunks would not be equal.
  """
  chunks = 2 * parts if balanced and parts > 1 else parts
  if length % chunks:
    near = [n for n in (length // chunks * chunks, -(-length // chunks) * chunks) if n]
    raise ConfigError(
      f"a length of {length} does not divide into {chunks} chunks for {parts} devices along the sequence; "
      f"the nearest lengths that do: {' or '.join(map(str, near))}"
    )
  places = np.arange(length, dtype=np.int32)
  if chunks == parts:
    return places
  low = np.arange(parts)
  return places.reshape(chunks, -1)[np.stack([low, chunks - 1 - low], 1)].reshape(-1)
