"""The vectorised packing against the plainest possible one."""

import numpy as np
import pytest

from maxscale.data import packing


def slow(blocks, length):
  """Every row of blocks, each a list of documents, each a list of tokens: one token at a time."""
  rows = []
  for documents in blocks:
    stream = [(token, d) for d, document in enumerate(documents) for token in document]
    for start in range(0, len(stream), length):
      row = {"tokens": [], "targets": [], "segments": [], "positions": []}
      for i in range(start, start + length):
        if i >= len(stream):
          values = (0, -1, 0, 0)
        else:
          token, document = stream[i]
          same = i > start and stream[i - 1][1] == document
          segment = 1 if i == start else row["segments"][-1] + (not same)
          goes_on = i + 1 < len(stream) and stream[i + 1][1] == document
          values = (token, stream[i + 1][0] if goes_on else -1, segment, row["positions"][-1] + 1 if same else 0)
        for key, value in zip(row, values):
          row[key].append(value)
      rows.append(row)
  return rows


def reader(blocks):
  tokens = [np.concatenate(documents) for documents in blocks]
  begins = [np.cumsum([0, *map(len, documents)])[:-1] for documents in blocks]

  def read(block, start, stop):
    inside = begins[block][(begins[block] >= start) & (begins[block] < stop)]
    return tokens[block][start:stop], inside - start

  return read, np.array([len(t) for t in tokens])


def packed(blocks, length, rows=None):
  read, sizes = reader(blocks)
  ends = np.cumsum(packing.rows_of_blocks(sizes, length))
  return packing.pack(read, sizes, ends, np.arange(ends[-1]) if rows is None else rows, length)


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_slow_reference(seed):
  rng = np.random.default_rng(seed)
  length = int(rng.integers(1, 12))
  blocks = [
    [rng.integers(0, 50, rng.integers(1, 30)).tolist() for _ in range(rng.integers(1, 8))]
    for _ in range(rng.integers(1, 5))
  ]
  got, want = packed(blocks, length), slow(blocks, length)
  assert len(want) == len(got["tokens"])
  for key, value in got.items():
    assert value.dtype == np.int32 and value.tolist() == [row[key] for row in want], key


@pytest.mark.parametrize("seed", range(10))
def test_each_token_is_predicted_once_and_no_segment_has_two_documents(seed):
  rng = np.random.default_rng(seed)
  numbers = iter(range(10**6))
  blocks = [[[next(numbers) for _ in range(rng.integers(1, 40))] for _ in range(6)] for _ in range(3)]
  document_of = {token: id(document) for block in blocks for document in block for token in document}
  got = packed(blocks, int(rng.integers(2, 17)))
  inside = [token for block in blocks for document in block for token in document[1:]]
  assert sorted(got["targets"][got["targets"] >= 0].tolist()) == inside
  assert np.array_equal(got["targets"] < 0, (got["targets"] == -1))
  for row in range(len(got["tokens"])):
    for segment in range(1, got["segments"][row].max() + 1):
      at = np.flatnonzero(got["segments"][row] == segment)
      assert len({document_of[t] for t in got["tokens"][row, at].tolist()}) == 1
      assert got["positions"][row, at].tolist() == list(range(len(at)))
      predicted = got["targets"][row, at]
      assert {document_of[t] for t in predicted[predicted >= 0].tolist()} <= {document_of[got["tokens"][row, at[0]]]}


def test_rows_in_any_order():
  blocks = [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9]]]
  every, some = packed(blocks, 2), packed(blocks, 2, np.array([4, 0, 4]))
  for key in every:
    assert np.array_equal(some[key], every[key][[4, 0, 4]])
