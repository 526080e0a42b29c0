"""A run that is stopped, killed, damaged or changed: it goes on to the same end, or says why not."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maxscale import train as command
from tests import runs

OTHER_RUNTIME = {"data.prefetch": 1, "data.threads": 1, "log.every": 7, "log.tensorboard": True, "checkpoint.every": 7}


@pytest.fixture(scope="module")
def reference():
  return runs.reference()


def same_end(run_dir, reference):
  """The last state and every loss are those of the undisturbed run, bit for bit."""
  assert runs.fingerprint(run_dir) == runs.fingerprint(reference)
  assert runs.losses(run_dir) == runs.losses(reference)
  assert len(runs.losses(run_dir)) == runs.STEPS


def last(run_dir, kind):
  return runs.events(run_dir, kind)[-1]


# ---- stopped


def test_a_restart_is_bit_exact_whatever_the_runtime_options(tmp_path, reference):
  run_dir = tmp_path / "run"
  runs.train(run_dir, {"run.steps": 33})
  assert runs.committed(run_dir) == [20, 33]
  assert "restored and verified step 33" in runs.train(run_dir, OTHER_RUNTIME)
  same_end(run_dir, reference)
  assert runs.fingerprint(run_dir, 33) != runs.fingerprint(run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_same_command_goes_on(tmp_path, reference, number):
  run_dir = tmp_path / "run"
  with runs.start(run_dir) as process:
    process.wait_for("step 5/80")
    process.signal(number)
    output = process.finish(75)
  step = last(run_dir, "step")["step"]
  assert 5 <= step < runs.STEPS and runs.committed(run_dir)[-1] == step
  assert f"{number.name}: saving and leaving" in output
  assert f"stopped by {number.name} after step {step}; the checkpoint is complete" in output
  end = last(run_dir, "exit")
  assert (end["code"], end["reason"]) == (75, number.name)
  assert f"restored and verified step {step} " in runs.train(run_dir)
  same_end(run_dir, reference)


def test_a_second_ctrl_c_leaves_at_once_with_the_old_checkpoint_intact(tmp_path, reference):
  run_dir = runs.copy(reference, tmp_path / "run", 20)
  marker = (runs.folder(run_dir, 20) / "COMMIT.json").read_bytes()
  with runs.start(run_dir) as process:
    process.wait_for("step 22/80")
    process.signal(signal.SIGINT)
    process.wait_for("SIGINT: saving and leaving")  # two at the same instant are one to the operating system
    process.signal(signal.SIGINT)
    output = process.finish(130)
  assert "leaving at once" in output and "stopped by" not in output
  assert (runs.folder(run_dir, 20) / "COMMIT.json").read_bytes() == marker
  committed = runs.committed(run_dir)
  assert f"restored and verified step {committed[-1]} " in runs.train(run_dir)
  same_end(run_dir, reference)


def test_another_mesh_goes_on_with_the_same_losses(tmp_path, reference):
  run_dir = runs.copy(reference, tmp_path / "run", 40)
  runs.train(run_dir, {"run.steps": 45, "run.simulated_devices": 8, "mesh.fsdp": 8})
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  output = runs.train(run_dir, {"run.steps": 50, "run.simulated_devices": 8, **mesh})
  assert "mesh data=2 x fsdp=2 x tensor=2 (8 x cpu)" in output and "restored and verified step 45 " in output
  before, after = runs.losses(reference), runs.losses(run_dir)
  assert list(after) == list(range(1, 51))
  assert [after[s] for s in range(1, 41)] == [before[s] for s in range(1, 41)]
  np.testing.assert_allclose([after[s] for s in range(41, 51)], [before[s] for s in range(41, 51)], rtol=2e-5)


# ---- killed


def crash(*arguments):
  """What the command prints; it shares this session's compile cache."""
  environment = {**os.environ, runs.SESSION: str(runs.session())}
  arguments = [sys.executable, "-m", "tests.crash", *map(str, arguments)]
  done = subprocess.run(arguments, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_killed_at_a_random_moment():
  assert "1 of 1 runs ended in the state of the undisturbed one" in crash("--times", 1, "--seed", 5)


@pytest.mark.slow
def test_killed_at_many_random_moments():
  assert "10 of 10 runs ended in the state of the undisturbed one" in crash("--times", 10)


def test_killed_between_the_start_of_a_save_and_its_commit(tmp_path, reference):
  run_dir = tmp_path / "run"
  with runs.start(run_dir) as process:
    torn = kill_in_a_save(process, run_dir)
  assert not (runs.folder(run_dir, torn) / "COMMIT.json").exists()
  before = [step for step in runs.committed(run_dir) if step < torn]
  output = runs.train(run_dir)
  assert [e["step"] for e in runs.events(run_dir, "restore")] == before[-1:]
  assert f"step {torn} is damaged" not in output  # it never was a checkpoint
  assert (f"restored and verified step {before[-1]} " in output) if before else ("restored" not in output)
  same_end(run_dir, reference)
  assert runs.committed(run_dir) == [20, 40, 60, 80]


def kill_in_a_save(process, run_dir):
  """Kills a run while it has a checkpoint without its marker, and returns the step."""
  deadline = time.monotonic() + runs.DEADLINE
  while process.popen.poll() is None and time.monotonic() < deadline:
    open_ = [f for f in (run_dir / "checkpoints").glob("*") if not (f / "COMMIT.json").exists()]
    if open_ and runs.committed(run_dir):  # not the first one: there is one before it
      process.signal(signal.SIGSTOP)
      os.waitid(os.P_PID, process.popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # nothing is written while we look
      if not (open_[0] / "COMMIT.json").exists():
        process.signal(signal.SIGKILL)
        process.popen.wait()
        return int(open_[0].name)
      process.signal(signal.SIGCONT)
  raise AssertionError(f"no save was seen before its commit:\n{process.output}")


# ---- damaged


@pytest.mark.parametrize("what", ["array", "marker"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, reference, what):
  run_dir = runs.copy(reference, tmp_path / "run", 60)
  if what == "array":
    array = runs.flip(run_dir, 60)
  else:
    array, marker = "COMMIT.json", runs.folder(run_dir, 60) / "COMMIT.json"
    marker.write_bytes(marker.read_bytes()[:-100])
  output = runs.train(run_dir)
  assert f"the checkpoint of step 60 is damaged and was not used: {array}: " in output
  assert "restored and verified step 40 " in output
  assert [(e["step"], e["array"]) for e in runs.events(run_dir, "checkpoint_bad")] == [(60, array)]
  assert last(run_dir, "restore")["step"] == 40
  same_end(run_dir, reference)
  assert runs.fingerprint(run_dir, 60) == runs.fingerprint(reference, 60)  # written anew, and good
  assert not (runs.folder(run_dir, 60) / "BAD.json").exists()


def test_a_run_without_a_good_checkpoint_stops_and_does_not_begin_anew(tmp_path, reference):
  run_dir = runs.copy(reference, tmp_path / "run", 40)
  array = runs.flip(run_dir, 20), runs.flip(run_dir, 40, "params/head")
  for attempt in (2, 3):  # the first finds the damage, the second remembers it
    output = runs.train(run_dir, code=1)
    assert "no checkpoint in" in output and "step 20: " in output and "step 40: " in output
    assert "Traceback" not in output and "step 1/80" not in output
    assert last(run_dir, "exit")["attempt"] == attempt and last(run_dir, "exit")["code"] == 1
    if attempt == 2:
      assert all(name in output for name in array)
  assert runs.committed(run_dir) == [20, 40]


# ---- changed


def refused(capsys, run_dir, changes):
  """What train says when it refuses the run: before any device is touched, so in this process."""
  assert command.main(runs.options(run_dir, {"run.simulated_devices": 0, **changes})) == 2
  return capsys.readouterr().err


def test_another_model_or_another_past_is_refused(reference, capsys):
  before = {f: f.stat().st_mtime_ns for f in reference.rglob("*")}
  err = refused(capsys, reference, {"model.layers": 3, "model.embed": 64})
  assert "model.layers is 2, not 3" in err and "model.embed is 32, not 64" in err and "--config.run.dir" in err
  both = {"text": {"kind": "text", "path": str(runs.session() / "text")}, "random": {"kind": "synthetic"}}
  for changes in (
    {"data.batch_size": 16},
    {"data.phases": ({"start": 70, "length": 32},)},
    {"data.sources": both},  # without a mixture, each source has an equal part of the steps done too
  ):
    err = refused(capsys, reference, {**changes, "run.steps": 90})
    assert "the schedule of the 80 steps" in err and "data.phases" in err
  assert {f: f.stat().st_mtime_ns for f in reference.rglob("*")} == before


def test_a_later_phase_is_accepted_and_recorded(tmp_path, reference):
  run_dir = runs.copy(reference, tmp_path / "run", 40)
  phase = {"start": 42, "batch_size": 4, "length": 128}
  output = runs.train(run_dir, {"data.phases": (phase,), "run.steps": 44})
  assert "compiled the step for 8 x 64" in output and "compiled the step for 4 x 128" in output
  changed = {e["option"]: (e["old"], e["new"]) for e in runs.events(run_dir, "config")}
  assert changed == {"data.phases": ([], [phase]), "run.steps": (80, 44)}
  losses, before = runs.losses(run_dir), runs.losses(reference)
  assert [losses[s] for s in range(1, 43)] == [before[s] for s in range(1, 43)] and losses[43] != before[43]


def test_a_changed_corpus_is_refused_by_its_name(tmp_path, reference):
  run_dir = runs.copy(reference, tmp_path / "run", 40)
  shutil.copytree(runs.session() / "text", tmp_path / "text")
  file = next((tmp_path / "text").iterdir())
  sources = {"data.sources": {"text": {"kind": "text", "path": str(tmp_path / "text")}}}
  assert "restored and verified step 40 " in runs.train(run_dir, {**sources, "run.steps": 41})  # moved, but the same
  file.write_text(file.read_text().replace("def ", "fed ", 1))
  output = runs.train(run_dir, sources, code=2)
  assert "the source 'text' changed since step 41: it was " in output and "Traceback" not in output
  assert last(run_dir, "exit")["code"] == 2 and runs.committed(run_dir) == [20, 40, 41]
