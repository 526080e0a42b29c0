import dataclasses
import hashlib
import sys

import numpy as np
import pytest

from maxscale.config import ConfigError
from maxscale.data.batches import Batches
from maxscale.data.loader import Loader, throughput
from maxscale.data.tokenizers import Bytes


def EVERY_ROW(step):  # rows_of: a host that needs the whole batch
  return None


PHASES = (
  {"start": 4, "batch_size": 12},
  {"start": 7, "length": 64, "mixture": {"letters": 1, "noise": 3}},
  {"start": 9, "length": 32},
)


@pytest.fixture
def letters(write_jsonl, random_texts):
  return write_jsonl("letters", random_texts(60), heldout=0.2)


@pytest.fixture
def config(make_config, letters):
  return make_config(
    sources={"letters": letters, "noise": {"kind": "synthetic"}},
    mixture={"letters": 3, "noise": 1},
    batch_size=8,
    length=32,
    phases=PHASES,
  )


def same(a, b):
  return set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a)


def test_the_order_is_the_one_that_runs_were_started_with(config):
  """A change of this number changes the data of every run that is under way."""
  batches, digest = Batches(config, Bytes()), hashlib.sha256()
  for step in (0, 3, 4, 8, 9, 10**6):
    for value in batches.batch(step).values():
      digest.update(value.tobytes())
  assert digest.hexdigest()[:16] == "389a8c1588175165"


def test_shapes_and_types(config):
  batches = Batches(config, Bytes())
  for step in (0, 3, 4, 7, 9, 1000):
    b, t = batches.shape(step)
    batch = batches.batch(step)
    assert {key: value.shape for key, value in batch.items()} == {
      **dict.fromkeys(("tokens", "targets", "segments", "positions"), (b, t)),
      "rows": (b,),
    }
    assert all(value.dtype == np.int32 for value in batch.values())
  assert [batches.shape(step) for step in (0, 4, 7, 9)] == [(8, 32), (12, 32), (12, 64), (12, 32)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_batch_of_one_host(config, hosts):
  whole, others = Batches(config, Bytes()), [Batches(config, Bytes()) for _ in range(hosts)]
  for step in (0, 3, 4, 8, 9, 500):
    want, size = whole.batch(step), whole.shape(step)[0] // hosts
    parts = [host.batch(step, slice(i * size, (i + 1) * size)) for i, host in enumerate(others)]
    assert same(want, {key: np.concatenate([part[key] for part in parts]) for key in want})
    rows = np.array([5, 0, 7])
    assert same(whole.batch(step, rows), {key: value[rows] for key, value in want.items()})


def test_steps_in_any_order(config):
  a, b = Batches(config, Bytes()), Batches(config, Bytes())
  forward = [a.batch(step) for step in range(12)]
  for step in (11, 3, 7, 0):
    assert same(forward[step], b.batch(step))


def test_changing_a_later_phase_changes_no_earlier_batch(config):
  data = dataclasses.replace(
    config.data, phases=(*PHASES[:2], {"start": 8, "batch_size": 4, "mixture": {"letters": 1}})
  )
  a, b = Batches(config, Bytes()), Batches(dataclasses.replace(config, data=data), Bytes())
  assert all(same(a.batch(step), b.batch(step)) for step in range(8))
  assert a.shape(8) != b.shape(8)


def test_the_seed_changes_the_order(config):
  other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
  assert not same(Batches(config, Bytes()).batch(0), Batches(other, Bytes()).batch(0))


def test_an_epoch_predicts_every_token_once_and_the_next_is_in_another_order(make_config, tmp_path):
  rng = np.random.default_rng(0)
  ids = np.arange(2000, dtype=np.uint16)
  ends = np.sort(rng.choice(np.arange(3, 1999), 40, replace=False))
  ids[ends] = 60000
  np.save(tmp_path / "ids.npy", ids)
  tokenizer = Bytes()
  tokenizer.vocab_size, tokenizer.eos = 60001, 60000
  spec = {"kind": "tokens", "path": str(tmp_path / "ids.npy"), "heldout": 0}
  batches = Batches(make_config(sources={"ids": spec}, batch_size=5, length=16), tokenizer)  # 125 rows
  epochs = []
  for epoch in range(2):
    steps = [batches.batch(step) for step in range(epoch * 25, epoch * 25 + 25)]
    targets = np.concatenate([step["targets"].ravel() for step in steps])
    first = np.concatenate(([0], ends + 1))
    assert sorted(targets[targets >= 0].tolist()) == sorted(np.delete(ids, first).tolist())
    epochs.append(np.concatenate([step["tokens"][:, 0] for step in steps]))
  assert np.array_equal(np.sort(epochs[0]), np.sort(epochs[1])) and len(np.unique(epochs[0])) >= 123
  assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_larger_than_the_corpus_reads_many_epochs(make_config, write_jsonl):
  spec = write_jsonl("tiny", ["abc", "de"])
  batch = Batches(make_config(sources={"tiny": spec}, batch_size=32, length=4), Bytes()).batch(3)
  assert set(map(bytes, batch["tokens"].astype(np.uint8))) == {b"\0abc", b"\1\0de", b"\1\0\0\0"}


def test_held_out_batches_are_fixed(config):
  a = Batches(config, Bytes(), "heldout")
  data = dataclasses.replace(config.data, phases=())
  other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=0), data=data)
  b = Batches(other, Bytes(), "heldout")
  assert all(same(a.batch(i), b.batch(i)) and a.shape(i) == (8, 32) for i in range(12))
  seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=5))
  seeded = dataclasses.replace(seeded, data=dataclasses.replace(data, mixture={"letters": 1}))
  plain = dataclasses.replace(other, data=seeded.data)
  assert same(Batches(seeded, Bytes(), "heldout").batch(2), Batches(plain, Bytes(), "heldout").batch(2))
  assert a.fingerprint["letters"] != Batches(config, Bytes()).fingerprint["letters"]


def test_sources_without_held_out_text_are_left_out(make_config, write_jsonl, letters):
  none = write_jsonl("none", ["abc"])
  config = make_config(sources={"letters": letters, "none": none}, batch_size=2, length=8)
  assert set(Batches(config, Bytes()).sources) == {"letters", "none"}
  assert set(Batches(config, Bytes(), "heldout").sources) == {"letters"}
  with pytest.raises(ConfigError, match=r"no source of data\.mixture has held-out text"):
    Batches(make_config(sources={"none": none}), Bytes(), "heldout")


def test_a_vocabulary_that_is_too_small_is_refused(make_config, letters):
  with pytest.raises(ConfigError, match=r"model\.vocab_size=257 is smaller"):
    Batches(make_config(vocab_size=257, sources={"letters": letters}), Bytes())


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (4, 8)])
def test_a_loader_reads_the_same_from_any_step(config, threads, prefetch):
  batches = Batches(config, Bytes())
  for start in (0, 3, 8):
    loader = Loader(batches, start, 11, EVERY_ROW, prefetch, threads)
    got = list(loader)
    assert [step for step, _ in got] == list(range(start, 11))
    assert all(same(batch, batches.batch(step)) for step, batch in got)


def test_a_loader_reads_the_rows_it_is_told(config):
  batches = Batches(config, Bytes())
  loader = Loader(batches, 2, 6, lambda step: slice(step, step + 2), 8, 2)
  for step, batch in loader:
    assert batch["rows"].tolist() == [step, step + 1]
    assert same(batch, batches.batch(step, slice(step, step + 2)))


def test_a_loader_raises_what_a_thread_raised(config):
  batches = Batches(config, Bytes())
  original = batches.batch

  def batch(step, rows=None):
    if step == 3:
      raise ConfigError("the disk of step 3 is gone")
    return original(step, rows)

  batches.batch = batch
  loader = Loader(batches, 1, 9, EVERY_ROW, 8, 2)
  assert [next(loader)[0], next(loader)[0]] == [1, 2]
  with pytest.raises(ConfigError, match="the disk of step 3 is gone"):
    next(loader)
  loader.close()


def test_a_closed_loader_stops_reading(config):
  batches = Batches(config, Bytes())
  loader = Loader(batches, 0, 10**9, EVERY_ROW, 2, 1)
  next(loader)
  loader.close()
  loader.close()
  with pytest.raises(Exception, match="closed"):
    next(loader)


def test_throughput(config):
  assert throughput(config, 0.1) > 1e5


def test_importing_the_package_does_not_import_jax():
  import subprocess

  code = (
    "import sys; from maxscale.data import batches, loader, ngram, tokenizers; "
    "heavy = {'jax', 'grain', 'pyarrow', 'tokenizers', 'sentencepiece', 'array_record'} & set(sys.modules); "
    "assert not heavy, heavy"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
