"""Arrays on disk: zarr3, one file a device shard, one checksummed inner chunk a layer of it.

An array has its logical shape. Its file grid is that of the devices that wrote it, so each file is written whole, once,
by one process; nothing is merged. A lost file is an error at reading, never zeros.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from maxscale import storage
from maxscale.checkpoint.layout import Leaf, Region, clip, owners, size, slices

METADATA = "zarr.json"


@dataclasses.dataclass
class Piece:
  """The part of an array that this process writes to one file."""

  leaf: Leaf
  where: Region  # logical
  data: np.ndarray


def to_host(arrays: list[jax.Array], leaves: tuple[Leaf, ...]) -> list[Piece]:
  """Copies to the host what this process writes. Blocks until the devices have computed it; nothing is left on them."""
  shards = []
  for leaf, x in zip(leaves, arrays):
    mine = owners(leaf.sharding, leaf.padded_shape)
    for shard in x.addressable_shards:
      where = clip(mine.get(shard.device, ()), leaf.logical_shape)
      if shard.device in mine and size(where):  # a shard that is all padding has no file
        shards.append((leaf, where, shard.data))
  for _, _, data in shards:  # every transfer is started before the first is waited for
    data.copy_to_host_async()
  return [Piece(leaf, where, _on_host(data, where)) for leaf, where, data in shards]


def _on_host(data: jax.Array, where: Region) -> np.ndarray:
  host = np.asarray(data)[tuple(slice(b - a) for a, b in where)]
  # On a CPU the host array is the device buffer itself, which the next step will overwrite.
  return host.copy() if jax.default_backend() == "cpu" else host


async def write(base: str, pieces: list[Piece], leaves: tuple[Leaf, ...], first: bool) -> int:
  """Writes this process's pieces, and with `first` the metadata of every array; returns the bytes of the pieces."""
  import asyncio

  about = {leaf.path: metadata(leaf.logical_shape, leaf.dtype, _file_shape(leaf), leaf.layer_dims) for leaf in leaves}
  if first:
    await asyncio.gather(*(open_for_writing(base, path, about[path], create=True) for path in about))
  slots = asyncio.Semaphore(8)  # files being encoded at once: each may hold a second copy of its data

  async def write_one(piece: Piece) -> int:
    async with slots:
      store = await open_for_writing(base, piece.leaf.path, about[piece.leaf.path], create=False)
      await write_file(store, piece)
      return piece.data.nbytes

  # Popped, so that the copy on the host shrinks as it is written. A failure waits for the other writes: none may still be
  # going on when it is reported.
  done = await asyncio.gather(*(write_one(pieces.pop()) for _ in range(len(pieces))), return_exceptions=True)
  written = 0
  for result in done:
    if isinstance(result, BaseException):
      raise result
    written += result
  return written


async def write_file(store: Any, piece: Piece) -> None:
  """Writes a piece that is one file of an array open for writing."""
  import tensorstore as ts

  # One transaction a file: all inner chunks reach the disk in one write, and the file is never read back to be merged.
  transaction = ts.Transaction()
  view = store.with_transaction(transaction)
  view = view[slices(piece.where)] if piece.where else view
  await view.write(piece.data, can_reference_source_data_indefinitely=True)
  await transaction.commit_async()


async def open_for_writing(base: str, path: str, metadata: dict, create: bool) -> Any:
  """The TensorStore of an array; `create` writes its metadata."""
  import tensorstore as ts

  spec = {"driver": "zarr3", "kvstore": _kvstore(base, path), "metadata": metadata}
  # Zeros are written like any value; otherwise a lost file could pass for zeros.
  spec["store_data_equal_to_fill_value"] = True
  return await ts.open(spec, open=True, create=create, assume_metadata=not create)


def _file_shape(leaf: Leaf) -> list[int]:
  shard = leaf.sharding.shard_shape(leaf.padded_shape)
  return [n if s == p else s for n, s, p in zip(leaf.logical_shape, shard, leaf.padded_shape)]


def metadata(shape: Sequence[int], dtype: np.dtype, file: Sequence[int], layer_dims: int) -> dict:
  """zarr3 metadata of an array in files of a shape, each with a checksummed chunk a layer."""
  chunk = [1] * layer_dims + list(file[layer_dims:])
  endian = {"name": "bytes", "configuration": {"endian": "little"}}
  codecs = [endian, {"name": "crc32c"}]
  inner = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": codecs}
  return {
    "shape": list(shape),
    "data_type": dtype.name,
    "fill_value": False if dtype == np.dtype(bool) else 0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(file)}},
    "codecs": [{"name": "sharding_indexed", "configuration": inner}],
  }


def _kvstore(base: str, path: str) -> Any:
  where = str(storage.path(base) / path)
  return where + "/" if "://" in where else {"driver": "file", "path": os.path.abspath(where)}


def open_for_reading(base: str, path: str) -> Any:
  """Future of the TensorStore of an array; its reads fail where a file is missing, truncated or changed."""
  import tensorstore as ts

  return ts.open(
    {"driver": "zarr3", "kvstore": _kvstore(base, path), "fill_missing_data_reads": False}, open=True, read=True
  )
