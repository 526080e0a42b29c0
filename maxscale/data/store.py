"""A tokenised corpus on local disk, memory-mapped: built once, by one process, and resumable at every block.

  tokens       documents back to back, each [bos] + text + [eos] or a conversation (chat.py); uint16, or uint32 where
               the vocabulary is above 65536
  documents    where each document starts in `tokens`, uint64
  loss_mask    whether each token counts as a target, a byte each; only where not all of them do
  blocks.npy   int64 [blocks, 3]: tokens, first token, first document of each block
  meta.json    sealed, written last: the store exists once this does

A block is consecutive documents of up to `BLOCK` tokens together; it never splits a document, so a longer one is a
block by itself. While building, `progress.json` names the last complete block; what the files hold beyond it is cut.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from maxscale import storage
from maxscale.config import ConfigError
from maxscale.data.lock import Lock, describe
from maxscale.data.tokenizers import Tokenizer
from maxscale.errors import DeadlineError

FORMAT = 1
BLOCK = 2**22
CHUNK = 2**20  # characters tokenised at once: enough for the threads of a tokenizer, small beside a block
Document = tuple[np.ndarray, np.ndarray | None]  # tokens, int32 [N]; whether each counts as a target, bool [N]
T = TypeVar("T")

log = logging.getLogger(__name__)


class Store:
  """A finished store. Opening it reads the sizes of its blocks, and maps nothing until tokens are read.

  Attributes:
    blocks: tokens of each block, int64 [blocks].
    documents, tokens: totals.
    masked: whether there is a loss mask.
    digest: of all tokens, document starts and the loss mask, in order.
  """

  def __init__(self, directory: str | os.PathLike):
    """Raises ConfigError where a file has been cut or replaced since it was built."""
    self._directory = pathlib.Path(directory)
    meta = storage.read_sealed(self._directory / "meta.json")
    self._dtype = np.dtype(meta["dtype"])
    self.documents, self.tokens, self.digest = meta["documents"], meta["tokens"], meta["digest"]
    self.masked = meta.get("masked", False)
    sizes = {"tokens": self.tokens * self._dtype.itemsize, "documents": self.documents * 8}
    for name, size in (sizes | {"loss_mask": self.tokens} if self.masked else sizes).items():
      if os.path.getsize(self._directory / name) != size:
        raise ConfigError(f"{self._directory / name} is damaged; delete the folder, and it is built again")
    table = np.load(self._directory / "blocks.npy")
    self.blocks, self._first_token, self._first_document = np.ascontiguousarray(table.T)
    self._maps: dict[str, np.ndarray] = {}

  def read(self, block: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [start, stop) of a block, and the indices among them at which documents start (int64)."""
    begin = int(self._first_token[block])
    last = block + 1 == len(self.blocks)
    documents = slice(int(self._first_document[block]), None if last else int(self._first_document[block + 1]))
    starts = self._map("documents", np.dtype(np.uint64))[documents]
    span = starts.searchsorted(np.array((begin + start, begin + stop), np.uint64))
    tokens = self._map("tokens", self._dtype)[begin + start : begin + stop]
    return tokens, starts[span[0] : span[1]].astype(np.int64) - (begin + start)

  def loss_mask(self, block: int, start: int, stop: int) -> np.ndarray:
    """Whether tokens [start, stop) of a block count as targets, bool [stop - start]."""
    begin = int(self._first_token[block])
    return self._map("loss_mask", np.dtype(bool))[begin + start : begin + stop]

  def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
    if name not in self._maps:  # as a plain array: slicing np.memmap itself costs microseconds
      self._maps[name] = np.asarray(np.memmap(self._directory / name, dtype, "r"))
    return self._maps[name]


def build(
  directory: str | os.PathLike,
  documents: Callable[[int], Iterable[Any]],
  tokenizer: Tokenizer,
  deadline: float,
  encode: Callable[[Iterable[Any]], Iterator[Document]] | None = None,
  masked: bool = False,
) -> Store:
  """The store in a folder, built first if need be; memory stays within some blocks whatever the corpus.

  Args:
    directory: its folder; nobody else writes there.
    documents: n -> what the corpus has from document n on, always in the same order.
    tokenizer: turns texts into tokens, and says how many there are.
    deadline: seconds to wait while another process builds it.
    encode: turns into tokens what is no text.
    masked: it gives a loss mask, too.

  Raises:
    DeadlineError: another process still builds it at the deadline; the message names it.
  """
  encode = encode or functools.partial(_encode, tokenizer=tokenizer)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  lock, end = Lock(directory / "lock"), time.monotonic() + deadline
  while not _committed(directory):
    if lock.acquire():
      try:
        if not _committed(directory):
          _write(directory, lambda start: encode(documents(start)), tokenizer, masked, lock)
      finally:
        lock.release()
    elif time.monotonic() > end:
      raise DeadlineError(
        f"{describe(lock.holder())} has been tokenising {directory} for longer than data.deadline={deadline:g} s "
        f"(last sign of life {lock.silence():.0f} s ago); raise data.deadline, or end that process and start again"
      )
    else:
      time.sleep(0.2)
  return Store(directory)


def _committed(directory: pathlib.Path) -> bool:
  return _read(directory / "meta.json") is not None


def _read(path: pathlib.Path) -> dict | None:
  try:
    return storage.read_sealed(path)
  except (FileNotFoundError, ValueError):  # never written, or killed while writing: not there either way
    return None


def _write(directory: pathlib.Path, encoded: Callable, tokenizer: Tokenizer, masked: bool, lock: Lock) -> None:
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
  done = _read(directory / "progress.json") or {"blocks": 0, "documents": 0, "tokens": 0, "digest": ""}
  sizes = {"tokens": done["tokens"] * dtype.itemsize, "documents": done["documents"] * 8, "table": done["blocks"] * 24}
  if masked:
    sizes["loss_mask"] = done["tokens"]
  with contextlib.ExitStack() as stack:
    files = {name: stack.enter_context(open(directory / name, "ab")) for name in sizes}
    for name, file in files.items():
      file.truncate(sizes[name])  # what was written after the last complete block
    for block in _blocks(encoded(done["documents"])):
      ids, masks = zip(*block)
      lengths = np.array([len(document) for document in ids])
      arrays = {
        "tokens": np.concatenate(ids).astype(dtype),
        "documents": (done["tokens"] + np.cumsum(lengths) - lengths).astype(np.uint64),
      }
      if masked:
        arrays["loss_mask"] = np.concatenate(masks)
      row = np.array([lengths.sum(), done["tokens"], done["documents"]])
      lock.check()
      for name, array in (arrays | {"table": row}).items():
        files[name].write(array.tobytes())
        files[name].flush()
        os.fsync(files[name].fileno())
      done = _advance(done, arrays)
      storage.write_sealed(directory / "progress.new", done)
      os.replace(directory / "progress.new", directory / "progress.json")
      log.info("tokenised %.1fM tokens of %s", done["tokens"] / 1e6, directory)
  np.save(directory / "blocks.npy", np.fromfile(directory / "table", np.int64).reshape(-1, 3))
  storage.write_sealed(directory / "meta.json", {"format": FORMAT, "dtype": dtype.name, "masked": masked, **done})
  for name in ("progress.json", "table"):
    storage.delete(directory / name)


def _advance(done: dict, arrays: dict[str, np.ndarray]) -> dict:
  digest = hashlib.blake2b(done["digest"].encode(), digest_size=16)  # a chain, so that a restart can go on with it
  for array in arrays.values():
    digest.update(array.tobytes())
  return {
    "blocks": done["blocks"] + 1,
    "documents": done["documents"] + len(arrays["documents"]),
    "tokens": done["tokens"] + arrays["tokens"].size,
    "digest": digest.hexdigest(),
  }


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Document]:
  """Each document as [bos] + tokens + [eos]."""
  bos, eos = np.array([tokenizer.bos], np.int32), np.array([tokenizer.eos], np.int32)
  for chunk in chunks(texts, len):
    yield from ((np.concatenate((bos, ids, eos)), None) for ids in tokenizer.encode_batch(chunk))


def chunks(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
  """Lists of consecutive items with about `CHUNK` characters each: what is tokenised at once."""
  chunk, size = [], 0
  for item in items:
    chunk.append(item)
    size += characters(item)
    if size >= CHUNK:
      yield chunk
      chunk, size = [], 0
  yield chunk


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
  block, size = [], 0
  for document in documents:
    if block and size + len(document[0]) > BLOCK:
      yield block
      block, size = [], 0
    block.append(document)
    size += len(document[0])
  if block:
    yield block
