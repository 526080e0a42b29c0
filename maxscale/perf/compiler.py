"""Options of the compilers as data (chip and feature -> options), what a run gets of them, and which one breaks a compile.

The table has what was seen to help, so that a plain run is a tuned run; `train` and `plan` resolve it alike. Options are
of two places: most go with each compile, never into the environment; those of the SparseCores libtpu takes from
LIBTPU_INIT_ARGS alone, before it loads, and ends the process at one that it does not know: they are tried in another
process first (`probe`), once for each version of libtpu. What the user's LIBTPU_INIT_ARGS, XLA_FLAGS or
JAX_OPTIMIZATION_LEVEL says wins over the config's `run.flags`, and these win over the table. An option that is left out
of what was asked for is one line.

Nothing here imports JAX at the top. `python -m maxscale.perf.compiler` is the process that tries: it reads a job as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from maxscale import config as config_lib
from maxscale import distributed, environment, storage
from maxscale.config import Config
from maxscale.perf.hardware import CHIPS, chip_of


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of a compiler.

  Attributes:
    chips: names in the hardware table, of those that accept it and gain from it.
    features: those of a program (`features`) that it takes, all of them.
    where: "compile": it goes with each compile; "init": libtpu takes it when it loads.
    source: where it was seen, or who says so.
    conflicts: options that cannot be on beside it: where the user has one of them on, this one is left out.
  """

  name: str
  value: str
  chips: tuple[str, ...]
  features: tuple[str, ...]
  where: str
  reason: str
  source: str
  conflicts: tuple[str, ...] = ()


_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_FUSE = "xla_tpu_enable_async_collective_fusion_fuse_"
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_V5E, _V5P, _V6E, _7X = ("TPU v5e",), ("TPU v5p",), ("TPU v6e",), ("TPU7x",)
_SPARSECORE = _V5P + _V6E + _7X  # v5e has none
_GPUS = ("H100", "H200", "B200", "GB200", "GB300")
_SEEN = "schedules of FSDP steps on v5p:2x2x2, v5p:4x4x4, v6e:4x4 and v6e:16x16, libtpu 0.0.42"
_MODE = "MaxText and AXLearn set it wherever SparseCores take collectives; schedules do not show it"
# Without the options of gathers and scatters both become synchronous all-reduces, or gathers stay synchronous, on v5p and
# v6e; on TPU7x they are asynchronous by default.
OPTIONS = (
  Option(f"{_OFFLOAD}all_gather", "true", _SPARSECORE, (), "compile",
         "gathers of parameters run on the SparseCores, beside the matmuls", _SEEN, (f"{_FUSE}all_gather",)),
  Option(f"{_OFFLOAD}2d_all_gather", "true", _SPARSECORE, (), "compile",
         "the same where an axis spans a plane of the torus", _SEEN, (f"{_FUSE}all_gather",)),
  Option(f"{_OFFLOAD}3d_all_gather", "true", _V5P + _7X, (), "compile",
         "the same where it spans three dimensions: without it all gathers of v5p:2x2x2 are synchronous", _SEEN,
         (f"{_FUSE}all_gather",)),
  Option(f"{_OFFLOAD}reduce_scatter", "true", _SPARSECORE, (), "compile",
         "scatters of gradients run on the SparseCores", _SEEN, (f"{_FUSE}reduce_scatter",)),
  Option(f"{_OFFLOAD}nd_reduce_scatter", "true", _SPARSECORE, (), "compile",
         "a scatter stays one: not an all-reduce of the whole that is cut afterwards", _SEEN,
         (f"{_FUSE}reduce_scatter",)),
  Option("xla_tpu_prefer_async_allgather_to_allreduce", "true", _SPARSECORE, (), "compile",
         "a gather stays one: not an all-reduce of zeros", _SEEN),
  Option("xla_tpu_use_tc_device_shape_on_sc", "true", _SPARSECORE, (), "compile",
         "how SparseCores run collectives: a public note reports 15% less throughput without these four on 256 v5p", _MODE),
  Option("xla_sc_disable_megacore_partitioning", "true", _SPARSECORE, (), "init", "as above", _MODE),
  Option("xla_sc_enable_instruction_fusion", "false", _SPARSECORE, (), "init", "as above", _MODE),
  Option("xla_sc_disjoint_spmem", "false", _SPARSECORE, (), "init", "as above", _MODE),
  # More of VMEM for one fusion: larger tiles. The search for them makes a compile three times as long.
  Option(_VMEM, "65536", _V5P, ("tuned", "dense"), "compile",
         "matmuls take a fifth less: 111 instead of 137 M cycles in a dense step of two layers",
         "schedule for v5p:2x2x2, libtpu 0.0.42"),
  Option(_VMEM, "98304", _V6E, ("tuned", "dense"), "compile",
         "matmuls take a quarter less: 67 instead of 92 M cycles in a dense step of two layers",
         "MaxText's recipes for v6e, dense models; schedule for v6e:4x4, libtpu 0.0.42"),
  Option(_VMEM, "65536", _7X, ("tuned", "dense"), "compile",
         "matmuls take a sixth less: 70 instead of 83 M cycles in a dense step of two layers; a core has 64 MiB",
         "public recipes for TPU7x; schedule for tpu7x:2x2x1, libtpu 0.0.42"),
  # A kernel that XLA lets write into a stack of layers is a fusion to it, and only has what a fusion has.
  Option(_VMEM, "40960", _V5P + _7X, ("moe",), "compile", "the experts' kernels need it (models/grouped.py)",
         "compiles for v5p:4x4x4 with the default of 16 MiB fail by 2.75 MiB, libtpu 0.0.42"),
  Option(_VMEM, "81920", _V5E + _V6E, ("moe",), "compile", "the same", "MaxText's recipes for v6e, models with experts"),
  Option("optimization_level", "19", _GPUS, (), "compile",  # O1 (jax._src.config.EffortLevel)
         "the latency-hiding scheduler with the speed-of-light model, pipelined collectives, unrolled loops",
         "XLA's documentation of GPU optimisation levels; not tried here"),
)  # fmt: skip

TUNED_STEPS = 2000  # a run of as many steps gains more than the minutes that a tuned compile takes
# PCI ids as jax._src.hardware_utils has them.
_PCI_VENDOR, _PCI = "0x1ae0", {"0x005e": "TPU v4", "0x0062": "TPU v5p", "0x0063": "TPU v5e", "0x006f": "TPU v6e",
                               "0x0076": "TPU7x"}  # fmt: skip
_PROBED_ON = {"TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}
ADDED = "MAXSCALE_LIBTPU_FLAGS"  # the end of LIBTPU_INIT_ARGS that is from here, for this process and its children
# What libtpu says of a flag and XLA of an option, unknown or with a wrong value.
_REFUSED = re.compile(
  r"(?:Unknown command line flag|specified for flag|No such compile option:|into flag|setting option) '?(\w+)"
)


@dataclasses.dataclass(frozen=True)
class Flags:
  """What a program gets: options of each compile, those of libtpu's start, and a line for each that was left out."""

  compile: dict[str, str]
  init: dict[str, str]
  dropped: list[str]


# ---- what a program gets


def features(config: Config, slices: int = 1) -> frozenset[str]:
  """What is special about a config's program, as the table names it."""
  mesh, dcn = config.mesh, config.mesh.dcn
  split = {axis for axis in ("pipeline", "context", "tensor", "expert")
           if getattr(mesh, axis) != 1 or getattr(dcn, axis) != 1}  # fmt: skip
  has = {
    "dense": not config.model.experts,
    "moe": bool(config.model.experts),
    "slices": max(slices, mesh.slices) > 1,
    "offload": config.optimizer.offload or "offload" in config.remat.table.values(),
    "tuned": config.run.steps >= TUNED_STEPS,
  }
  return frozenset(split | {name for name, true in has.items() if true})


def resolve(
  chip: str | None,
  has: Collection[str],
  given: Mapping[str, str] | None = None,
  flags: Mapping[str, str] | None = None,
) -> Flags:
  """The options of a program with the features `has` on a chip of the hardware table.

  Args:
    given: what the user's environment says: it stays there, and nothing else is said of the same names.
    flags: the config's `run.flags`.
  """
  given, flags, dropped = dict(given or {}), {name: str(value) for name, value in (flags or {}).items()}, []
  table = {o.name: o for o in OPTIONS if chip in o.chips and set(o.features) <= set(has)}
  values = {name: o.value for name, o in table.items()} | flags
  for name, value in list(values.items()):
    if name in given:
      del values[name]
      if value != given[name] and value:
        dropped.append(f"{name}={value} is left out: the environment has {given[name]}")
    elif not value:
      del values[name]
  for name in [name for name in values if name in table and name not in flags]:
    on = given | values
    clash = next((c for c in table[name].conflicts if on.get(c, "false").lower() not in ("false", "0")), None)
    if clash:
      dropped.append(f"{name}={values.pop(name)} is left out: {clash}={on[clash]} and it cannot both be")
  places = {o.name: o.where for o in OPTIONS}
  init = {n for n in values if places.get(n, "init" if n.startswith("xla_sc_") else "compile") == "init"}
  return Flags({n: v for n, v in values.items() if n not in init}, {n: values[n] for n in values if n in init}, dropped)


def own_arguments() -> str:
  """The user's LIBTPU_INIT_ARGS, without what `before_jax` put behind it."""
  return os.environ.get("LIBTPU_INIT_ARGS", "").removesuffix(os.environ.get(ADDED, "")).strip()


def given() -> dict[str, str]:
  """The options that the user's environment has."""
  return _parsed(own_arguments())


def in_force() -> dict[str, str]:
  """The options that the environment has, those of `before_jax` among them."""
  return _parsed(os.environ.get("LIBTPU_INIT_ARGS", ""))


def _parsed(arguments: str) -> dict[str, str]:
  out = {}
  for token in f"{os.environ.get('XLA_FLAGS', '')} {arguments}".split():
    name, _, value = token.lstrip("-").partition("=")
    out[name] = value or "true"
  level = os.environ.get("JAX_OPTIMIZATION_LEVEL")
  return out | ({"optimization_level": level} if level else {})


def options(device_kind: str, config: Config | None = None, slices: int = 1) -> dict[str, str]:
  """The options of a compile for a device kind; without a config those that every program on it gets."""
  chip = chip_of(device_kind)
  name, has = chip.name if chip else None, features(config, slices) if config else ()
  return resolve(name, has, given(), config.run.flags if config else {}).compile


def chip_of_topology(topology: str) -> str | None:
  """The chip, as the hardware table names it, of a topology or accelerator type: v5p:8x8x8, v5litepod-16, h100:64."""
  kind = re.split(r"[:-]", topology.lower())[0].replace("v5litepod", "v5e")
  return next((chip.name for chip in CHIPS if kind == chip.name.lower().removeprefix("tpu ")), None)


def local_chip(pci: str = "/sys/bus/pci/devices") -> str | None:
  """The TPU that this machine has, found without JAX; None: there is none, or it is unknown."""
  if chip := chip_of_topology(os.environ.get("TPU_ACCELERATOR_TYPE", "")):
    return chip
  vendors = [file for file in pathlib.Path(pci).glob("*/vendor") if file.read_text().strip() == _PCI_VENDOR]
  kinds = [_PCI.get((file.parent / "device").read_text().strip()) for file in vendors]
  return next(filter(None, kinds), None)


def before_jax(config: Config, chip: str | None, slices: int = 1) -> None:
  """Puts into LIBTPU_INIT_ARGS, behind what the user has there, the flags of a config that libtpu takes when it loads."""
  flags = resolve(chip, features(config, slices), given(), config.run.flags)
  for text in flags.dropped:
    say(text)
  init = probe(chip, flags.init, config.run.compile_cache) if chip in _PROBED_ON and flags.init else {}
  if init or ADDED in os.environ:  # a parent's are for its config
    own, added = own_arguments(), " ".join(_tokens(init))
    os.environ.update({"LIBTPU_INIT_ARGS": f"{own} {added}".strip(), ADDED: added})


@functools.cache  # once, however many programs there are
def say(text: str) -> None:
  """A line on stderr, of process 0."""
  if max(environment.place()[0], distributed.index) <= 0:
    print(text, file=sys.stderr, flush=True)


# ---- compiling with them


def compile(lowered: Any, options: Mapping[str, str]) -> Any:
  """Compiles a `jax.stages.Lowered`. Options that this compiler refuses by name are left out, a line each."""
  import jax

  options = dict(options)
  while True:
    try:
      return lowered.compile(compiler_options=_typed(options))
    except jax.errors.JaxRuntimeError as e:
      names = [name for name in _REFUSED.findall(str(e)) if name in options]
      if not names:
        raise
      for name in names:
        say(f"{name}={options.pop(name)} is left out: {str(e).splitlines()[0]}")


def _typed(options: Mapping[str, str]) -> dict[str, Any]:
  """XLA's own options (those of GPUs) want true booleans and numbers; libtpu's take either."""
  known = {"true": True, "false": False}
  return {n: int(v) if v.isdecimal() else known.get(v.lower(), v) for n, v in options.items()}


def _tokens(flags: Mapping[str, str]) -> list[str]:
  return [f"--{name}={value}" for name, value in flags.items()]


# ---- trying them in another process


def attempt(job: Mapping[str, Any], init: Mapping[str, str] | None = None, seconds: float = 600.0) -> str:
  """Compiles in a process of its own; "" if that worked, else the end of what it wrote on stderr.

  Args:
    job: "topology"; "compile": options; and the "config" as JSON whose step it is, with "slices". Without a config it is
      a product of two small matrices.
    init: flags for LIBTPU_INIT_ARGS, beside the user's own.
    seconds: that it may take.
  """
  arguments = " ".join([own_arguments(), *_tokens(init or {})]).strip()
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": arguments}
  try:
    done = subprocess.run([sys.executable, "-m", "maxscale.perf.compiler"], input=json.dumps(job), env=variables,
                          capture_output=True, text=True, timeout=seconds)  # fmt: skip
  except subprocess.TimeoutExpired:
    return f"not compiled within {seconds:.0f} s"
  return (done.stderr.strip()[-5000:] or f"exit {done.returncode}") if done.returncode else ""


def probe(chip: str, flags: Mapping[str, str], folder: str) -> dict[str, str]:
  """Those of libtpu's flags that the installed version accepts; a line for each of the others.

  What was found is kept in `folder` (no file: ""), for this version and chip. Without libtpu there are none.
  """
  try:
    version = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return {}
  path = f"{folder}/libtpu-{version}-{chip.replace(' ', '-')}.json" if folder else ""
  refused, known, job = {}, _read(path), {"topology": _PROBED_ON[chip]}
  while unknown := [token for token in _tokens(_without(flags, refused)) if token not in known]:
    trial = _without(flags, refused)
    if not (error := attempt(job, trial)):
      known |= dict.fromkeys(unknown, "")
    elif names := [name for name in _REFUSED.findall(error) if name in trial]:
      refused |= dict.fromkeys(names, "libtpu does not know it, or its value")
    elif name := bisect(trial, lambda some: not attempt(job, some)):
      refused[name] = "no program compiles with it"
    else:  # it is not the flags: nothing is learnt
      say(f"flags of libtpu cannot be tried, none is set: {error.splitlines()[-1]}")
      return {}
    known |= {token: refused[name] for name in refused for token in _tokens({name: flags[name]})}
    if path:
      storage.write_sealed(path, known)
  accepted = {name: value for name, value in flags.items() if not known[f"--{name}={value}"]}
  for name in flags.keys() - accepted.keys():
    say(f"{name}={flags[name]} is left out: {known[f'--{name}={flags[name]}']} (libtpu {version})")
  return accepted


def _without(flags: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
  return {name: value for name, value in flags.items() if name not in names}


def _read(path: str) -> dict[str, str]:
  try:
    return storage.read_sealed(path) if path else {}
  except (FileNotFoundError, ValueError):  # none, or torn by a process that was stopped: it is made again
    return {}


def bisect(
  options: Mapping[str, str], works: Callable[[dict[str, str]], bool], limit: int = 32, seconds: float = 900.0
) -> str | None:
  """The option without which a compile that fails works; None if there is no single one, or no time to find it.

  Args:
    options: with all of which it fails.
    works: whether it works with some of them; in a process of its own, as a compiler may crash.
    limit: options that are left out, one after the other.
    seconds: after which no compile is started.
  """
  end = time.monotonic() + seconds
  if not options or not works({}):
    return None  # it is not the options
  for name in list(options)[:limit]:
    if time.monotonic() > end:
      return None
    if works(_without(options, [name])):
      return name
  return None


def culprit(config: Config, topology: str, slices: int, flags: Flags, seconds: float = 900.0) -> str | None:
  """The option that the compile of a config's step for a topology fails with, by `bisect`, in so many seconds."""
  job = {"config": config_lib.to_json(config), "topology": topology, "slices": slices}
  end = time.monotonic() + seconds

  def works(some: dict[str, str]) -> bool:
    init = {name: value for name, value in some.items() if name in flags.init}
    return not attempt({**job, "compile": _without(some, init)}, init, max(1.0, end - time.monotonic()))

  return bisect(flags.compile | flags.init, works, seconds=seconds)


def main() -> None:
  job = json.load(sys.stdin)
  import jax

  from maxscale.sharding import chips

  if job.get("config"):
    from maxscale.perf.compiled import aot

    config = config_lib.from_json(job["config"])
    step, _ = aot.program_for(config, job["topology"], job["slices"])
    lowered = step.trace(config.data.batch_size, config.data.length).lower()
  else:
    place = jax.sharding.SingleDeviceSharding(chips.devices(job["topology"])[0])
    lowered = jax.jit(jax.numpy.dot).lower(*[jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=place)] * 2)
  lowered.compile(compiler_options=_typed(job.get("compile", {})))


if __name__ == "__main__":
  main()
