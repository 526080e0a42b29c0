"""Small runs of `python -m maxscale.train` in processes of their own, and readers of what they leave.

`python -m tests.runs <what> <file> <arguments of train>` is train with something seen or injected (see `WATCHERS`), or,
with "imports", as it is; what was seen goes to the file.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SESSION = "MAXSCALE_TEST_SESSION"  # a folder that a test hands to the processes it starts
DEADLINE = 300  # seconds until a test gives up on a process; no test measures time by it
STEPS = 80  # of a whole run; it saves at 20, 40, 60 and 80
SMALL = {
  "run.simulated_devices": 2, "run.steps": STEPS, "mesh.fsdp": 2, "mesh.tensor": 1, "model.layers": 2,
  "model.embed": 32, "model.mlp": 64, "data.batch_size": 8, "data.length": 64, "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 5, "checkpoint.every": 20, "checkpoint.keep": 10, "eval.every": 0, "log.every": 1,
  "log.sample_tokens": 0, "log.peak_tflops": 1, "log.tensorboard": False,
}  # fmt: skip


@functools.cache
def session() -> pathlib.Path:
  """The folder of this test session: a compile cache, a tokenised corpus, and its text."""
  if SESSION in os.environ:
    return pathlib.Path(os.environ[SESSION])
  folder = pathlib.Path(tempfile.mkdtemp(prefix="maxscale-tests-"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  (folder / "text").mkdir()
  for file in ("config.py", "train.py", "goodput/events.py"):
    shutil.copy(ROOT / "maxscale" / file, folder / "text" / f"{file.replace('/', '_')}.txt")
  return folder


def options(run_dir: Any, changes: dict[str, Any], base: dict[str, Any] = SMALL) -> list[str]:
  """Arguments of train for configs/tiny.py with the options of `base`, then `changes`."""
  own = {"run.dir": run_dir, "run.compile_cache": session() / "xla", "data.cache": session() / "data"}
  if base:
    own["data.sources"] = {"text": {"kind": "text", "path": str(session() / "text")}}
  return ["--config", "configs/tiny.py", *(f"--config.{k}={v}" for k, v in (base | own | changes).items())]


class Process:
  """A process whose output (both streams) goes to a file. Use as a context manager: it does not outlive the block."""

  def __init__(self, arguments: list[str], folder: pathlib.Path, module: str = "maxscale.train"):
    """`folder` takes its output and its temporary files: event logs of killed runs wait there for the next start."""
    (folder / "spool").mkdir(parents=True, exist_ok=True)
    descriptor, self._log = tempfile.mkstemp(dir=folder, prefix="output-")
    environment = {**os.environ, "TMPDIR": str(folder / "spool"), SESSION: str(session()), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", module, *arguments]
    self.popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=descriptor, stderr=subprocess.STDOUT)
    os.close(descriptor)

  def __enter__(self) -> Process:
    return self

  def __exit__(self, *_: Any) -> None:
    if self.popen.poll() is None:
      self.popen.kill()
      self.popen.wait()

  @property
  def output(self) -> str:
    return pathlib.Path(self._log).read_text(errors="replace")

  def wait_for(self, text: str) -> None:
    """Waits until the process has written a text."""
    deadline = time.monotonic() + DEADLINE
    while text not in self.output:
      assert self.popen.poll() is None, f"exit {self.popen.returncode} without {text!r}:\n{self.output}"
      assert time.monotonic() < deadline, f"no {text!r} yet:\n{self.output}"
      time.sleep(0.002)

  def signal(self, number: signal.Signals) -> None:
    self.popen.send_signal(number)

  def finish(self, code: int = 0) -> str:
    """Waits for the end, demands an exit code, and returns the output."""
    self.popen.wait(DEADLINE)
    assert self.popen.returncode == code, f"exit {self.popen.returncode}, not {code}:\n{self.output}"
    return self.output


def start(run_dir: pathlib.Path, changes: dict[str, Any] | None = None, base: dict[str, Any] = SMALL) -> Process:
  return Process(options(run_dir, changes or {}, base), run_dir.parent)


def train(run_dir: pathlib.Path, changes: dict[str, Any] | None = None, code: int = 0, base: dict = SMALL) -> str:
  """A run from its start to its end; returns what it printed."""
  with start(run_dir, changes, base) as process:
    return process.finish(code)


def watch(what: str, run_dir: pathlib.Path, changes: dict[str, Any] | None = None, *more: str) -> dict[str, Any]:
  """A whole run with something seen or injected; returns what was seen, and the output."""
  file = run_dir.parent / f"{run_dir.name}-{what}.json"
  with Process([what, str(file), *options(run_dir, changes or {}), *more], run_dir.parent, "tests.runs") as process:
    output = process.finish()
  return {"output": output, **json.loads(file.read_text())}


@functools.cache
def reference() -> pathlib.Path:
  """The run of `SMALL` that nothing disturbed."""
  run_dir = session() / "reference" / "run"
  train(run_dir)
  return run_dir


def copy(source: pathlib.Path, target: pathlib.Path, last: int) -> pathlib.Path:
  """A copy of a run that has no checkpoints after step `last`."""
  shutil.copytree(source, target)
  for step in committed(target):
    if step > last:
      shutil.rmtree(folder(target, step))
  return target


# ---- what a run leaves


def folder(run_dir: pathlib.Path, step: int) -> pathlib.Path:
  return run_dir / "checkpoints" / f"{step:010d}"


def committed(run_dir: pathlib.Path) -> list[int]:
  return sorted(int(f.parent.name) for f in (run_dir / "checkpoints").glob("*/COMMIT.json"))


def fingerprint(run_dir: pathlib.Path, step: int = STEPS) -> dict[str, Any]:
  """Array -> fingerprint of each layer, from the marker of a checkpoint: two states are equal where these are."""
  from maxscale import storage

  return storage.read_sealed(folder(run_dir, step) / "COMMIT.json")["fingerprints"]


def losses(run_dir: pathlib.Path) -> dict[int, float]:
  from maxscale.goodput.metrics import read_metrics

  return {row["step"]: row["loss"] for row in read_metrics(str(run_dir)) if "loss" in row}


def events(run_dir: pathlib.Path, kind: str = "", attempt: int = 0) -> list[dict]:
  """Events of a run, of one kind or attempt where given."""
  from maxscale.goodput.events import read

  return [e for e in read(str(run_dir)) if kind in ("", e["kind"]) and attempt in (0, e["attempt"])]


def flip(run_dir: pathlib.Path, step: int, array: str = "params/layers/mlp/up") -> str:
  """Flips a bit in the middle of an array's largest file in a checkpoint; returns the name of the array."""
  files = [f for f in (folder(run_dir, step) / "arrays" / array / "c").rglob("*") if f.is_file()]
  file = max(files, key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  return array


# ---- train with something seen or injected


def _watch_loop(compiled: Any, seen: dict[str, Any]) -> Any:
  """Sees, when each step is dispatched, whether the metrics of the two before it are there; and what is imported."""
  import jax

  metrics = []

  def dispatch(state: Any, batch: Any) -> Any:
    seen.setdefault("modules", sorted(sys.modules))
    seen.setdefault("ready", []).append([all(x.is_ready() for x in jax.tree.leaves(m)) for m in metrics[-2:]])
    state, new = compiled(state, batch)
    metrics.append(new)
    return state, new

  return dispatch


def _inject_nan(compiled: Any, seen: dict[str, Any]) -> Any:
  """Step 5 sees a parameter that is not a number, as from a bad chip; before and after it the parameters are good."""
  import jax
  import jax.numpy as jnp

  def dispatch(state: Any, batch: Any) -> Any:
    if int(state["step"]) != 4:
      return compiled(state, batch)
    before = jax.tree.map(jnp.copy, state)
    state["params"]["final_norm"]["scale"] *= jnp.nan
    new, metrics = compiled(state, batch)
    seen["loss"] = float(metrics["loss"])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(new)]
    pairs = zip(paths, jax.tree.leaves(before), jax.tree.leaves(new))
    seen["changed"] = [path for path, old, now in pairs if not jnp.array_equal(old, now)]
    return {**new, "params": before["params"]}, metrics

  return dispatch


WATCHERS = {"loop": _watch_loop, "nan": _inject_nan}  # (compiled step, what is seen) -> what the loop calls instead


def main(what: str, file: str, arguments: list[str]) -> int:
  from maxscale import train as command

  seen: dict[str, Any] = {}
  if what in WATCHERS:
    compile_ = command.Run._compile

    def compile_and_watch(self: Any, *shape: int) -> Any:
      compiled, executed = compile_(self, *shape)
      return WATCHERS[what](compiled, seen), executed

    command.Run._compile = compile_and_watch
  code = command.main(arguments)
  seen.setdefault("modules", sorted(sys.modules))  # "imports": those of the whole run
  pathlib.Path(file).write_text(json.dumps(seen))
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
