import math

import numpy as np
import pytest

from maxscale.data import sources
from maxscale.data.ngram import ngram_losses
from maxscale.data.tokenizers import Bytes


@pytest.fixture
def source(make_config, write_jsonl):
  def make(name, texts):
    return sources.open_source(name, write_jsonl(name, texts), Bytes(), "train", make_config())

  return make


def slow(train, heldout, vocab, order):
  """The same model, one token at a time, from dicts."""
  start, counts = -1, {}

  def events(texts):
    for text in texts:
      ids = [start] * order + [256, *text.encode(), 257]
      yield from ((tuple(ids[i - k] for k in range(order - 1, 0, -1)), ids[i]) for i in range(order + 1, len(ids)))

  for context, token in events(train):
    for n in range(order):
      counts.setdefault(context[len(context) - n :], {}).setdefault(token, 0)
      counts[context[len(context) - n :]][token] += 1

  def probability(context, token):
    shorter = probability(context[1:], token) if context else 1 / vocab
    seen = counts.get(context)
    if not seen:
      return shorter
    return (max(seen.get(token, 0) - 0.75, 0) + 0.75 * len(seen) * shorter) / sum(seen.values())

  losses = [-math.log(probability(context, token)) for context, token in events(heldout)]
  return sum(losses) / len(losses)


def test_by_hand(source):
  # Seen: bos->a, a->b, b->eos (twice each). p1(a) = (2 - D + 3D/258) / 6; p2(a | bos) = (2 - D + D p1(a)) / 2.
  p1 = (2 - 0.75 + 0.75 * 3 / 258) / 6
  p2 = (2 - 0.75 + 0.75 * p1) / 2
  losses = ngram_losses(source("a", ["ab", "ab"]), source("b", ["ab"]), 258, (1, 2))
  assert losses == pytest.approx({1: -math.log(p1), 2: -math.log(p2)})


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_slow_reference(source, random_texts, order):
  train, heldout = random_texts(20, 1), [*random_texts(5, 2), "never seen: xyz"]
  got = ngram_losses(source("a", train), source("b", heldout), 258, (order,))
  assert got == pytest.approx({order: slow(train, heldout, 258, order)})


def test_a_regular_corpus_is_learned(source):
  train, heldout = source("a", ["abcabcabc" * 30] * 20), source("b", ["abcabcabc" * 30])
  losses = ngram_losses(train, heldout, 258)
  assert list(losses) == [2, 3, 4] and losses[2] < 0.1


def test_limit_and_large_vocabularies(source):
  train, heldout = source("a", ["ab" * 50, "zz" * 500]), source("b", ["ab"])
  assert ngram_losses(train, heldout, 258, (2,), limit=102) == ngram_losses(
    source("c", ["ab" * 50]), heldout, 258, (2,)
  )
  assert ngram_losses(train, heldout, 1025) == {}


def test_sources_without_documents_have_none(make_config):
  synthetic = sources.open_source("s", {"kind": "synthetic"}, Bytes(), "train", make_config())
  assert ngram_losses(synthetic, synthetic, 258) == {} and not np.any(synthetic.blocks)
