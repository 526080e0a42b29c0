"""From a config to a program on this machine's devices: the checks, the vocabulary, the mesh and the rules."""

from __future__ import annotations

from typing import Any

from maxscale import config as config_lib
from maxscale.config import Config, ConfigError


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


def build(config: Config, vocab_size: int, sampling: bool = False) -> Any:
  """The program of a config on this machine's devices, checked; nothing is compiled.

  A program for sampling has no batch to be split, and takes the most devices that its arrays can be split over.

  Raises:
    ConfigError: a table of the model is wrong, there are too few devices, or arrays that the rules cannot place.
  """
  from maxscale import environment
  from maxscale.models import quantise, remat, rope
  from maxscale.sharding import mesh, rules
  from maxscale.step import Program

  rope.check(config.model.rope_scaling)
  quantise.check(config.model.quantize)
  devices = environment.devices(config)
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
