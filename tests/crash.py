"""Kills small runs at random moments and demands that each ends as an undisturbed one does, bit for bit:
`python -m tests.crash --times 10`. Exit code 0 only if all do, and a kill hit a run that was at work."""

import argparse
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from tests import runs

STEPS = 15
OPTIONS = {"run.simulated_devices": 1, "mesh.fsdp": 1, "run.steps": STEPS, "checkpoint.every": 3}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--times", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  rng, equal, hits = random.Random(args.seed), 0, 0
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    reference = root / "reference" / "run"
    runs.train(reference, OPTIONS)  # fills the compile cache
    start = time.monotonic()
    runs.train(root / "timed" / "run", OPTIONS)
    seconds = time.monotonic() - start
    print(f"an undisturbed run of {STEPS} steps takes {seconds:.1f} s")
    equal_before = same(root / "timed" / "run", reference)
    for i in range(1, args.times + 1):
      # A random moment of the i-th part of the run: together they are uniform, and all of its life is hit.
      run_dir, after = root / str(i) / "run", seconds * rng.uniform(i - 1, i) / args.times
      hit = kill(run_dir, after)
      output = runs.train(run_dir, OPTIONS)
      where, ok = describe(run_dir, hit), same(run_dir, reference)
      went_on = re.search("restored and verified step [0-9]+|is complete", output)
      went_on = went_on.group() if went_on else "started anew"
      equal, hits = equal + ok, hits + (hit > 0)
      print(
        f"{i}: killed after {after:.2f} s {where}; {went_on}; {'the same end' if ok else 'ANOTHER END'}", flush=True
      )
  print(f"{equal} of {args.times} runs ended in the state of the undisturbed one; {hits} kills hit a running process")
  return 0 if equal_before and equal == args.times and hits else 1


def kill(run_dir: pathlib.Path, after: float) -> int:
  """Starts a run and kills it after so many seconds; its process id, or 0 if it had ended by then."""
  with runs.start(run_dir, OPTIONS) as process:
    try:
      process.popen.wait(after)
      return 0
    except subprocess.TimeoutExpired:
      process.signal(signal.SIGKILL)
      assert process.popen.wait() == -signal.SIGKILL, process.output
      return process.popen.pid


def same(run_dir: pathlib.Path, reference: pathlib.Path) -> bool:
  """Whether the last state and every loss are equal."""
  losses = runs.losses(run_dir)
  return len(losses) == STEPS and losses == runs.losses(reference) and (
    runs.fingerprint(run_dir, STEPS) == runs.fingerprint(reference, STEPS)
  )  # fmt: skip


def describe(run_dir: pathlib.Path, pid: int) -> str:
  """What a killed process was at, as its event log says, which the next start of the run has recovered."""
  if not pid:
    return "(it had ended)"
  jobs = [e for e in runs.events(run_dir, "job") if e["pid"] == pid]
  if not jobs:
    return "before its event log"
  lines = runs.events(run_dir, attempt=jobs[0]["attempt"])
  states = [e["class"] for e in lines if e["kind"] == "state"] or ["start"]
  steps = [e["step"] for e in lines if e["kind"] == "step"]
  saves, commits = ({e["step"] for e in lines if e["kind"] == kind} for kind in ("save", "commit"))
  open_ = f", with step {max(saves - commits)} saved but not committed" if saves - commits else ""
  return f"in class {states[-1]}" + (f" after step {steps[-1]}" if steps else "") + open_


if __name__ == "__main__":
  sys.exit(main())
