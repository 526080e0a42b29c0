"""Markers: what is torn was never committed, what was changed is damage."""

import pytest

from maxscale import storage
from maxscale.checkpoint import commit


@pytest.fixture
def run_dir(tmp_path):
  for step in (1, 2, 3):
    storage.write_sealed(commit.folder(str(tmp_path), step) / commit.MARKER, {"format": commit.FORMAT, "step": step})
  return str(tmp_path)


def edit(run_dir, step, change):
  path = commit.folder(run_dir, step) / commit.MARKER
  path.write_bytes(change(path.read_bytes()))


def flip(data, at):
  return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_torn_marker_is_no_checkpoint_and_its_folder_goes(run_dir):
  edit(run_dir, 3, lambda data: data[: len(data) // 2])
  assert commit.steps(run_dir) == [1, 2] and commit.damaged(run_dir) == []
  assert commit.retain(run_dir, 3, 0) == [3]


@pytest.mark.parametrize("at", [5, 40, 90])
def test_a_changed_marker_is_damage_and_its_folder_stays(run_dir, at):
  for step in (1, 2, 3):
    edit(run_dir, step, lambda data: flip(data, at))
  assert commit.steps(run_dir) == [] and commit.damaged(run_dir) == [1, 2, 3]
  assert commit.retain(run_dir, 1, 0) == []
  with pytest.raises(storage.ChangedError, match="changed after it was written"):
    commit.read_marker(run_dir, 1)


def test_a_folder_without_a_marker_is_neither(run_dir):
  storage.delete(commit.folder(run_dir, 2) / commit.MARKER)
  commit.folder(run_dir, 2).mkdir(parents=True, exist_ok=True)
  assert commit.steps(run_dir) == [1, 3] and commit.damaged(run_dir) == []
