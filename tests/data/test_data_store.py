import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from maxscale import storage
from maxscale.config import ConfigError
from maxscale.data import lock as lock_lib
from maxscale.data import store
from maxscale.data.lock import Lock
from maxscale.data.tokenizers import Bytes

FILES = ("tokens", "documents", "blocks.npy", "meta.json")
# A builder in a process of its own: small blocks, and slow enough to be caught in the middle.
BUILDER = """
import sys, time
from maxscale.data import store
from maxscale.data.tokenizers import Bytes
store.BLOCK, store.CHUNK = 2000, 100
def documents(start):
  for i in range(start, 200):
    time.sleep(float(sys.argv[2]))
    yield f"document {i} " * (i % 17)
store.build(sys.argv[1], documents, Bytes(), 60)
"""


def documents(start):
  return (f"document {i} " * (i % 17) for i in range(start, 200))


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(store, "BLOCK", 2000)
  monkeypatch.setattr(store, "CHUNK", 100)


def start_builder(directory, pause, until):
  process = subprocess.Popen([sys.executable, "-c", BUILDER, str(directory), str(pause)])
  end = time.monotonic() + 30
  while not until():
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.01)
  return process


def test_holds_every_document(tmp_path, small_blocks):
  built = store.build(tmp_path, documents, Bytes(), 1)
  want = [[256, *text.encode(), 257] for text in documents(0)]
  got = []
  for block, size in enumerate(built.blocks.tolist()):
    tokens, starts = built.read(block, 0, size)
    assert tokens.dtype == np.uint16 and starts[0] == 0 and size <= 2000
    got += [part.tolist() for part in np.split(tokens, starts[1:])]
  assert got == want
  assert (built.documents, built.tokens) == (200, sum(map(len, want)))
  assert len(built.blocks) > 5
  tokens, starts = built.read(2, 3, 500)
  whole, all_starts = built.read(2, 0, 500)
  assert np.array_equal(tokens, whole[3:]) and starts.tolist() == [s - 3 for s in all_starts if s >= 3]


def test_a_document_longer_than_a_block_is_a_block_by_itself(tmp_path, small_blocks):
  built = store.build(tmp_path, lambda start: ["a", "b" * 5000, "c", "d"][start:], Bytes(), 1)
  assert built.blocks.tolist() == [3, 5002, 6]


def test_is_built_once(tmp_path):
  first = store.build(tmp_path, lambda start: ["abc", "de"][start:], Bytes(), 1)
  again = store.build(tmp_path, lambda start: pytest.fail("read again"), Bytes(), 1)
  assert again.digest == first.digest
  other = store.build(tmp_path / "other", lambda start: ["abcd", "e"][start:], Bytes(), 1)
  assert other.digest != first.digest


def test_large_vocabularies_take_uint32(tmp_path):
  tokenizer = Bytes()
  tokenizer.vocab_size = 2**16 + 1
  built = store.build(tmp_path, lambda start: ["abc"], tokenizer, 1)
  assert built.read(0, 0, 3)[0].dtype == np.uint32


def test_killed_in_the_middle_it_goes_on_and_is_the_same_to_the_byte(tmp_path, small_blocks):
  directory, reference = tmp_path / "killed", tmp_path / "whole"
  store.build(reference, documents, Bytes(), 1)
  progress = directory / "progress.json"
  process = start_builder(directory, 0.02, lambda: progress.exists() and storage.read_sealed(progress)["blocks"] >= 3)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not (directory / "meta.json").exists() and (directory / "lock").exists()
  with open(directory / "tokens", "ab") as f:
    f.write(b"torn")
  starts = []

  def remember(start):
    starts.append(start)
    return documents(start)

  store.build(directory, remember, Bytes(), 1)
  assert starts[0] >= 3
  for name in FILES:
    assert (directory / name).read_bytes() == (reference / name).read_bytes(), name
  assert set(os.listdir(directory)) == {*FILES, "lock.guard"}


def test_a_torn_meta_is_not_a_store(tmp_path, small_blocks):
  whole = store.build(tmp_path, documents, Bytes(), 1)
  data = (tmp_path / "meta.json").read_bytes()
  (tmp_path / "meta.json").write_bytes(data[:-5])
  assert store.build(tmp_path, documents, Bytes(), 1).digest == whole.digest
  assert (tmp_path / "meta.json").read_bytes() == data


def test_a_second_builder_waits_and_names_the_first(tmp_path, small_blocks):
  process = start_builder(tmp_path, 0.01, (tmp_path / "lock").exists)
  with pytest.raises(TimeoutError, match=f"process {process.pid} on {socket.gethostname()} .*data.deadline=0.1 s"):
    store.build(tmp_path, lambda start: pytest.fail("built twice"), Bytes(), 0.1)
  built = store.build(tmp_path, lambda start: pytest.fail("built twice"), Bytes(), 30)
  assert built.documents == 200 and process.wait() == 0


def hold(path, pid, host):
  path.write_text(json.dumps({"pid": pid, "host": host, "id": "other"}))


def test_a_silent_holder_elsewhere_is_replaced_and_a_living_one_is_not(tmp_path, monkeypatch):
  hold(tmp_path / "lock", 1, "elsewhere")
  lock = Lock(tmp_path / "lock")
  assert not lock.acquire()
  monkeypatch.setattr(lock_lib, "STALE", 0.2)
  for _ in range(4):
    time.sleep(0.1)
    os.utime(tmp_path / "lock")
    assert not lock.acquire()
  time.sleep(0.3)
  assert lock.acquire()
  lock.check()
  lock.release()
  assert not (tmp_path / "lock").exists()


def test_one_of_many_takes_over(tmp_path, monkeypatch):
  hold(tmp_path / "lock", 1, "elsewhere")
  locks = [Lock(tmp_path / "lock") for _ in range(16)]
  monkeypatch.setattr(Lock, "_alive", lambda self: time.sleep(0.01) or self.holder().get("id") not in (None, "other"))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    taken = list(pool.map(Lock.acquire, locks))
  assert taken.count(True) == 1
  locks[taken.index(True)].release()


def test_the_heart_beats(tmp_path, monkeypatch):
  monkeypatch.setattr(lock_lib, "BEAT", 0.05)
  lock = Lock(tmp_path / "lock")
  assert lock.acquire()
  os.utime(tmp_path / "lock", (0, 0))
  time.sleep(0.3)
  assert (tmp_path / "lock").stat().st_mtime > 0
  lock.release()


def test_a_builder_that_lost_its_lock_stops(tmp_path, small_blocks):
  def stolen(start):
    yield "a" * 3000
    hold(tmp_path / "lock", 77, "elsewhere")
    yield "b" * 3000

  with pytest.raises(RuntimeError, match="taken over by process 77 on elsewhere"):
    store.build(tmp_path, stolen, Bytes(), 1)
  assert (tmp_path / "lock").exists() and not (tmp_path / "meta.json").exists()


def test_a_failing_corpus_frees_the_lock(tmp_path):
  def broken(start):
    yield "a"
    raise ConfigError("line 3")

  with pytest.raises(ConfigError, match="line 3"):
    store.build(tmp_path, broken, Bytes(), 1)
  assert store.build(tmp_path, lambda start: ["a"], Bytes(), 1).documents == 1


def test_a_damaged_store_is_refused(tmp_path):
  store.build(tmp_path, lambda start: ["abc"], Bytes(), 1)
  with open(tmp_path / "tokens", "ab") as f:
    f.write(b"xx")
  with pytest.raises(ConfigError, match="tokens is damaged; delete the folder"):
    store.Store(tmp_path)


def test_opening_reads_the_block_table_alone(tmp_path, small_blocks):
  store.build(tmp_path, documents, Bytes(), 1)
  opened, on = [], [True]
  sys.addaudithook(lambda event, args: opened.append(str(args[0])) if on and event == "open" else None)
  built = store.Store(tmp_path)
  files = {os.path.basename(path) for path in opened if path.startswith(str(tmp_path))}
  assert files == {"meta.json", "blocks.npy"}
  built.read(0, 0, 10)
  on.clear()
  assert str(tmp_path / "tokens") in opened
