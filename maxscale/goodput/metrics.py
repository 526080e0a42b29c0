"""Metrics of a run: JSON lines in the run directory, and TensorBoard files beside them.

A line is {"step": ..., "wall": unix seconds, name: number, ...}; a number that is not finite is null. The report draws
the names of `PANELS` together, and every other name on its own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import SupportsFloat

from maxscale import storage
from maxscale.goodput import segments
from maxscale.goodput.events import dumps

FOLDER = "metrics"
PANELS: dict[str, tuple[str, ...]] = {  # title -> names drawn in one chart
  "loss (nats per token)": ("loss", "heldout_loss"),
  "tokens per second": ("tokens_per_second",),
  "tokens per second and device": ("tokens_per_second_per_device",),
  "share of peak FLOP/s": ("mfu", "mfu_full_mask", "hfu"),
  "step time (s)": ("step_seconds",),
  "gradient norm": ("grad_norm",),
  "learning rate": ("learning_rate",),
}


class MetricsWriter:
  """Writes the metrics of a run; process 0 has the only one, and one thread uses it."""

  def __init__(self, run_dir: str, tensorboard: bool) -> None:
    """Opens the writer; nothing is written before the first metrics.

    Args:
      run_dir: directory of the run, in any store.
      tensorboard: also write <run_dir>/tensorboard, if the run directory is on a file system.
    """
    self._lines = segments.SegmentWriter(run_dir, FOLDER)
    self._run_dir, self._tensorboard, self._board = storage.path(run_dir), tensorboard, None
    if tensorboard and "://" in str(run_dir):
      self._tensorboard = False
      logging.getLogger(__name__).warning(
        "no TensorBoard files: they are appended to, and %s cannot append; its metrics/ holds the same", run_dir
      )

  def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
    """Writes scalars of a step: after `step` optimizer steps.

    Raises:
      OSError: the local disk refused the line.
    """
    wall, values = time.time(), {name: float(value) for name, value in scalars.items()}
    self._lines.append(dumps({"step": int(step), "wall": round(wall, 3), **values}))
    if self._tensorboard:
      self._write_board(step, values, wall)

  def close(self) -> None:
    """Writes all lines to the run directory.

    Raises:
      OSError: the store refused them; the next start of the run on this host recovers them.
    """
    if self._board:
      self._board.close()
    self._lines.close()

  def _write_board(self, step: int, values: dict[str, float], wall: float) -> None:
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (made by protoc)

    if self._board is None:  # purge_step: TensorBoard drops what an earlier attempt wrote from this step on
      self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step)
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    # One record: add_scalar for each value costs ten times as much.
    self._board.file_writer.add_summary(summary, step, wall)  # pyright: ignore[reportOptionalMemberAccess]


def read_metrics(run_dir: str) -> list[dict]:
  """One dict a step, in the order of steps; a torn line is left out.

  What is written for a step in several lines is joined, the last line counting. An attempt that resumes at a step
  replaces everything that earlier attempts wrote from that step on.
  """
  rows: dict[int, dict] = {}
  current = 0
  for attempt, _, line in segments.read_lines(run_dir, FOLDER):
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if attempt != current:
      rows = {step: old for step, old in rows.items() if step < row["step"]}
      current = attempt
    rows[row["step"]] = rows.get(row["step"], {}) | row
  return [rows[step] for step in sorted(rows)]
