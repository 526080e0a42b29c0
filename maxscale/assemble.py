"""From a config to a program on this machine's devices: the checks, the vocabulary, the mesh and the rules."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np

from maxscale import config as config_lib
from maxscale.config import Config, ConfigError
from maxscale.perf import compiler, plans
from maxscale.perf.hardware import chip_of
from maxscale.perf.plans import Plan


def check(config: Config) -> None:
  """The checks that belong to a library of their own and need no device.

  Raises:
    UserError: a source, the remat table or the model's family is wrong.
  """
  from maxscale.data.sources import check_spec
  from maxscale.models import families, remat

  remat.table(config.remat)
  if config.model.family:
    families.get(config.model.family)
  for name, spec in config.data.sources.items():
    check_spec(name, spec)


def plan(path: str, config: str, small: bool = False) -> Plan:
  """The plan of a file, for a config's file.

  Raises:
    ConfigError: it is no plan, or one for another config.
  """
  out = plans.load(path)
  if pathlib.Path(out.config).stem != pathlib.Path(config).stem:
    raise ConfigError(f"{path} is a plan for {out.config}, not for {config}; plan the config that is to run")
  if small:
    raise ConfigError(f"{path} is a plan for {out.slices} x {out.topology}, and --small runs on simulated devices; leave "
                      "one of them out")  # fmt: skip
  return out


def planned(plan: Plan | None) -> list[tuple[str, str]]:
  """What a plan changes of its config, as overrides: its flags are `run.flags`."""
  if plan is None:
    return []
  flags = plan.flags["compile"] | plan.flags["init"]
  return plan.overrides() + [(f"run.flags.{name}", repr(value)) for name, value in flags.items()]


def check_devices(plan: Plan, devices: list[Any]) -> None:
  """Refuses devices that a plan is not for.

  Raises:
    ConfigError: says what it is for, and what there is.
  """
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  chip, dims = chip_of(devices[0].device_kind), [int(n) for n in plan.topology.partition(":")[2].split("x")]
  chips = len(devices) // slices // (chip.devices if chip else 1)
  if devices[0].platform == "tpu":
    there = sorted(n for n in np.ptp([d.coords for d in devices], axis=0).tolist() if n)
    fits = (slices, there) == (plan.slices, sorted(n - 1 for n in dims if n > 1))
  else:
    fits = chips * slices == math.prod(dims) * plan.slices
  if not (fits and chip and chip.name == compiler.chip_of_topology(plan.topology)):
    raise ConfigError(
      f"the plan is for {plan.slices} x {plan.topology}, and there are {slices} x {chips} chips "
      f"({devices[0].device_kind}); make one for them with python -m maxscale.plan"
    )


def build(config: Config, vocab_size: int, sampling: bool = False, plan: Plan | None = None) -> Any:
  """The program of a config on this machine's devices, checked; nothing is compiled.

  A program for sampling has no batch to be split, and takes the most devices that its arrays can be split over.

  Args:
    plan: that the config was planned with, if it was.

  Raises:
    ConfigError: the plan is for other devices, a table of the model is wrong, there are too few devices, or arrays that
      the rules cannot place.
  """
  from maxscale import environment
  from maxscale.models import quantise, remat, rope
  from maxscale.sharding import mesh, rules
  from maxscale.step import Program

  rope.check(config.model.rope_scaling)
  quantise.check(config.model.quantize)
  devices = environment.devices(config)
  if plan:
    check_devices(plan, devices)
  actions = remat.table(config.remat)
  if devices[0].platform == "cpu":
    if actions and "offload" in actions.values():
      raise ConfigError("remat.table offloads to host memory, which a CPU does not have apart; use keep or recompute")
    if config.optimizer.offload:
      raise ConfigError("optimizer.offload=True: a CPU has no host memory apart; set it to False")
  if sampling:
    devices = devices[: max(n for n in range(1, len(devices) + 1) if config.model.embed % n == 0)]
  try:
    shape, device_mesh = mesh.for_config(config, devices)
  except ConfigError as e:
    small = "" if config.run.simulated_devices else "; to try the config small on this machine, add --small"
    raise ConfigError(f"{e}{small}") from None
  program = Program(config, vocab_size, device_mesh, rules.make(config.sharding, shape.sizes, shape.slices))
  for batch, length in [] if sampling else batch_shapes(config):
    program.check(batch, length)
  return program


def batch_shapes(config: Config) -> list[tuple[int, int]]:
  """(B, T) of each phase, without repeats."""
  return list(dict.fromkeys((p.batch_size, p.length) for p in config_lib.phases(config.data)))


def vocabulary(config: Config) -> tuple[Any, int]:
  """The tokenizer, and the vocabulary of the model."""
  from maxscale.data.tokenizers import load_tokenizer

  tokenizer = load_tokenizer(config.data.tokenizer)
  return tokenizer, config.model.vocab_size or tokenizer.vocab_size


def audit(config: Config) -> str:
  """What the rules imply: each array's sharding and bytes, each mesh axis's place, a step's collectives, the schedule."""
  from maxscale.perf import traffic
  from maxscale.sharding import audit as arrays
  from maxscale.sharding import pipeline, topology

  program = build(config, vocabulary(config)[1])
  moved = traffic.by_slices(traffic.transfers(program.trace(*batch_shapes(config)[0])), program.rules)
  parts = [arrays.table(program.infos(), program.rules), topology.table(program.mesh), traffic.table(moved)]
  if program.schedule.stages > 1:
    parts.append(pipeline.picture(program.schedule))
  return "\n\n".join(parts)
