"""What a device has of a step: the sizes of its share, its products and kernels, and the collectives that it joins."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from maxscale.models.module import ParamSpec
from maxscale.perf import traffic
from maxscale.step import Program


class Dot(NamedTuple):
  """A product [m, k] x [k, n]; with `groups`, of `m` rows in so many groups, each with a matrix of its own.

  Attributes:
    exact: in float32.
    out: bytes of an element of the result.
    outer: the `k` rows are those in groups, and each group has a result of its own.
  """

  m: float
  k: float
  n: float
  groups: int = 0
  exact: bool = False
  out: int = 2
  outer: bool = False

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


class Local:
  """Sizes, collectives and bytes of arrays of a device, the same for every policy of remat.

  Legend: b sequences and t places of a microbatch on a device, r places of them in the residual layout, `a` bytes of
  an activation, `g` of a gradient. Sizes of the model as in models/parts.py, `*_l` those of a device.
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
    length = self.split("length", "compute")
    self.sequence = self.split("residual_length", "compute")[len(length) :]
    self.length = length
    self.made: dict[Any, Any] = {}  # what `once` has made

  def once(self, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once for all policies."""
    if key not in self.made:
      self.made[key] = make()
    return self.made[key]

  def dot(self, m: float, k: float, n: float, groups: int = 0) -> Dot:
    """A product in the dtype of activations."""
    return Dot(m, k, n, groups, self.exact, self.a)

  # ---- collectives

  def move(self, kind: str, axes: tuple[str, ...], size: float, dtype: str = "", times: int = 1) -> tuple:
    """A collective of `size` elements; () where there is nobody to send to."""
    dtype = dtype or self.shape.m.compute_dtype
    axes = tuple(a for a in axes if self.rules.sizes[a] > 1)
    if not axes:
      return ()
    return (traffic.Transfer(kind, axes, dtype, int(size * jnp.dtype(dtype).itemsize), times, 0),)

  def _rest(self, name: str) -> tuple[str, ...]:
    return tuple(a for a in self.split(name, "compute") if a not in self.sequence)

  def gather(self, width: float, dtype: str = "") -> tuple:
    """`context.gather` of [b, t, width]."""
    return self.move("all-gather", self.sequence, self.b * self.t * width, dtype)

  def reduce(self, width: float, name: str, dtype: str = "") -> tuple:
    """`context.reduce` of [b, t, width]."""
    size = self.b * self.t * width
    return self.move("all-reduce", self._rest(name), size, dtype) + self.move(
      "reduce-scatter", self.sequence, size, dtype
    )

  def extra_axes(self, names: Iterable[str | None], role: str, to: str) -> list[tuple[str, ...]]:
    """Mesh axes that split each dimension in `role`, and not in role `to`."""
    split = self.split
    return [split(n, role)[len(split(n, to)) :] if n else () for n in names]

  def weight_moves(
    self, shape: tuple[float, ...], names: tuple, role: str, to: str, dtype: str, gradient: bool
  ) -> list:
    """`context.gather_param` of a parameter of this shape, or `scatter_gradient` of its gradient."""
    out, size = [], math.prod(shape) / math.prod(self.factor(n, role) for n in names)
    extra = self.extra_axes(names, role, to)
    for axes in extra:
      size *= math.prod(self.rules.sizes[a] for a in axes)
      out += [] if gradient else self.move("all-gather", axes, size, dtype)
    for axis in (axis for axes in extra for axis in axes) if gradient else ():
      slices = self.rules.slices.get(axis, 1)
      inside = self.rules.sizes[axis] // slices
      found = self.move("reduce-scatter", (axis,), size, dtype)
      if slices > 1 and inside > 1:  # `context._reduce_scatter`
        across = self.move("reduce-scatter", (axis,), size / inside, dtype)
        found = tuple(dataclasses.replace(t, grouped=True, dcn=i > 0) for i, t in enumerate(found + across))
      out += found
      size /= inside * slices
    return out

  def parameter(self, path: str) -> tuple[ParamSpec, tuple, tuple]:
    """A parameter, and shape and names of it in one layer."""
    spec = self.step.skeleton.specs[path]
    lead = 1 if spec.rows else 0
    return spec, spec.shape[lead:], spec.names[lead:]

  def weight_gathers(self, path: str, dtype: str = "") -> list[traffic.Transfer]:
    """A use of a weight."""
    _, shape, names = self.parameter(path)
    dtype = dtype or self.shape.m.compute_dtype
    make = lambda: self.weight_moves(shape, names, "param", "compute", dtype, False)  # noqa: E731
    return self.once((path, dtype), make)

  def weight_scatters(self, path: str) -> list[traffic.Transfer]:
    """A gradient of a weight."""
    spec, shape, names = self.parameter(path)
    make = lambda: self.weight_moves(shape, names, "param", "compute", self.shape.grad_dtype, True)  # noqa: E731
    return self.once((path,), make) if spec.trained else []

  # ---- arrays

  @functools.cached_property
  def state_bytes(self) -> tuple[float, float]:
    """Bytes of a device between steps, as the audit has them: parameters (with counters), and the optimizer's."""
    both = [0.0, 0.0]
    for info in self.step.infos():
      both[info.path.startswith("optimizer/")] += info.bytes // math.prod(self.factor(n, info.role) for n in info.names)
    return both[0], both[1]

  @functools.cached_property
  def gradient_bytes(self) -> float:
    """Gradients while they are added up: float32, in role param."""
    return sum(4 * math.prod(s.shape) / math.prod(self.factor(n, "param") for n in s.names)
               for s in self.step.trained.values())  # fmt: skip
