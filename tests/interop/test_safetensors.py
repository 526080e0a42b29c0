"""The safetensors format, read and written; files are made by hand, and by its own library where that is installed."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from maxscale.interop import InteropError, safetensors
from tests.interop import checkpoints as hf

TENSORS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "odd": np.array([1, 2, 3], np.uint8),  # what follows begins at an odd byte
  "b": np.arange(4).astype(ml_dtypes.bfloat16),
  "c": np.array([1.5, -448.0], ml_dtypes.float8_e4m3fn),
  "none": np.zeros((0, 4), np.float16),
  "number": np.array(7, np.int64),
}


def test_every_dtype_is_read(tmp_path):
  hf.write_file(tmp_path / "model.safetensors", TENSORS)
  stored = safetensors.open_folder(str(tmp_path))
  assert list(stored) == list(TENSORS)
  for name, x in TENSORS.items():
    found = stored[name].open()
    assert found.dtype == x.dtype and found.shape == x.shape and found.tobytes() == x.tobytes(), name


@pytest.mark.parametrize("limit", [safetensors.SHARD_BYTES, 30])
def test_what_is_written_is_read_by_the_plain_reader_and_the_library(limit, tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors, "SHARD_BYTES", limit)
  stored = safetensors.create_folder(str(tmp_path), ((n, x.dtype, x.shape) for n, x in TENSORS.items()))
  for name, x in TENSORS.items():
    stored[name].open(writable=True)[...] = x
  want = {n: (safetensors.NAMES[x.dtype], x.shape, x.tobytes()) for n, x in TENSORS.items()}
  assert hf.read(tmp_path) == want
  assert safetensors.open_folder(str(tmp_path)).keys() == TENSORS.keys()
  files = sorted(tmp_path.glob("*.safetensors"))
  if limit == 30:
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [f.name for f in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in TENSORS.values())
    assert index["weight_map"]["a"] == files[0].name and index["weight_map"]["number"] == files[1].name
  else:
    assert [f.name for f in files] == ["model.safetensors"]
  library = pytest.importorskip("safetensors", reason="safetensors is optional: pip install safetensors")
  found = {name: entry for f in files for name, entry in library.deserialize(f.read_bytes())}
  assert found.keys() == TENSORS.keys()
  for name, (dtype, shape, data) in want.items():
    assert (found[name]["dtype"], tuple(found[name]["shape"]), bytes(found[name]["data"])) == (dtype, shape, data)


def header(entries, body=b"\0" * 8):
  text = json.dumps(entries).encode()
  return struct.pack("<Q", len(text)) + text + body


def entry(**changes):
  return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "is truncated or no safetensors file: 0 bytes"),
    (b"\xff" * 40, "is truncated or no safetensors file"),
    (struct.pack("<Q", 8) + b"\xff" * 8, "its header is not one"),
    (header([1]), "its header is not one"),
    (header({"a": {"dtype": "F32"}}), "its header is not one"),
    (header(entry(dtype="F4")), "a has dtype 'F4'; known: F64, F32"),
    (header(entry(shape=[3])), "a is F32[3], 12 bytes, but has 8 in the file"),
    (header(entry(data_offsets=[4, 12])), "a begins at byte"),
    (header(entry(), b"\0" * 7), "a: the file is truncated"),
    (header(entry(), b"\0" * 9), "is damaged: 1 bytes behind its last tensor"),
    (header({**entry(), "b": entry()["a"]}), "b begins at byte"),
  ],
)
def test_what_is_no_whole_file_is_refused(data, message, tmp_path):
  file = tmp_path / "model.safetensors"
  file.write_bytes(data)
  with pytest.raises(InteropError) as e:
    safetensors.open_folder(str(tmp_path))
  assert message in str(e.value) and str(file) in str(e.value), e.value


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
  hf.write(tmp_path, None, {"a": TENSORS["a"], "b": TENSORS["b"]}, files=2)
  index = tmp_path / "model.safetensors.index.json"
  found = json.loads(index.read_text())
  found["weight_map"]["c"] = found["weight_map"]["a"]
  index.write_text(json.dumps(found))
  with pytest.raises(InteropError, match=r"model-00001-of-00002\.safetensors and .* disagree on c"):
    safetensors.open_folder(str(tmp_path))


def test_a_folder_without_tensors(tmp_path):
  with pytest.raises(InteropError, match="has no safetensors file"):
    safetensors.open_folder(str(tmp_path))
