"""Metrics: a resume replaces what it writes again; TensorBoard files; a killed writer."""

import math
import signal
import subprocess
import sys

import numpy as np
from tensorboardX.proto import event_pb2

from maxscale import storage
from maxscale.goodput.metrics import MetricsWriter, read_metrics


def values(run, name):
  return {row["step"]: row[name] for row in read_metrics(run) if name in row}


def test_a_resume_replaces_what_came_after_it(tmp_path):
  run = str(tmp_path)
  first = MetricsWriter(run, tensorboard=False)
  for step in range(1, 21):
    first.write(step, {"loss": np.float32(step)})
  first.write(20, {"eval_loss": 7})
  first.write(20, {"loss": 20.5})
  first.close()
  assert values(run, "loss")[20] == 20.5 and values(run, "eval_loss") == {20: 7.0}
  second = MetricsWriter(run, tensorboard=False)
  for step in range(11, 14):
    second.write(step, {"loss": -step})
  second.close()
  assert values(run, "loss") == {s: s if s <= 10 else -s for s in range(1, 14)}
  assert values(run, "eval_loss") == {}


def test_not_finite_is_null_and_torn_is_left_out(tmp_path):
  writer = MetricsWriter(str(tmp_path), tensorboard=False)
  writer.write(1, {"loss": math.nan, "grad_norm": 1.0})
  writer.close()
  storage.write(tmp_path / "metrics" / "1-0-1.jsonl", '{"step": 2, "lo')
  assert [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(str(tmp_path))] == [(1, None, 1.0)]


def test_a_killed_writer_loses_nothing(tmp_path):
  code = (
    "import os, sys; from maxscale.goodput.metrics import MetricsWriter; w = MetricsWriter(sys.argv[1], False)\n"
    "for i in range(1, 11): w.write(i, {'loss': i})\n"
    "os.kill(os.getpid(), 9)"
  )
  assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
  assert len(read_metrics(str(tmp_path))) == 1
  MetricsWriter(str(tmp_path), tensorboard=False).close()
  assert values(str(tmp_path), "loss") == {i: i for i in range(1, 11)}


def test_tensorboard(tmp_path):
  writer = MetricsWriter(str(tmp_path), tensorboard=True)
  writer.write(3, {"loss": 2.5})
  writer.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  data, found = file.read_bytes(), []
  while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + size :]
  assert found == [(3, "loss", 2.5)]


def test_tensorboard_needs_a_file_system(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(storage, "path", lambda p: tmp_path / str(p).replace("://", "_"))
  writer = MetricsWriter("gs://bucket/run", tensorboard=True)
  writer.write(1, {"loss": 1})
  writer.close()
  assert "cannot append" in caplog.text
  assert not list(tmp_path.rglob("tensorboard"))
