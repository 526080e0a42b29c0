import os

import numpy as np
import pytest

from maxscale.config import ConfigError
from maxscale.data import sources
from maxscale.data.tokenizers import Bytes

TEXTS = [f"document {i}: " + "xyz" * i for i in range(40)]


@pytest.fixture
def open_source(make_config):
  def make(spec, split="train", name="s", **data):
    return sources.open_source(name, spec, Bytes(), split, make_config(**data))

  return make


def texts_of(source):
  out = []
  for block, size in enumerate(source.blocks.tolist()):
    tokens, starts = source.read(block, 0, size)
    out += [Bytes().decode(part) for part in np.split(tokens, starts[1:])]
  return out


def write_text(tmp_path):
  (tmp_path / "texts" / "deep").mkdir(parents=True)
  for i, text in enumerate(TEXTS):
    (tmp_path / "texts" / ("deep" if i % 2 else "") / f"{i}.txt").write_text(text)
  return {"kind": "text", "path": str(tmp_path / "texts")}


def write_jsonl(tmp_path):
  import json

  for part in range(2):
    lines = [json.dumps({"body": text}) for text in TEXTS[part * 20 : part * 20 + 20]]
    (tmp_path / f"{part}.jsonl").write_text("\n\n".join(lines))
  return {"kind": "jsonl", "path": str(tmp_path / "*.jsonl"), "column": "body"}


def write_parquet(tmp_path):
  import pyarrow
  import pyarrow.parquet

  table = pyarrow.table({"id": range(40), "text": TEXTS})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
  return {"kind": "parquet", "path": str(tmp_path)}


def write_arrayrecord(tmp_path, texts=TEXTS):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
  for text in texts:
    writer.write(text if isinstance(text, bytes) else text.encode())
  writer.close()
  return {"kind": "arrayrecord", "path": str(tmp_path / "a.arrayrecord")}


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet, write_arrayrecord])
def test_text_kinds_split_their_documents(tmp_path, open_source, write):
  spec = {**write(tmp_path), "heldout": 0.25}
  train, heldout = texts_of(open_source(spec)), texts_of(open_source(spec, "heldout"))
  assert sorted(train + heldout) == sorted(TEXTS)
  assert 3 <= len(heldout) <= 20
  everything = open_source({**spec, "heldout": 0.0})
  assert sorted(texts_of(everything)) == sorted(TEXTS)
  assert everything.fingerprint["documents"] == 40
  assert everything.fingerprint["tokens"] == sum(map(len, TEXTS)) + 80
  assert texts_of(open_source(spec)) == train
  if write is not write_text:  # records keep their order
    assert train == [text for text in TEXTS if text in set(train)]


def test_a_single_text_file_holds_out_its_end(tmp_path, open_source):
  (tmp_path / "a.txt").write_text("0123456789" * 10)
  spec = {"kind": "text", "path": str(tmp_path / "a.txt"), "heldout": 0.2}
  assert texts_of(open_source(spec)) == ["0123456789" * 8]
  assert texts_of(open_source(spec, "heldout")) == ["0123456789" * 2]


def test_a_changed_file_is_tokenised_again(tmp_path, open_source):
  path = tmp_path / "a.txt"
  path.write_text("one")
  spec = {"kind": "text", "path": str(path), "heldout": 0}
  before = open_source(spec).fingerprint
  path.write_text("two")
  os.utime(path, (1, 1))
  after = open_source(spec)
  assert texts_of(after) == ["two"] and after.fingerprint["digest"] != before["digest"]


def test_stdlib(open_source):
  train, heldout = open_source({"kind": "stdlib"}), open_source({"kind": "stdlib"}, "heldout")
  assert train.fingerprint["tokens"] > 5_000_000
  assert 0.01 < heldout.fingerprint["tokens"] / train.fingerprint["tokens"] < 0.2
  assert any("def dataclass(" in text for text in texts_of(train) + texts_of(heldout))


def write_tokens(path, tokens, dtype="uint16"):
  tokens = np.array(tokens, dtype)
  np.save(path, tokens) if path.suffix == ".npy" else tokens.tofile(path)
  return {"kind": "tokens", "path": str(path), "heldout": 0}


@pytest.mark.parametrize(
  "name, dtype", [("a.npy", "uint16"), ("a.npy", "uint32"), ("a.bin", "uint16"), ("a.bin", "uint32")]
)
def test_tokens(tmp_path, open_source, name, dtype):
  ids = [1, 2, 257, 3, 4, 5, 257, 6, 257, 7]
  spec = {**write_tokens(tmp_path / name, ids, dtype), "dtype": dtype}
  source = open_source(spec)
  for start in range(10):
    for stop in range(start + 1, 11):
      tokens, starts = source.read(0, start, stop)
      assert tokens.tolist() == ids[start:stop]
      assert starts.tolist() == [i - start for i in (0, 3, 7, 9) if start <= i < stop]
  train, heldout = open_source({**spec, "heldout": 0.2}), open_source({**spec, "heldout": 0.2}, "heldout")
  assert train.read(0, 0, 8)[0].tolist() == ids[:8] and heldout.read(0, 0, 2)[0].tolist() == ids[8:]


def test_tokens_of_several_files(tmp_path, open_source):
  for i in range(3):
    write_tokens(tmp_path / f"{i}.npy", range(i * 10, i * 10 + 10))
  spec = {"kind": "tokens", "path": str(tmp_path), "heldout": 0.5}
  train, heldout = open_source(spec), open_source(spec, "heldout")
  assert train.blocks.tolist() == [10, 5] and heldout.blocks.tolist() == [5, 10]
  assert heldout.read(0, 0, 5)[0].tolist() == [15, 16, 17, 18, 19]
  digest = train.fingerprint["digest"]
  write_tokens(tmp_path / "1.npy", range(11, 21))
  assert open_source(spec).fingerprint["digest"] != digest


def test_synthetic(open_source):
  source = open_source({"kind": "synthetic"})
  rows = np.array([0, 1, 2**39, 1])
  batch = source.examples(rows, 5000)
  assert batch["tokens"].dtype == np.int32 and set(np.unique(batch["tokens"])) == set(range(258))
  assert np.array_equal(batch["tokens"][1], batch["tokens"][3])
  assert (batch["tokens"][0] == batch["tokens"][1]).mean() < 0.02
  assert np.array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:]) and (batch["targets"] >= 0).all()
  assert (batch["segments"] == 1).all() and np.array_equal(batch["positions"][2], np.arange(5000))
  held = open_source({"kind": "synthetic"}, "heldout").examples(rows, 5000)
  assert (held["tokens"] == batch["tokens"]).mean() < 0.02


def test_copy(open_source):
  batch = open_source({"kind": "copy"}).examples(np.arange(3), 10)
  tokens, targets = batch["tokens"], batch["targets"]
  assert np.array_equal(tokens[:, :5], tokens[:, 5:])
  assert (targets[:, :4] == -1).all() and (targets[:, 9] == -1).all()
  assert np.array_equal(targets[:, 4:9], tokens[:, 5:])


@pytest.mark.parametrize(
  "spec, message",
  [
    ({}, r"data\.sources\.s=\{\} must be a dict with a kind"),
    ({"kind": "parket"}, "did you mean 'parquet'"),
    ({"kind": "jsonl", "colum": "a"}, "no key 'colum'; did you mean 'column'"),
    ({"kind": "text", "path": "x", "column": "a"}, "no key 'column'.*it has: path, heldout"),
    ({"kind": "text"}, r"has no path; set data\.sources\.s\.path"),
    ({"kind": "text", "path": 3}, "path=3 must be a text"),
    ({"kind": "stdlib", "heldout": 1.0}, "must be at least 0 and below 1"),
    ({"kind": "text", "path": "/nowhere/*.txt"}, "there is no file; give"),
    ({"kind": "tokens", "path": "/nowhere.bin"}, "there is no file; give"),
  ],
)
def test_wrong_specs(open_source, spec, message):
  with pytest.raises(ConfigError, match=message):
    open_source(spec)


@pytest.mark.parametrize(
  "kind, content, message",
  [
    ("text", b"ok \xff", r"bad is not UTF-8 \(byte 3\)"),
    ("jsonl", b'{"text": "a"}\n{"text": "b"\n', "bad:2: not JSON"),
    ("jsonl", b'{"text": "a"}\n{"test": "b"}\n', "bad:2 has no column 'text'.*did you mean 'test'"),
    ("jsonl", b'{"text": 3}', "bad:1: 'text' is int, not text"),
    ("jsonl", b"[1]", "bad:1: list, not an object"),
    ("jsonl", b'{"text": "\xff"}', "bad:1 is not UTF-8"),
    ("jsonl", b'{"text": "\\ud800"}', "bad:1: 'text' has a lone surrogate"),
    ("text", b"", r"data\.sources\.s has no text for training"),
    ("jsonl", b"\n", r"data\.sources\.s has no text for training"),
    ("parquet", b"PAR1", "bad is damaged, or not a Parquet file"),
    ("arrayrecord", b"nothing of the kind", "bad is damaged, or not an ArrayRecord file"),
  ],
)
def test_wrong_content(tmp_path, open_source, kind, content, message):
  (tmp_path / "bad").write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    open_source({"kind": kind, "path": str(tmp_path / "bad"), "heldout": 0})


def test_wrong_columns_and_records(tmp_path, open_source):
  spec = write_parquet(tmp_path)
  with pytest.raises(ConfigError, match=r"no column 'txt' \(set data.sources.s.column\); did you mean 'text'"):
    open_source({**spec, "column": "txt"})
  with pytest.raises(ConfigError, match="row 0 of the corpus: 'id' is int, not text"):
    open_source({**spec, "column": "id", "heldout": 0})
  with pytest.raises(ConfigError, match="record 1 is not UTF-8"):
    open_source({**write_arrayrecord(tmp_path, ["a", b"\xff"]), "heldout": 0})
  spec = {**write_arrayrecord(tmp_path, [np.random.default_rng(i).bytes(500).hex() for i in range(500)]), "heldout": 0}
  data = bytearray((tmp_path / "a.arrayrecord").read_bytes())  # incompressible, so that the hole is in the records
  data[70_000:72_000] = bytes(2000)
  (tmp_path / "a.arrayrecord").write_bytes(data)
  with pytest.raises(ConfigError, match="arrayrecord is damaged"):
    open_source(spec)


def test_wrong_tokens(tmp_path, open_source):
  source = open_source(write_tokens(tmp_path / "a.bin", [1, 2, 258]))
  with pytest.raises(ConfigError, match="a token 258 where the vocabulary has 258"):
    source.read(0, 0, 3)
  (tmp_path / "odd.bin").write_bytes(b"123")
  with pytest.raises(ConfigError, match="3 bytes are no whole number of uint16"):
    open_source({"kind": "tokens", "path": str(tmp_path / "odd.bin")})
  with pytest.raises(ConfigError, match="did you mean 'uint16'"):
    open_source({"kind": "tokens", "path": str(tmp_path / "a.bin"), "dtype": "int16"})
  np.save(tmp_path / "f.npy", np.zeros((2, 2)))
  with pytest.raises(ConfigError, match="one-dimensional"):
    open_source({"kind": "tokens", "path": str(tmp_path / "f.npy")})
  with pytest.raises(ConfigError, match="no text for evaluation"):
    open_source(write_tokens(tmp_path / "a.bin", [1, 2]), "heldout")


def test_the_cache_must_be_local(open_source):
  with pytest.raises(ConfigError, match=r"data\.cache='gs://x' must be a local folder"):
    sources.open_source("s", {"kind": "stdlib"}, Bytes(), "train", _with_cache("gs://x"))


def _with_cache(cache):
  import dataclasses

  from maxscale.config import Config

  return dataclasses.replace(Config(), data=dataclasses.replace(Config().data, cache=cache))
