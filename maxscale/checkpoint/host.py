"""Checkpoints written and read on the host, a block of a layer at a time: for conversion, which never holds a state."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxscale import storage
from maxscale.checkpoint import arrays, commit
from maxscale.checkpoint.fingerprint import host_words
from maxscale.checkpoint.layout import CheckpointError, Leaf, Region, size, slices
from maxscale.checkpoint.orbax_io import ARRAYS, process_file
from maxscale.checkpoint.restore import changed_files

Shape = tuple[int, ...]


def leaf_of(path: str, shape: Shape, rows: tuple[int, ...]) -> Leaf:
  """A float32 array whose first dimension counts layers where there are `rows`."""
  mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("host",))
  sharding = NamedSharding(mesh, PartitionSpec())
  return Leaf(path, shape, shape, np.dtype(np.float32), sharding, layer_dims=int(bool(rows)), rows=rows)


def blocks(shape: Shape, file: Shape) -> Iterator[Region]:
  """The regions of a grid of files that tile a shape."""
  for starts in itertools.product(*(range(0, n, step) for n, step in zip(shape, file))):
    yield tuple((a, min(a + step, n)) for a, step, n in zip(starts, file, shape))


class Writer:
  """Writes a checkpoint. `write` may be called from several threads, once for each file.

  Args:
    files: path of a leaf -> shape of a file of one layer of it.
  """

  def __init__(self, run_dir: str, step: int, leaves: tuple[Leaf, ...], files: Mapping[str, Shape]):
    self._run_dir, self._step, self._leaves = run_dir, step, {leaf.path: leaf for leaf in leaves}
    self._base = str(commit.folder(run_dir, step) / ARRAYS)
    self._words = {leaf.path: np.zeros((len(leaf.rows), 2), np.uint32) for leaf in leaves}
    self._lock, self.bytes = threading.Lock(), 0
    self._stores = asyncio.run(self._create(files))

  async def _create(self, files: Mapping[str, Shape]) -> dict[str, Any]:
    async def create(leaf: Leaf) -> Any:
      file = (1,) * leaf.layer_dims + files[leaf.path]
      metadata = arrays.metadata(leaf.logical_shape, leaf.dtype, file, leaf.layer_dims)
      return await arrays.open_for_writing(self._base, leaf.path, metadata, create=True)

    return dict(zip(self._leaves, await asyncio.gather(*map(create, self._leaves.values()))))

  def write(self, path: str, row: int, where: Region, data: np.ndarray) -> None:
    """Writes the file that holds a region of the layer in a row; row 0 of an array that stacks none."""
    leaf = self._leaves[path]
    lead = ((row, row + 1),) if leaf.layer_dims else ()
    piece = arrays.Piece(leaf, lead + where, data.reshape([b - a for a, b in lead + where]))
    try:
      asyncio.run(arrays.write_file(self._stores[path], piece))
    except (ValueError, OSError) as e:  # what TensorStore raises
      raise CheckpointError(f"{path} cannot be written in {self._run_dir}: {str(e)[:500]}") from e
    words = host_words(data, where, leaf.layer_shape)
    with self._lock:
      self._words[path][row] += words
      self.bytes += data.nbytes

  def commit(self, meta: commit.Meta) -> None:
    """Makes it a checkpoint, once all is written."""
    words = {path: w[np.argsort(self._leaves[path].rows)].tolist() for path, w in self._words.items()}
    report = {"bytes": self.bytes, "fingerprints": words}
    storage.write_sealed(storage.path(self._base) / process_file(0), report)
    commit.write_marker(self._run_dir, self._step, tuple(self._leaves.values()), meta)


class Reader:
  """Reads the newest committed checkpoint of a run, or that of a step, and verifies what it has read whole.

  Raises:
    CheckpointError: there is none, or its small files were changed.
  """

  def __init__(self, run_dir: str, step: int | None = None):
    steps = commit.steps(run_dir)
    if not steps or (step is not None and not commit.is_committed(run_dir, step)):
      which = "checkpoint" if step is None else f"checkpoint of step {step}"
      raise CheckpointError(f"{run_dir} holds no whole {which}; steps that it holds: {steps or 'none'}")
    self.step = steps[-1] if step is None else step
    self.marker = commit.read_marker(run_dir, self.step)
    base = commit.folder(run_dir, self.step)
    damage = changed_files(base, self.marker, ())
    if damage:
      raise CheckpointError(
        f"the checkpoint of step {self.step} in {run_dir} is damaged: {damage}; give another --step"
      )
    self._base, self._stores, self._lock = str(base / ARRAYS), {}, threading.Lock()
    self._rows = {  # (parameter, layer) -> array, row
      (parameter, layer): (entry["array"], row)
      for parameter, entries in self.marker["table"].items()
      for entry in entries
      for row, layer in enumerate(entry["rows"])
    }

  def shape(self, parameter: str, layer: int) -> Shape | None:
    """Shape of a layer of a parameter; None where the checkpoint has none."""
    if (parameter, layer) not in self._rows:
      return None
    saved = self.marker["arrays"][self._rows[parameter, layer][0]]
    return tuple(saved["shape"][saved["layer_dims"] :])

  def chunks(self, parameter: str, layer: int) -> Iterator[tuple[Region, np.ndarray]]:
    """Each region of a layer that was written as one, with its elements; verified when the last one was taken.

    Raises:
      CheckpointError: the layer is damaged.
    """
    array, row = self._rows[parameter, layer]
    shape, store = self.shape(parameter, layer), self._open(array)
    assert shape is not None
    lead = np.unravel_index(row, self.marker["arrays"][array]["shape"][: store.rank - len(shape)])
    words = np.zeros(2, np.uint32)
    for where in blocks(shape, store.chunk_layout.read_chunk.shape[store.rank - len(shape) :]):
      try:
        data = store[(*map(int, lead), *slices(where))].read().result()
      except (ValueError, OSError) as e:
        raise self._damaged(parameter, layer, f"cannot be read: {str(e)[:500]}") from e
      words += host_words(data, where, shape)
      yield where, data
    if words.tolist() != self.marker["fingerprints"][parameter][layer]:
      raise self._damaged(parameter, layer, "its fingerprint differs")

  def layer(self, parameter: str, layer: int) -> np.ndarray:
    """A layer of a parameter, whole."""
    out = np.empty(self.shape(parameter, layer) or (), np.float32)
    for where, data in self.chunks(parameter, layer):
      out[slices(where)] = data
    return out

  def chunk_bytes(self, parameter: str, layer: int) -> int:
    """Bytes of the largest region of a layer that `chunks` gives."""
    shape = self.shape(parameter, layer)
    assert shape is not None
    chunk = self._open(self._rows[parameter, layer][0]).chunk_layout.read_chunk.shape
    return size(tuple((0, min(a, b)) for a, b in zip(shape, chunk[len(chunk) - len(shape) :]))) * 4

  def _open(self, array: str) -> Any:
    with self._lock:
      if array not in self._stores:
        self._stores[array] = arrays.open_for_reading(self._base, array).result()
      return self._stores[array]

  def _damaged(self, parameter: str, layer: int, how: str) -> CheckpointError:
    return CheckpointError(
      f"the checkpoint of step {self.step} is damaged: {parameter}, layer {layer}: {how}; give another --step"
    )
