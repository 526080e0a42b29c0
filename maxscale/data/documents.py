"""The documents of a corpus, in a fixed order, for one split: what is tokenised into a store.

Text files are split by file: the held-out ones have the smallest hashes of their relative path (at least one of
several files; of a single file, its end). Records are split by a hash of their ordinal in the corpus.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np

from maxscale.config import ConfigError
from maxscale.data import permutation

SUFFIXES = {
  "jsonl": (".jsonl",),
  "chat": (".jsonl",),
  "parquet": (".parquet",),
  "arrayrecord": (".arrayrecord", ".array_record"),
}
COLUMNS = {"chat": "messages"}
STDLIB_SKIPS = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One split of a corpus.

  Attributes:
    documents: n -> its texts from document n on; for the kind chat, (file and line, record).
    identity: what it is read from, as JSON: equal identities hold equal documents.
  """

  documents: Callable[[int], Iterator[Any]]
  identity: dict


def open_corpus(name: str, spec: dict, split: str, heldout: float) -> Corpus:
  """The documents of a source of a text kind.

  Args:
    name: of the source, for messages.
    spec: its entry in `data.sources`; kind is stdlib, text, jsonl, parquet, arrayrecord or chat.
    split: "train" or "heldout".
    heldout: fraction of the documents that is held out.

  Raises:
    ConfigError: there is no such file; later, while reading: a file is not UTF-8, a line is not JSON, there is no
      such column. The message names the file, the line and what to change.
  """
  kind, where = spec["kind"], f"data.sources.{name}"
  if kind == "stdlib":
    root, files = sysconfig.get_path("stdlib"), _stdlib(sysconfig.get_path("stdlib"))
  else:
    root, files = find(where, spec, SUFFIXES.get(kind, ()))
  identity = {
    "kind": kind,
    "split": split,
    "heldout": heldout,
    "column": spec.get("column", COLUMNS.get(kind, "text")),
    "files": [],
  }
  for file in files:
    stat = os.stat(os.path.join(root, file))
    identity["files"].append((file, stat.st_size, stat.st_mtime_ns))
  if kind in ("stdlib", "text"):
    return Corpus(lambda start: _texts(root, files, split, heldout, start), identity)
  mine = Split(split, heldout)
  paths = [os.path.join(root, file) for file in files]
  if kind == "chat":
    return Corpus(lambda start: itertools.islice(_json_records(paths, mine), start, None), identity)
  records = {"jsonl": _jsonl, "parquet": _parquet, "arrayrecord": _arrayrecord}[kind]
  column = identity["column"]
  return Corpus(lambda start: itertools.islice(records(where, paths, column, mine), start, None), identity)


def find(where: str, spec: dict, suffixes: tuple[str, ...]) -> tuple[str, list[str]]:
  """The files of `spec["path"]`, a file, a glob or a folder (with what is below it): their folder and sorted names.

  Raises:
    ConfigError: no path is given, or no file is there.
  """
  if "path" not in spec:
    raise ConfigError(f"{where} is of kind {spec['kind']!r} and has no path; set {where}.path")
  path = os.path.expanduser(spec["path"])
  if os.path.isdir(path):
    files = [f for f in glob.glob("**", root_dir=path, recursive=True) if not suffixes or f.endswith(suffixes)]
    root = path
  elif os.path.isfile(path):
    root, files = os.path.dirname(path), [os.path.basename(path)]
  else:
    root = os.path.dirname(path.split("*")[0])
    files = [os.path.relpath(f, root or ".") for f in glob.glob(path, recursive=True)]
  files = sorted(f for f in files if os.path.isfile(os.path.join(root, f)))
  if not files:
    what = f"no file ending in {' or '.join(suffixes)}" if os.path.isdir(path) and suffixes else "no file"
    raise ConfigError(f"{where}.path={spec['path']!r}: there is {what}; give a file, a folder or a glob of files")
  return root, files


class Split:
  """Which records of a corpus belong to a split, by ordinal."""

  def __init__(self, split: str, heldout: float):
    self._heldout, self._limit = split == "heldout", min(int(heldout * 2**64), 2**64 - 1)

  def has(self, ordinals: np.ndarray) -> np.ndarray:
    """bool [N] for int64 [N]."""
    return (permutation.mix(ordinals.astype(np.uint64)) < np.uint64(self._limit)) == self._heldout


def _stdlib(root: str) -> list[str]:
  files = []
  for folder, folders, names in os.walk(root):
    folders[:] = [f for f in folders if f not in STDLIB_SKIPS]
    files += [os.path.relpath(os.path.join(folder, name), root) for name in names if name.endswith(".py")]
  return sorted(files)


def _texts(root: str, files: list[str], split: str, heldout: float, start: int) -> Iterator[str]:
  if len(files) == 1:  # nothing to choose from: its end is held out
    text = read_text(os.path.join(root, files[0]))
    cut = round(len(text) * (1 - heldout))
    mine = [text[:cut] if split == "train" else text[cut:]]
    yield from mine[start:]
    return
  by_hash = sorted(files, key=lambda f: hashlib.blake2b(f.encode()).digest())
  held = set(by_hash[: max(round(heldout * len(files)), 1) if heldout else 0])
  for file in [f for f in files if (f in held) == (split == "heldout")][start:]:
    yield read_text(os.path.join(root, file))


def read_text(path: str) -> str:
  """A text file; ConfigError where it is not UTF-8."""
  with open(path, "rb") as f:
    return _utf8(f.read(), path)


def _utf8(data: bytes, where: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise ConfigError(f"{where} is not UTF-8 (byte {e.start}); convert it, or leave it out") from None


def _jsonl(where: str, paths: list[str], column: str, mine: Split) -> Iterator[str]:
  for place, record in _json_records(paths, mine):
    if column not in record:
      no_column(place, column, record, where)
    text = record[column]
    if not isinstance(text, str):
      raise ConfigError(f"{place}: {column!r} is {type(text).__name__}, not text; set {where}.column to a text column")
    check_surrogates(text, place, column)
    yield text


def _json_records(paths: list[str], mine: Split) -> Iterator[tuple[str, dict]]:
  """(file:line, the object in it)."""
  ordinal, keep = 0, []
  for path in paths:
    with open(path, "rb") as f:
      for number, line in enumerate(f, 1):
        if not line.strip():
          continue
        if ordinal % 4096 == 0:  # many at a time: NumPy is slow on single numbers
          keep = mine.has(np.arange(ordinal, ordinal + 4096)).tolist()
        if keep[ordinal % 4096]:
          place = f"{path}:{number}"
          yield place, _json_record(line, place)
        ordinal += 1


def _json_record(line: bytes, place: str) -> dict:
  try:
    record = json.loads(_utf8(line, place))
  except json.JSONDecodeError as e:
    raise ConfigError(f"{place}: not JSON ({e.msg}, column {e.colno}); repair or remove the line") from None
  if not isinstance(record, dict):
    raise ConfigError(f"{place}: {type(record).__name__}, not an object with columns; repair or remove the line")
  return record


def check_surrogates(text: str, place: str, column: str) -> None:
  """ConfigError for half of a surrogate pair: JSON can spell it, and no tokenizer takes it."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ConfigError(f"{place}: {column!r} has a lone surrogate, which is not text; repair or remove it") from None


def no_column(place: str, column: str, columns: Iterable[str], where: str) -> NoReturn:
  """Raises the ConfigError that names the nearest column."""
  near = difflib.get_close_matches(column, columns, 1)
  known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, columns)) or 'none'}"
  raise ConfigError(f"{place} has no column {column!r} (set {where}.column); {known}")


def _parquet(where: str, paths: list[str], column: str, mine: Split) -> Iterator[str]:
  import pyarrow
  import pyarrow.parquet

  ordinal = 0
  for path in paths:
    try:
      with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
          no_column(path, column, file.schema_arrow.names, where)
        for batch in file.iter_batches(1024, columns=[column]):
          for i in np.flatnonzero(mine.has(np.arange(ordinal, ordinal + len(batch)))):
            text = batch.column(0)[i].as_py()
            if not isinstance(text, str):
              row = f"{path}: row {ordinal + i} of the corpus: {column!r}"
              raise ConfigError(f"{row} is {type(text).__name__}, not text; set {where}.column, or drop such rows")
            yield text
          ordinal += len(batch)
    except (pyarrow.ArrowException, OSError) as e:
      raise ConfigError(f"{path} is damaged, or not a Parquet file ({e}); restore it, or set {where}.path") from e


def _arrayrecord(where: str, paths: list[str], column: str, mine: Split) -> Iterator[str]:
  from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]: it has no stubs

  ordinal = 0
  for path in paths:
    try:
      reader = array_record_module.ArrayRecordReader(path)
      records = reader.num_records()
      for start in range(0, records, 256):
        ids = np.arange(start, min(start + 256, records))
        ids = ids[mine.has(ids + ordinal)]
        for i, record in zip(ids, reader.read(ids.tolist()) if len(ids) else ()):
          yield _utf8(record, f"{path}: record {i}")
      reader.close()  # raises what was wrong with a file that seemed to have no records
    except RuntimeError as e:
      raise ConfigError(f"{path} is damaged, or not an ArrayRecord file ({e}); restore it, or set {where}.path") from e
    ordinal += records
