"""What a device does in a step, by part: products, kernels, collectives and bytes, and what it keeps for backward.

The table of remat says which values of a layer (perf/closed/layer.py) are kept; what backward needs beyond those is computed
again, as `jax.checkpoint` would.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math

from maxscale.config import Remat
from maxscale.models import loss, remat
from maxscale.perf import traffic
from maxscale.perf.closed import layer
from maxscale.perf.closed.layer import Node
from maxscale.perf.closed.local import Dot, Kernel, Local
from maxscale.sharding import rules
from maxscale.step import Program


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


class Work:
  """Everything that a device does in a step with a policy of remat: `parts`, and what each layer keeps (`layers`)."""

  def __init__(self, step: Program, backend: str):
    self.local = Local(step, backend)
    gathers = any(step.rules.split(n, "param") != step.rules.split(n, "compute") for n in step.rules.tables["param"])
    self.drop_weights = gathers or step.schedule.stages > 1
    self._set(step.config.remat)

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

  # ---- remat

  def saved(self, nodes: list[Node]) -> tuple[set[str], dict[str, float]]:
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
    return redo.union(*(producer[value].beside for value in redo)), kept

  def layer_parts(self, stack: str, window: int, dense: bool) -> tuple[Part, Part, float, float]:
    """(forward, backward, bytes kept on the device, bytes of backward's buffers) of a layer."""
    d = self.local
    nodes = d.once((stack, window, dense), lambda: layer.values(d, stack, window, dense))
    redo, kept = self.saved(nodes)
    forward, backward = Part("forward"), Part("backward")
    for n in nodes:
      used = [g for w in n.weights for g in d.weight_gathers(w, "float32" if w.endswith("/router") else "")]
      forward.weights += used
      backward.weights += used
      backward.weights += [g for w in n.weights for g in d.weight_scatters(w)]
      _add(forward, n)
      if n.out in redo:
        _add(backward, n)
      for dot, w in zip(n.dots, n.weights, strict=True):
        backward.dots.append(Dot(dot.m, dot.n, dot.k, dot.groups, dot.exact, dot.out))
        if d.parameter(w)[0].trained:
          # the sum over rows is one product for each group
          backward.dots.append(Dot(dot.k, dot.m, dot.n, dot.groups, dot.exact, d.g, outer=bool(dot.groups)))
      backward.dots += n.others_back
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

  def _buffers(self, nodes: list[Node], kept: dict[str, float]) -> float:
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
    s = self.local.shape
    return dict(collections.Counter(
      ("dense_layers" if i < s.L_dense else "layers", s.window(i), i < s.L_dense or not s.E) for i in range(s.L)
    ))  # fmt: skip

  @functools.cached_property
  def layers(self) -> dict[tuple[str, int, bool], tuple[Part, Part, float, float]]:
    return {kind: self.layer_parts(*kind) for kind in self.kinds}

  @functools.cached_property
  def parts(self) -> list[Part]:
    """The step of a device, in order. In a pipeline every tick counts, also those at which a stage has no work."""
    d = self.local
    s, schedule = d.shape, d.step.schedule
    chunks = schedule.stages * schedule.repeats
    ticks = schedule.ticks
    out = [d.once("start", lambda: _start(d))]
    residual = d.b * d.r * s.D * d.a
    lookup, lookup_back = _lookup(d)
    lookup.times, lookup_back.times = ticks * (2 if s.L_dense else 1), ticks
    send = d.move("collective-permute", ("pipeline",), d.b * d.r * s.D) if schedule.stages > 1 else ()
    share = d.move("all-reduce", ("pipeline",), d.b * d.r * s.D) if schedule.stages > 1 else ()
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
    head = _head(d, d.b * d.t)
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
      out.append(Part("accumulate", ticks, vector=3 * d.gradient_bytes / schedule.repeats))
    out.append(d.once("finish", lambda: _finish(d)))
    return out

  def _further(self, head: Part) -> list[Part]:
    """Multi-token prediction: for each module a projection, a layer, an embedding and a head."""
    d = self.local
    s, own, times = d.shape, d.b * d.r, d.shape.m.mtp * head.times
    forward, back, *_ = self.layer_parts("mtp/layer", s.window(s.L), not s.E)
    lookup, lookup_back = _lookup(d)
    dot = d.dot(own, 2 * s.D, s.D)
    projection = Part("projection", times, [dot, dot, Dot(own, s.D, 2 * s.D), Dot(2 * s.D, own, s.D)],
                      weights=2 * d.weight_gathers("mtp/projection") + d.weight_scatters("mtp/projection"))  # fmt: skip
    parts = [projection, forward, back, lookup, lookup_back, _head(d, d.b * d.t)]
    return [dataclasses.replace(p, name=f"further {p.name}", times=times) for p in parts]


def _start(d: Local) -> Part:
  """Parameters from role state to role param."""
  return Part("start", weights=[t for spec in d.step.skeleton.specs.values() for t in d.weight_moves(
    spec.shape, spec.names, "state", "param", spec.dtype, False)])  # fmt: skip


def _lookup(d: Local) -> tuple[Part, Part]:
  """The embedding, forward and backward."""
  s, rows = d.shape, d.b * d.t * d.shape.D
  table = d.V_l * s.D
  forward = Part("embedding", weights=d.weight_gathers("embedding"), moves=list(d.reduce(s.D, "vocab")),
                 vector=2 * rows * d.a)  # fmt: skip
  trained = d.parameter("embedding")[0].trained
  back = Part("embedding backward", weights=d.weight_scatters("embedding"), moves=list(d.gather(s.D)),
              vector=(2 * table * d.g + 3 * rows * d.g) if trained else 0)  # fmt: skip
  return forward, back if trained else Part("embedding backward")


def _head(d: Local, tokens: float) -> Part:
  """The loss with its gradients: logits, dx and dw of each chunk."""
  s = d.shape
  path = "embedding" if s.m.tied_embeddings else "head"
  size = loss._chunk_size(int(tokens), int(d.V_l), d.config.loss.chunk)
  chunks = int(tokens) // size
  # The gradient of the matrix is read and written by the product that adds to it.
  dots = [Dot(size, s.D, d.V_l, 0, d.exact, 4), Dot(size, d.V_l, s.D, 0, d.exact, d.a),
          Dot(d.V_l, size, s.D, 0, d.exact, 8 if chunks > 1 else 4)]  # fmt: skip
  vocab = d.split("vocab", "compute")
  moves = d.gather(s.D) + d.reduce(s.D, "vocab")
  moves += 3 * d.move("all-reduce", vocab, tokens, "float32")  # maximum, sum, and logit of the target
  vector = 1.5 * tokens * d.V_l * 4  # the rest is done by the products' own passes over the logits
  norm = 6 * d.b * d.r * s.D * d.a
  return Part("head", dots=dots * chunks, weights=d.weight_gathers(path) + d.weight_scatters(path), moves=list(moves),
              vector=vector + norm)  # fmt: skip


def _finish(d: Local) -> Part:
  """`context.complete_gradients`, and the update."""
  out = Part("update")
  for spec in d.step.trained.values():
    local = math.prod(spec.shape) / math.prod(d.factor(n, "state") for n in spec.names)
    out.moves += d.weight_moves(spec.shape, spec.names, "state", "param", d.shape.grad_dtype, True)
    done = {a for n in spec.names if n for role in rules.ROLES for a in d.split(n, role)}
    left = dict.fromkeys(a for n in rules.TOKENS for a in d.split(n, "compute") if a not in done)
    out.moves += d.move("all-reduce", tuple(left), local, d.shape.grad_dtype)
    out.vector += 3 * 4 * local  # of gradients; the state is read and written
  out.vector += 2 * sum(d.state_bytes)
  return out


def _add(part: Part, n: Node) -> None:
  part.dots += n.dots + n.others
  if n.kernel:
    part.kernels.append(n.kernel[0])
  (part.ring if n.kernel else part.moves).extend(n.moves)
  part.vector += n.vector
