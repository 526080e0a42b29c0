"""Checkpoints: asynchronous save, sealed commit, fingerprints, restore onto any layout."""

from maxscale.checkpoint.commit import Meta, steps
from maxscale.checkpoint.fingerprint import digest, fingerprint
from maxscale.checkpoint.layout import CheckpointError, Leaf
from maxscale.checkpoint.manager import Checkpointer
from maxscale.checkpoint.restore import Rejected, Restored, restore

__all__ = [
  "CheckpointError",
  "Checkpointer",
  "Leaf",
  "Meta",
  "Rejected",
  "Restored",
  "digest",
  "fingerprint",
  "restore",
  "steps",
]
