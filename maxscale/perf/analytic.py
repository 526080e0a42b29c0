"""The step of a config in closed form: FLOPs, bytes and seconds of a device, without tracing or compiling it.

A layer is written down as a small graph of values (`_Node`): what computes each, what its backward needs, and what is
sent. The table of remat says which values are kept; what backward needs beyond those is computed again, as
`jax.checkpoint` would. From that follow the products, collectives and kept bytes of every part of the step
(`parts`), which tests hold against the traced program, and from those, by rates (`Efficiency`), seconds.

It ranks layouts in milliseconds each (perf/search.py); the seconds that are reported come from compiled programs.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from maxscale.config import Config, ConfigError, Remat
from maxscale.models import loss, remat, splash
from maxscale.models.module import ParamSpec
from maxscale.perf import flops, network, traffic
from maxscale.perf.hardware import CHIPS, GIB, Chip
from maxscale.sharding import mesh, rules, topology
from maxscale.step import Program

EXACT = 6  # passes of bfloat16 that a product in float32 takes on a TPU
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
    attention: of peak, of attention kernels, on whole blocks and padded heads; 0.55 is what schedules are charged.
    experts: of peak, of grouped products on whole tiles; assumed 0.75.
    stream: of HBM bandwidth, where no copy was measured.
    vector: of that, of elementwise passes: v6e norms and stacks of kept values ran at about half in schedules.
    overlap: part of a layer's compute behind which gathers and scatters of its weights hide. Schedules hid all of them
      once the SparseCores, or fusions on v5e, carry them (perf/compiler.py); TPU v4 has neither.
    reserved: bytes of a device's HBM that programs may not use: programs were refused beyond 31.25 of 32 GiB on v6e.
  """

  matmul: float = 0.9
  hidden: float = 0.6
  launch: float = 2e-6
  attention: float = 0.55
  experts: float = 0.75
  stream: float = 0.85
  vector: float = 0.5
  overlap: float = 0.95
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


# ---- what a device does


class Dot(NamedTuple):
  """A product [m, k] x [k, n]; with `groups`, of `m` rows in so many groups, each with a matrix of its own.

  Attributes:
    exact: in float32.
    out: bytes of an element of the result.
  """

  m: float
  k: float
  n: float
  groups: int = 0
  exact: bool = False
  out: int = 2

  @property
  def flops(self) -> float:
    return 2.0 * self.m * self.k * self.n


class Kernel(NamedTuple):
  """Attention of `heads` heads (times sequences): `pairs` of query and key of each, in products with qk and v wide.

  `score` products are qk wide, `mix` products v wide.
  """

  heads: float
  pairs: float
  qk: int
  v: int
  score: int
  mix: int

  @property
  def flops(self) -> float:
    return 2.0 * self.heads * self.pairs * (self.score * self.qk + self.mix * self.v)


@dataclasses.dataclass
class Part:
  """A part of the step that runs `times` times.

  Attributes:
    weights: collectives of parameters and their gradients, which hide behind what the part computes.
    moves: collectives of activations, which it waits for.
    ring: collectives that hide behind attention.
    vector: bytes of HBM that elementwise work reads and writes.
    offload: bytes to the host, or from it.
  """

  name: str
  times: float = 1
  dots: list[Dot] = dataclasses.field(default_factory=list)
  kernels: list[Kernel] = dataclasses.field(default_factory=list)
  weights: list[traffic.Transfer] = dataclasses.field(default_factory=list)
  moves: list[traffic.Transfer] = dataclasses.field(default_factory=list)
  ring: list[traffic.Transfer] = dataclasses.field(default_factory=list)
  vector: float = 0.0
  offload: float = 0.0

  @property
  def flops(self) -> float:
    return sum(d.flops for d in self.dots) + sum(k.flops for k in self.kernels)

  @property
  def transfers(self) -> list[traffic.Transfer]:
    return [dataclasses.replace(t, times=t.times * round(self.times)) for t in self.weights + self.moves + self.ring]


@dataclasses.dataclass(frozen=True)
class _Node:
  """A value of a layer.

  Attributes:
    out: its name; those of `remat.NAMES` can be kept.
    ins: values that it is made of.
    needs: values that its backward needs.
    size: bytes of it.
    weights: path of each weight in `dots`, in their order.
    moves, back: collectives of forward and of backward.
    vector, vector_back: bytes of elementwise passes.
  """

  out: str
  ins: tuple[str, ...]
  needs: tuple[str, ...] = ()
  size: float = 0.0
  dots: tuple[Dot, ...] = ()
  weights: tuple[str, ...] = ()
  kernel: tuple[Kernel, Kernel] | None = None
  moves: tuple[traffic.Transfer, ...] = ()
  back: tuple[traffic.Transfer, ...] = ()
  vector: float = 0.0
  vector_back: float = 0.0


class Work:
  """Everything that a device does in a step: `parts`, `kept` bytes of a layer, and what memory is made of.

  Legend: b sequences and t places of a microbatch on a device, r places of them in the residual layout, `a` bytes of
  an activation. Sizes of the model as in models/parts.py, `*_l` those of a device.
  """

  def __init__(self, step: Program, backend: str):
    self.step, self.rules, self.backend = step, step.rules, backend
    self.split, self.factor = functools.cache(self.rules.split), functools.cache(self.rules.factor)
    c, s, factor = step.config, step.shape, lambda n: self.factor(n, "compute")
    self.config, self.shape = c, s
    self.b = c.data.batch_size / c.sharding.microbatches / factor("batch")
    self.t, self.r = c.data.length / factor("length"), c.data.length / factor("residual_length")
    self.N_l, self.K_l = s.N_pad / factor("heads"), s.K_pad / factor("kv_heads")
    self.V_l = s.V_pad / factor("vocab")
    self.a = jnp.dtype(s.m.compute_dtype).itemsize
    self.g = jnp.dtype(s.grad_dtype).itemsize
    self.exact = self.a == 4
    gathers = any(self.split(n, "param") != self.split(n, "compute") for n in self.rules.tables["param"])
    self.drop_weights = gathers or step.schedule.stages > 1
    length = self.split("length", "compute")
    self.sequence = self.split("residual_length", "compute")[len(length) :]
    self.length = length
    self.made: dict[Any, Any] = {}  # what `once` has made, whatever is kept
    self._set(c.remat)

  def _set(self, policy: Remat) -> None:
    actions = remat.table(policy)
    self.plain = actions is None and not self.drop_weights  # nothing is left out
    self.actions: dict[str, str] = {n: "keep" for n in remat.NAMES} if actions is None else actions

  def with_remat(self, policy: Remat) -> Work:
    """The same with another policy; shares what does not depend on it."""
    out = copy.copy(self)
    for name in ("layers", "parts"):
      vars(out).pop(name, None)
    out._set(policy)
    return out

  def once(self, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once for all policies."""
    if key not in self.made:
      self.made[key] = make()
    return self.made[key]

  # ---- collectives

  def _move(self, kind: str, axes: tuple[str, ...], size: float, dtype: str = "", times: int = 1) -> tuple:
    """Of `size` elements; () where there is nobody to send to."""
    dtype = dtype or self.shape.m.compute_dtype
    axes = tuple(a for a in axes if self.rules.sizes[a] > 1)
    if not axes:
      return ()
    return (traffic.Transfer(kind, axes, dtype, int(size * jnp.dtype(dtype).itemsize), times, 0),)

  def _rest(self, name: str) -> tuple[str, ...]:
    return tuple(a for a in self.split(name, "compute") if a not in self.sequence)

  def _gather(self, width: float, dtype: str = "") -> tuple:
    """`context.gather` of [b, t, width]."""
    return self._move("all-gather", self.sequence, self.b * self.t * width, dtype)

  def _reduce(self, width: float, name: str, dtype: str = "") -> tuple:
    """`context.reduce` of [b, t, width]."""
    size = self.b * self.t * width
    return self._move("all-reduce", self._rest(name), size, dtype) + self._move(
      "reduce-scatter", self.sequence, size, dtype
    )

  def _more(self, names: Iterable[str | None], role: str, to: str) -> list[tuple[str, ...]]:
    split = self.split
    return [split(n, role)[len(split(n, to)) :] if n else () for n in names]

  def _weight_moves(
    self, shape: tuple[float, ...], names: tuple, role: str, to: str, dtype: str, gradient: bool
  ) -> list:
    """`context.gather_param` of a parameter of this shape, or `scatter_gradient` of its gradient."""
    out, size = [], math.prod(shape) / math.prod(self.factor(n, role) for n in names)
    more = self._more(names, role, to)
    for axes in more:
      size *= math.prod(self.rules.sizes[a] for a in axes)
      out += [] if gradient else self._move("all-gather", axes, size, dtype)
    for axis in (axis for axes in more for axis in axes) if gradient else ():
      slices = self.rules.slices.get(axis, 1)
      inside = self.rules.sizes[axis] // slices
      found = self._move("reduce-scatter", (axis,), size, dtype)
      if slices > 1 and inside > 1:  # `context._reduce_scatter`
        across = self._move("reduce-scatter", (axis,), size / inside, dtype)
        found = tuple(dataclasses.replace(t, grouped=True, dcn=i > 0) for i, t in enumerate(found + across))
      out += found
      size /= inside * slices
    return out

  def _of(self, path: str) -> tuple[ParamSpec, tuple, tuple]:
    """A parameter, and shape and names of it in one layer."""
    spec = self.step.skeleton.specs[path]
    lead = 1 if spec.rows else 0
    return spec, spec.shape[lead:], spec.names[lead:]

  def gathers(self, path: str, dtype: str = "") -> list[traffic.Transfer]:
    """A use of a weight."""
    _, shape, names = self._of(path)
    dtype = dtype or self.shape.m.compute_dtype
    make = lambda: self._weight_moves(shape, names, "param", "compute", dtype, False)  # noqa: E731
    return self.once((path, dtype), make)

  def scatters(self, path: str) -> list[traffic.Transfer]:
    """A gradient of a weight."""
    spec, shape, names = self._of(path)
    make = lambda: self._weight_moves(shape, names, "param", "compute", self.shape.grad_dtype, True)  # noqa: E731
    return self.once((path,), make) if spec.trained else []

  # ---- a layer

  def layer(self, stack: str, window: int, dense: bool) -> list[_Node]:
    """The values of a layer in the order in which they are computed; "x" goes in."""
    s, m, a = self.shape, self.shape.m, self.a
    residual, tokens = self.b * self.r * s.D * a, self.b * self.t
    attention = self._latent(stack) if m.mla.kv_rank else self._grouped(stack)
    post = ("attention_out",) if m.post_norms else ()
    nodes = [_Node("n1", ("x",), ("x",), residual, vector=2 * residual, vector_back=4 * residual), *attention,
             *self._attend(window)]  # fmt: skip
    back = "attention_back" if any(n.out == "attention_back" for n in nodes) else "attention"
    nodes.append(
      _Node("attention_out", (back,), (back,), residual, (self._dot(tokens, self.N_l * s.H_v, s.D),),
            (f"{stack}/attention/out",), None, self._reduce(s.D, "heads"), self._gather(s.D))
    )  # fmt: skip
    nodes.append(_Node("x1", ("x", "attention_out"), post, residual, vector=3 * residual, vector_back=3 * residual))
    if m.parallel_block:
      entry = "n1"
    else:
      entry = "n2"
      nodes.append(_Node("n2", ("x1",), ("x1",), residual, vector=2 * residual, vector_back=4 * residual))
    nodes += self._mlp(stack, entry) if dense else self._moe(stack, entry)
    post = ("mlp_out",) if m.post_norms else ()
    nodes.append(_Node("out", ("x1", "mlp_out"), post, residual, vector=3 * residual, vector_back=3 * residual))
    return nodes

  def _dot(self, m: float, k: float, n: float, groups: int = 0) -> Dot:
    return Dot(m, k, n, groups, self.exact, self.a)

  def _grouped(self, stack: str) -> list[_Node]:
    s, tokens, at = self.shape, self.b * self.t, f"{stack}/attention/"
    entry = _Node("attention_in", ("n1",), size=tokens * s.D * self.a, moves=self._gather(s.D),
                  back=self._reduce(s.D, "heads"))  # fmt: skip
    out = [entry]
    for name, heads, width in (("query", self.N_l, s.H), ("key", self.K_l, s.H), ("value", self.K_l, s.H_v)):
      size, normed = tokens * heads * width * self.a, s.m.qk_norm and name != "value"
      dot = (self._dot(tokens, s.D, heads * width),)
      passes = 0.0 if name == "value" or (s.m.max_positions and not normed) else 2 * size
      # the norm of a head needs what it normalises
      out.append(_Node(f"{name}_raw", ("attention_in",), ("attention_in",), size, dot, (at + name,)))
      out.append(_Node(name, (f"{name}_raw",), (f"{name}_raw",) if normed else (), size, vector=passes,
                       vector_back=passes))  # fmt: skip
    return out

  def _latent(self, stack: str) -> list[_Node]:
    s, mla, at, a = self.shape, self.shape.m.mla, f"{stack}/attention/", self.a
    tokens, own = self.b * self.t, self.b * self.r
    width, wide = mla.kv_rank + mla.rope_dim, mla.nope_dim + mla.v_dim
    in_and_back = lambda n: dict[str, Any](moves=self._gather(n), back=self._reduce(n, "heads"))  # noqa: E731
    out = [
      _Node("kv_down", ("n1",), ("n1",), own * width * a, (self._dot(own, s.D, width),), (at + "kv_down",)),
      _Node("kv_latent", ("kv_down",), ("kv_down",), tokens * mla.kv_rank * a, vector=2 * own * width * a,
            vector_back=4 * own * width * a, **in_and_back(mla.kv_rank)),
      _Node("rope_latent", ("kv_down",), size=tokens * mla.rope_dim * a, **in_and_back(mla.rope_dim)),
    ]  # fmt: skip
    heads = self.N_l * s.H
    if mla.q_rank:
      out += [
        _Node("query_down", ("n1",), ("n1",), own * mla.q_rank * a, (self._dot(own, s.D, mla.q_rank),),
              (at + "query_down",)),
        _Node("query_latent", ("query_down",), ("query_down",), tokens * mla.q_rank * a,
              vector=2 * own * mla.q_rank * a, vector_back=4 * own * mla.q_rank * a, **in_and_back(mla.q_rank)),
        _Node("query_raw", ("query_latent",), ("query_latent",), tokens * heads * a,
              (self._dot(tokens, mla.q_rank, heads),), (at + "query_up",)),
      ]  # fmt: skip
    else:
      out += [
        _Node("attention_in", ("n1",), size=tokens * s.D * a, **in_and_back(s.D)),
        _Node("query_raw", ("attention_in",), ("attention_in",), tokens * heads * a,
              (self._dot(tokens, s.D, heads),), (at + "query",)),
      ]  # fmt: skip
    size = tokens * heads * a
    out += [
      _Node("query", ("query_raw",), size=size, vector=2 * size, vector_back=2 * size),
      _Node("kv_raw", ("kv_latent",), ("kv_latent",), tokens * self.N_l * wide * a,
            (self._dot(tokens, mla.kv_rank, self.N_l * wide),), (at + "kv_up",)),
      _Node("key", ("kv_raw", "rope_latent"), size=size, vector=2 * size, vector_back=2 * size),
      _Node("value", ("kv_raw",), size=tokens * self.N_l * s.H_v * a),
    ]  # fmt: skip
    return out

  def _attend(self, window: int) -> list[_Node]:
    """From query, key and value to attention, by the method for split sequences."""
    s, b, t, a = self.shape, self.b, self.t, self.a
    parts = self.factor("length", "compute")
    window = window if window < t * parts else 0
    method = s.context if parts > 1 else ""
    method = "gather" if method == "ring" and window else method
    q, k, v = b * t * self.N_l * s.H, b * t * self.K_l * s.H, b * t * self.K_l * s.H_v
    o = b * t * self.N_l * s.H_v
    forward, backward, extra = self._kernels(window, parts, method)
    ins, out = ("query", "key", "value"), []
    moves: tuple = ()
    back: tuple = ()
    if method == "gather":
      gather = lambda n: self._move("all-gather", self.length, n * parts)  # noqa: E731
      scatter = lambda n: self._move("reduce-scatter", self.length, n * parts)  # noqa: E731
      out.append(_Node("keys", ("key", "value"), size=(k + v) * parts * a, moves=gather(k) + gather(v),
                       back=scatter(k) + scatter(v)))  # fmt: skip
      ins = ("query", "keys")
    elif method == "ulysses":
      exchange = lambda *n: tuple(x for size in n for x in self._move("all-to-all", self.length, size))  # noqa: E731
      out.append(_Node("exchanged", ins, size=(q + k + v) * a, moves=exchange(q, k, v), back=exchange(q, k, v)))
      ins = ("exchanged",)
    elif method == "ring":
      send = lambda n, dtype="", times=parts - 1: self._move("collective-permute", self.length, n, dtype, times)  # noqa: E731
      moves = send(k) + send(v)
      back = moves + send(k, "float32", parts) + send(v, "float32", parts)
    out.append(
      _Node("attention", ins, (*ins, "attention"), o * a + b * t * self.N_l * 4, kernel=(forward, backward),
            moves=moves, back=back, vector=extra[0], vector_back=extra[1])
    )  # fmt: skip
    if method == "ulysses":
      out.append(_Node("attention_back", ("attention",), size=o * a, moves=exchange(o), back=exchange(o)))
    return out

  def _kernels(self, window: int, parts: int, method: str) -> tuple[Kernel, Kernel, tuple[float, float]]:
    """Forward and backward kernels, and bytes of what they write out beside their results."""
    s, t = self.shape, int(self.t)
    whole = t * parts
    heads, t = (self.N_l / parts, whole) if method == "ulysses" else (self.N_l, t)
    chunk = t // 2 if method in ("ring", "gather") else t
    kernels = self.backend == "tpu" and chunk % 128 == 0
    make = lambda pairs, score, mix: Kernel(self.b * heads, pairs, s.H, s.H_v, score, mix)  # noqa: E731
    if not kernels:
      pairs = _xla_pairs(t, whole, window, method)
      logits = 4 * self.b * heads * pairs  # float32, written and read by softmax and products, forward and backward
      return make(pairs, 1, 1), make(pairs, 3, 2), (4 * logits, 8 * logits)
    small = max(s.H, s.H_v) > 128 or self.a > 2 or s.m.attention_softcap or 0 < window <= 512
    sizes = (512, 256, 128) if small else (1024, 512, 256, 128)
    keys = t if method == "ring" else whole
    block_q, block_kv = (next(n for n in sizes if rows % n == 0) for rows in (chunk, keys))
    if method == "gather":
      # zigzag: of the pairs that all devices see each has an equal share
      pairs = _block_pairs(whole, whole, block_q, block_kv, window) / parts
    else:
      pairs = _block_pairs(t, keys, block_q, block_kv, window)
    fused = keys // block_kv <= splash.FUSED_BLOCKS and not window
    row = self.b * heads * s.H * self.a
    partial = 2 * row * t * (keys // block_kv) if fused else 0.0  # of dq, one for each block of keys, then summed
    extra = (0.0, partial)
    if method == "ring":  # each step's results are added up in float32
      steps, half = parts - 1, t // 2
      pairs += steps * t * t / 2
      sums = 3 * 4 * self.b * t * (self.N_l * s.H_v), 3 * 4 * self.b * t * (self.N_l * s.H + self.K_l * (s.H + s.H_v))
      rest = 2 * row * half * 2 * max(1, half // block_kv)
      extra = (steps * sums[0], partial + steps * (sums[1] + rest))
    return make(pairs, 1, 1), make(pairs, 3, 2) if fused else make(pairs, 4, 3), extra

  def _mlp(self, stack: str, entry: str, inside: str = "") -> list[_Node]:
    """A dense MLP. `inside`: name of the partial sum, where the MLP stands beside experts in one region."""
    s, tokens, at = self.shape, self.b * self.t, f"{stack}/mlp/{'shared/' if inside else ''}"
    width = self._of(at + "up")[1][1] / self.factor("mlp", "compute")
    size, mark, out = tokens * width * self.a, "shared_" if inside else "", []
    if not inside:
      out.append(_Node("mlp_in", (entry,), size=tokens * s.D * self.a, moves=self._gather(s.D),
                       back=self._reduce(s.D, "mlp")))  # fmt: skip
    names = ("gate", "up") if s.m.gated else ("up",)
    for name in names:
      out.append(_Node(mark + name, ("mlp_in",), ("mlp_in",), size, (self._dot(tokens, s.D, width),), (at + name,)))
    wide = tuple(mark + name for name in names)
    out.append(_Node(f"{mark}hidden", wide, wide, size, vector_back=3 * size))
    out.append(
      _Node(inside or "mlp_out", (f"{mark}hidden",), (f"{mark}hidden",), tokens * s.D * self.a if inside else
            self.b * self.r * s.D * self.a, (self._dot(tokens, width, s.D),), (at + "down",),
            moves=() if inside else self._reduce(s.D, "mlp"), back=() if inside else self._gather(s.D))
    )  # fmt: skip
    return out

  def _moe(self, stack: str, entry: str) -> list[_Node]:
    s, a, tokens, at = self.shape, self.a, self.b * self.t, f"{stack}/mlp/"
    own = self.b * self.r
    residual, whole = own * s.D * a, tokens * s.D * a
    width = s.F / self.factor("mlp", "compute")
    parts = self.factor("experts", "compute")
    axes, groups = self.split("experts", "compute"), s.E_pad // parts
    choices = tokens * s.A
    room = min(math.ceil(s.buffer * choices), parts * choices) if parts > 1 else choices
    dense = s.m.moe.route == "dense"
    worked = tokens * s.E_pad if dense else choices  # rows of products: those that were chosen, however large the room
    rows = worked if dense else room
    there = lambda n, size: self._move("ragged-all-to-all", axes, size * n, "" if n > 1 else "float32")  # noqa: E731
    product = lambda k, n: self._dot(worked, k, n, groups)  # noqa: E731
    small = [(s.A, "float32"), (s.A, "int32"), (1, "bool")]  # gates, ids, valid
    size = rows * width * a
    nodes = [
      _Node("router", (entry,), (entry,), own * s.E_pad * 4, (Dot(own, s.D, s.E_pad, 0, True, 4),), (at + "router",),
            vector=residual),
      _Node("choice", ("router",), ("router",), moves=sum((self._gather(n, dtype) for n, dtype in small), ()),
            back=self._reduce(s.A, "mlp", "float32"), vector=6 * own * s.E_pad * 4, vector_back=6 * own * s.E_pad * 4),
      _Node("mlp_in", (entry,), size=whole, moves=self._gather(s.D), back=self._reduce(s.D, "mlp")),
      _Node("rows", ("mlp_in", "choice"), ("choice",), rows * s.D * a, moves=there(s.D, choices),
            back=there(s.D, room), vector=0 if dense else 2 * choices * s.D * a,
            vector_back=0 if dense else 3 * choices * s.D * a),
      _Node("row_gates", ("choice",), ("choice",), rows * 4, moves=there(1, choices), back=there(1, room)),
    ]  # fmt: skip
    names = ("gate", "up") if s.m.gated else ("up",)
    for name in names:
      nodes.append(_Node(name, ("rows",), ("rows",), size, (product(s.D, width),), (at + name,), vector=2 * size))
    nodes += [
      _Node("hidden", (*names, "row_gates"), (*names, "row_gates"), size, vector=3 * size, vector_back=6 * size),
      _Node("experts_out", ("hidden",), ("hidden",), rows * s.D * a, (product(width, s.D),), (at + "down",)),
      _Node("combined", ("experts_out", "choice"), ("choice",), whole, moves=there(s.D, room), back=there(s.D, choices),
            vector=0 if dense else 2 * choices * s.D * a, vector_back=0 if dense else 2 * choices * s.D * a),
    ]  # fmt: skip
    ins = ("combined",)
    if s.m.moe.shared:
      nodes += self._mlp(stack, entry, "shared_out")
      ins = ("combined", "shared_out")
    nodes.append(_Node("mlp_out", ins, (), residual, moves=self._reduce(s.D, "mlp"), back=self._gather(s.D),
                       vector=whole))  # fmt: skip
    return nodes

  # ---- remat

  def saved(self, nodes: list[_Node]) -> tuple[set[str], dict[str, float]]:
    """Names of the values that backward computes again, and bytes of each that it finds kept (or on the host)."""
    producer = {n.out: n for n in nodes}
    if self.plain:
      return set(), {n.out: n.size for n in nodes} | {"x": nodes[0].size}
    redo: set[str] = set()
    kept = {"x": nodes[0].size}
    stack = [value for n in nodes for value in n.needs]
    while stack:
      value = stack.pop()
      if value == "x" or value in redo:
        continue
      if self.actions.get(value.removeprefix("shared_"), "recompute") != "recompute":
        kept[value] = producer[value].size
        continue
      redo.add(value)
      stack += producer[value].ins
    return redo, kept

  def layer_parts(self, stack: str, window: int, dense: bool) -> tuple[Part, Part, float, float]:
    """(forward, backward, bytes kept on the device, bytes of backward's buffers) of a layer."""
    nodes = self.once((stack, window, dense), lambda: self.layer(stack, window, dense))
    redo, kept = self.saved(nodes)
    forward, backward = Part("forward"), Part("backward")
    for n in nodes:
      used = [g for w in n.weights for g in self.gathers(w, "float32" if w.endswith("/router") else "")]
      forward.weights += used
      backward.weights += used
      backward.weights += [g for w in n.weights for g in self.scatters(w)]
      _add(forward, n)
      if n.out in redo:
        _add(backward, n)
      for dot, w in zip(n.dots, n.weights, strict=True):
        backward.dots.append(Dot(dot.m, dot.n, dot.k, dot.groups, dot.exact, dot.out))
        if self._of(w)[0].trained:
          # the sum over rows is one product for each group
          backward.dots.append(Dot(dot.k, dot.m, dot.n, dot.groups, dot.exact, self.g))
      if n.kernel:
        backward.kernels.append(n.kernel[1])
      (backward.ring if n.kernel else backward.moves).extend(n.back)
      backward.vector += n.vector_back
    host = sum(size for name, size in kept.items() if self.actions.get(name) == "offload")
    stacked = sum(kept.values()) - host
    forward.vector += 2 * stacked
    backward.vector += 2 * stacked
    forward.offload = backward.offload = host
    return forward, backward, stacked, self._buffers(nodes, kept)

  def _buffers(self, nodes: list[_Node], kept: dict[str, float]) -> float:
    """Bytes that exist at once in a layer's backward: the larger of its two blocks, values and their gradients."""
    blocks: dict[bool, float] = {True: 0.0, False: 0.0}
    attention = True
    for n in nodes:
      attention = attention and n.out != "x1"
      if n.out not in kept or self.plain:
        blocks[attention] += n.size
      if n.kernel or n.out in ("gate", "up", "rows", "hidden"):
        blocks[attention] += n.size  # its gradient
    return max(blocks.values())

  # ---- the whole

  @functools.cached_property
  def kinds(self) -> dict[tuple[str, int, bool], int]:
    """(stack, window, dense) -> layers of that kind, over all stages."""
    s = self.shape
    return dict(collections.Counter(
      ("dense_layers" if i < s.L_dense else "layers", s.window(i), i < s.L_dense or not s.E) for i in range(s.L)
    ))  # fmt: skip

  @functools.cached_property
  def layers(self) -> dict[tuple[str, int, bool], tuple[Part, Part, float, float]]:
    return {kind: self.layer_parts(*kind) for kind in self.kinds}

  @functools.cached_property
  def parts(self) -> list[Part]:
    """The step of a device, in order. In a pipeline every tick counts, also those at which a stage has no work."""
    s, schedule = self.shape, self.step.schedule
    chunks = schedule.stages * schedule.repeats
    ticks = schedule.ticks
    out = [self.once("start", self._start)]
    residual = self.b * self.r * s.D * self.a
    lookup, lookup_back = self._lookup()
    lookup.times, lookup_back.times = ticks * (2 if s.L_dense else 1), ticks
    send = self._move("collective-permute", ("pipeline",), self.b * self.r * s.D) if schedule.stages > 1 else ()
    share = self._move("all-reduce", ("pipeline",), self.b * self.r * s.D) if schedule.stages > 1 else ()
    out.append(lookup)
    backward = []
    for (stack, window, dense), count in self.kinds.items():
      forward, back, *_ = self.layers[stack, window, dense]
      outside = stack == "dense_layers"
      times = count * ticks / (1 if outside else chunks)
      # the layers before `layers` are a part of the embedding, whose backward runs it once more
      out.append(dataclasses.replace(forward, name=f"{stack} forward", times=times * (2 if outside else 1)))
      backward.append(dataclasses.replace(back, name=f"{stack} backward", times=times))
    out.append(Part("stages forward", ticks, moves=list(send)))
    head = self._head(self.b * self.t)
    head.times = ticks - schedule.fill if schedule.stages * schedule.repeats > 1 else ticks
    head.moves += share
    out.append(head)
    if s.m.mtp:
      out += self._further(head)
    out += backward
    out.append(Part("stages backward", ticks, moves=list(send)))
    lookup_back.moves += share
    lookup_back.vector += 0 if schedule.stages == 1 else residual
    out.append(lookup_back)
    if ticks > 1:  # gradients are added up
      out.append(Part("accumulate", ticks, vector=3 * self.gradient_bytes / schedule.repeats))
    out.append(self.once("finish", self._finish))
    return out

  def _start(self) -> Part:
    """Parameters from role state to role param."""
    return Part("start", weights=[t for spec in self.step.skeleton.specs.values() for t in self._weight_moves(
      spec.shape, spec.names, "state", "param", spec.dtype, False)])  # fmt: skip

  def _lookup(self) -> tuple[Part, Part]:
    """The embedding, forward and backward."""
    s, rows = self.shape, self.b * self.t * self.shape.D
    table = self.V_l * s.D
    forward = Part("embedding", weights=self.gathers("embedding"), moves=list(self._reduce(s.D, "vocab")),
                   vector=2 * rows * self.a)  # fmt: skip
    trained = self._of("embedding")[0].trained
    back = Part("embedding backward", weights=self.scatters("embedding"), moves=list(self._gather(s.D)),
                vector=(2 * table * self.g + 3 * rows * self.g) if trained else 0)  # fmt: skip
    return forward, back if trained else Part("embedding backward")

  def _head(self, tokens: float) -> Part:
    """The loss with its gradients: logits, dx and dw of each chunk."""
    s = self.shape
    path = "embedding" if s.m.tied_embeddings else "head"
    size = loss._chunk_size(int(tokens), int(self.V_l), self.config.loss.chunk)
    chunks = int(tokens) // size
    dots = [Dot(size, s.D, self.V_l, 0, self.exact, 4), Dot(size, self.V_l, s.D, 0, self.exact, self.a),
            Dot(self.V_l, size, s.D, 0, self.exact, 4)]  # fmt: skip
    vocab = self.split("vocab", "compute")
    moves = self._gather(s.D) + self._reduce(s.D, "vocab")
    moves += 3 * self._move("all-reduce", vocab, tokens, "float32")  # maximum, sum, and logit of the target
    vector = 4 * tokens * self.V_l * 4 + (chunks > 1) * chunks * 3 * self.V_l * s.D * self.g
    norm = 6 * self.b * self.r * s.D * self.a
    return Part("head", dots=dots * chunks, weights=self.gathers(path) + self.scatters(path), moves=list(moves),
                vector=vector + norm)  # fmt: skip

  def _further(self, head: Part) -> list[Part]:
    """Multi-token prediction: for each module a projection, a layer, an embedding and a head."""
    s, own, times = self.shape, self.b * self.r, self.shape.m.mtp * head.times
    forward, back, *_ = self.layer_parts("mtp/layer", s.window(s.L), not s.E)
    lookup, lookup_back = self._lookup()
    dot = self._dot(own, 2 * s.D, s.D)
    projection = Part("projection", times, [dot, dot, Dot(own, s.D, 2 * s.D), Dot(2 * s.D, own, s.D)],
                      weights=2 * self.gathers("mtp/projection") + self.scatters("mtp/projection"))  # fmt: skip
    parts = [projection, forward, back, lookup, lookup_back, self._head(self.b * self.t)]
    return [dataclasses.replace(p, name=f"further {p.name}", times=times) for p in parts]

  def _finish(self) -> Part:
    """`context.complete_gradients`, and the update."""
    out = Part("update")
    for spec in self.step.trained.values():
      local = math.prod(spec.shape) / math.prod(self.factor(n, "state") for n in spec.names)
      out.moves += self._weight_moves(spec.shape, spec.names, "state", "param", self.shape.grad_dtype, True)
      done = {a for n in spec.names if n for role in rules.ROLES for a in self.split(n, role)}
      left = dict.fromkeys(a for n in rules.TOKENS for a in self.split(n, "compute") if a not in done)
      out.moves += self._move("all-reduce", tuple(left), local, self.shape.grad_dtype)
      out.vector += 3 * 4 * local  # of gradients; the state is read and written
    out.vector += 2 * sum(self.state_bytes)
    return out

  @functools.cached_property
  def gradient_bytes(self) -> float:
    """Gradients while they are added up: float32, in role param."""
    return sum(4 * math.prod(s.shape) / math.prod(self.factor(n, "param") for n in s.names)
               for s in self.step.trained.values())  # fmt: skip

  # ---- memory

  @functools.cached_property
  def state_bytes(self) -> tuple[float, float]:
    """Bytes of a device between steps, as the audit has them: parameters (with counters), and the optimizer's."""
    both = [0.0, 0.0]
    for info in self.step.infos():
      both[info.path.startswith("optimizer/")] += info.bytes // math.prod(self.factor(n, info.role) for n in info.names)
    return both[0], both[1]

  def memory(self) -> dict[str, float]:
    """Class -> bytes of a device at the peak: in the backward of a layer, or in the head."""
    s, schedule, rules_ = self.shape, self.step.schedule, self.rules
    parameters, moments = self.state_bytes
    on_host = self.config.optimizer.offload
    zero = [
      s for s in self.step.skeleton.specs.values() if rules_.spec(s.names, "param") != rules_.spec(s.names, "state")
    ]
    used = sum(4 * math.prod(s.shape) / math.prod(self.factor(n, "param") for n in s.names) for s in zero)
    chunks = schedule.stages * schedule.repeats
    kept = sum(self.layers[kind][2] * count / (chunks if kind[0] == "layers" else 1)
               for kind, count in self.kinds.items())  # fmt: skip
    if chunks > 1:
      kept *= schedule.slots + 1  # a ring of units, and the one at work
    table = self.V_l * s.D
    gathered = 0.0  # and of one weight the gradient, before it is scattered
    for stack, *_ in self.kinds:
      whole = [_gathered(self, path) for path in self._layer_paths(stack)]
      gathered = max(gathered, self.a * sum(whole) + 2 * self.g * max(whole))
    buffers = max(layer[3] for layer in self.layers.values())
    size = loss._chunk_size(int(self.b * self.t), int(self.V_l), self.config.loss.chunk)
    head = 2 * size * self.V_l * 4 + table * (self.a + 4) + 2 * self.b * self.t * s.D * self.a
    # The gradients of the layers of a microbatch come beside those that are added up, and not before its backward.
    layers = 4 * sum(math.prod(s.shape) / math.prod(self.factor(n, "param") for n in s.names)
                     for path, s in self.step.trained.items() if path.startswith("layers/"))  # fmt: skip
    gradients = self.gradient_bytes if schedule.ticks > 1 else self.gradient_bytes - layers
    work = {"gradients": gradients + layers / schedule.repeats, "gathered weights": gathered, "buffers": buffers}
    if gradients + head > sum(work.values()):
      work = {"gradients": gradients, "logits": head}
    return {"parameters": parameters + used, "optimizer": 0.0 if on_host else moments, "kept": kept, **work}

  def _layer_paths(self, stack: str) -> list[str]:
    return [p for p, s in self.step.skeleton.specs.items() if p.startswith(f"{stack}/") and len(s.shape) > 2]


def _gathered(work: Work, path: str) -> float:
  """Elements of a weight of one layer in use, where using it gathers it."""
  _, shape, names = work._of(path)
  if not any(work._more(names, "param", "compute")):
    return 0.0
  return math.prod(shape) / math.prod(work.factor(n, "compute") for n in names)


def _add(part: Part, n: _Node) -> None:
  part.dots += n.dots
  if n.kernel:
    part.kernels.append(n.kernel[0])
  (part.ring if n.kernel else part.moves).extend(n.moves)
  part.vector += n.vector


@functools.cache
def _block_pairs(queries: int, keys: int, block_q: int, block_kv: int, window: int) -> float:
  """Pairs in the blocks of a causal mask that are computed: those in which some query sees some key."""
  first = np.arange(0, queries, block_q)
  last_key = np.minimum((first + block_q - 1) // block_kv, keys // block_kv - 1)
  first_key = np.maximum(0, (first - window + 1) // block_kv) if window else np.zeros_like(first)
  return float((last_key - first_key + 1).sum()) * block_q * block_kv


@functools.cache
def _xla_pairs(t: int, whole: int, window: int, method: str) -> float:
  """Pairs that `attention._blocks` computes."""
  from maxscale.models.attention import CAUSAL_BLOCKS, WINDOW_BLOCKS

  def blocks(chunk: int, keys: int, static: bool) -> float:
    counts = (WINDOW_BLOCKS, CAUSAL_BLOCKS) if window else (CAUSAL_BLOCKS,) if static else ()
    rows = chunk // next((n for n in counts if chunk % n == 0 and chunk >= 32 * n), 1)
    total = 0.0
    for start in range(0, chunk, rows):
      if static:
        seen = min(keys, start + rows) - (max(0, start + 1 - window) if window else 0)
      else:
        seen = min(keys, rows + window) if window else keys
      total += rows * seen
    return total

  if method == "gather":
    return 2 * blocks(t // 2, whole, False)
  if method == "ring":
    return blocks(t, t, True) + (whole // t - 1) * t * t / 2
  return blocks(t, t, True)


# ---- seconds


@dataclasses.dataclass(frozen=True)
class _Device:
  """What `mesh_utils` asks of a device of a slice."""

  id: int
  coords: tuple[int, int, int]
  core_on_chip: int
  device_kind: str
  platform: str = "tpu"
  process_index: int = 0
  slice_index: int = 0


@functools.cache
def _grid(kind: str, chips: tuple[int, ...], cores: int, ici: tuple[int, ...]) -> np.ndarray:
  """[*ici, 4]: x, y, z and core of each device of a slice, as `mesh.make` would place them."""
  from jax.experimental import mesh_utils

  dims = (*chips, 1, 1)[:3]
  coords = [(x, y, z) for z in range(dims[2]) for y in range(dims[1]) for x in range(dims[0])]
  devices = [_Device(i * cores + core, at, core, kind) for i, at in enumerate(coords) for core in range(cores)]
  placed = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
  return np.array([(*d.coords, d.core_on_chip) for d in placed.flat]).reshape(*ici, 4)


@functools.cache
def _box(chip: Chip, chips: tuple[int, ...], ici: tuple[int, ...], axes: tuple[int, ...]) -> tuple[network.Dims, float]:
  """The box of the torus that devices along some axes of a mesh fill, and how many such groups share its links."""
  grid = _grid(chip.kinds[0], chips, chip.devices, ici)
  group = np.moveaxis(grid, axes, range(len(axes)))
  group = group.reshape(math.prod(ici[a] for a in axes), -1, 4)[:, 0]
  wrap = (*topology.wraps(chip.kinds[0], chips), False, False)
  dims, shared, count = [], 1, 1
  for dim in range(3):
    at = np.unique(group[:, dim])
    if len(at) > 1:
      stride = int(np.diff(at).min())
      dims.append((len(at), bool(wrap[dim] and len(at) * stride == chips[dim])))
      shared, count = max(shared, stride), count * len(at)
  cores = len(np.unique(group[:, 3]))
  if count * cores != len(group):  # no box: a line through its devices
    dims = [(len(group) // cores, False)]
  return tuple(dims), shared * chip.devices / cores


class Clock:
  """Seconds of parts on a chip, in a mesh."""

  def __init__(self, chip: Chip, chips: tuple[int, ...], shape: mesh.MeshShape, made: rules.Rules, e: Efficiency):
    self.chip, self.chips, self.shape, self.rules, self.e = chip, chips, shape, made, e
    self.peak = chip.bf16 / chip.devices
    self.hbm = chip.hbm_bytes / chip.devices * (chip.stream or e.stream)
    self.overlap = 0.0 if chip.name == "TPU v4" else e.overlap
    self.moved: dict[tuple, float] = {}
    self.dots: dict[Dot, float] = {}

  def dot(self, d: Dot) -> float:
    """Matrix unit and HBM, of which the longer hides a part of the shorter."""
    pad = lambda n, tile: math.ceil(n / tile) * tile  # noqa: E731
    tile = self.chip.tile
    m, k, n = pad(d.m, 8), pad(d.k, tile), pad(d.n, tile)
    rate = self.peak * (self.chip.matmul or self.e.matmul)
    if d.groups:
      rows, rate = max(d.m, d.k) if min(d.m, d.k) else d.m, self.peak * self.e.experts
      waste = 1 + d.groups * tile / rows  # a tile of rows for each group is partly another's
      work, weights = 2 * m * k * n * waste, d.groups
    else:
      work, weights = 2 * m * k * n, 1
    size = 2 * (2 if d.exact else 1)
    moved = size * (d.m * d.k + weights * d.k * d.n) + d.out * d.m * d.n
    times = sorted((work * (EXACT if d.exact else 1) / rate, moved / self.hbm))
    return times[1] + (1 - self.e.hidden) * times[0] + self.e.launch

  def kernel(self, k: Kernel) -> float:
    pad = lambda n: math.ceil(n / self.chip.tile) * self.chip.tile  # noqa: E731
    work = 2 * k.heads * k.pairs * (k.score * pad(k.qk) + k.mix * pad(k.v))
    return work / (self.peak * self.e.attention) + self.e.launch

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
      dims, shared = _box(self.chip, self.chips, self.shape.ici, at)
      return network.seconds(t.kind, t.bytes, self.chip, dims, 1 / shared)
    size = math.prod(self.shape.ici[i] for i in at)
    places = np.arange(math.prod(self.shape.ici)).reshape(self.shape.ici)
    group = np.moveaxis(places, at, range(len(at))).reshape(size, -1)[:, 0]
    across = len(np.unique(group // self.chip.domain))
    return network.switch_seconds(t.kind, t.bytes, self.chip, size, across)

  def part(self, p: Part) -> dict[str, float]:
    """Class -> seconds of all executions of a part."""
    out: dict[str, float] = collections.defaultdict(float)
    for d in p.dots:
      if d not in self.dots:
        self.dots[d] = self.dot(d)
      out["experts" if d.groups else "matmul"] += self.dots[d]
    out["attention"] = sum(map(self.kernel, p.kernels))
    out["vector"] = p.vector / (self.hbm * self.e.vector)
    compute = sum(out.values())
    for group, room in (("weights", self.overlap * compute), ("ring", out["attention"]), ("moves", 0.0)):
      links: dict[str, float] = collections.defaultdict(float)
      for whole in getattr(p, group):
        for t in traffic.by_slices([whole], self.rules) if self.rules.slices else (whole,):
          name, taken = "*".join(t.axes), t.times * self.transfer(t)
          if t.dcn:  # nothing was seen to hide it
            out[f"dcn {name}"] += taken
          else:
            links[f"ici {name}"] += taken
      total = sum(links.values())
      for name, taken in links.items():
        out[name] += taken * max(0.0, 1 - room / total) if total else 0.0
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
  return of(work, Clock(chip, chips, shape, step.rules, efficiency))


def of(work: Work, clock: Clock) -> Estimate:
  """What a step takes, by its parts and the seconds of each."""
  step, config, chip, efficiency = work.step, work.config, clock.chip, clock.e
  timed = [(p, clock.part(p)) for p in work.parts]
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
    seconds["offload"] = seconds.get("offload", 0.0) + work.state_bytes[1] * chip.devices / (chip.host_bytes or 16e9)
  total = sum(seconds.values())
  memory, limit = work.memory(), chip.hbm / chip.devices - efficiency.reserved
  tokens = config.data.batch_size * config.data.length
  per_chip = tokens / total / (clock.shape.devices / chip.devices)
  model = flops.from_config(config, config.model.vocab_size)
  return Estimate(
    memory=memory, seconds=dict(seconds), flops=sum(p.times * p.flops for p in work.parts), step_seconds=total,
    tokens_per_second_per_chip=per_chip, mfu=flops.mfu(model, config.data.length, per_chip, chip.bf16),
    fits=sum(memory.values()) <= limit, limit=limit, bound=max(seconds, key=lambda name: seconds[name]),
  )  # fmt: skip
