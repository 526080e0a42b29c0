"""Compiles the train step of a config, the one that `train` runs, for chips that are not here."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax

from maxscale.config import Config
from maxscale.perf.compiled import program
from maxscale.sharding import chips, mesh, rules
from maxscale.step import Program


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A train step for a topology.

  Attributes:
    topology, slices: what it is for, as v5p:8x8x8.
    step: its arrays and rules; `step.config` says batch and length.
    shape: of the mesh.
    traced: as JAX traced it.
    executable: as the TPU compiler made it; it cannot be run here.
    seconds: that tracing, lowering and compiling took.
  """

  topology: str
  slices: int
  step: Program
  shape: mesh.MeshShape
  traced: jax.stages.Traced
  executable: jax.stages.Compiled
  seconds: float

  @functools.cached_property
  def text(self) -> str:
    """The scheduled program."""
    return self.executable.as_text() or ""

  @functools.cached_property
  def program(self) -> program.Program:
    return program.read(self.text)


def program_for(config: Config, topology: str, slices: int = 1) -> tuple[Program, mesh.MeshShape]:
  """The programs of a config on the mesh that it gets on a topology.

  Raises:
    ConfigError: the topology is unknown, or the config does not fit its devices' number.
  """
  shape, devices = mesh.for_config(config, chips.devices(topology, slices))
  step = Program(config, config.model.vocab_size, devices, rules.make(config.sharding, shape.sizes, shape.slices))
  step.check(config.data.batch_size, config.data.length)
  return step, shape


def compile_step(config: Config, topology: str, slices: int = 1) -> Compiled:
  """Traces and compiles the step of a config for a topology. The process runs on the CPU (`environment.prepare_plan`)."""
  start = time.perf_counter()
  step, shape = program_for(config, topology, slices)
  traced = step.trace(config.data.batch_size, config.data.length)
  executable = step.compile(traced)
  return Compiled(topology, slices, step, shape, traced, executable, time.perf_counter() - start)
