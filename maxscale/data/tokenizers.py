"""Text to token ids and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np

from maxscale.config import ConfigError

# The names under which published tokenizers keep these two, in the order in which they are tried.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")


class Tokenizer:
  """What the rest asks of a tokenizer.

  Attributes:
    vocab_size: ids are in [0, vocab_size).
    bos, eos: ids that begin and end a document; the same one where the vocabulary has no begin.
    fingerprint: names the mapping; equal fingerprints give equal ids.
  """

  vocab_size: int
  bos: int
  eos: int
  fingerprint: str

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids of a text (UTF-8 where it is bytes), int32 [length], without bos and eos."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    """`encode` of each text; the libraries that have threads use them."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of ids; bos, eos and ids beyond the vocabulary (its padding) say nothing."""
    raise NotImplementedError


class Bytes(Tokenizer):
  """Ids 0 to 255 are bytes, 256 begins a document, 257 ends it."""

  vocab_size, bos, eos, fingerprint = 258, 256, 257, "bytes-1"

  def encode_batch(self, texts):
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return [np.frombuffer(text, np.uint8).astype(np.int32) for text in raw]

  def decode(self, ids):
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFace(Tokenizer):
  """A `tokenizer.json`. Names of special tokens inside a text are text: a corpus cannot end its own documents."""

  def __init__(self, path: str):
    import tokenizers

    self._tokenizer = tokenizers.Tokenizer.from_file(path)
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    self.bos, self.eos = _special_ids(path, vocab)
    self.fingerprint = _fingerprint(path, self.bos, self.eos)

  def encode_batch(self, texts):
    texts = [_as_text(text) for text in texts]
    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids):
    return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)


class SentencePiece(Tokenizer):
  """A SentencePiece `.model`."""

  def __init__(self, path: str):
    import sentencepiece

    self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    self.vocab_size = self._model.vocab_size()
    if self._model.eos_id() < 0:
      raise ConfigError(f"data.tokenizer={path!r} has no end token (eos_id); train the model with one")
    self.eos = self._model.eos_id()
    self.bos = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos
    self.fingerprint = _fingerprint(path, self.bos, self.eos)

  def encode_batch(self, texts):
    return [np.array(ids, np.int32) for ids in self._model.encode([_as_text(text) for text in texts])]

  def decode(self, ids):
    return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in (self.bos, self.eos)])


def load_tokenizer(spec: str) -> Tokenizer:
  """The tokenizer that `data.tokenizer` names: "bytes", or the path of a `*.json` or a SentencePiece `*.model`.

  bos and eos of a `*.json` are those that a `tokenizer_config.json` beside it names; without one, the first special
  token with a usual name (`BOS_NAMES`, `EOS_NAMES`). eos stands in for a bos that there is not.

  Raises:
    ConfigError: there is no such file, it is not a tokenizer, or it has no end-of-document token.
  """
  if spec == "bytes":
    return Bytes()
  path = os.path.expanduser(spec)
  kinds = {".json": HuggingFace, ".model": SentencePiece}
  kind = kinds.get(os.path.splitext(path)[1])
  if kind is None:
    raise ConfigError(f"data.tokenizer={spec!r} is none of 'bytes', a path to a tokenizer.json, a path to a *.model")
  if not os.path.isfile(path):
    raise ConfigError(f"data.tokenizer={spec!r}: there is no such file; give its path, or 'bytes'")
  try:
    return kind(path)
  except ConfigError:
    raise
  except Exception as e:  # both libraries raise bare Exception or RuntimeError
    raise ConfigError(f"data.tokenizer={spec!r} is not a readable tokenizer: {e}") from e


def _special_ids(path: str, vocab: dict[str, int]) -> tuple[int, int]:
  beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
  named = {}
  if os.path.isfile(beside):
    with open(beside, encoding="utf-8") as f:
      named = json.load(f)

  def find(key, usual):
    name = named.get(key)
    name = name["content"] if isinstance(name, dict) else name  # a text, or an added token spelled out
    return next((vocab[n] for n in (name, *usual) if n in vocab), None)

  eos = find("eos_token", EOS_NAMES)
  if eos is None:
    raise ConfigError(
      f"data.tokenizer={path!r} has no end-of-document token: none of {', '.join(EOS_NAMES)} is in its vocabulary; "
      f"put a tokenizer_config.json with an eos_token beside it"
    )
  bos = find("bos_token", BOS_NAMES)
  return (eos if bos is None else bos), eos


def _fingerprint(path: str, bos: int, eos: int) -> str:
  with open(path, "rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  return f"{os.path.splitext(path)[1][1:]}-{digest[:16]}-{bos}-{eos}"


def _as_text(text: str | bytes) -> str:
  return text if isinstance(text, str) else text.decode()
