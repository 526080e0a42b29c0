"""Reads the newest checkpoint that verifies, onto any mesh, sharding, padding, stacking and number of hosts."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from typing import Any

import jax
import numpy as np

from maxscale import storage
from maxscale.checkpoint import arrays as arrays_lib
from maxscale.checkpoint import commit
from maxscale.checkpoint.fingerprint import fingerprint
from maxscale.checkpoint.layout import (
  CheckpointError,
  Leaf,
  Region,
  clip,
  layers_in,
  region,
  size,
  slices,
  unflatten,
)
from maxscale.checkpoint.orbax_io import ARRAYS

# What TensorStore says of a store that does not answer, or not us: no proof of damage.
TRANSIENT = (
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "RESOURCE_EXHAUSTED",
  "ABORTED",
)
THREADS = 4  # arrays in flight, each of which is on the host once


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A checkpoint that was not used, the array (or file) that was damaged, and how."""

  step: int
  array: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Restored:
  """A verified state, the step of its checkpoint, what that says of its run, and the newer ones that were damaged."""

  state: dict[str, Any]
  step: int
  meta: commit.Meta
  rejected: list[Rejected]


def restore(run_dir: str, leaves: tuple[Leaf, ...], step: int | None = None) -> Restored:
  """Restores the newest verified checkpoint; every process must call it. Nothing is initialised first.

  Args:
    run_dir: directory of the run.
    leaves: the arrays wanted; fewer than were saved is fine, and only those are read and verified.
    step: this one and no other, even if an earlier restore found it damaged; None: the newest that verifies.

  Raises:
    CheckpointError: none verifies, or a leaf is not in the checkpoint with that shape and dtype.
  """
  rejected: list[Rejected] = []
  for candidate in [step] if step is not None else reversed(commit.folders(run_dir)):
    base = commit.folder(run_dir, candidate)
    if step is None and (base / commit.BAD).exists():
      continue
    try:
      marker = commit.read_marker(run_dir, candidate)
    except FileNotFoundError:
      continue  # never committed: not a checkpoint
    except ValueError as e:
      rejected.append(Rejected(candidate, commit.MARKER, str(e)))
      continue
    check(marker, leaves)
    state, damage = _read(base, marker, leaves)
    if not damage:
      return Restored(unflatten(state), candidate, commit.Meta(**marker["meta"]), rejected)
    rejected += [Rejected(candidate, array, reason) for array, reason in damage.items()]
    if jax.process_index() == 0:
      commit.mark_bad(run_dir, candidate, ", ".join(damage), "; ".join(damage.values()))
  raise CheckpointError(_nothing(run_dir, step, rejected))


def _nothing(run_dir: str, step: int | None, rejected: list[Rejected]) -> str:
  lines = [f"step {r.step}: {r.array}: {r.reason}" for r in rejected]
  for old in commit.folders(run_dir):
    bad = commit.folder(run_dir, old) / commit.BAD
    if old not in {r.step for r in rejected} and bad.exists():
      lines.append(f"step {old}: found damaged by an earlier restore; delete {bad} to try it again")
  which = f"checkpoint of step {step}" if step is not None else "checkpoint"
  return "\n  ".join([f"no {which} in {run_dir} can be restored", *(lines or ["there is none"])])


def check(marker: dict[str, Any], leaves: tuple[Leaf, ...]) -> None:
  """Compares the leaves with what the checkpoint holds.

  Raises:
    CheckpointError: names the leaf, both shapes or dtypes, and what to change.
  """
  for leaf in leaves:
    where = _sources(marker, leaf)
    missing = sorted(set(leaf.rows) - where.keys())
    if missing:
      held = f"layers {sorted(where)}" if where else "nothing of it"
      raise CheckpointError(
        f"{leaf.path}: the checkpoint of step {marker['step']} has {held}, not layers {missing} of {leaf.parameter!r}; "
        "use the model config of the checkpoint (its COMMIT.json holds it), or ask for fewer leaves"
      )
    for array in {where[layer][0] for layer in leaf.rows}:
      saved = marker["arrays"][array]
      shape = tuple(saved["shape"][saved["layer_dims"] :])
      if (shape, saved["dtype"]) != (leaf.layer_shape, leaf.dtype.name):
        raise CheckpointError(
          f"{leaf.path}: a layer is {leaf.dtype.name}{list(leaf.layer_shape)} here, but {saved['dtype']}{list(shape)} in "
          f"the checkpoint of step {marker['step']} ({array}); change the model config to the checkpoint's, or start a "
          "new run directory"
        )


def _sources(marker: dict[str, Any], leaf: Leaf) -> dict[int, tuple[str, int]]:
  """Layer -> (array, row) of the leaf's parameter."""
  entries = marker["table"].get(leaf.parameter, [])
  return {layer: (e["array"], row) for e in entries for row, layer in enumerate(e["rows"])}


def _read(base: storage.Path, marker: dict, leaves: tuple[Leaf, ...]) -> tuple[dict[str, jax.Array], dict[str, str]]:
  """The arrays, and what is damaged: array or file -> how. The answer is the same in every process."""
  stores: dict[str, Any] = {}
  damage: dict[str, str] = changed_files(base, marker, leaves)
  arrays: dict[str, jax.Array] = {}
  if not damage:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      names = {array for leaf in leaves for array, _ in _sources(marker, leaf).values()}
      stores = {name: arrays_lib.open_for_reading(str(base / ARRAYS), name) for name in sorted(names)}
      reads = {leaf.path: pool.submit(_read_leaf, leaf, marker, stores) for leaf in leaves}
      for path, read in reads.items():
        try:
          arrays[path] = read.result()
        except _UnreadableError as e:
          if any(status in str(e) for status in TRANSIENT):
            raise CheckpointError(_later(path, e)) from e
          damage[path] = f"cannot be read: {str(e)[:500]}"
  damage = _agree(damage, marker["step"])
  if not damage:
    damage = _verify(arrays, marker, leaves)
  return arrays, damage


def _later(what: str, error: Exception) -> str:
  return f"{what} cannot be read now, which proves no damage: {str(error)[:500]}; mend the access and run it again"


def changed_files(base: storage.Path, marker: dict[str, Any], leaves: tuple[Leaf, ...]) -> dict[str, str]:
  """Small files that differ from their digests. Process 0 looks at all, the others at those that they will read."""
  names = marker["sha256"]
  if jax.process_index():
    arrays = {array for leaf in leaves for array, _ in _sources(marker, leaf).values()}
    names = {f"{ARRAYS}/{array}/{arrays_lib.METADATA}" for array in arrays}

  def look(name: str) -> str | None:
    try:
      return None if commit.sha256(base / name) == marker["sha256"][name] else "was changed after the commit"
    except FileNotFoundError:
      return "is missing"
    except OSError as e:
      raise CheckpointError(_later(name, e)) from e

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    return {name: how for name, how in zip(names, pool.map(look, names)) if how}


def _agree(damage: dict[str, str], step: int) -> dict[str, str]:
  """Every process gets the damage that any of them saw, so that all fall back together."""
  if jax.process_count() == 1:
    return damage
  import json

  from jax.experimental import multihost_utils

  text = json.dumps([step, damage]).encode()[:65536]
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  mine = np.zeros(int(sizes.max()), np.uint8)
  mine[: len(text)] = np.frombuffer(text, np.uint8)
  everyone = [json.loads(row[:n].tobytes()) for row, n in zip(multihost_utils.process_allgather(mine), sizes)]
  if {s for s, _ in everyone} != {step}:
    raise CheckpointError(f"processes see different checkpoints (steps {[s for s, _ in everyone]}); is run.dir shared?")
  return {path: how for _, seen in everyone for path, how in seen.items()}


def _verify(arrays: dict[str, jax.Array], marker: dict[str, Any], leaves: tuple[Leaf, ...]) -> dict[str, str]:
  """Leaves whose fingerprint, computed on the devices from what arrived there, is not the marker's."""
  found = fingerprint(unflatten(arrays), leaves)
  damage = {}
  for leaf in leaves:
    want = np.asarray(marker["fingerprints"][leaf.parameter], np.uint32)
    wrong = [layer for layer in leaf.rows if (found[leaf.parameter][layer] != want[layer]).any()]
    if wrong:
      damage[leaf.path] = f"fingerprint differs in layers {wrong}" if leaf.layer_dims else "fingerprint differs"
  return damage


class _UnreadableError(Exception):
  """Data of an array is missing, truncated, changed or unreachable. Other errors are ours, and blame no checkpoint."""


def _result(future: Any) -> Any:
  try:
    return future.result()
  except (ValueError, OSError) as e:  # what TensorStore raises for each of these
    raise _UnreadableError(str(e)) from e


def _read_leaf(leaf: Leaf, marker: dict[str, Any], stores: dict[str, Any]) -> jax.Array:
  """One array, each device's part read once on this host, whatever the number of replicas."""
  where = _sources(marker, leaf)
  opened = {array: _result(stores[array]) for array, _ in (where[layer] for layer in leaf.rows)}
  dims = {array: marker["arrays"][array] for array in opened}
  index = leaf.sharding.addressable_devices_indices_map(leaf.padded_shape)
  wanted = {device: region(i, leaf.padded_shape) for device, i in index.items() if i is not None}
  parts = set(wanted.values())
  box = tuple((min(a for a, _ in d), max(b for _, b in d)) for d in zip(*parts))
  # Files are checked whole, layer by layer: where the parts tile one box, reading the box reads each file once.
  if size(box) == sum(size(p) for p in parts):
    whole = _read_region(leaf, box, where, opened, dims)
    host = {p: whole[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(p, box))] for p in parts}
  else:
    host = {p: _read_region(leaf, p, where, opened, dims) for p in parts}
  placed = [jax.device_put(host[p], device) for device, p in wanted.items()]
  return jax.make_array_from_single_device_arrays(leaf.padded_shape, leaf.sharding, placed)


def _read_region(leaf: Leaf, part: Region, where: dict, opened: dict[str, Any], arrays: dict[str, Any]) -> np.ndarray:
  """A region of the padded array, read from wherever its layers are; padding is zero."""
  layers = layers_in(leaf, part)
  inner = part[leaf.layer_dims :]
  logical = clip(inner, leaf.layer_shape)
  runs = _runs([(i, *where[layer]) for i, layer in enumerate(layers) if layer >= 0], arrays)
  shape = tuple(b - a for a, b in part)
  reads = []
  for first, array, row, n in runs if size(logical) else []:
    lead = np.unravel_index(row, arrays[array]["shape"][: arrays[array]["layer_dims"]])
    view = opened[array]
    if len(lead) == 1:
      view = view[(slice(row, row + n), *slices(logical))]
    elif lead or logical:
      view = view[(*(slice(int(i), int(i) + 1) for i in lead), *slices(logical))]
    reads.append((first, n, view.read()))
  if len(reads) == 1 and reads[0][1] == len(layers) and inner == logical:  # the usual case: nothing to move
    return _result(reads[0][2]).reshape(shape)
  out = np.zeros((len(layers), *(b - a for a, b in inner)), leaf.dtype)
  for first, n, read in reads:
    target = out[(slice(first, first + n), *(slice(b - a) for a, b in logical))]
    target[...] = _result(read).reshape(target.shape)
  return out.reshape(shape)


def _runs(rows: list[tuple[int, str, int]], arrays: dict[str, Any]) -> list[tuple[int, str, int, int]]:
  """(row here, array, row there) -> (first row here, array, first row there, rows): neighbours become one read."""
  out: list[tuple[int, str, int, int]] = []
  for here, array, there in rows:
    first, name, row, n = out[-1] if out else (0, "", 0, 0)
    if (name, first + n, row + n) == (array, here, there) and arrays[array]["layer_dims"] == 1:
      out[-1] = (first, name, row, n + 1)
    else:
      out.append((here, array, there, 1))
  return out
