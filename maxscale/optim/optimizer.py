"""The optimizer: Optax transformations on a nested dict of parameters, their state a nested dict too.

Optax states are tuples of named tuples; on disk, in rules and in fingerprints everything has a path, so the state
is kept as {"mu/<parameter path>": ..., "nu/<parameter path>": ..., "count": ...}, by the names that Optax has for its
moments. Moments of matrices are kept in optimizer.state_dtype; the others, which are small, in float32.

  adamw      b1, b2 and eps are its own; decay is decoupled, here and in the others, and of matrices alone
  adafactor  b1 averages updates (0: it has no such moment), b2 is the most that the decay of its squares becomes
  lion       b1 and b2 are its own
  muon       b1 is the momentum of matrices of layers; all else has AdamW's update
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxscale.config import Config
from maxscale.config import Optimizer as Options
from maxscale.models.module import ParamSpec, Tree, flatten, nest
from maxscale.optim import moments, muon
from maxscale.optim.adafactor import scale_by_factored_rms
from maxscale.optim.matrices import dimensions
from maxscale.sharding.rules import Rules

Schedule = optax.Schedule


def schedule(o: Options, steps: int) -> Schedule:
  """Learning rate as a function of the step (the first is step 0), over `steps` steps.

  Linear warm-up, then cosine or linear to final_fraction, which the last step has; wsd stays at the peak and falls
  linearly at the end.
  """
  peak, end, rest = o.learning_rate, o.learning_rate * o.final_fraction, max(1, steps - 1 - o.warmup_steps)
  # Step 0 already learns: the warm-up reaches the peak at step warmup_steps - 1.
  warmup = optax.linear_schedule(peak / max(1, o.warmup_steps), peak, max(1, o.warmup_steps - 1))
  if o.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, rest, o.final_fraction)
  elif o.schedule == "linear":
    after = optax.linear_schedule(peak, end, rest)
  elif o.schedule == "wsd":
    decay = min(rest, o.decay_steps or max(1, steps // 10))
    after = optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
  else:
    after = optax.constant_schedule(peak)
  return optax.join_schedules([warmup, after], [o.warmup_steps]) if o.warmup_steps else after


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """`update` maps (gradients, state, parameters, step) to (new parameters, new state); all nested dicts.

  Attributes:
    params: the specs of the parameters.
    leaves: of each leaf of Optax's state, its spec, its dtype between steps, and the specs of the arrays that hold it.
    treedef: of Optax's state.
  """

  transform: optax.GradientTransformation
  learning_rate: Schedule
  params: dict[str, ParamSpec]
  state_dtype: str
  leaves: list[tuple[ParamSpec, str, list[ParamSpec]]]
  treedef: Any
  seed: int

  @property
  def specs(self) -> dict[str, ParamSpec]:
    """Path of every array of the state -> its spec."""
    return {spec.path: spec for _, _, stored in self.leaves for spec in stored}

  def init(self, params: Tree) -> Tree:
    return self._store(self.transform.init(self._enter(params)), jnp.int32(0))

  def update(self, grads: Tree, state: Tree, params: Tree, step: jax.Array) -> tuple[Tree, Tree]:
    old = self._enter(params)
    updates, new = self.transform.update(self._enter(grads), self._load(state), old)
    rate = self.learning_rate(step)
    flat = flatten(jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), old, updates))
    return nest({path: moments.leave(self.params[path], x) for path, x in flat.items()}), self._store(new, step)

  def _enter(self, params: Tree) -> Tree:
    return nest({path: moments.enter(self.params[path], self.state_dtype, x) for path, x in flatten(params).items()})

  def _load(self, state: Tree) -> Any:
    flat = flatten(state)
    return jax.tree.unflatten(
      self.treedef,
      [moments.decode(spec, dtype, [flat[s.path] for s in stored]) for spec, dtype, stored in self.leaves],
    )

  def _store(self, state: Any, step: jax.Array) -> Tree:
    out = {}
    for (spec, dtype, stored), x in zip(self.leaves, jax.tree.leaves(state)):
      out |= {s.path: a for s, a in zip(stored, moments.encode(spec, dtype, x, self.seed, step))}
    return nest(out)


def make(
  config: Config, params: dict[str, ParamSpec], mesh: jax.sharding.Mesh | None = None, rules: Rules | None = None
) -> Optimizer:
  """The optimizer of a config for parameters described by their specs; on a mesh, they are in role state."""
  o = config.optimizer
  decayed = nest({path: dimensions(spec).is_matrix for path, spec in params.items()})
  transform = optax.chain(
    _scaling(config, params, mesh, rules), optax.add_decayed_weights(o.weight_decay, mask=decayed)
  )
  shapes = {path: moments.view(spec, o.state_dtype)[0].shape for path, spec in params.items()}
  abstract = nest({path: jax.ShapeDtypeStruct(shapes[path], jnp.dtype(s.dtype)) for path, s in params.items()})
  state = jax.eval_shape(transform.init, abstract)
  leaves = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
    spec, low = _spec(keys, leaf, params)
    dtype = o.state_dtype if low else spec.dtype
    leaves.append((spec, dtype, moments.specs(spec, dtype, rules)))
  rate = schedule(o, config.run.steps)
  return Optimizer(transform, rate, params, o.state_dtype, leaves, jax.tree.structure(state), config.run.seed)


def _scaling(
  config: Config, params: dict[str, ParamSpec], mesh: jax.sharding.Mesh | None, rules: Rules | None
) -> optax.GradientTransformation:
  """From gradients to updates of the size of AdamW's (Lion's are larger: its learning rate is 3 to 10 times smaller,
  Chen et al., arXiv 2302.06675)."""
  o = config.optimizer
  adam = optax.scale_by_adam(o.b1, o.b2, o.eps)
  if o.name == "lion":
    return optax.scale_by_lion(o.b1, o.b2)
  if o.name == "adafactor":
    factored = scale_by_factored_rms(params, o.b2)
    return optax.chain(factored, optax.ema(o.b1)) if o.b1 else factored
  if o.name == "muon":
    matrices = {path: spec for path, spec in params.items() if muon.applies(spec)}
    orthogonal = muon.orthogonalize(matrices, config.model.compute_dtype, mesh, rules)
    return optax.partition(
      {"muon": optax.chain(optax.trace(o.b1, nesterov=True), orthogonal), "adam": adam},
      nest({path: "muon" if path in matrices else "adam" for path in params}),
    )
  return adam


# Dimensions of the parameter that a moment is a mean over.
MEANS = {"v_row": lambda d: d.outputs, "v_col": lambda d: d.inputs}


def _spec(keys: tuple, leaf: Any, params: dict[str, ParamSpec]) -> tuple[ParamSpec, bool]:
  """The spec of a leaf of Optax's state, in which `keys` lead to it, and whether it may be kept in a lower precision.

  Its path is the name of the moment and the path of the parameter. Every count is the same one: steps.
  """
  last = max(i for i, key in enumerate(keys) if isinstance(key, jax.tree_util.GetAttrKey))
  kind, path = keys[last].name, "/".join(key.key for key in keys[last + 1 :])
  if kind == "count":
    return ParamSpec(kind, (), (), (), str(leaf.dtype), None, ()), False
  like = params[path]
  gone = MEANS[kind](dimensions(like)) if kind in MEANS else ()
  keep = lambda values: tuple(value for dim, value in enumerate(values) if dim not in gone)  # noqa: E731
  spec = dataclasses.replace(like, path=f"{kind}/{path}", shape=keep(like.shape), logical=keep(like.logical),
                             names=keep(like.names), dtype=str(leaf.dtype))  # fmt: skip
  assert math.prod(spec.shape) == leaf.size, f"the optimizer state {spec.path} {leaf.shape} is like no parameter"
  return spec, dimensions(like).is_matrix and not gone
