"""Memory of a device at the peak of a step, by class, in closed form."""

from __future__ import annotations

import math

from maxscale.models import loss
from maxscale.perf.closed.local import Local
from maxscale.perf.closed.work import Work


def memory(work: Work) -> dict[str, float]:
  """Class -> bytes of a device at the peak: in the backward of a layer, or in the head."""
  d = work.local
  s, schedule = d.shape, d.step.schedule
  parameters, moments = d.state_bytes
  on_host = d.config.optimizer.offload
  zero = [s for s in d.step.skeleton.specs.values() if d.rules.spec(s.names, "param") != d.rules.spec(s.names, "state")]
  used = sum(4 * math.prod(s.shape) / math.prod(d.factor(n, "param") for n in s.names) for s in zero)
  chunks = schedule.stages * schedule.repeats
  kept = sum(work.layers[kind][2] * count / (chunks if kind[0] == "layers" else 1)
             for kind, count in work.kinds.items())  # fmt: skip
  if chunks > 1:
    kept *= schedule.slots + 1  # a ring of units, and the one at work
  table = d.V_l * s.D
  gathered = 0.0  # and of one weight the gradient, before it is scattered
  for stack, *_ in work.kinds:
    whole = [_gathered(d, path) for path in _layer_paths(d, stack)]
    gathered = max(gathered, d.a * sum(whole) + 2 * d.g * max(whole))
  # Of what is offloaded some layers' values are on their way: 3 to 4 in schedules for v6e.
  buffers = max(layer[3] + 3 * layer[1].offload for layer in work.layers.values())
  size = loss._chunk_size(int(d.b * d.t), int(d.V_l), d.config.loss.chunk)
  head = 2 * size * d.V_l * 4 + table * (d.a + 4) + 2 * d.b * d.t * s.D * d.a
  # The gradients of the layers of a microbatch come beside those that are added up, and not before its backward.
  layers = 4 * sum(math.prod(s.shape) / math.prod(d.factor(n, "param") for n in s.names)
                   for path, s in d.step.trained.items() if path.startswith("layers/"))  # fmt: skip
  gradients = d.gradient_bytes if schedule.ticks > 1 else d.gradient_bytes - layers
  peak = {"gradients": gradients + layers / schedule.repeats, "gathered weights": gathered, "buffers": buffers}
  if gradients + head > sum(peak.values()):
    peak = {"gradients": gradients, "logits": head}
  return {"parameters": parameters + used, "optimizer": 0.0 if on_host else moments, "kept": kept, **peak}


def _layer_paths(d: Local, stack: str) -> list[str]:
  return [p for p, s in d.step.skeleton.specs.items() if p.startswith(f"{stack}/") and len(s.shape) > 2]


def _gathered(d: Local, path: str) -> float:
  """Elements of a weight of one layer in use, where using it gathers it."""
  _, shape, names = d.parameter(path)
  if not any(d.extra_axes(names, "param", "compute")):
    return 0.0
  return math.prod(shape) / math.prod(d.factor(n, "compute") for n in names)
