"""The marker that makes a folder a checkpoint, and the life of such folders.

run_dir/checkpoints/0000000500/arrays/params/...      data, and process-*.json: what each process wrote
run_dir/checkpoints/0000000500/COMMIT.json            written last; sealed; everything that a reader must know
run_dir/checkpoints/0000000500/BAD.json               written when a restore found it damaged
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import platform
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from maxscale import storage
from maxscale.checkpoint.arrays import METADATA
from maxscale.checkpoint.layout import CheckpointError, Leaf
from maxscale.checkpoint.orbax_io import ARRAYS, process_file

FORMAT = 1
MARKER, BAD = "COMMIT.json", "BAD.json"


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a checkpoint says of its run: config hash, resolved config (JSON text), fingerprint of the data order."""

  config_hash: str = ""
  config: str = ""
  data_fingerprint: str = ""
  versions: dict[str, str] = dataclasses.field(default_factory=dict)  # filled in when it is written


def folder(run_dir: str, step: int) -> storage.Path:
  return storage.path(run_dir) / "checkpoints" / f"{step:010d}"


def folders(run_dir: str) -> list[int]:
  """Steps that have a folder, committed or not, ascending."""
  names = storage.listdir(storage.path(run_dir) / "checkpoints")
  return [int(n) for n in names if n.isdigit() and len(n) == 10]


def steps(run_dir: str) -> list[int]:
  """Committed steps that no restore has found damaged, ascending."""
  return [s for s in folders(run_dir) if is_committed(run_dir, s) and not (folder(run_dir, s) / BAD).exists()]


def damaged(run_dir: str) -> list[int]:
  """Steps that were committed and cannot be trusted: a restore said so, or the marker was changed; ascending."""
  return [s for s in folders(run_dir) if (folder(run_dir, s) / BAD).exists() or _marker_changed(run_dir, s)]


def _marker_changed(run_dir: str, step: int) -> bool:
  try:
    read_marker(run_dir, step)
    return False
  except storage.ChangedError:
    return True
  except (FileNotFoundError, ValueError):  # never committed
    return False


def is_committed(run_dir: str, step: int) -> bool:
  try:
    read_marker(run_dir, step)
    return True
  except (FileNotFoundError, ValueError):
    return False


def read_marker(run_dir: str, step: int) -> dict[str, Any]:
  """The marker of a step.

  Raises:
    FileNotFoundError: the step is not committed.
    ValueError: the marker is torn, or (ChangedError) changed.
    CheckpointError: another version of MaxScale wrote it.
  """
  marker = storage.read_sealed(folder(run_dir, step) / MARKER)
  if marker["format"] != FORMAT:
    raise CheckpointError(f"step {step} has checkpoint format {marker['format']}; this MaxScale reads format {FORMAT}")
  return marker


def write_marker(run_dir: str, step: int, leaves: tuple[Leaf, ...], meta: Meta) -> int:
  """Commits a step whose data every process has written; returns the bytes of its arrays.

  Raises:
    CheckpointError: a process has not written its part.
  """
  base = folder(run_dir, step)
  reports = _reports(base)
  fingerprints: dict[str, np.ndarray] = {}
  for report in reports:
    for name, words in report["fingerprints"].items():
      words = np.asarray(words, np.uint32)
      fingerprints[name] = fingerprints[name] + words if name in fingerprints else words  # modulo 2**32
  small = [f"{ARRAYS}/{leaf.path}/{METADATA}" for leaf in leaves]
  small += [f"{ARRAYS}/{process_file(i)}" for i in range(jax.process_count())]
  small += [name for name in storage.listdir(base) if name not in (ARRAYS, MARKER)]
  marker = {
    "format": FORMAT,
    "step": step,
    "meta": dataclasses.asdict(dataclasses.replace(meta, versions=versions())),
    "arrays": {
      leaf.path: {"shape": leaf.logical_shape, "dtype": leaf.dtype.name, "layer_dims": leaf.layer_dims}
      for leaf in leaves
    },
    "table": table(leaves),
    "fingerprints": {name: words.tolist() for name, words in fingerprints.items()},
    "sha256": dict(zip(small, _parallel(lambda name: sha256(base / name), small))),
  }
  storage.write_sealed(base / MARKER, marker)  # last: from here on the checkpoint exists
  return sum(report["bytes"] for report in reports)


def _reports(base: storage.Path) -> list[dict[str, Any]]:
  def read(index: int) -> dict[str, Any] | None:
    try:
      return storage.read_sealed(base / ARRAYS / process_file(index))
    except FileNotFoundError:
      return None

  reports = _parallel(read, range(jax.process_count()))
  absent = [i for i, report in enumerate(reports) if report is None]
  if absent:
    raise CheckpointError(f"processes {absent} did not write their part; their logs say why")
  return reports


def _parallel(function: Any, items: Iterable) -> list:
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # remote storage answers slowly, but many at once
    return list(pool.map(function, items))


def table(leaves: tuple[Leaf, ...]) -> dict[str, list[dict[str, Any]]]:
  """Parameter -> the arrays that hold its layers, with the layer in each row."""
  out: dict[str, list[dict[str, Any]]] = {}
  for leaf in leaves:
    out.setdefault(leaf.parameter, []).append({"array": leaf.path, "rows": leaf.rows})
  return out


def sha256(path: storage.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
  import importlib.metadata

  names = {"maxscale": "maxscale", "jax": "jax", "orbax": "orbax-checkpoint", "tensorstore": "tensorstore"}
  return {key: importlib.metadata.version(name) for key, name in names.items()} | {"python": platform.python_version()}


def mark_bad(run_dir: str, step: int, array: str, reason: str) -> None:
  """Excludes a step from later restores; its files stay, for whoever wants to know what happened."""
  storage.write_sealed(folder(run_dir, step) / BAD, {"array": array, "reason": reason})


def retain(run_dir: str, keep: int, keep_every: int, writing: int | None = None) -> list[int]:
  """Deletes what need not be kept, and returns those steps.

  Kept are the newest `keep` good checkpoints, those at multiples of `keep_every` (0: none), damaged ones among or after
  them, and `writing`. Folders that were never committed go.
  """
  good, bad = steps(run_dir), damaged(run_dir)
  oldest = good[-keep:][0] if good else 0
  every = {s for s in good if keep_every and s % keep_every == 0}
  gone = []
  for step in folders(run_dir):
    recent = step >= oldest and (step in good or step in bad)
    if step != writing and not recent and step not in every:
      delete(run_dir, step)
      gone.append(step)
  return gone


def delete(run_dir: str, step: int) -> None:
  """Deletes a step; the marker first, so that a deletion cut short leaves no checkpoint that lacks files."""
  storage.delete(folder(run_dir, step) / MARKER)
  storage.delete(folder(run_dir, step))
