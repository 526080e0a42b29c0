"""Files of a run, on a local disk, NFS or an object store: the one module that touches them.

Only what every store offers is used: write a whole object, read it, list, delete. No rename and no append: a reader
must be able to tell a torn object from a whole one, so whatever decides something carries a checksum of itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

from etils import epath

Path = epath.Path


def path(p: str | os.PathLike) -> Path:
  """A path of any store; `~` is expanded."""
  return epath.Path(p).expanduser()


def write(p: str | os.PathLike, data: bytes | str) -> None:
  """Writes a whole object, making its folder; on a local disk the bytes are on the medium when this returns."""
  p = path(p)
  p.parent.mkdir(parents=True, exist_ok=True)
  data = data.encode() if isinstance(data, str) else data
  with p.open("wb") as f:
    f.write(data)
    f.flush()
    if hasattr(f, "fileno"):
      with contextlib.suppress(OSError):  # object stores have no descriptor; closing the object commits it
        os.fsync(f.fileno())


class ChangedError(ValueError):
  """A sealed file whose content is not what was written."""


def write_sealed(p: str | os.PathLike, value: Any) -> None:
  """Writes JSON with a checksum of itself, so that a torn or changed file is not taken for a whole one."""
  body = json.dumps(value, sort_keys=True)
  write(p, json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}))


def read_sealed(p: str | os.PathLike) -> Any:
  """The value that `write_sealed` wrote.

  Raises:
    ChangedError: the file is whole and was changed after it was written.
    ValueError: it is torn: its writer was stopped.
    FileNotFoundError: there is none.
  """
  data = path(p).read_bytes()
  try:
    sealed = json.loads(data)
    body = sealed["body"]
    if hashlib.sha256(body.encode()).hexdigest() != sealed["sha256"]:
      raise ValueError("checksum")
    return json.loads(body)
  except (ValueError, KeyError, TypeError) as e:
    if data.endswith(b"}"):
      raise ChangedError(f"{p} was changed after it was written") from e
    raise ValueError(f"{p} is torn") from e


def listdir(p: str | os.PathLike) -> list[str]:
  """Names in a folder, sorted; empty where there is none."""
  p = path(p)
  return sorted(c.name for c in p.iterdir()) if p.exists() else []


def delete(p: str | os.PathLike) -> None:
  """Deletes an object or a folder with all in it; nothing to delete is fine."""
  p = path(p)
  if p.is_dir():
    p.rmtree()
  elif p.exists():
    p.unlink()
