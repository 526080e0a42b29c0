"""The step of a config in closed form: seconds and memory of a device, without tracing or compiling it.

The parts of the step (perf/closed/work.py), which tests hold against the traced program, take seconds by rates (`Efficiency`)
and by the links of the mesh (`Clock`); perf/closed/footprint.py says what fits.

It ranks layouts in milliseconds each (perf/search.py); the seconds that are reported come from compiled programs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from maxscale.config import Config, ConfigError
from maxscale.perf import calibration, flops, network, traffic
from maxscale.perf.closed import footprint
from maxscale.perf.closed.local import Dot, Kernel
from maxscale.perf.closed.work import Part, Work
from maxscale.perf.hardware import CHIPS, GIB, Chip
from maxscale.sharding import mesh, rules, topology
from maxscale.step import Program

EXACT = 6  # passes of bfloat16 that a product in float32 takes on a TPU
DIES = 6  # links of ICI that are as fast as what joins the two dies of a TPU7x (Google Cloud TPU documentation: TPU7x)
TOPOLOGIES = {
  "v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "tpu7x": "TPU7x", "tpu8t": "TPU8t",
  **{chip.name.lower(): chip.name for chip in CHIPS if not chip.torus},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """Rates as fractions of the hardware table's, and other constants of the model. A calibration may replace them.

  Attributes:
    matmul: of peak, in the inner loop of a product, where the chip has no measured one. Compiler's estimate of large
      products: 88% (v5e), 90% (v5p).
    hidden: part of a product's shorter time (matrix unit or HBM) that its longer one hides. With `launch`, from TPU7x
      measured at 1024, 2048 and 16k (350, 679 and 956 of 1153.5 TFLOP/s a core) and v6e at 8192 (754 of 918).
    launch: seconds of any operation beside its work.
    attention, experts: of peak, of attention kernels and of grouped products on whole blocks and tiles. None: the rates
      of the calibration (perf/calibration.py); 0.55 and 0.75 of a chip that is no TPU.
    stream: of HBM bandwidth, where no copy was measured.
    vector: of that, of elementwise passes: v6e norms and stacks of kept values ran at about half in schedules.
    overlap: part of a layer's compute behind which gathers and scatters of its weights hide. Schedules hid all of them
      once the SparseCores, or fusions on v5e, carry them (perf/compiler.py); TPU v4 has neither.
    most: part of them that hides at most: 0.74 to 0.92 in schedules, in pipelines as elsewhere.
    tight: that part where programs take more than `full` of the memory that they may: gathers then start when they are
      waited for. 0.03 and 0.17 in schedules with 99% (v5p) and 96% (v6e); at 91% as anywhere.
    beside: part of the gathers and scatters of activations (not of exchanges between experts) that hides in backward,
      behind products for weights: 0.69 in a schedule. In forward everything waits for them.
    reserved: bytes of a device's HBM that programs may not use: programs were refused beyond 31.25 of 32 GiB on v6e.
  """

  matmul: float = 0.9
  hidden: float = 0.6
  launch: float = 2e-6
  attention: float | None = None
  experts: float | None = None
  stream: float = 0.85
  vector: float = 0.5
  overlap: float = 0.95
  most: float = 0.85
  tight: float = 0.1
  full: float = 0.95
  beside: float = 0.65
  reserved: float = 0.75 * GIB


DEFAULT = Efficiency()


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a step of a device is expected to take.

  Attributes:
    memory: class -> bytes of a device at the peak.
    seconds: class -> seconds of a step: matmul, attention, experts, vector, "ici <axes>" and "dcn <axes>" (exposed),
      bubble, offload (exposed).
    flops: executed by a device, recomputation included.
    fits: the memory is there.
    bound: the class that takes longest.
  """

  memory: dict[str, float]
  seconds: dict[str, float]
  flops: float
  step_seconds: float
  tokens_per_second_per_chip: float
  mfu: float
  fits: bool
  limit: float
  bound: str

  @property
  def bytes(self) -> float:
    return sum(self.memory.values())


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
  """The chip and the chips of a slice along each dimension, of a topology such as v5p:8x8x8 or h100:64.

  Raises:
    ConfigError: it is not of that form, or the chip is unknown.
  """
  kind, _, shape = name.lower().partition(":")
  dims = shape.split("x")
  if kind not in TOPOLOGIES or not all(d.isdigit() and int(d) for d in dims):
    raise ConfigError(f"mesh.topology={name!r} is not a chip and a shape, such as v5p:8x8x8 or h100:64; known chips: "
                      f"{', '.join(TOPOLOGIES)}")  # fmt: skip
  return next(c for c in CHIPS if c.name == TOPOLOGIES[kind]), tuple(map(int, dims))


def program(config: Config, chip: Chip, chips: tuple[int, ...], slices: int = 1) -> tuple[Program, mesh.MeshShape]:
  """The step of a config on chips, without devices: its arrays, rules and checks, but nothing to trace.

  Raises:
    ConfigError: the mesh does not have the devices' number, or the rules do not fit together.
  """
  shape = mesh.resolve(config.mesh, math.prod(chips) * chip.devices * slices, slices)
  nowhere: Any = None
  out = Program(config, config.model.vocab_size, nowhere, rules.make(config.sharding, shape.sizes, shape.slices))
  # Neither depends on the mesh, but for the order of layers in a stack: made once a model.
  key = repr((config.model, config.lora, config.optimizer, config.run.steps))
  if key not in _made:
    if len(_made) > 64:
      _made.clear()
    whole = dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, repeats=1, microbatches=1))
    first = Program(whole, config.model.vocab_size, nowhere, rules.make(type(config.sharding)(), _one(shape)))
    _made[key] = {"skeleton": first.skeleton, "optimizer": first.optimizer}
  vars(out).update(_made[key])  # where `functools.cached_property` looks first
  return out, shape


_made: dict[str, dict[str, Any]] = {}


def _one(shape: mesh.MeshShape) -> dict[str, int]:
  return dict.fromkeys(shape.sizes, 1)


# ---- seconds of parts


@functools.cache
def _grid(kind: str, chips: tuple[int, ...], cores: int, ici: tuple[int, ...], boxed: str) -> np.ndarray:
  """[*ici, 4]: x, y, z and core of each device of a slice, as `mesh.make` would place them."""
  dims = (*chips, 1, 1)[:3]
  at = [(x, y, z) for z in range(dims[2]) for y in range(dims[1]) for x in range(dims[0])]
  devices = [mesh.Chip(c, core, kind, i * cores + core) for i, c in enumerate(at) for core in range(cores)]
  placed = mesh.place(ici, devices, boxed)
  return np.array([(*d.coords, d.core_on_chip) for d in placed.flat]).reshape(*ici, 4)


@functools.cache
def _box(
  chip: Chip, chips: tuple[int, ...], ici: tuple[int, ...], axes: tuple[int, ...], boxed: str = ""
) -> tuple[network.Dims, float]:
  """The box of the torus that devices along some axes of a mesh fill, and how many such groups share its links."""
  grid = _grid(chip.kinds[0], chips, chip.devices, ici, boxed)
  group = np.moveaxis(grid, axes, range(len(axes)))
  group = group.reshape(math.prod(ici[a] for a in axes), -1, 4)[:, 0]
  wrap = (*topology.wraps(chip.kinds[0], chips), False, False)
  dims, shares, count = [], [], 1
  for dim in range(3):
    at = np.unique(group[:, dim])
    if len(at) > 1:
      stride = int(np.diff(at).min())
      dims.append((len(at), bool(wrap[dim] and len(at) * stride == chips[dim])))
      shares.append(1 / stride)  # groups lie between each other's chips
      count *= len(at)
  cores = len(np.unique(group[:, 3]))
  if count * cores != len(group):  # no box: a line through its devices
    dims = [(len(group) // cores, False)]
  return tuple(dims), chip.devices / cores / (sum(shares) / len(shares) if shares else 1.0)


class Clock:
  """Seconds of parts on a chip, in a mesh."""

  def __init__(
    self, chip: Chip, chips: tuple[int, ...], shape: mesh.MeshShape, made: rules.Rules, e: Efficiency, boxed: str = ""
  ):
    """boxed: as in `mesh.place`."""
    self.chip, self.chips, self.shape, self.rules, self.e, self.boxed = chip, chips, shape, made, e, boxed
    self.peak = chip.bf16 / chip.devices
    self.hbm = chip.hbm_bytes / chip.devices * (chip.stream or e.stream)
    self.overlap = 0.0 if chip.name == "TPU v4" else e.overlap
    rates = calibration.rates(chip) if chip.torus else None
    self.attention = e.attention or (rates.attention if rates else 0.55)
    self.experts = e.experts or (rates.grouped if rates else 0.75)
    self.moved: dict[tuple, float] = {}
    self.dots: dict[Dot, float] = {}

  def dot(self, d: Dot) -> float:
    """Matrix unit and HBM, of which the longer hides a part of the shorter."""
    pad = lambda n, tile: math.ceil(n / tile) * tile  # noqa: E731
    tile = self.chip.tile
    m, k, n = pad(d.m, 8), pad(d.k, tile), pad(d.n, tile)
    rate = self.peak * (self.chip.matmul or self.e.matmul)
    weights, results, waste = 1, 1, 1.0
    if d.groups:
      rows, rate = d.k if d.outer else d.m, self.peak * self.experts
      waste = 1 + d.groups * tile / rows  # a tile of rows for each group is partly another's
      weights, results = (1, d.groups) if d.outer else (d.groups, 1)
    work = 2 * m * k * n * waste
    size = 2 * (2 if d.exact else 1)
    moved = size * (d.m * d.k + weights * d.k * d.n) + d.out * results * d.m * d.n
    times = sorted((work * (EXACT if d.exact else 1) / rate, moved / self.hbm))
    return times[1] + (1 - self.e.hidden) * times[0] + self.e.launch

  def kernel(self, k: Kernel) -> float:
    """The rate is that of heads of 128: others fill more or less of a matrix unit."""
    tile = self.chip.tile
    whole = (k.score * math.ceil(k.qk / tile) + k.mix * math.ceil(k.v / tile)) * tile
    fill = (k.score * k.qk + k.mix * k.v) / whole / min(1.0, 128 / tile)
    return k.flops / (self.peak * self.attention * fill) + self.e.launch

  def transfer(self, t: traffic.Transfer) -> float:
    """Seconds of one execution."""
    key = (t.kind, t.axes, t.bytes, t.dcn)
    if key not in self.moved:
      self.moved[key] = self._transfer(t)
    return self.moved[key]

  def _transfer(self, t: traffic.Transfer) -> float:
    if t.dcn:
      return network.dcn_seconds(t.kind, t.bytes, self.chip, math.prod(self.rules.slices.get(a, 1) for a in t.axes))
    names = tuple(self.shape.sizes)
    at = tuple(i for i, name in enumerate(names) if name in t.axes and self.shape.ici[i] > 1)
    if not at:
      return 0.0
    if self.chip.torus:
      dims, shared = _box(self.chip, self.chips, self.shape.ici, at, self.boxed)
      if not dims:  # the devices of a chip
        return network.seconds(t.kind, t.bytes, self.chip, ((self.chip.devices, False),), DIES)
      return network.seconds(t.kind, t.bytes, self.chip, dims, 1 / shared)
    size = math.prod(self.shape.ici[i] for i in at)
    places = np.arange(math.prod(self.shape.ici)).reshape(self.shape.ici)
    group = np.moveaxis(places, at, range(len(at))).reshape(size, -1)[:, 0]
    across = len(np.unique(group // self.chip.domain))
    return network.switch_seconds(t.kind, t.bytes, self.chip, size, across)

  def part(self, p: Part, tight: bool = False) -> dict[str, float]:
    """Class -> seconds of all executions of a part, of a program that takes nearly all memory or not."""
    out: dict[str, float] = collections.defaultdict(float)
    for d in p.dots:
      if d not in self.dots:
        self.dots[d] = self.dot(d)
      out["experts" if d.groups else "matmul"] += self.dots[d]
    out["attention"] = sum(map(self.kernel, p.kernels))
    out["vector"] = p.vector / (self.hbm * self.e.vector)
    compute = sum(out.values())
    most = self.e.tight if tight else self.e.most
    beside = self.e.beside if "backward" in p.name else 0.0
    # behind how many seconds of work each hides, and which part of it does at most
    rooms = {
      "weights": (self.overlap * compute, most),
      "ring": (out["attention"], 1.0),
      "moves": (0.3 * compute, beside),
    }
    for group, (room, share) in rooms.items():
      links: dict[str, float] = collections.defaultdict(float)
      for whole in getattr(p, group):
        for t in traffic.by_slices([whole], self.rules) if self.rules.slices else (whole,):
          name, taken = "*".join(t.axes), t.times * self.transfer(t)
          if t.dcn:  # nothing was seen to hide it
            out[f"dcn {name}"] += taken
          elif group == "moves" and t.kind not in ("all-gather", "reduce-scatter"):
            out[f"ici {name}"] += taken
          else:
            links[f"ici {name}"] += taken
      total = sum(links.values())
      for name, taken in links.items():
        out[name] += taken * max(1 - share, 1 - room / total) if total else 0.0
    if p.offload:
      out["offload"] = max(0.0, p.offload / (self.chip.host_bytes or 16e9) * self.chip.devices - compute)
    return {name: p.times * s for name, s in out.items() if s}


def estimate(
  config: Config, chip: Chip, chips: tuple[int, ...], slices: int = 1, efficiency: Efficiency = DEFAULT
) -> Estimate:
  """What a step of a config takes.

  Args:
    chips: of a slice, along each dimension of its torus; their number for chips that switches connect.

  Raises:
    ConfigError: the mesh does not have the devices' number, or the rules do not fit together.
  """
  step, shape = program(config, chip, chips, slices)
  work = Work(step, "tpu" if chip.torus else "xla")
  return of(work, Clock(chip, chips, shape, step.rules, efficiency, mesh.boxed_axis(config)))


def of(work: Work, clock: Clock) -> Estimate:
  """What a step takes, by its parts and the seconds of each."""
  step, chip = work.local.step, clock.chip
  config = step.config
  memory, limit = footprint.memory(work), chip.hbm / chip.devices - clock.e.reserved
  tight = sum(memory.values()) > clock.e.full * limit
  timed = [(p, clock.part(p, tight)) for p in work.parts]
  seconds: dict[str, float] = collections.defaultdict(float)
  for _, found in timed:
    for name, s in found.items():
      seconds[name] += s
  schedule = step.schedule
  inside = sum(sum(found.values()) for p, found in timed if p.name.startswith(("layers", "stages")))
  if schedule.stages > 1:  # of what all ticks take, the share of those at which a stage waits
    seconds = {name: s * (1 - schedule.bubble * inside / sum(seconds.values())) for name, s in seconds.items()}
    seconds["bubble"] = schedule.bubble * inside
  if config.optimizer.offload:
    moments = work.local.state_bytes[1]
    seconds["offload"] = seconds.get("offload", 0.0) + moments * chip.devices / (chip.host_bytes or 16e9)
  total = sum(seconds.values())
  tokens = config.data.batch_size * config.data.length
  per_chip = tokens / total / (clock.shape.devices / chip.devices)
  model = flops.from_config(config, config.model.vocab_size)
  return Estimate(
    memory=memory, seconds=dict(seconds), flops=sum(p.times * p.flops for p in work.parts), step_seconds=total,
    tokens_per_second_per_chip=per_chip, mfu=flops.mfu(model, config.data.length, per_chip, chip.bf16),
    fits=sum(memory.values()) <= limit, limit=limit, bound=max(seconds, key=lambda name: seconds[name]),
  )  # fmt: skip
