import json

import numpy as np
import pytest

from maxscale.config import ConfigError
from maxscale.data.tokenizers import load_tokenizer

TEXT = "hello world, hello\nTabs\tand ünïcode 漢字 <|endoftext|> end"


@pytest.fixture
def bpe(tmp_path):
  """special tokens -> the path of a byte-level tokenizer.json with them."""
  import tokenizers

  def make(*special):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=list(special),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")

  return make


def test_bytes():
  tokenizer = load_tokenizer("bytes")
  assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (258, 256, 257)
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and ids.tolist() == list(TEXT.encode())
  assert np.array_equal(ids, tokenizer.encode(TEXT.encode()))
  assert tokenizer.decode([256, *ids, 257, 300]) == TEXT
  assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"


def test_huggingface(bpe):
  tokenizer = load_tokenizer(bpe("<s>", "</s>", "<|endoftext|>"))
  assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (300, 0, 2)
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and len(ids) < len(TEXT.encode())
  assert not set(ids.tolist()) & {0, 1, 2}  # its <|endoftext|> is text, not the end of the document
  assert tokenizer.decode([0, *ids, 2, 999]) == TEXT
  assert np.array_equal(tokenizer.encode(TEXT.encode()), ids)


def test_huggingface_end_tokens_named_beside_it(bpe, tmp_path):
  path = bpe("<a>", "<b>", "</s>")
  plain = load_tokenizer(path)
  assert (plain.bos, plain.eos) == (2, 2)  # eos stands in for a missing bos
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<a>", "eos_token": {"content": "<b>"}}))
  named = load_tokenizer(path)
  assert (named.bos, named.eos) == (0, 1)
  assert named.fingerprint != plain.fingerprint and load_tokenizer(path).fingerprint == named.fingerprint


def test_sentencepiece(tmp_path):
  import sentencepiece

  (tmp_path / "text").write_text((TEXT + "\n") * 50)
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=60, hard_vocab_limit=False,
    minloglevel=2,
  )  # fmt: skip
  tokenizer = load_tokenizer(str(tmp_path / "sp.model"))
  assert (tokenizer.bos, tokenizer.eos) == (1, 2)
  ids = tokenizer.encode("hello world")
  assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
  assert tokenizer.decode([1, *ids, 2, 9999]) == "hello world"


@pytest.mark.parametrize(
  "spec, message",
  [
    ("byte", r"data\.tokenizer='byte' is none of 'bytes'"),
    ("/nowhere/tokenizer.json", "there is no such file"),
    ("/nowhere/sp.model", "there is no such file"),
  ],
)
def test_wrong_specs(spec, message):
  with pytest.raises(ConfigError, match=message):
    load_tokenizer(spec)


@pytest.mark.parametrize("name", ["tokenizer.json", "sp.model"])
def test_a_file_that_is_no_tokenizer(tmp_path, name):
  (tmp_path / name).write_text("{}")
  with pytest.raises(ConfigError, match=r"data\.tokenizer='.*' is not a readable tokenizer"):
    load_tokenizer(str(tmp_path / name))


def test_no_end_of_document(bpe):
  with pytest.raises(ConfigError, match=r"no end-of-document token.*tokenizer_config\.json"):
    load_tokenizer(bpe("<a>"))
