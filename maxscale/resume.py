"""Where a run goes on: what a resume may change, the next attempt, and the state that it starts from."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from maxscale import config as config_lib
from maxscale.config import IDENTITY, SCHEDULE, Config, ConfigError


def check(config: Config) -> int | None:
  """Compares a config with the newest checkpoint of its run; touches no device.

  Returns:
    Steps done in that checkpoint, or None where there is none.

  Raises:
    ConfigError: an identity option, or the schedule of steps already done, differs.
  """
  old = _saved(config)
  if old is None:
    return None
  step, meta = old
  before = config_lib.from_json(meta["config"])
  changed = [d for d in config_lib.differences(before, config) if d[1] == IDENTITY]
  if changed:
    text = ", ".join(f"{path} is {old!r}, not {new!r}" for path, _, old, new in changed)
    raise ConfigError(
      f"{config.run_dir} holds another run: {text}. Give the run another --config.run.dir, or the option its old value"
    )
  if _history(before, step) != _history(config, step):
    raise ConfigError(
      f"the schedule of the {step} steps that {config.run_dir} has done differs from theirs: change data.* from step "
      f"{step} on, with a phase in data.phases"
    )
  return step


def _saved(config: Config) -> tuple[int, dict[str, Any]] | None:
  """(step, meta) of the newest checkpoint whose marker can be read."""
  from maxscale.checkpoint import commit

  for step in reversed(commit.steps(config.run_dir)):
    return step, commit.read_marker(config.run_dir, step)["meta"]
  return None


def _history(config: Config, step: int) -> list[config_lib.Phase]:
  """The phases that began before a step; an empty mixture is the sources that it stands for."""
  every = dict.fromkeys(config.data.sources, 1.0)
  return [
    dataclasses.replace(phase, mixture=phase.mixture or every)
    for phase in config_lib.phases(config.data)
    if phase.start < step
  ]


def attempt(config: Config) -> Any:
  """Begins an attempt: meets the other processes, if there are any, and opens the event log of this one.

  The log of process 0 comes first: it numbers the attempt, even where the others are never met.
  """
  from maxscale import distributed, environment
  from maxscale.goodput.events import EventLog

  index, count = environment.place()
  log = EventLog(config.run_dir, 0, count, config.hash) if index == 0 else None
  if log and count > 1:
    log.enter("device_init")
  distributed.join(lambda e: log.failed(e) if log else None)
  if distributed.index:
    distributed.ask("attempt", distributed.JOIN, "process 0")
  log = log or EventLog(config.run_dir, distributed.index, distributed.count, config.hash)
  if distributed.count > 1 and not distributed.index:
    distributed.tell("attempt", str(log.attempt))
  return log


def leaves(program: Any, prefix: str = "") -> tuple:
  """The arrays of a program's state as the checkpoint describes them; only those whose path begins with `prefix`."""
  from maxscale.checkpoint.layout import Leaf

  return tuple(
    Leaf(path, s.logical, s.shape, s.dtype, program.sharding(s), layer_dims=int(bool(s.rows)), rows=s.rows)
    for path, s in program.specs.items()
    if path.startswith(prefix)
  )


def restore_or_initialise(run: Any) -> tuple[Any, int]:
  """The state that an attempt starts from, and the steps that it has done. A restore never initialises first.

  Raises:
    ConfigError: the corpus of the steps already done changed.
    CheckpointError: there are checkpoints, and none of them is good.
  """
  import jax

  from maxscale import distributed
  from maxscale.checkpoint import commit
  from maxscale.checkpoint.restore import restore
  from maxscale.goodput.telemetry import line

  config, log, program = run.config, run.log, run.program
  # Where all checkpoints are damaged the run stops, it does not begin anew.
  if not commit.steps(config.run_dir) and not commit.damaged(config.run_dir):
    return _begin(run), 0
  with log.state("restore"):
    start = time.perf_counter()
    found = restore(config.run_dir, leaves(program))
    for bad in [] if distributed.index else found.rejected:  # all processes know of the same
      log.event("checkpoint_bad", step=bad.step, array=bad.array, reason=bad.reason)
      line(f"the checkpoint of step {bad.step} is damaged and was not used: {bad.array}: {bad.reason}")
    seconds = time.perf_counter() - start
    size = sum(x.nbytes for x in jax.tree.leaves(found.state))
    log.event("restore", step=found.step, seconds=seconds, bytes=size)
  line(f"restored and verified step {found.step} ({size / 2**20:.1f} MiB) in {seconds:.1f} s")
  _check_data(run, found)
  for path, kind, old, new in config_lib.differences(config_lib.from_json(found.meta.config), config):
    if kind == SCHEDULE:
      log.event("config", option=path, old=old, new=new)
      line(f"schedule: {path} was {old!r}, is now {new!r}")
  return found.state, found.step


def _check_source(source: str, config: Config) -> None:
  """Refuses parameters that are not those of the config's model, whatever their shapes.

  Raises:
    ConfigError: names run.init_from and what differs.
  """
  from maxscale.generate import read_config

  where = f"run.init_from={source}"
  try:
    old = read_config(source)
  except ConfigError as e:
    raise ConfigError(f"{where}: {e}") from e
  changed = [f"{path} is {was!r} there, {now!r} here" for path, kind, was, now in config_lib.differences(old, config)
             if kind == IDENTITY and path.startswith("model.")]  # fmt: skip
  if changed:
    raise ConfigError(f"{where} holds another model: {', '.join(changed)}; begin with its own config, --config "
                      f"{source}/config.json")  # fmt: skip
  if old.lora.rank:
    raise ConfigError(f"{where} holds adapters (lora.rank={old.lora.rank}) beside a base; python -m maxscale.convert puts "
                      "them into the weights: convert it to hf and back, and begin with that")  # fmt: skip


def parameters(
  run_dir: str, program: Any, step: int | None = None, wanted: Callable[[str], bool] = lambda path: True
) -> Any:
  """The parameters (`wanted` of a path) of the newest checkpoint that verifies, or of a step, whatever mesh wrote it."""
  from maxscale.checkpoint.restore import restore

  found = restore(run_dir, tuple(leaf for leaf in leaves(program, "params/") if wanted(leaf.path)), step)
  for bad in found.rejected:
    print(f"the checkpoint of step {bad.step} is damaged and was not used: {bad.array}: {bad.reason}", file=sys.stderr)
  return found


def _begin(run: Any) -> Any:
  """The state before the first step, from the parameters of another run's checkpoint where the config says so. What that
  does not have (adapters, whose base it holds) starts as in any run."""
  import jax

  from maxscale.goodput.telemetry import line
  from maxscale.models.module import ADAPTERS

  program, source, given = run.program, run.config.run.init_from, None
  if source:
    _check_source(source, run.config)
    with run.log.state("restore"):
      found = parameters(source, program, wanted=lambda path: not path.endswith(ADAPTERS))
      given = found.state["params"]
      line(f"parameters from step {found.step} of {source}")
  with run.log.state("init"):
    return jax.block_until_ready(program.initialise()(given))


def _check_data(run: Any, found: Any) -> None:
  before, now = json.loads(found.meta.data_fingerprint), run.batches.fingerprint
  for name in before.keys() & now.keys():
    if before[name] != now[name]:
      raise ConfigError(
        f"the source {name!r} changed since step {found.step}: it was {before[name]}, it is {now[name]}. Bring the "
        "old text back, or begin a new phase (data.phases) with the new text under another name"
      )
