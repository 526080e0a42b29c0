"""Comparisons of two programs: alternating pairs on this machine, or the compiler's own figures."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Time of a over time of b: the median over pairs, and a 95% interval of that median."""

  median: float
  low: float
  high: float
  a_seconds: float
  b_seconds: float
  pairs: int

  def __str__(self) -> str:
    return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.pairs} pairs"


def alternate(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> Ratio:
  """Times a and b in pairs, the first of each pair in turn, after one run of each that does not count.

  Only the two of a pair are compared, so a machine that is slower for a while shifts neither the ratio nor its median.
  The interval is that of the bootstrap of the median, with a fixed seed.
  """
  a(), b()
  seconds = np.zeros((pairs, 2))
  for i in range(pairs):
    for which in (0, 1) if i % 2 == 0 else (1, 0):
      start = time.perf_counter()
      (a, b)[which]()
      seconds[i, which] = time.perf_counter() - start
  ratios = seconds[:, 0] / seconds[:, 1]
  samples = np.median(np.random.default_rng(0).choice(ratios, (10000, pairs)), axis=1)
  low, high = np.quantile(samples, [0.025, 0.975])
  a_seconds, b_seconds = np.median(seconds, axis=0)
  return Ratio(float(np.median(ratios)), float(low), float(high), float(a_seconds), float(b_seconds), pairs)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step: matmul FLOPs of its trace, bytes of temporaries, seconds of compilation, the executable."""

  flops: float
  temporaries: int
  seconds: float
  executable: Any


def compile_step(traced: Any) -> Compiled:
  """Compiles a traced step without any cache of compiled programs."""
  from maxscale.perf.flops import jaxpr_flops

  start = time.perf_counter()
  executable = traced.lower().compile()
  seconds = time.perf_counter() - start
  return Compiled(jaxpr_flops(traced.jaxpr), executable.memory_analysis().temp_size_in_bytes, seconds, executable)


def matmul_seconds(jaxpr: Any) -> float:
  """Seconds that the matmuls of a program take on this machine, each of them run alone: the best that it could do.

  A step's matmuls are smaller, thinner and otherwise laid out than the large square one whose rate is called a peak.
  """
  import jax
  import jax.numpy as jnp

  from maxscale.perf.flops import dots

  counts: dict[Any, float] = {}
  for eqn, times in dots(jaxpr):
    key = tuple((v.aval.shape, v.aval.dtype) for v in eqn.invars), tuple(sorted(eqn.params.items(), key=str))
    counts[key] = counts.get(key, 0) + times
  total = 0.0
  for (avals, params), times in counts.items():
    arguments = [jnp.ones(shape, dtype) for shape, dtype in avals]
    run = jax.jit(functools.partial(jax.lax.dot_general_p.bind, **dict(params)))
    total += times * _best(lambda run=run, arguments=arguments: jax.block_until_ready(run(*arguments)))
  return total


def _best(run: Callable[[], Any], tries: int = 5) -> float:
  run()
  seconds = []
  for _ in range(tries):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return min(seconds)
