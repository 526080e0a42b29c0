"""The event log: what is in a line, that nothing is lost when its writer is killed, what it costs."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from maxscale import storage
from maxscale.goodput import events, segments
from maxscale.goodput.events import EventLog


def spools(root):
  return [p for p in root.rglob("*.jsonl")]


def test_lines(tmp_path, spool_root):
  log = EventLog(str(tmp_path / "run"), process=0, processes=2, config_hash="abc")
  with log.state("compile"):
    assert log.current == "compile"
  log.event("step", step=1, seconds=0.5, tokens=128, note="more than is asked for")
  log.flush()
  assert len(events.read(str(tmp_path / "run"))) == 4  # what was logged, though the log is open
  log.event("eval", step=1, loss=math.nan, seconds=1)
  log.close(0, "done")
  log.close(1, "a second call does nothing")
  job, compiling, back, step, evaluation, end = lines = events.read(str(tmp_path / "run"))
  assert (job["kind"], job["processes"], job["config_hash"], job["pid"]) == ("job", 2, "abc", os.getpid())
  assert job["versions"]["jax"]
  assert (compiling["class"], back["class"]) == ("compile", "start")
  assert (step["tokens"], step["note"], evaluation["loss"]) == (128, "more than is asked for", None)
  assert (end["kind"], end["code"], end["reason"]) == ("exit", 0, "done")
  assert [line["seq"] for line in lines] == list(range(6))
  assert {(line["v"], line["attempt"], line["process"]) for line in lines} == {(1, 1, 0)}
  assert {line["run"] for line in lines} == {(tmp_path / "run" / "run_id").read_text()}
  assert not spools(spool_root)


@pytest.mark.parametrize(
  "kind, fields, error, message",
  [
    ("stepp", {}, ValueError, "unknown kind"),
    ("step", {"step": 1, "tokens": 3}, ValueError, "lacks the field 'seconds'"),
    ("step", {"step": 1.0, "seconds": 1, "tokens": 3}, TypeError, "step=1.0"),
    ("step", {"step": True, "seconds": 1, "tokens": 3}, TypeError, "step=True"),
    ("skip", {"step": 1, "wall": 3}, ValueError, "envelope"),
  ],
)
def test_wrong_events_are_refused(tmp_path, kind, fields, error, message):
  log = EventLog(str(tmp_path))
  with pytest.raises(error, match=message):
    log.event(kind, **fields)
  with pytest.raises(ValueError, match="no class"):
    log.enter("down")
  log.close(0, "done")
  with pytest.raises(ValueError, match="closed"):
    log.event("skip", step=1)
  assert [e["kind"] for e in events.read(str(tmp_path))] == ["job", "exit"]


def test_state_returns_to_the_class_before_it_after_an_error(tmp_path):
  log = EventLog(str(tmp_path))
  log.enter("step")
  with pytest.raises(KeyError), log.state("save"), log.state("eval"):
    raise KeyError
  assert log.current == "step"
  log.enter("step")  # nothing changes: no line
  log.close(0, "")
  assert [e["class"] for e in events.read(str(tmp_path)) if e["kind"] == "state"] == [
    "step", "save", "eval", "save", "step",
  ]  # fmt: skip


def test_mono_counts_from_the_start_of_the_process(tmp_path):
  code = (
    "import time; time.sleep(0.4); from maxscale.goodput.events import EventLog; import sys; "
    "EventLog(sys.argv[1]).close(0, '')"
  )
  start = time.time()
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
  job = events.read(str(tmp_path))[0]
  assert 0.4 < job["mono"] < time.time() - start
  assert job["wall"] - job["mono"] == pytest.approx(start, abs=0.3)


def test_a_killed_process_loses_nothing_on_its_host(tmp_path, spool_root):
  run, code = str(tmp_path / "run"), (
    "import os, signal, sys; from maxscale.goodput.events import EventLog; log = EventLog(sys.argv[1])\n"
    "for i in range(100): log.event('skip', step=i)\n"
    "os.kill(os.getpid(), signal.SIGKILL)"
  )  # fmt: skip
  killed = subprocess.run([sys.executable, "-c", code, run])
  assert killed.returncode == -signal.SIGKILL
  assert [e["kind"] for e in events.read(run)] == ["job"]  # claimed at once; the rest is in the spool
  (spool,) = spools(spool_root)
  with spool.open("ab") as f:
    f.write(b'{"v": 1, "run": "x", "att')  # as if it had been killed while it wrote a line
  log = EventLog(run)
  assert log.attempt == 2
  lines = events.read(run)
  assert [e["step"] for e in lines if e["kind"] == "skip"] == list(range(100))
  assert [(e["kind"], e["attempt"]) for e in lines[-2:]] == [("torn", 1), ("job", 2)]
  assert lines[-2]["mono"] == lines[-3]["mono"]
  log.close(0, "")
  assert not spools(spool_root)


def test_a_living_process_keeps_its_spool(tmp_path, spool_root):
  run, code = str(tmp_path / "run"), (
    "import sys; from maxscale.goodput.events import EventLog; log = EventLog(sys.argv[1], process=1)\n"
    "log.event('skip', step=7); print('ready', flush=True); sys.stdin.read(); log.close(0, '')"
  )  # fmt: skip
  first = EventLog(run)
  first.event("skip", step=1)
  child = subprocess.Popen([sys.executable, "-c", code, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert child.stdout.readline() == b"ready\n"
  second = EventLog(run, process=2)  # neither of the living writers is recovered by it
  assert len(spools(spool_root)) == 3
  first.event("skip", step=2)
  for log in (first, second):
    log.close(0, "")
  child.communicate()
  lines = events.read(run)
  assert [(e["attempt"], e["process"], e["kind"]) for e in lines] == [
    (1, 0, "job"), (1, 0, "skip"), (1, 0, "skip"), (1, 0, "exit"),
    (1, 1, "job"), (1, 1, "skip"), (1, 1, "exit"),
    (1, 2, "job"), (1, 2, "exit"),
  ]  # fmt: skip


def test_processes_agree_on_the_attempt(tmp_path):
  for order in ((0, 1), (1, 0), (0,), (0, 1)):  # whoever starts first, and after an attempt without process 1
    for log in [EventLog(str(tmp_path), process) for process in order]:
      log.close(0, "")
  jobs = [(e["process"], e["attempt"]) for e in events.read(str(tmp_path)) if e["kind"] == "job"]
  assert sorted(jobs) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 4)]


def test_segments_grow_and_end(tmp_path, monkeypatch):
  monkeypatch.setattr(segments, "SEGMENT_BYTES", 2000)
  log = EventLog(str(tmp_path), seconds=0)  # every line is due
  for i in range(50):
    log.event("skip", step=i)
  assert [e["step"] for e in events.read(str(tmp_path))[1:]] == list(range(50))  # without a close
  files = storage.listdir(tmp_path / "events")
  assert 3 < len(files) < 6
  assert all((tmp_path / "events" / f).stat().st_size < 2300 for f in files)
  log.close(0, "")


def test_an_outage_of_the_store_stops_nothing(tmp_path, monkeypatch, caplog):
  log = EventLog(str(tmp_path), seconds=0)
  write = storage.write

  def fail(*_):
    raise OSError("no store")

  monkeypatch.setattr(storage, "write", fail)
  log.event("skip", step=1)
  assert "no store" in caplog.text
  with pytest.raises(OSError, match="no store"):
    log.flush()
  monkeypatch.setattr(storage, "write", write)
  log.event("skip", step=2)
  assert [e.get("step") for e in events.read(str(tmp_path))] == [None, 1, 2]
  log.close(0, "")


def test_threads_and_a_wall_clock_that_runs_backwards(tmp_path, monkeypatch):
  log = EventLog(str(tmp_path))
  clock = iter(range(10**6, 0, -1))
  monkeypatch.setattr(time, "time", lambda: float(next(clock)))
  work = [threading.Thread(target=lambda: [log.event("skip", step=i) for i in range(50)]) for _ in range(4)]
  for t in work:
    t.start()
  for t in work:
    t.join()
  log.close(0, "")
  lines = events.read(str(tmp_path))
  assert [e["seq"] for e in lines] == list(range(202))
  assert all(a["mono"] <= b["mono"] for a, b in itertools.pairwise(lines))


def test_a_newer_schema_is_refused(tmp_path):
  EventLog(str(tmp_path)).close(0, "")
  storage.write(tmp_path / "events" / "2-0-0.jsonl", json.dumps({"v": 2, "kind": "job"}) + "\n")
  with pytest.raises(ValueError, match="schema 2"):
    events.read(str(tmp_path))


def test_a_new_run_waits_for_process_0(tmp_path, monkeypatch):
  monkeypatch.setattr(segments, "RUN_ID_DEADLINE", 0.3)
  with pytest.raises(TimeoutError, match="process 0"):
    EventLog(str(tmp_path), process=1)


def test_compilations_are_logged(tmp_path):
  import jax
  import jax.numpy as jnp

  log = EventLog(str(tmp_path / "run"))
  events.watch_jax(log)
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")  # fmt: skip
  before = {name: getattr(jax.config, name) for name in names}

  def square_and_add_17(x):
    return x * x + 17

  x = jnp.ones(3)
  try:
    jax.jit(square_and_add_17)(x)
    for name, value in zip(names, (str(tmp_path / "cache"), 0.0, -1)):
      jax.config.update(name, value)
    jax._src.compilation_cache.reset_cache()
    for _ in range(2):
      jax.clear_caches()
      jax.jit(square_and_add_17)(x)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    jax._src.compilation_cache.reset_cache()
  log.close(0, "")
  jax.jit(lambda x: x * 5)(x)  # after the close: not logged, no error
  lines = [e for e in events.read(str(tmp_path / "run")) if e["kind"] == "compile" and "add_17" in e["program"]]
  assert [e["cache"] for e in lines][1:] == ["miss", "hit"] and lines[0]["cache"] in ("off", "miss")
  assert all(e["seconds"] > 0 for e in lines)


def test_cost_of_an_event(tmp_path):
  log = EventLog(str(tmp_path))
  costs = []
  for i in range(2000):
    start = time.perf_counter()
    log.event("step", step=i, seconds=0.5, tokens=4096)
    costs.append(time.perf_counter() - start)
  log.close(0, "")
  assert sorted(costs)[1000] < 100e-6  # measured: 15 us on one core of a server
