"""Says what a config will do on chips that are not here: `python -m maxscale.plan --config F --topology v5p:8x8x8`.

The step that `train` runs is compiled by the TPU compiler, which works on any CPU (pip install 'maxscale[plan]'): HBM by
class, the predicted seconds of a step with an interval and where they go, collectives, and what to try next. Nothing runs
on a chip, and every time is a prediction.

  --config.group.option=value  as for train
  --json F, --html F           the same as data (perf/report.py says which), and as a page with charts
  --hlo DIR                    the scheduled program, and its trace; not with --search, nor are these two
  --search                     compile the best layouts, remat policies and microbatches instead (perf/search.py)
  --plan F                     write a plan: `train --plan F` runs it
  --docstrings [F ...]         write the prediction into the docstring of each config (all in configs/), and stop
  --calibration                how far predictions are from public step times, and stop

Exit codes: 0; 2 the config is wrong or does not fit, with what would make it fit; 1 the compiler failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maxscale import config as config_lib
from maxscale.config import Config, ConfigError
from maxscale.errors import UserError
from maxscale.sharding import chips

if TYPE_CHECKING:  # JAX is imported once the environment is ready for it
  from maxscale.perf.compiled.aot import Compiled
  from maxscale.perf.report import Report

PROGRAM = "python -m maxscale.plan"
GIB = 2.0**30
MARK = "Predicted ("  # how the block in the docstring of a config begins; it ends at an empty line


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--config", help="a file with get_config(), e.g. configs/llama3_8b.py")
  parser.add_argument("--topology", help="chips of a slice, as v5p:8x8x8; default: the config's mesh.topology")
  parser.add_argument("--slices", type=int, help="slices of these; default: the config's mesh.slices, or 1")
  parser.add_argument("--json", metavar="F", help="also write the report as JSON")
  parser.add_argument("--html", metavar="F", help="also write it as a page with charts")
  parser.add_argument("--hlo", metavar="DIR", help="also write the scheduled program and its trace")
  parser.add_argument(
    "--search", action="store_true", help="look for the fastest layout, remat policy and microbatches"
  )
  parser.add_argument("--plan", metavar="F", help="also write a plan for train --plan F")
  parser.add_argument("--docstrings", nargs="*", metavar="F", help="write the prediction into configs' docstrings")
  parser.add_argument("--calibration", action="store_true", help="print how far predictions are from public step times")
  arguments, rest = parser.parse_known_args(argv)
  try:
    if arguments.calibration:
      from maxscale.perf import calibration

      print(calibration.report())
      return 0
    if arguments.docstrings is not None:
      for path in arguments.docstrings or sorted(glob.glob("configs/*.py")):
        document(path)
      return 0
    if not arguments.config:
      raise ConfigError("--config is missing: a file with get_config(), e.g. configs/llama3_8b.py")
    run(arguments, config_lib.split_overrides(rest))
    return 0
  except UserError as e:
    print(f"{PROGRAM}: {e}", file=sys.stderr)
    return e.exit_code
  except OSError as e:  # a file, or what a source or a library wants from a network
    print(f"{PROGRAM}: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
    return 1


def run(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
  """Prints and writes what the arguments ask for.

  Raises:
    UserError: the config is wrong or does not fit, or the compiler failed.
  """
  config = config_lib.load(arguments.config, overrides)
  topology, slices = arguments.topology or config.mesh.topology, config.mesh.slices or 1
  slices = slices if arguments.slices is None else arguments.slices
  if not topology:
    raise ConfigError(f"{arguments.config} says no mesh.topology, and a plan is for TPU chips: give some, as in "
                      "--topology v5p:4x4x4")  # fmt: skip
  if not arguments.search or topology.partition(":")[0] in chips.SHAPES:
    chips.check(topology)
  if slices < 1:
    raise ConfigError(f"--slices {slices}: give the number of slices, from 1 on")
  _outputs(arguments)
  config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=0, topology=topology))
  config = ready(config, topology, slices)
  if arguments.search:
    _search(config, arguments, dict(overrides), topology, slices)
    return
  compiled = compile_step(config, arguments.config, topology, slices)
  from maxscale.perf import page, report

  try:
    made = report.make(compiled)
  except ValueError as e:  # a loop of unknown trips, a chip that is in no table
    raise UserError(f"{arguments.config} compiles for {topology}, but what it takes is unknown: {e}") from e
  print(report.text(made), flush=True)
  if arguments.json:
    _write(arguments.json, json.dumps(made.to_json(), indent=2))
  if arguments.html:
    _write(arguments.html, page.html_page(made))
  if arguments.hlo:
    _hlo(compiled, arguments.hlo)
  if arguments.plan:
    _plan(made, arguments.config, dict(overrides)).save(arguments.plan)


def _outputs(arguments: argparse.Namespace) -> None:
  """Refuses what cannot be written before minutes of compiling, and makes the folders of what can.

  Raises:
    ConfigError: a search is asked for the report of one layout, or a path is a folder that should be a file, or below a
      file.
  """
  report = [f"--{name}" for name in ("json", "html", "hlo") if getattr(arguments, name)]
  if arguments.search and report:
    raise ConfigError(f"{' and '.join(report)} go with a plan of one layout, not with --search: search first, and give the "
                      "options that it finds in a second call")  # fmt: skip
  for name in ("json", "html", "plan", "hlo"):
    path = getattr(arguments, name)
    if not path:
      continue
    if name != "hlo" and os.path.isdir(path):
      raise ConfigError(f"--{name} {path}: this is a folder; name a file")
    try:
      os.makedirs(path if name == "hlo" else os.path.dirname(path) or ".", exist_ok=True)
    except OSError as e:
      raise ConfigError(f"--{name} {path}: its folder cannot be made: {e.strerror}") from e


def ready(config: Config, topology: str, slices: int) -> Config:
  """Sets the environment that JAX and libtpu read when they load, and checks what `assemble.build` checks.

  The config then has the size of its vocabulary.
  """
  from maxscale import assemble, environment

  environment.prepare_plan(config, topology, slices)
  assemble.check(config)
  from maxscale.models import quantise, rope
  from maxscale.perf import search

  rope.check(config.model.rope_scaling)
  quantise.check(config.model.quantize)
  return search.with_options(config, {"model.vocab_size": assemble.vocabulary(config)[1]})


def compile_step(config: Config, path: str, topology: str, slices: int) -> Compiled:
  """The compiled step.

  Raises:
    ConfigError: it does not fit; says by how much, and what would make it fit.
    UserError: the compiler failed; names the option that it fails with, if it is one.
  """
  import jax

  from maxscale.perf import compiler
  from maxscale.perf.compiled import aot, memory

  try:
    return aot.compile_step(config, topology, slices)
  except jax.errors.JaxRuntimeError as e:
    if oom := memory.out_of_memory(e):
      raise ConfigError(too_large(config, path, topology, slices, oom)) from e
    print(f"{PROGRAM}: the compiler failed; looking for an option that it fails with", file=sys.stderr, flush=True)
    flags = compiler.resolve(compiler.chip_of_topology(topology), compiler.features(config, slices), compiler.given(),
                             config.run.flags)  # fmt: skip
    name = compiler.culprit(config, topology, slices, flags)
    hint = f'without {name} it works: --config.run.flags.{name}=""' if name else "no single option was found to be why"
    raise UserError(f"the compiler failed on {path} for {topology}: {str(e).strip().splitlines()[0]}; {hint}") from e


def too_large(config: Config, path: str, topology: str, slices: int, oom: Any) -> str:
  """The message for a step that the compiler refused for its size."""
  from maxscale.perf import advice

  fits = advice.to_fit(config, topology, slices, oom.excess)
  lines = [f"{path} on {topology} {oom.text()}"]
  if fits:
    lines += [
      "what would make it fit, by the closed form and not compiled:",
      *(f"  {n}. {f}" for n, f in enumerate(fits, 1)),
    ]
  else:
    lines.append(
      "no change of one or two options was found that would make it fit; take more chips, or a smaller data.batch_size"
    )
  return "\n".join(lines)


def _search(
  config: Config, arguments: argparse.Namespace, overrides: dict[str, str], topology: str, slices: int
) -> None:
  from maxscale.perf import search

  say = lambda line: print(line, flush=True)  # noqa: E731
  found = search.run(config, arguments.config, topology, slices, overrides=overrides, say=say)
  print("\n".join(["", "seconds and HBM by the closed form, best first:", *found.lines]))
  p = found.plan.predicted
  print(f"\nthe plan, predicted ({p['by']}): {p['seconds']:.3f} s, {p['tokens_per_second_per_chip']:,.0f} tokens/s/chip, "
        f"{p['hbm'] / GIB:.1f} GiB of HBM")  # fmt: skip
  if arguments.plan:
    found.plan.save(arguments.plan)
    print(f"{arguments.plan} holds it: python -m maxscale.train --config {arguments.config} --plan {arguments.plan}")


def _plan(made: Report, path: str, overrides: Mapping[str, str]) -> Any:
  """The config as it is, as a plan; flags are those of the table, which every run has."""
  from maxscale.perf.plans import Plan

  p = made.predicted
  predicted = {"seconds": p.seconds, "low": p.low, "high": p.high, "hbm": made.peak, "classes": p.classes,
               "tokens_per_second_per_chip": p.tokens_per_second_per_chip, "by": "compiled"}  # fmt: skip
  return Plan(path, made.topology, made.slices, dict(overrides), predicted=predicted, versions=made.versions)


def _hlo(compiled: Compiled, folder: str) -> None:
  from maxscale.perf.compiled import predict, trace

  events = predict.events_of(compiled)
  _write(os.path.join(folder, "program.txt"), compiled.text)
  _write(os.path.join(folder, "trace.json"), json.dumps(trace.to_json(events)))


def _write(path: str, content: str) -> None:
  with open(path, "w", encoding="utf-8") as f:
    f.write(content + "\n")


# ---- docstrings of configs


def document(path: str) -> None:
  """Compiles a config for the chips that it is for, in a process of its own, and writes what it found into its docstring.

  A config that is for no chips is left alone.

  Raises:
    UserError: it does not compile.
  """
  if not config_lib.load(path).mesh.topology:
    return
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "maxscale.plan", "--config", path, "--json", f"{folder}/report.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise UserError(f"{path} could not be planned: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    with open(f"{folder}/report.json", encoding="utf-8") as f:
      found = json.load(f)
  with open(path, encoding="utf-8") as f:
    source = f.read()
  _write(path, with_prediction(source, found).rstrip("\n"))
  print(f"{path}: {prediction(found)}", flush=True)


def prediction(found: Mapping[str, Any]) -> str:
  """The block of a docstring, as one line, from a report as JSON."""
  p, versions = found["predicted"], found["versions"]
  slices = f"{found['slices']} x " if found["slices"] > 1 else ""
  return (f"{MARK}{slices}{found['topology']}, jax {versions['jax']}, libtpu {versions['libtpu']}): step "
          f"{p['seconds']:.2f} s (80% {p['low']:.2f} to {p['high']:.2f}), {p['tokens_per_second_per_chip']:,.0f} "
          f"tokens/s/chip, MFU {p['mfu']:.1%}, HBM {found['peak'] / GIB:.1f} of {found['capacity'] / GIB:.1f} GiB")  # fmt: skip


def with_prediction(source: str, found: Mapping[str, Any]) -> str:
  """The source of a config whose docstring has the block: in the place of an old one, else behind its second paragraph."""
  whole = re.match(r'"""(.*?)"""', source, re.DOTALL)
  if not whole:
    raise ConfigError("a config begins with a docstring that says what it is and for which chips")
  paragraphs = whole.group(1).rstrip().split("\n\n")
  ours = [p.strip().startswith(MARK) for p in paragraphs]
  place = ours.index(True) if True in ours else min(2, len(paragraphs))
  block = "\n".join(textwrap.wrap(prediction(found), 119, break_on_hyphens=False))
  paragraphs[place : place + sum(ours)] = [block]
  return '"""' + "\n\n".join(paragraphs) + '\n"""' + source[whole.end() :]


if __name__ == "__main__":
  sys.exit(main())
