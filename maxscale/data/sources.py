"""Where tokens come from: one entry of `data.sources`, one split of it.

  kind          reads                                                           keys
  stdlib        the source text of this Python's standard library               heldout
  text          text files, one document a file: a file, a folder or a glob     path heldout
  jsonl         one document a line                                             path column heldout
  parquet       one document a row                                              path column heldout
  arrayrecord   one document a record, UTF-8                                    path heldout
  chat          one conversation a line, as JSON (see chat.py)                  path column loss heldout
  tokens        raw token ids, *.bin or one-dimensional *.npy                   path dtype heldout
  synthetic     random tokens, for benchmarks                                   -
  copy          random tokens twice, to see that attention learns               -

Text, of conversations too, is tokenised once into a store: packing needs the length of every document in tokens, which
only tokenising tells. A tokens file is used as it is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable

import numpy as np

from maxscale import config as config_lib
from maxscale import storage
from maxscale.config import ConfigError
from maxscale.data import chat, documents, packing, permutation, store
from maxscale.data.tokenizers import Tokenizer

HELDOUT = 0.05
KINDS = {
  "stdlib": ("heldout",),
  "text": ("path", "heldout"),
  "jsonl": ("path", "column", "heldout"),
  "parquet": ("path", "column", "heldout"),
  "arrayrecord": ("path", "heldout"),
  "chat": ("path", "column", "loss", "heldout"),
  "tokens": ("path", "dtype", "heldout"),
  "synthetic": (),
  "copy": (),
}
KEY_TYPES = {"path": str, "column": str, "dtype": str, "loss": str, "heldout": (int, float)}


class Source:
  """One split of a source: blocks of tokens, of which rows are cut.

  Attributes:
    blocks: tokens of each block, int64 [blocks]: all that start-up reads.
    loss_mask: (block, start, stop) -> which of these tokens count as targets, bool [stop - start]; None: all do.
    fingerprint: documents, tokens and digest; a resume compares it to see that the corpus is still the same.
  """

  blocks: np.ndarray
  fingerprint: dict
  loss_mask: Callable[[int, int, int], np.ndarray] | None = None

  def __init__(self):
    self._ends: dict[int, np.ndarray] = {}

  def read(self, block: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [start, stop) of a block, and the indices among them at which documents start."""
    raise NotImplementedError

  def rows(self, length: int) -> int:
    """Rows of an epoch of sequences of `length` tokens."""
    return int(self._row_ends(length)[-1])

  def examples(self, rows: np.ndarray, length: int) -> packing.Batch:
    """Rows int64 [B] as int32 [B, T] arrays: tokens, targets, segments, positions (see packing.py)."""
    return packing.pack(self.read, self.blocks, self._row_ends(length), rows, length, self.loss_mask)

  def _row_ends(self, length: int) -> np.ndarray:
    if length not in self._ends:
      self._ends[length] = np.cumsum(packing.rows_of_blocks(self.blocks, length))
    return self._ends[length]


class Documents(Source):
  """Text, tokenised into a store."""

  def __init__(self, tokenised: store.Store):
    super().__init__()
    self.blocks, self.read = tokenised.blocks, tokenised.read
    if tokenised.masked:
      self.loss_mask = tokenised.loss_mask
    self.fingerprint = {"documents": tokenised.documents, "tokens": tokenised.tokens, "digest": tokenised.digest}


class TokenFiles(Source):
  """Files of raw token ids; each is a block. A document ends at its eos, found in what is read: nothing is scanned."""

  def __init__(self, name: str, spec: dict, tokenizer: Tokenizer, split: str):
    super().__init__()
    self._where, self._eos, self._vocab = f"data.sources.{name}", tokenizer.eos, tokenizer.vocab_size
    root, files = documents.find(self._where, spec, (".bin", ".npy"))
    arrays = [_map_tokens(os.path.join(root, f), spec.get("dtype", "uint16"), self._where) for f in files]
    total = sum(map(len, arrays))
    cut = total - int(total * spec.get("heldout", HELDOUT))
    low, high = (0, cut) if split == "train" else (cut, total)
    begins = np.cumsum([0, *map(len, arrays)])
    clipped = [a[max(low - b, 0) : max(high - b, 0)] for a, b in zip(arrays, begins.tolist())]
    self._arrays = [a for a in clipped if len(a)]
    self.blocks = np.array([len(a) for a in self._arrays], np.int64)
    self.fingerprint = {"documents": None, "tokens": high - low, "digest": _sample_digest(self._arrays)}

  def read(self, block, start, stop):
    array = self._arrays[block]
    tokens = array[start:stop]
    if tokens.max() >= self._vocab:
      raise ConfigError(
        f"{self._where} has a token {tokens.max()} where the vocabulary has {self._vocab}: wrong dtype or tokenizer; "
        f"set {self._where}.dtype or data.tokenizer"
      )
    starts = np.flatnonzero(array[max(start - 1, 0) : stop - 1] == self._eos) + (start == 0)
    return tokens, starts if start else np.concatenate(([0], starts))


class Synthetic(Source):
  """Random tokens, one segment a row: computed from (seed, row), without end."""

  def __init__(self, vocab_size: int, seed: int, split: str):
    super().__init__()
    self._vocab, self._key = vocab_size, permutation.key("synthetic", seed, split)
    self.blocks = np.zeros(0, np.int64)
    self.fingerprint = {"documents": None, "tokens": None, "digest": f"synthetic-{vocab_size}-{self._key:x}"}

  def rows(self, length):
    return 2**40

  def examples(self, rows, length):
    first = np.zeros((len(rows), length + 1), bool)
    return packing.examples(self._random(rows, length + 1), first, np.full(len(rows), length + 1))

  def _random(self, rows: np.ndarray, length: int) -> np.ndarray:
    """int32 [B, length] in [0, vocabulary)."""
    keys = permutation.mix(rows.astype(np.uint64) ^ np.uint64(self._key))
    bits = permutation.mix(keys[:, None] + np.arange(length, dtype=np.uint64)) >> np.uint64(32)
    return (bits * np.uint64(self._vocab) >> np.uint64(32)).astype(np.int32)


class Copy(Synthetic):
  """The second half of a row repeats its random first half, and is all that the loss sees."""

  def examples(self, rows, length):
    half = max(length // 2, 1)
    tokens = self._random(rows, half)[:, np.arange(length + 1) % half]
    batch = packing.examples(tokens, np.zeros(tokens.shape, bool), np.full(len(rows), length + 1))
    batch["targets"][:, : half - 1] = -1
    batch["targets"][:, 2 * half - 1 :] = -1
    return batch


def open_source(name: str, spec: dict, tokenizer: Tokenizer, split: str, config: config_lib.Config) -> Source:
  """Opens one split of a source; text that is not yet tokenised is tokenised into `data.cache` first.

  Args:
    name: of the source.
    spec: its entry in `data.sources`; the keys of its kind are in the module's table.
    tokenizer: makes the tokens, or made them.
    split: "train" or "heldout".
    config: data.cache, data.deadline, model.vocab_size and run.seed are read.

  Raises:
    ConfigError: the spec, a file or its content is wrong, or the split is empty; says what to change.
    DeadlineError: another process is still tokenising it after data.deadline.
  """
  check_spec(name, spec)
  kind, where = spec["kind"], f"data.sources.{name}"
  if kind in ("synthetic", "copy"):
    return {"synthetic": Synthetic, "copy": Copy}[kind](
      config.model.vocab_size or tokenizer.vocab_size, config.run.seed, split
    )
  if kind == "tokens":
    source = TokenFiles(name, spec, tokenizer, split)
    empty = not source.fingerprint["tokens"]
  else:
    source = _tokenised(name, spec, tokenizer, split, config)
    frame = 0 if kind == "chat" else 2  # bos and eos are not text
    empty = source.fingerprint["tokens"] <= frame * source.fingerprint["documents"]
  if empty:
    purpose = "training" if split == "train" else "evaluation"
    raise ConfigError(
      f"{where} has no text for {purpose}; change {where}.heldout={spec.get('heldout', HELDOUT):g} or add documents"
    )
  return source


def check_spec(name: str, spec: dict) -> None:
  """Refuses an entry of `data.sources` with an unknown kind or key, or a value of the wrong type.

  Raises:
    ConfigError: names the nearest kind or key.
  """
  where = f"data.sources.{name}"
  if not isinstance(spec, dict) or "kind" not in spec:
    raise ConfigError(f"{where}={spec!r} must be a dict with a kind: {', '.join(KINDS)}")
  if spec["kind"] not in KINDS:
    raise ConfigError(f"{where}.kind={spec['kind']!r} is not one of {', '.join(KINDS)}{_near(spec['kind'], KINDS)}")
  keys = KINDS[spec["kind"]]
  for key, value in spec.items():
    if key == "kind":
      continue
    if key not in keys:
      raise ConfigError(f"{where} of kind {spec['kind']!r} has no key {key!r}{_near(key, keys)}; it has: {_list(keys)}")
    if not isinstance(value, KEY_TYPES[key]):
      raise ConfigError(f"{where}.{key}={value!r} must be a {'number' if key == 'heldout' else 'text'}")
  if spec.get("loss", "all") not in chat.LOSSES:
    raise ConfigError(
      f"{where}.loss={spec['loss']!r} is not one of {', '.join(chat.LOSSES)}{_near(spec['loss'], chat.LOSSES)}"
    )
  if not 0 <= spec.get("heldout", HELDOUT) < 1:
    raise ConfigError(f"{where}.heldout={spec['heldout']} must be at least 0 and below 1")


def _list(keys: tuple[str, ...]) -> str:
  return ", ".join(keys) or "none"


def _near(value: object, known) -> str:
  near = difflib.get_close_matches(str(value), known, 1)
  return f"; did you mean {near[0]!r}?" if near else ""


def _tokenised(name: str, spec: dict, tokenizer: Tokenizer, split: str, config: config_lib.Config) -> Documents:
  if "://" in config.data.cache:
    raise ConfigError(f"data.cache={config.data.cache!r} must be a local folder: its files are memory-mapped")
  corpus = documents.open_corpus(name, spec, split, spec.get("heldout", HELDOUT))
  identity = [store.FORMAT, tokenizer.fingerprint, corpus.identity]
  encode, masked = None, False
  if spec["kind"] == "chat":
    conversations = chat.Chat(f"data.sources.{name}", spec, tokenizer)
    encode, masked = conversations.encode, conversations.masked
    identity.append(conversations.identity)
  key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
  directory = storage.path(config.data.cache) / f"{spec['kind']}-{split}-{key}"
  return Documents(store.build(directory, corpus.documents, tokenizer, config.data.deadline, encode, masked))


def _map_tokens(path: str, dtype: str, where: str) -> np.ndarray:
  if path.endswith(".npy"):
    array = np.load(path, mmap_mode="r")
  else:
    if dtype not in ("uint16", "uint32"):
      raise ConfigError(f"{where}.dtype={dtype!r} is not one of uint16, uint32{_near(dtype, ('uint16', 'uint32'))}")
    size, item = os.path.getsize(path), np.dtype(dtype).itemsize
    if size % item:
      raise ConfigError(f"{path}: its {size} bytes are no whole number of {dtype} tokens; set {where}.dtype")
    array = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
  if array.ndim != 1 or array.dtype.kind != "u":
    raise ConfigError(f"{path} is {array.dtype} {list(array.shape)}; tokens are one-dimensional uint16 or uint32")
  return np.asarray(array)


def _sample_digest(arrays: list[np.ndarray]) -> str:
  """Of 64 samples spread over the arrays (at least one each): finds another corpus without reading this one."""
  digest = hashlib.blake2b(digest_size=16)
  for array in arrays:
    digest.update(len(array).to_bytes(8, "little"))
    for start in np.linspace(0, max(len(array) - 512, 0), max(64 // len(arrays), 1)).astype(np.int64).tolist():
      digest.update(array[start : start + 512].tobytes())
  return digest.hexdigest()
