"""The optimizer: Optax transformations on a nested dict of parameters, their state a nested dict too.

Optax states are tuples of named tuples; on disk, in rules and in fingerprints everything has a path, so the state
is kept as {"mu/<parameter path>": ..., "nu/<parameter path>": ..., "count": ...}.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxscale.config import Config
from maxscale.config import Optimizer as Options
from maxscale.models.module import ParamSpec, Tree, flatten, nest

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
  """`update` maps (gradients, state, parameters, step) to (new parameters, new state); all nested dicts."""

  transform: optax.GradientTransformation
  learning_rate: Schedule
  treedef: Any
  specs: dict[str, ParamSpec]

  def init(self, params: Tree) -> Tree:
    return nest(_by_path(self.transform.init(params)))

  def update(self, grads: Tree, state: Tree, params: Tree, step: jax.Array) -> tuple[Tree, Tree]:
    flat = flatten(state)
    old = jax.tree.unflatten(self.treedef, [flat[path] for path in self.specs])
    updates, new = self.transform.update(grads, old, params)
    rate = self.learning_rate(step)
    params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
    return params, nest(_by_path(new))


def make(config: Config, params: dict[str, ParamSpec]) -> Optimizer:
  """The optimizer of a config for parameters described by their specs."""
  o = config.optimizer
  decayed = nest({path: "norm" not in spec.names for path, spec in params.items()})
  transform = optax.chain(
    optax.scale_by_adam(o.b1, o.b2, o.eps), optax.add_decayed_weights(o.weight_decay, mask=decayed)
  )
  abstract = nest({path: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)) for path, s in params.items()})
  state = jax.eval_shape(transform.init, abstract)
  specs = {path: _spec(path, leaf, params) for path, leaf in _by_path(state).items()}
  return Optimizer(transform, schedule(o, config.run.steps), jax.tree.structure(state), specs)


def _by_path(state: Any) -> dict[str, Any]:
  """Leaves of an Optax state by path; positions in a chain are dropped, names stay."""
  out = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
    names = [getattr(k, "name", getattr(k, "key", None)) for k in keys if not isinstance(k, jax.tree_util.SequenceKey)]
    path = "/".join(map(str, names))
    assert path not in out, f"two leaves of the optimizer state are called {path}"
    out[path] = leaf
  return out


def _spec(path: str, leaf: Any, params: dict[str, ParamSpec]) -> ParamSpec:
  """The spec of a state leaf: that of the parameter whose path it ends in, or a scalar."""
  like = params.get(path.partition("/")[2])
  if like is not None and like.shape == leaf.shape:
    return dataclasses.replace(like, path=path, dtype=str(leaf.dtype))
  assert leaf.shape == (), f"the optimizer state {path} {leaf.shape} is like no parameter"
  return ParamSpec(path, (), (), (), str(leaf.dtype), None, ())
