"""Batches from the loader to the devices. The cases run on 8 simulated devices, in a process of their own."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from tests import multidevice

LAYOUTS = {
  "rows on 8": ((8,), ("a",), ("a", None)),
  "rows on 4, columns on 2": ((4, 2), ("a", "b"), ("a", "b")),
  "rows on 2 x 2, replicas": ((2, 2, 2), ("a", "b", "c"), (("a", "b"), None)),
  "rows on the inner axis, so that a process holds a part in several pieces": ((4, 2), ("a", "b"), ("b", None)),
  "replicated": ((8,), ("a",), (None, None)),
}


@pytest.fixture(scope="module")
def results():
  return multidevice.run("tests.test_feed")


@pytest.mark.parametrize("name", multidevice.names("tests.test_feed"))
def test_case(results, name):
  multidevice.check(results, name)


def config(**options):
  from maxscale.config import Config

  whole = Config()
  data = dataclasses.replace(whole.data, sources={"random": {"kind": "synthetic"}}, batch_size=16, length=8, **options)
  return dataclasses.replace(whole, data=data)


def batches(**options):
  from maxscale.data.batches import Batches
  from maxscale.data.tokenizers import load_tokenizer

  return Batches(config(**options), load_tokenizer("bytes"))


def shardings(layout):
  """Key of a batch -> its sharding, of one of `LAYOUTS`."""
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  sizes, axes, spec = LAYOUTS[layout]
  mesh = jax.make_mesh(sizes, axes)
  return lambda key: NamedSharding(mesh, PartitionSpec(*(spec[:1] if key == "rows" else spec)))


class Process:
  """A sharding as one process of several sees it: some of the devices are its own."""

  def __init__(self, sharding, mine):
    self._sharding, self._mine = sharding, mine

  def addressable_devices_indices_map(self, shape):
    indices = self._sharding.devices_indices_map(shape)
    return {device: index for device, index in indices.items() if device.id in self._mine}


def place_as(processes, batch_of, sharding_of):
  """Key -> device -> what `place` put there, each of the processes with its own rows only."""
  from maxscale.data import feed

  def parts(shape, sharding, part):
    return {device: part(index) for device, index in sharding.addressable_devices_indices_map(shape).items()}

  out = {}
  for mine in processes:
    own = lambda key, mine=mine: Process(sharding_of(key), mine)  # noqa: E731
    rows = feed.local_rows(own("tokens"), (16, 8))
    with mock.patch.object(feed.jax, "make_array_from_callback", parts):
      for key, by_device in feed.place(batch_of(rows), 16, own).items():
        out.setdefault(key, {}).update(by_device)
  return out


def case_one_process_places_the_global_batch():
  from maxscale.data import feed

  source = batches()
  whole = source.batch(3)
  for layout in LAYOUTS:
    sharding_of = shardings(layout)
    rows = feed.local_rows(sharding_of("tokens"), (16, 8))
    assert rows.tolist() == list(range(16)), layout
    placed = feed.place(source.batch(3, rows), 16, sharding_of)
    assert placed.keys() == whole.keys()
    for key, value in placed.items():
      assert value.sharding == sharding_of(key), (layout, key)
      np.testing.assert_array_equal(np.asarray(value), whole[key], f"{layout}, {key}")


def case_processes_place_together_what_one_places():
  source = batches()
  whole = source.batch(3)
  for layout in LAYOUTS:
    sharding_of = shardings(layout)
    for processes in ((range(4), range(4, 8)), ((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 7), (1, 2, 3, 4, 5, 6))):
      placed = place_as(processes, lambda rows: source.batch(3, rows), sharding_of)
      for key, by_device in placed.items():
        indices = sharding_of(key).devices_indices_map(whole[key].shape)
        assert by_device.keys() == indices.keys()
        for device, index in indices.items():
          np.testing.assert_array_equal(by_device[device], whole[key][index], f"{layout}, {processes}, {key}")


def case_a_process_makes_only_its_own_rows():
  from maxscale.data import feed

  own = Process(shardings("rows on 8")("tokens"), (2, 3))
  assert feed.local_rows(own, (16, 8)).tolist() == [4, 5, 6, 7]
  own = Process(shardings("rows on the inner axis, so that a process holds a part in several pieces")("tokens"), (1, 3))
  assert feed.local_rows(own, (16, 8)).tolist() == list(range(8, 16))


def case_the_feed_gives_each_step_in_order_from_any_start_and_across_phases():
  from maxscale.data.feed import Feed

  phases = ({"start": 4, "batch_size": 8, "length": 24},)
  source, sharding_of = batches(phases=phases), shardings("rows on 4, columns on 2")
  for start in (0, 3, 5):
    feed = Feed(config(phases=phases), source, start, 7, sharding_of)
    for step in range(start, 7):
      batch, whole = next(feed), source.batch(step)
      assert batch["tokens"].shape == ((8, 24) if step >= 4 else (16, 8))
      assert all((np.asarray(batch[key]) == whole[key]).all() for key in whole), step
    with np.testing.assert_raises(StopIteration):
      next(feed)
    feed.close()


def case_the_feed_raises_what_making_a_batch_raised():
  from maxscale.data.feed import Feed

  source = batches()
  make = source.batch

  def fail_at_two(step, rows=None):
    if step == 2:
      raise OSError("injected: the disk went away")
    return make(step, rows)

  source.batch = fail_at_two
  feed = Feed(config(), source, 0, 5, shardings("rows on 8"))
  next(feed), next(feed)
  with np.testing.assert_raises_regex(OSError, "injected: the disk went away"):
    next(feed)
  feed.close()
