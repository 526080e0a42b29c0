"""Text to token ids and back."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxscale.config import ConfigError

# The names under which published tokenizers keep these two, in the order in which they are tried.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")

# Inside the name of a special token it makes the name text, and is itself nothing. Unicode keeps it for such uses.
BREAK = "\ufdd0"
PLAIN_TEMPLATE = (
  "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Tokenizer:
  """What the rest asks of a tokenizer.

  Attributes:
    vocab_size: ids are in [0, vocab_size).
    bos, eos: ids that begin and end a document; the same one where the vocabulary has no begin.
    fingerprint: names the mapping; equal fingerprints give equal ids.
    chat_templates: name -> Jinja template of conversations; "default", and maybe "tool_use" for those with tools.
    chat_variables: what templates may ask for by name: bos_token, eos_token, ...
    special_names: how special tokens are written in a rendered conversation.
  """

  vocab_size: int
  bos: int
  eos: int
  fingerprint: str
  chat_templates: Mapping[str, str] = {}
  chat_variables: Mapping[str, str] = {}
  special_names: Sequence[str] = ()

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids of a text (UTF-8 where it is bytes), int32 [length], without bos and eos."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    """`encode` of each text; the libraries that have threads use them."""
    raise NotImplementedError

  def encode_chat(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rendered conversations as whole documents: names of special tokens are those, unless `BREAK` is in them.

    Returns:
      ids, int32 [length], and the first and last (exclusive) character that each stands for, int64 [length, 2].

    Raises:
      ConfigError: the vocabulary makes a special token even of a name that is text.
    """
    raise NotImplementedError

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of ids; bos, eos and ids beyond the vocabulary (its padding) say nothing."""
    raise NotImplementedError


class Bytes(Tokenizer):
  """Ids 0 to 255 are bytes, 256 begins a document, 257 ends it. A message of a conversation is "role: content\\n"."""

  vocab_size, bos, eos, fingerprint = 258, 256, 257, "bytes-1"
  chat_templates: Mapping[str, str] = {"default": PLAIN_TEMPLATE}

  def encode_batch(self, texts):
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return [np.frombuffer(text, np.uint8).astype(np.int32) for text in raw]

  def encode_chat(self, texts):
    out = []
    for text, ids in zip(texts, self.encode_batch(texts)):
      character = np.cumsum((ids & 0xC0) != 0x80)  # all bytes of a character but its first are 10xxxxxx
      character = np.concatenate(([0], character, [len(text)]))  # the end belongs to whom the last character does
      ids = np.concatenate(([self.bos], ids, [self.eos])).astype(np.int32)
      out.append((ids, np.stack((np.maximum(character - 1, 0), character), axis=1)))
    return out

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
    self._path = path
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    named = _beside(path)
    self.bos, self.eos = _special_ids(path, vocab, named)
    self.chat_templates = _chat_templates(path, named)
    self.chat_variables = {
      key: name for key, value in named.items() if key.endswith("_token") and (name := _name(value))
    }
    added = self._tokenizer.get_added_tokens_decoder()
    self._special = {i: token.content for i, token in added.items() if token.special}
    self.special_names = tuple(self._special.values())
    self.fingerprint = _fingerprint(path, self.bos, self.eos)

  def encode_batch(self, texts):
    texts = [_as_text(text) for text in texts]
    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode_chat(self, texts):
    out = []
    for text, encoding in zip(texts, self._chat.encode_batch(texts, add_special_tokens=False)):
      ids, characters = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
      if BREAK in text:
        self._check_broken(text, ids, characters)
      out.append((ids, characters))
    return out

  @functools.cached_property
  def _chat(self):
    import tokenizers
    from tokenizers import normalizers

    chat = tokenizers.Tokenizer.from_file(self._path)
    chat.no_truncation()
    chat.no_padding()
    chat.post_processor = None  # it would trim white space off the characters of tokens
    own = [chat.normalizer] if chat.normalizer else []
    chat.normalizer = normalizers.Sequence([normalizers.Replace(BREAK, ""), *own])  # names were looked for before
    return chat

  def _check_broken(self, text: str, ids: np.ndarray, characters: np.ndarray) -> None:
    for i in np.flatnonzero(np.isin(ids, list(self._special))):
      name, (start, stop) = self._special[int(ids[i])], characters[i]
      if BREAK in text[start:stop] and name in text[start:stop].replace(BREAK, ""):
        around = text[max(start - 40, 0) : stop + 40].replace(BREAK, "")
        raise ConfigError(
          f"data.tokenizer={self._path!r} makes its special token {name!r} of text that has this name: {around!r}; "
          f"remove the name from that message, or set normalized to false in the tokenizer's added_tokens"
        )

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


def _beside(path: str) -> dict:
  """What tokenizer_config.json says, if there is one."""
  beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
  if not os.path.isfile(beside):
    return {}
  with open(beside, encoding="utf-8") as f:
    return json.load(f)


def _name(value: Any) -> str | None:
  """Of a token: a text, or an added token spelled out."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def _chat_templates(path: str, named: dict) -> dict[str, str]:
  """Those in files beside a tokenizer, as transformers 5 saves them, or else those in its tokenizer_config.json."""
  folder = pathlib.Path(path).parent
  files = {file.stem: file for file in folder.glob("chat_templates/*.jinja")}
  if (folder / "chat_template.jinja").is_file():
    files["default"] = folder / "chat_template.jinja"
  if files:
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
  templates = named.get("chat_template") or []
  if isinstance(templates, str):
    return {"default": templates}
  return {entry["name"]: entry["template"] for entry in templates}


def _special_ids(path: str, vocab: dict[str, int], named: dict) -> tuple[int, int]:
  def find(key, usual):
    return next((vocab[n] for n in (_name(named.get(key)), *usual) if n in vocab), None)

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
