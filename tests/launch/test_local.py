"""`python -m launch.local`: what a launcher must do, with processes that do little; and training with several processes."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maxscale import environment
from maxscale.config import ConfigError
from tests import runs

# Of the 8 devices each row is on 4, so that with 4 processes of 2 devices two of them hold the same rows.
STEPS = 8
TRAIN = {
  "run.steps": STEPS, "run.simulated_devices": 8, "mesh.fsdp": 2, "mesh.tensor": 4, "model.kv_heads": 4,
  "remat.policy": "none", "checkpoint.every": 3,
}  # fmt: skip
FINISH = {"eval.every": STEPS, "eval.batches": 2, "log.sample_tokens": 4}


def launch(folder, processes, command, devices=1, *more):
  """A launcher that runs a command; its logs are in folder/logs."""
  sizes = ["--processes", str(processes), "--devices-per-process", str(devices), "--logs", str(folder / "logs")]
  return runs.Process([*sizes, *more, "--", *command], folder, "launch.local")


def log(folder, process):
  return (folder / "logs" / f"process-{process}.log").read_text()


def wait_until(what, seconds=runs.DEADLINE):
  deadline = time.monotonic() + seconds
  while not (result := what()):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  return result


def find(pattern, text):
  """The first group of what matches, or all of it."""
  match = re.search(pattern, text)
  assert match, f"no {pattern} in\n{text}"
  return match[match.re.groups and 1]


def alive(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


# ---- the launcher


def shell(script):
  return ["bash", "-c", script]


def test_each_process_knows_its_place_and_has_a_log(tmp_path):
  with launch(tmp_path, 3, shell("env | grep ^MAXSCALE_; echo on stderr >&2"), 2) as process:
    output = process.finish()
  assert f"logs in {tmp_path / 'logs'}" in output
  assert output.count("MAXSCALE_PROCESS=") == 1 and "MAXSCALE_PROCESS=0\n" in output and "on stderr" in output
  addresses = set()
  for i in range(3):
    text = log(tmp_path, i)
    assert f"MAXSCALE_PROCESS={i}\n" in text and "MAXSCALE_PROCESSES=3\n" in text and "on stderr" in text
    assert "MAXSCALE_DEVICES_PER_PROCESS=2\n" in text
    addresses.add(find(r"MAXSCALE_COORDINATOR=(127\.0\.0\.1:\d+)\n", text))
  assert len(addresses) == 1


@pytest.mark.parametrize("how, code, said", [("exit 7", 7, "exit code 7"), ("kill -SEGV $$", 139, "SIGSEGV")])
def test_the_first_failure_ends_all_and_is_said_last(tmp_path, how, code, said):
  script = f'echo "pid $$"; if [ $MAXSCALE_PROCESS = 1 ]; then sleep 0.3; echo the reason; {how}; fi; sleep 100'
  start = time.monotonic()
  with launch(tmp_path, 3, shell(script), 1, "--grace", "60") as process:
    output = process.finish(code)
  assert time.monotonic() - start < 30  # SIGTERM is enough
  lines = output.splitlines()
  assert lines[-2] == "launch: process 1: the reason"
  assert lines[-1].startswith("launch: process 1 of 3 ") and said in lines[-1] and "process-1.log" in lines[-1]
  assert not any(alive(find(r"pid (\d+)", log(tmp_path, i))) for i in range(3))


def test_one_that_ignores_sigterm_is_killed_with_all_that_it_started(tmp_path):
  script = (
    'trap "" TERM; sleep 100 & echo "pids $$ $!"; [ $MAXSCALE_PROCESS = 0 ] && exit 3; while true; do sleep 1; done'
  )
  with launch(tmp_path, 2, shell(script), 1, "--grace", "0.5") as process:
    process.finish(3)
  for i in range(2):
    assert not any(map(alive, find(r"pids (.*)\n", log(tmp_path, i)).split()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_all_are_waited_for(tmp_path, number):
  script = (
    f'trap "sleep 0.$MAXSCALE_PROCESS; echo saved; exit 75" {number.name[3:]}; echo up; while true; do sleep 0.05; done'
  )
  with launch(tmp_path, 3, shell(script)) as process:
    wait_until(
      lambda: all((tmp_path / "logs" / f"process-{i}.log").exists() and "up" in log(tmp_path, i) for i in range(3))
    )
    process.signal(number)
    process.finish(75)
  assert all("saved" in log(tmp_path, i) for i in range(3))


@pytest.mark.skipif(sys.platform != "linux", reason="no other system ends a child with its parent")
def test_none_survives_a_launcher_that_is_killed(tmp_path):
  with launch(tmp_path, 2, ["sleep", "100"]) as process:
    process.wait_for("logs in")
    children = pathlib.Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children").read_text().split()
    assert len(children) == 2
    process.signal(signal.SIGKILL)
    process.popen.wait()
    wait_until(lambda: not any(map(alive, children)), 5)


@pytest.mark.parametrize(
  "arguments, said",
  [
    ([], "--processes"),
    (["--processes", "0", "--", "true"], "--processes must be at least 1"),
    (["--processes", "2"], "command"),
    (["--processes", "2", "--", "no-such-command"], "no-such-command"),
  ],
)
def test_bad_usage_is_one_line(tmp_path, arguments, said):
  with runs.Process(
    [*arguments[:2], "--logs", str(tmp_path / "logs"), *arguments[2:]], tmp_path, "launch.local"
  ) as process:
    output = process.finish(2)
  assert len(output.splitlines()) == 1 and said in output


# ---- agreeing on a step


def test_processes_far_apart_stop_after_the_same_step(tmp_path, monkeypatch):
  monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # they meet without it
  with launch(tmp_path, 3, [sys.executable, "-m", "tests.launch.counting"]) as process:
    logs = [tmp_path / "logs" / f"process-{i}.log" for i in range(3)]
    wait_until(lambda: all(f.exists() and "counting" in f.read_text() for f in logs))
    time.sleep(0.5)
    os.kill(int(find(r"pid (\d+)", log(tmp_path, 2))), signal.SIGTERM)
    process.finish(75)
  stops = {find(r"stopped by .*", log(tmp_path, i)) for i in range(3)}
  assert len(stops) == 1 and re.fullmatch(r"stopped by SIGTERM of process 2 after \d+", stops.pop())


# ---- meeting

MEET = """
from maxscale import distributed
distributed.join()
print("process", distributed.index, "of", distributed.count, flush=True)
"""


def test_one_that_meets_nobody_says_so_and_ends(tmp_path):
  where = {"MAXSCALE_COORDINATOR": "127.0.0.1:9", "MAXSCALE_PROCESSES": "2", "MAXSCALE_PROCESS": "1"}
  own = {**os.environ, **where, "JAX_PLATFORMS": "cpu"}
  short = MEET.replace("distributed.join()", "distributed.JOIN = 2; distributed.join()")
  done = subprocess.run([sys.executable, "-c", short], cwd=runs.ROOT, env=own, capture_output=True, text=True)
  assert done.returncode == 1 and "have not all met (MAXSCALE_COORDINATOR=127.0.0.1:9)" in done.stderr


def test_a_cluster_that_jax_knows_needs_no_addresses(tmp_path):
  slurm = f"SLURM_JOB_ID={os.getpid()} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$MAXSCALE_PROCESS"
  script = f"env -u MAXSCALE_PROCESSES -u MAXSCALE_PROCESS -u JAX_COORDINATOR_BIND_ADDRESS MAXSCALE_COORDINATOR=auto {slurm} SLURM_LOCALID=0 {sys.executable} -c '{MEET}'"
  with launch(tmp_path, 2, shell(script)) as process:
    process.finish()
  assert [f"process {i} of 2" in log(tmp_path, i) for i in range(2)] == [True, True]


@pytest.mark.parametrize(
  "variables", [{"COORDINATOR": "localhost"}, {"PROCESS": "2"}, {"PROCESS": "one"}, {"PROCESSES": ""}]
)
def test_wrong_variables_are_named(monkeypatch, variables):
  for name, value in ({"COORDINATOR": "localhost:1234", "PROCESSES": "2", "PROCESS": "1"} | variables).items():
    monkeypatch.setenv(f"MAXSCALE_{name}", value)
  with pytest.raises(ConfigError, match=r"MAXSCALE_COORDINATOR=.*MAXSCALE_PROCESS=.*MAXSCALE_PROCESSES="):
    environment.place()


# ---- training


def train(folder, processes, devices, changes=None, module="maxscale.train"):
  command = [sys.executable, "-m", module, *runs.options(folder / "run", {**TRAIN, **(changes or {})})]
  return launch(folder, processes, command, devices)


def complete(folder, processes, devices, changes=None):
  with train(folder, processes, devices, changes) as process:
    process.finish()
  return folder


def pid(folder, process):
  """Id of a process, from its event log: not there for the moment in which more is written to it."""
  jobs = lambda: [e["pid"] for e in runs.events(folder / "run", "job") if e["process"] == process]  # noqa: E731
  return wait_until(jobs)[0]


def values(folder, name="loss"):
  from maxscale.goodput.metrics import read_metrics

  return {row["step"]: row[name] for row in read_metrics(str(folder / "run")) if name in row}


def agree(a, b):
  assert a.keys() == b.keys()
  np.testing.assert_allclose([a[s] for s in a], [b[s] for s in a], rtol=1e-6)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """A complete run of 4 processes with 2 devices each."""
  return complete(tmp_path_factory.mktemp("four"), 4, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The same run in one process, with an evaluation and a sample at its end."""
  return complete(tmp_path_factory.mktemp("one"), 1, 8, FINISH)


def test_a_run_is_written_and_said_once(reference):
  first = log(reference, 0)
  assert "mesh fsdp=2 x tensor=4 (8 x cpu)" in first and f"step {STEPS}/{STEPS}" in first and "report" in first
  for i in (1, 2, 3):  # Gloo says whom it has connected to
    assert not [line for line in log(reference, i).splitlines() if line and "peer ranks" not in line]
  assert list(values(reference)) == list(range(1, STEPS + 1))
  jobs = runs.events(reference / "run", "job")
  assert [(e["attempt"], e["process"], e["processes"]) for e in jobs] == [(1, i, 4) for i in range(4)]
  assert [e["step"] for e in runs.events(reference / "run", "commit")] == [3, 6, STEPS]
  assert [(e["code"], e["reason"]) for e in runs.events(reference / "run", "exit")] == [(0, "complete")] * 4
  assert all((reference / "run" / name).exists() for name in ("config.json", "report.html"))
  again = complete(reference, 4, 2)
  assert "is complete: 8 steps" in log(again, 0) and not any(log(again, i) for i in (1, 2, 3))


def test_one_process_has_the_losses_of_four(reference, one):
  agree(values(one), values(reference))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A run of 4 processes, one of which was asked to stop."""
  folder = tmp_path_factory.mktemp("stopped")
  with train(folder, 4, 2) as process:
    process.wait_for(f"step 4/{STEPS}")
    os.kill(pid(folder, 2), signal.SIGTERM)
    process.finish(75)
  return folder


def test_a_signal_to_one_process_saves_the_same_step_in_all(stopped, reference):
  run_dir = stopped / "run"
  step = runs.committed(run_dir)[-1]
  assert f"stopped by SIGTERM of process 2 after step {step}; the checkpoint is complete" in log(stopped, 0)
  ends = runs.events(run_dir, "exit")
  assert [(e["process"], e["code"], e["reason"]) for e in ends] == [(i, 75, "SIGTERM of process 2") for i in range(4)]
  for i in range(4):
    assert [e["step"] for e in runs.events(run_dir, "save") if e["process"] == i][-1] == step
    assert [e["step"] for e in runs.events(run_dir, "step") if e["process"] == i] == list(range(1, step + 1))
  # What it did until then is what the undisturbed run of 4 processes did, bit for bit.
  assert values(stopped) == {s: loss for s, loss in values(reference).items() if s <= step}
  assert runs.fingerprint(run_dir, 3) == runs.fingerprint(reference / "run", 3)


def test_what_four_processes_saved_two_go_on_with(stopped, reference):
  step = runs.committed(stopped / "run")[-1]
  complete(stopped, 2, 4)
  assert f"restored and verified step {step} " in log(stopped, 0)
  agree(values(stopped), values(reference))
  jobs = runs.events(stopped / "run", "job", attempt=2)
  assert [(e["process"], e["processes"]) for e in jobs] == [(0, 2), (1, 2)]
  assert runs.committed(stopped / "run")[-1] == STEPS


def test_a_killed_process_ends_all_and_the_next_start_resumes(tmp_path, one):
  with train(tmp_path, 2, 4) as process:
    process.wait_for(f"step 4/{STEPS}")
    wait_until(lambda: runs.committed(tmp_path / "run"))
    before = [pid(tmp_path, i) for i in range(2)]
    os.kill(before[1], signal.SIGKILL)
    output = process.finish(137)
  assert "process 1 of 2 was ended by SIGKILL" in output.splitlines()[-1]
  assert not any(map(alive, before))
  committed = runs.committed(tmp_path / "run")
  assert committed
  complete(tmp_path, 2, 4, FINISH)
  assert f"restored and verified step {committed[-1]} " in log(tmp_path, 0)
  agree(values(tmp_path), values(one))
  agree(values(tmp_path, "heldout_loss"), values(one, "heldout_loss"))
  for pattern in (r"count models, same text: .*\n", r"sample of 4 tokens:\n.*\n"):
    assert len({find(pattern, log(folder, 0)) for folder in (tmp_path, one)}) == 1


def test_an_error_in_one_process_ends_all_with_its_own_words(tmp_path):
  changes = {"run.simulated_devices": 2, "mesh.tensor": 1, "checkpoint.every": 2, "data.cache": tmp_path / "data"}
  with train(tmp_path, 2, 1, changes, "tests.launch.failing") as process:
    output = process.finish(1)
  lines = output.splitlines()
  # The other process loses its peer at the same moment, and may be the first to be seen to end.
  assert " of 2 ended with exit code 1" in lines[-1]
  assert "OSError: injected: the disk went away" in log(tmp_path, 1)
  ends = [e for e in runs.events(tmp_path / "run", "exit") if e["process"] == 1]
  assert [(e["code"], e["reason"]) for e in ends] == [(1, "OSError: injected: the disk went away")]
  assert "".join(log(tmp_path, i) for i in range(2)).count("tokenising") == 1


@pytest.mark.parametrize(
  "processes, changes, said",
  [
    (4, {"model.embedd": 3}, "unknown option 'model.embedd'"),
    (3, {}, "run.simulated_devices=8, but 3 processes with 2 devices each have 6"),
    (2, {"run.simulated_devices": 0}, "fsdp=2 * tensor=4 is 8, but there are 4 devices"),
  ],
)
def test_a_wrong_config_is_said_once(tmp_path, processes, changes, said):
  with train(tmp_path, processes, 2, changes) as process:
    output = process.finish(2)
  assert output.count(said) == 1 and "Traceback" not in output
  assert "ended with exit code 2" in output.splitlines()[-1]
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_four_processes_again_are_bit_for_bit_equal(tmp_path, reference):
  complete(tmp_path, 4, 2)
  assert values(tmp_path) == values(reference)
  for step in (3, 6, STEPS):
    assert runs.fingerprint(tmp_path / "run", step) == runs.fingerprint(reference / "run", step)
