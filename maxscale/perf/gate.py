"""Fails when the compiled step of a config got worse: `python -m maxscale.perf.gate [--all] [--update] [NAME ...]`.

Each case is compiled as `python -m maxscale.plan` does and compared with tests/perf/golden/NAME.json, which has figures
for each version of the compiler that they were taken with; with another one they are shown, and nothing fails. HBM, the
predicted step and bytes of collectives may not grow by more than `TOLERANCE`; a compile that takes twice as long is only
mentioned, since the machine may be busy. `--update` writes the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests/perf/golden"
TOLERANCE = {"peak": 0.02, "seconds": 0.02, "bytes": 0.01}
SLOW = 2.0  # times the compile seconds that are worth a line
GIB = 2.0**30
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """A config with some options, on a topology ("": its own)."""

  config: str
  topology: str = ""
  options: tuple[str, ...] = ()


_FEW = ("model.layers=2", "run.steps=1000", "optimizer.warmup_steps=100")  # short runs have no slow compile options
SHORT = {
  "short_dense": Case("llama3_8b", "v5p:2x2x2", (*_FEW, "data.batch_size=32")),
  "short_moe": Case("mixtral_8x7b", "v5p:2x2x2", (*_FEW, "data.batch_size=96", "mesh.expert=4")),
}
# The chips, sequences and lengths of steps that another framework has published, or that its programs were compiled for.
PEERS = {
  "llama3_8b_v6e": Case("llama3_8b", "v6e:16x16", ("data.batch_size=1024",)),
  "llama3_8b_tpu7x": Case("llama3_8b", "tpu7x:4x4x4", ("data.batch_size=512", "remat.policy=custom",
                          "remat.table={'attention': 'keep', 'gate': 'keep', 'up': 'keep'}")),
  "llama3_70b_v5p": Case("llama3_70b", "v5p:4x4x8", ("data.batch_size=512", "mesh.data=1", "sharding.microbatches=8")),
  "llama3_70b_tpu7x": Case("llama3_70b", "tpu7x:4x4x4", ("data.batch_size=256", "mesh.data=1", "mesh.context=1",
                           "sharding.microbatches=1", "remat.policy=custom",
                           "remat.table={'attention': 'keep', 'query': 'offload'}")),
  "deepseek_v3_8192": Case("deepseek_v3", "v5p:8x8x8", ("data.length=8192", "sharding.microbatches=2")),
}  # fmt: skip
WHOLE = {path.stem: Case(path.stem) for path in sorted((ROOT / "configs").glob("*.py")) if "tiny" not in path.stem}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m maxscale.perf.gate", description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "names", nargs="*", help=f"of {', '.join({**SHORT, **WHOLE, **PEERS})}; default: {', '.join(SHORT)}"
  )
  parser.add_argument(
    "--all", action="store_true", help="every config on the chips that it is for, and the peers' (minutes each)"
  )
  parser.add_argument("--update", action="store_true", help="the figures become the golden ones")
  arguments = parser.parse_args(argv)
  cases = {**SHORT, **WHOLE, **PEERS}
  if unknown := [name for name in arguments.names if name not in cases]:
    parser.error(f"no case {', '.join(unknown)}; cases: {', '.join(cases)}")
  worse = 0
  for name in arguments.names or (cases if arguments.all else SHORT):
    found = compiled(cases[name])
    if isinstance(found, str):
      print(f"{name}: WORSE: it does not compile: {found}", flush=True)
      worse += 1
      continue
    version, figures = found
    path = GOLDEN / f"{name}.json"
    golden = json.loads(path.read_text()) if path.exists() else {}
    problems, notes = compare(golden.get(version), figures, version, list(golden))
    print(f"{name}: {_line(figures)} ({version})", flush=True)
    for text in [*(f"WORSE: {p}" for p in problems), *notes]:
      print(f"  {text}", flush=True)
    if arguments.update:
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps({**golden, version: figures}, indent=2, sort_keys=True) + "\n")
    else:
      worse += bool(problems)
  return int(worse > 0)


def compiled(case: Case) -> tuple[str, Figures] | str:
  """(version, figures) of a case, compiled in a process of its own; why there are none."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "maxscale.plan", "--config", f"configs/{case.config}.py", "--json", f"{folder}/r"]
    command += ["--topology", case.topology] if case.topology else []
    done = subprocess.run(
      [*command, *(f"--config.{option}" for option in case.options)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
      return (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
    report = json.loads(pathlib.Path(folder, "r").read_text())
  return f"jax {report['versions']['jax']}, libtpu {report['versions']['libtpu']}", figures(report)


def figures(report: Mapping[str, Any]) -> Figures:
  """What is compared, of a report as JSON."""
  moved: dict[str, float] = {}
  for c in report["collectives"]:
    moved[f"{c['kind']} {c['over']}"] = c["bytes"]
  return {
    "peak": report["peak"], "hbm": report["hbm"], "seconds": report["predicted"]["seconds"],
    "parts": {p["part"]: p["seconds"] for p in report["predicted"]["parts"]}, "bytes": sum(moved.values()),
    "collectives": moved, "compile_seconds": report["compile_seconds"],
  }  # fmt: skip


def compare(golden: Figures | None, found: Figures, version: str, known: list[str]) -> tuple[list[str], list[str]]:
  """(what is worse, what else is worth a line).

  Args:
    golden: of the same version, if there are some.
    known: versions that there are golden figures of.
  """
  if golden is None:
    return [], [f"nothing to compare with for {version} (there is: {'; '.join(known) or 'nothing'})"]
  worse, notes = [], []
  for key, inside, what, unit, name in (
    ("peak", "hbm", "HBM", GIB, "GiB"), ("seconds", "parts", "the predicted step", 1.0, "s"),
    ("bytes", "collectives", "what collectives move", GIB, "GiB"),
  ):  # fmt: skip
    before, after = golden[key], found[key]
    change = (after - before) / before if before else float(after > 0)
    if abs(change) > TOLERANCE[key]:
      text = f"{what} {'grew' if change > 0 else 'shrank'} by {abs(change):.1%}, from {before / unit:.3f} to "
      text += f"{after / unit:.3f} {name}; most in {_most(golden[inside], found[inside], change, unit, name)}"
      worse.append(text) if change > 0 else notes.append(f"better: {text}; --update keeps it")
  if found["compile_seconds"] > SLOW * golden["compile_seconds"]:
    notes.append(f"the compile took {found['compile_seconds']:.0f} s, {golden['compile_seconds']:.0f} s before")
  return worse, notes


def _most(before: Mapping[str, float], after: Mapping[str, float], change: float, unit: float, name: str) -> str:
  """The class or part that changed most in the direction of the whole."""
  changes = {key: after.get(key, 0) - before.get(key, 0) for key in {**before, **after}}
  key = max(changes, key=lambda k: changes[k] * (1 if change > 0 else -1))
  return f"{key} ({changes[key] / unit:+.3f} {name})"


def _line(found: Figures) -> str:
  return (f"HBM {found['peak'] / GIB:.3f} GiB, predicted step {found['seconds']:.4f} s, collectives "
          f"{found['bytes'] / GIB:.3f} GiB, compiled in {found['compile_seconds']:.0f} s")  # fmt: skip


if __name__ == "__main__":
  sys.exit(main())
