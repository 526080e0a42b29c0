"""Searches the layouts, remat policies, microbatches and flags of a config on a topology for the shortest step.

The closed form (perf/closed/analytic.py) ranks thousands of legal candidates; the few best are compiled, each in a process of
its own (libtpu reads flags once, and a compile that fails may take its process along), and the shortest prediction of
those that fit becomes a plan. The global batch, and what is computed, stay as they are.

`python -m maxscale.perf.search` is that process: it reads a job as JSON and prints what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from maxscale import config as config_lib
from maxscale.config import MESH_AXES, Config, ConfigError
from maxscale.models import remat
from maxscale.perf import compiler
from maxscale.perf.closed import analytic
from maxscale.perf.closed.work import Work
from maxscale.perf.hardware import GIB, Chip
from maxscale.perf.plans import Plan
from maxscale.sharding import layouts
from maxscale.sharding.mesh import boxed_axis

Options = dict[str, Any]  # path -> value
Flags = dict[str, str]  # as run.flags
MOST = {"tensor": 32, "context": 64, "pipeline": 16}  # devices along an axis beyond which no config gains
SHORTEST = 1024  # places of a device: shorter parts of a sequence are not worth splitting it
MESHES = 48  # for which everything else is varied
FAMILIES = ("fsdp", "tensor", "expert", "context", "pipeline")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a config, and what the closed form says of it."""

  options: Options
  estimate: analytic.Estimate

  @functools.cached_property
  def families(self) -> tuple[str, ...]:
    """What splits the model beside batches; "fsdp" where nothing does."""
    used = tuple(a for a in FAMILIES[1:] if self.options.get(f"mesh.{a}", 1) * self.options.get(f"mesh.dcn.{a}", 1) > 1)
    return used or ("fsdp",)

  @functools.cached_property
  def mesh(self) -> tuple[int, ...]:
    """Sizes of the axes, within a slice and across."""
    return tuple(v for path, v in self.options.items() if path.startswith("mesh."))

  @property
  def policy(self) -> str:
    table = self.options.get("remat.table") or {}
    return ", ".join([self.options["remat.policy"], *(f"{action} {name}" for name, action in table.items())])

  @property
  def kind(self) -> str:
    """Of its policy: a preset, or a table that offloads, or one that does not."""
    policy, table = self.options["remat.policy"], self.options.get("remat.table") or {}
    return (
      f"remat {policy}" if not table else "something offloaded" if "offload" in table.values() else "something kept"
    )

  @functools.cached_property
  def name(self) -> str:
    """Its options in a line, without those that say nothing."""
    plain = {path: v for path, v in self.options.items() if path.startswith("mesh.") and v != 1}
    plain |= {
      path: v for path, v in self.options.items() if path.startswith("sharding.") and v not in (1, "ring", "exchange")
    }
    return f"{layouts.name(plain)}; remat {self.policy}"

  @property
  def order(self) -> tuple:
    """Candidates that fit come first, then the shorter step; equal ones in the order of their names."""
    e = self.estimate
    return not e.fits, e.step_seconds if e.fits else e.bytes, self.name


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler, and the walk of its schedule, say of a candidate with some flags of its own (`run.flags`).

  Attributes:
    seconds, low, high, classes: predicted; 0 where there is no program.
    hbm: bytes of a device; of a program that was refused for them, what it would need.
    error: why there is no program.
    took: seconds of the whole process.
    events: the trace of the program (`trace.to_json`).
  """

  candidate: Candidate
  flags: Flags
  seconds: float = 0.0
  low: float = 0.0
  high: float = 0.0
  classes: dict[str, float] = dataclasses.field(default_factory=dict)
  hbm: float = 0.0
  error: str = ""
  took: float = 0.0
  events: list = dataclasses.field(default_factory=list, repr=False)


@dataclasses.dataclass(frozen=True)
class Search:
  """The result: candidates best first, those that were compiled, the plan, and a line for each that is worth one."""

  candidates: list[Candidate]
  compiled: list[Compiled]
  plan: Plan
  lines: list[str]


# ---- candidates


def with_options(config: Config, options: Options) -> Config:
  """The config with some options changed; they are not checked again."""
  tree: Options = {}
  for path, value in options.items():
    *groups, last = path.split(".")
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = value
  return _replaced(config, tree)


def _replaced(node: Any, tree: Options) -> Any:
  inner = {key: _replaced(getattr(node, key), v) if dataclasses.is_dataclass(getattr(node, key)) else v
           for key, v in tree.items()}  # fmt: skip
  return dataclasses.replace(node, **inner)


def meshes(config: Config, devices: int, slices: int) -> Iterator[Options]:
  """Every factorisation of the devices of a slice over the mesh axes; slices go along data, pipeline or fsdp."""
  m, length = config.model, config.data.length
  most = {axis: devices for axis in MESH_AXES} | MOST
  most["context"] = min(most["context"], max(1, length // SHORTEST))
  most["expert"] = m.experts or 1
  most["tensor"] = min(most["tensor"], config.kv_heads)
  most["pipeline"] = min(most["pipeline"], m.layers)
  for sizes in _factors(devices, [most[axis] for axis in MESH_AXES]):
    for across in ("data", "pipeline", "fsdp") if slices > 1 else ("data",):
      dcn = {f"mesh.dcn.{axis}": slices if axis == across else 1 for axis in MESH_AXES}
      yield {f"mesh.{axis}": size for axis, size in zip(MESH_AXES, sizes)} | dcn


def _factors(n: int, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
  """Every way to write n as a product of so many factors, each at most as large."""
  if len(most) == 1:
    if n <= most[0]:
      yield (n,)
    return
  for d in range(1, min(n, most[0]) + 1):
    if n % d == 0:
      for rest in _factors(n // d, most[1:]):
        yield d, *rest


def schedules(config: Config, options: Options) -> Iterator[Options]:
  """Microbatches, chunks of a pipeline's stages, and how tokens reach split experts, for a mesh."""
  size = lambda axis: options[f"mesh.{axis}"] * options[f"mesh.dcn.{axis}"]  # noqa: E731
  rows = config.data.batch_size // (size("data") * size("fsdp") * size("expert"))
  stages = size("pipeline")
  counts = [m for m in range(1, min(rows, 64) + 1) if rows % m == 0 and m % stages == 0 and m & (m - 1) == 0]
  for repeats in (1, 2, 4) if stages > 1 else (1,):
    for ways in ({"sharding.experts": way} for way in ("exchange", "gather")) if size("expert") > 1 else ({},):
      yield from ({"sharding.microbatches": m, "sharding.repeats": repeats, **ways} for m in counts)


def policies(config: Config) -> list[Options]:
  """The presets, and attention kept with one value more; one value on the host."""
  m = config.model
  useless = {"router": not m.experts, "gate": not m.gated, "mlp_out": not m.post_norms}  # that backward does not need
  names = [n for n in remat.NAMES if not useless.get(n)]
  out: list[Options] = [{"remat.policy": p, "remat.table": {}} for p in ("full", "attention", "projections", "none")]
  tables: list[dict[str, str]] = [{"attention": "keep", n: "keep"} for n in names if n != "attention"]
  tables += [{"attention": "keep", "gate": "keep", "up": "keep"}, {"attention": "offload"}]
  tables += [{"attention": "keep", "query": "offload"}, {"attention": "keep", "up": "offload"}]
  return out + [{"remat.policy": "custom", "remat.table": table} for table in tables]


class Ranking:
  """Candidates of a config on chips, by the closed form; those that the rules refuse are left out."""

  def __init__(self, config: Config, chip: Chip, chips: tuple[int, ...], slices: int, efficiency: analytic.Efficiency):
    self.config, self.chip, self.chips, self.slices, self.efficiency = config, chip, chips, slices, efficiency
    self.devices = math.prod(chips) * chip.devices
    self.works: dict[str, tuple[Work, analytic.Clock]] = {}

  def look(self, options: Options, checked: bool = False) -> Candidate | None:
    """The candidate; None where the config cannot run so."""
    config = with_options(self.config, options)
    try:
      step, shape = analytic.program(config, self.chip, self.chips, self.slices)
      if not checked:
        step.check(config.data.batch_size, config.data.length)
    except ConfigError:
      return None
    work = Work(step, "tpu" if self.chip.torus else "xla")
    clock = analytic.Clock(self.chip, self.chips, shape, step.rules, self.efficiency, boxed_axis(config))
    out = Candidate(options, analytic.of(work, clock))
    self.works[out.name] = work, clock
    return out

  def all(self) -> list[Candidate]:
    """Every mesh and schedule with the leanest policy, then the best of these with every policy; best first."""
    full = {"remat.policy": "full", "remat.table": {}}
    found: list[Candidate] = []
    for mesh in meshes(self.config, self.devices, self.slices):
      same = lambda s: (s["sharding.repeats"], s.get("sharding.experts"))  # noqa: E731
      for _, group in itertools.groupby(schedules(self.config, mesh), same):
        first = self.look({**mesh, **next(group), **full})
        if first:  # what is refused does not depend on the number of microbatches
          found += [first, *filter(None, (self.look({**mesh, **s, **full}, checked=True) for s in group))]
    if not found:
      raise ConfigError(f"no mesh of {self.devices} devices divides the config; change data.batch_size, which is "
                        f"{self.config.data.batch_size}, or the sizes of the model")  # fmt: skip
    found.sort(key=lambda c: c.order)
    chosen = found[:MESHES] + [c for family in FAMILIES for c in _of(found, family)[:4]]
    base = {c.name: c for c in chosen}.values()
    more = [self._with_policy(c, p) for c in base for p in policies(self.config) if p != full]
    return sorted([*found, *filter(None, more)], key=lambda c: c.order)

  def _with_policy(self, candidate: Candidate, policy: Options) -> Candidate | None:
    work, clock = self.works[candidate.name]
    if work.local.step.schedule.stages > 1 and "offload" in policy["remat.table"].values():
      return None  # what a pipeline keeps stays on the device (step.py)
    remat = config_lib.Remat(policy["remat.policy"], policy["remat.table"])
    return Candidate({**candidate.options, **policy}, analytic.of(work.with_remat(remat), clock))


def _of(candidates: Iterable[Candidate], family: str) -> list[Candidate]:
  return [c for c in candidates if family in c.families]


# ---- what is compiled


def in_turn(candidates: Sequence[Candidate], compiled: Sequence[Compiled], count: int) -> Iterator[Candidate]:
  """What to compile: the best that fit, until `count` of them work; at most four times as many.

  Of one mesh at most two, since the closed form knows differences of meshes less well. From `compiled`, which the caller
  adds to, it learns: where memory was too small, others that split the model by the same axes are taken to need as much
  more than the closed form says; a mesh that failed otherwise is left out.
  """
  for _ in range(4 * count):
    results = {c.candidate.name: c for c in sorted(compiled, key=lambda c: not c.error)}  # one that works wins
    if sum(not c.error for c in results.values()) >= count:
      return
    more: dict[tuple[str, ...], float] = {}
    meshes: list[tuple] = []
    for c in results.values():
      refused = c.error and c.hbm
      if refused:
        more[c.candidate.families] = max(more.get(c.candidate.families, 1.0), c.hbm / c.candidate.estimate.bytes)
      else:
        meshes += [c.candidate.mesh] * (1 + bool(c.error))
    fit = (c for c in candidates if c.name not in results and meshes.count(c.mesh) < 2
           and c.estimate.fits and c.estimate.bytes * more.get(c.families, 1.0) <= c.estimate.limit)  # fmt: skip
    chosen = next(fit, None)
    if chosen is None:
      return
    yield chosen


def compile_candidate(config: Config, topology: str, slices: int) -> dict[str, Any]:
  """In a process of its own: what `Compiled` says, of a config whose options are those of the candidate."""
  from maxscale import environment

  environment.prepare_plan(config, topology, slices)
  from maxscale.perf.compiled import aot, memory, predict, trace

  try:
    made = aot.compile_step(config, topology, slices)
    found = predict.predict(made)
  except Exception as e:  # the compiler has one type for all errors; most often there is too little memory
    oom = memory.out_of_memory(e)
    return {"error": str(e).strip().splitlines()[0][:300], "hbm": oom.used if oom else 0.0}
  analysis = made.executable.memory_analysis()
  assert analysis is not None, "a TPU program says what it needs"
  return {"seconds": found.seconds, "low": found.low, "high": found.high, "classes": dict(found.classes),
          "hbm": memory.peak(analysis), "events": trace.to_json(predict.events_of(made))}  # fmt: skip


def in_process(config: Config, topology: str, slices: int, seconds: float) -> dict[str, Any]:
  """`compile_candidate` in a process that may take so many seconds."""
  job = {"config": config_lib.to_json(config), "topology": topology, "slices": slices}
  try:
    done = subprocess.run([sys.executable, "-m", "maxscale.perf.search"], input=json.dumps(job), capture_output=True,
                          text=True, timeout=seconds, env={**os.environ, "JAX_PLATFORMS": "cpu"})  # fmt: skip
  except subprocess.TimeoutExpired:
    return {"error": f"not compiled within {seconds:.0f} s"}
  lines = done.stdout.splitlines()
  if done.returncode or not lines:
    return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
  return json.loads(lines[-1])


# ---- the search


def run(
  config: Config, path: str, topology: str, slices: int = 1, compiles: int = 4, budget: float = 1500.0,
  flag_sets: Sequence[Flags] = ({},), efficiency: analytic.Efficiency = analytic.DEFAULT,
  overrides: Options | None = None, say: Callable[[str], None] = print,
) -> Search:  # fmt: skip
  """The best plan for a config.

  Args:
    path: of the config's file, for the plan.
    compiles: candidates whose programs work, each with every set of flags; at most four times as many are tried. 0, and
      chips that no compiler here is for: the closed form decides alone.
    budget: seconds after which no compile goes on.
    flag_sets: flags of a compile over those that the config has and the table gives (perf/compiler.py).
    overrides: what the user changed of the file (path -> text or value): the plan has it, below what was found.
    say: is given a line about what is going on.

  Raises:
    ConfigError: the topology is unknown, nothing fits it, or nothing that was compiled works.
  """
  start = time.perf_counter()
  chip, chips = analytic.parse(topology)
  ranking = Ranking(config, chip, chips, slices, efficiency)
  candidates = ranking.all()
  best = candidates[0]
  say(f"{len(candidates)} candidates in {time.perf_counter() - start:.0f} s by the closed form; best: {best.name}, "
      f"{best.estimate.step_seconds:.3f} s")  # fmt: skip
  if not best.estimate.fits:
    e = best.estimate
    raise ConfigError(f"nothing fits {topology}: the leanest candidate ({best.name}) needs {e.bytes / GIB:.1f} GiB of "
                      f"{e.limit / GIB:.1f}; take more chips, or a smaller data.batch_size or data.length")  # fmt: skip
  compiled: list[Compiled] = []
  turn = in_turn(candidates, compiled, compiles if chip.torus else 0)
  for candidate, flags in ((candidate, flags) for candidate in turn for flags in flag_sets):
    left = budget - (time.perf_counter() - start)
    if left <= 0:
      say(f"the {budget:.0f} s are over: {len(compiled)} compiled")
      break
    made = with_options(config, {**candidate.options, "run.flags": {**config.run.flags, **flags}})
    begun = time.perf_counter()
    result = in_process(made, topology, slices, left)
    c = Compiled(candidate, flags, took=time.perf_counter() - begun, **result)
    compiled.append(c)
    say(
      f"{candidate.name}{_flags_text(flags)}: {c.error or f'{c.seconds:.3f} s, {c.hbm / GIB:.1f} GiB'} ({c.took:.0f} s)"
    )
  good = sorted((c for c in compiled if not c.error), key=lambda c: (c.seconds, c.candidate.name))
  if compiled and not good:
    errors = "\n".join(f"  {c.candidate.name}{_flags_text(c.flags)}: {c.error}" for c in compiled)
    raise ConfigError(f"none of the {len(compiled)} programs that were compiled for {topology} works; take more chips or a "
                      f"smaller data.batch_size if memory is too small, or another topology:\n{errors}")  # fmt: skip
  winner = good[0] if good else None
  plan = _plan(config, path, topology, slices, winner.candidate if winner else best, winner, overrides or {})
  return Search(candidates, compiled, plan, explain(candidates, compiled))


def _plan(
  config: Config, path: str, topology: str, slices: int, candidate: Candidate, compiled: Compiled | None,
  overrides: Options,
) -> Plan:  # fmt: skip
  e, options = candidate.estimate, dict(candidate.options)
  if compiled and compiled.flags:
    options["run.flags"] = {**config.run.flags, **compiled.flags}
  made, chip = with_options(config, options), analytic.parse(topology)[0].name
  resolved = compiler.resolve(chip, compiler.features(made, slices), flags=made.run.flags)
  flags = {"compile": resolved.compile, "init": resolved.init}
  predicted: dict[str, Any] = {"seconds": e.step_seconds, "hbm": e.bytes, "classes": e.seconds, "by": "closed form"}
  if compiled:
    predicted = {"seconds": compiled.seconds, "low": compiled.low, "high": compiled.high, "hbm": compiled.hbm,
                 "classes": compiled.classes, "by": "compiled"}  # fmt: skip
  tokens, chips = config.data.batch_size * config.data.length, math.prod(analytic.parse(topology)[1]) * slices
  predicted["tokens_per_second_per_chip"] = tokens / predicted["seconds"] / chips
  # An override of an option, or of something inside it, that the search chose would otherwise come behind it.
  own = {p: v for p, v in overrides.items() if not any(f"{p}.".startswith(f"{chosen}.") for chosen in options)}
  return Plan(path, topology, slices, own | options, flags, predicted, versions())


def versions() -> dict[str, str]:
  """Of what the compiled program depends on, where it is installed."""
  found = {}
  for package in ("jax", "jaxlib", "libtpu"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


# ---- words


def explain(candidates: Sequence[Candidate], compiled: Sequence[Compiled] = (), best: int = 3) -> list[str]:
  """A line for the best few, the best of each family and of each policy: seconds, HBM, and what it loses on."""
  first = candidates[0]
  shown = {c.name: f"number {n}" if n > 1 else "best" for n, c in enumerate(candidates[:best], 1)}
  for family in FAMILIES:
    for c in _of(candidates, family)[:1]:
      shown.setdefault(c.name, f"best with {family}" if family != "fsdp" else "best of data and fsdp alone")
  mesh = lambda c: {p: v for p, v in c.options.items() if not p.startswith("remat.")}  # noqa: E731
  same = [c for c in candidates if mesh(c) == mesh(first)]
  for c in {c.kind: c for c in reversed(same)}.values():
    shown.setdefault(c.name, f"the same mesh with {c.kind}")
  by_name = {c.name: c for c in candidates}
  rows = sorted((by_name[name] for name in shown), key=lambda c: c.order)
  real = {c.candidate.name: c for c in compiled if not c.error}
  lines = []
  for c in rows:
    e, made = c.estimate, real.get(c.name)
    also = f" (compiled: {made.seconds:.3f} s, {made.hbm / GIB:.1f} GiB)" if made else ""
    lines.append(
      f"{e.step_seconds:8.3f} s {e.bytes / GIB:6.1f} GiB  {c.name}{also} [{shown[c.name]}]: {loses(c, first)}"
    )
  return lines


def loses(candidate: Candidate, best: Candidate) -> str:
  """Why a candidate is not the best: what does not fit, or the classes in which it is slower."""
  e, b = candidate.estimate, best.estimate
  if not e.fits:
    largest = max(e.memory, key=lambda name: e.memory[name])
    return f"does not fit by {(e.bytes - e.limit) / GIB:.1f} GiB ({largest} {e.memory[largest] / GIB:.1f})"
  if candidate is best:
    shares = sorted(e.seconds.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{s / e.step_seconds:.0%} {_class_text(name)}" for name, s in shares)
  more = {name: e.seconds.get(name, 0.0) - b.seconds.get(name, 0.0) for name in {**b.seconds, **e.seconds}}
  worst = sorted(more.items(), key=lambda item: (-item[1], item[0]))[:2]
  said = [f"{s:.3f} s more {_class_text(name)}" for name, s in worst if s > 0.1 * (e.step_seconds - b.step_seconds)]
  return ", ".join(said) if said and e.step_seconds > b.step_seconds else "as fast"


def _class_text(name: str) -> str:
  network, _, axes = name.partition(" ")
  if network in ("ici", "dcn"):
    return f"exposed {network.upper()} collectives along {axes}"
  return {"vector": "elementwise work", "offload": "waiting for the host", "bubble": "pipeline bubble"}.get(name, name)


def _flags_text(flags: Flags) -> str:
  return f" with {' '.join(f'{name}={value}' for name, value in flags.items())}" if flags else ""


if __name__ == "__main__":
  job = json.load(sys.stdin)
  print(json.dumps(compile_candidate(config_lib.from_json(job["config"]), job["topology"], job["slices"])))
