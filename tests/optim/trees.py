"""Parameters for the optimizer tests: stacked, padded, of experts; small but with more than one block of int8."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from maxscale.models.module import ParamSpec, flatten, map_specs, nest
from maxscale.optim import optimizer
from maxscale.sharding import mesh as meshes
from maxscale.sharding import rules
from tests.models import reference as ref

L, D, N, H, E, F, V = 4, 256, 3, 4, 4, 24, 13
# path -> names and logical sizes of one layer; of matrices, how many leading dimensions are inputs, behind experts
SHAPES = {
  "embedding": (("vocab", "embed"), (V, D), 1),
  "layers/attention/query": (("embed", "heads", "head_dim"), (D, N, H), 1),
  "layers/attention/query_bias": (("heads", "head_dim"), (N, H), 0),
  "layers/attention/out": (("heads", "head_dim", "embed"), (N, H, D), 2),
  "layers/mlp/up": (("experts", "embed", "mlp"), (E, D, F), 1),
  "layers/mlp/down": (("experts", "mlp+embed", None), (E, F, D), 1),
}
MATRICES = [path for path, (*_, inputs) in SHAPES.items() if inputs]
MUON = ["layers/attention/query", "layers/attention/out", "layers/mlp/up", "layers/mlp/down"]
PADDED = {"heads": 4, "vocab": 16}


def specs(rows=tuple(range(L)), padded=PADDED):
  out = {}
  for path, (names, shape, _) in SHAPES.items():
    lead, name = ((len(rows),), ("layers",)) if path.startswith("layers/") else ((), ())
    full = tuple(max(padded.get(n, 0), s) for n, s in zip(names, shape))
    out[path] = ParamSpec(path, lead + full, lead + shape, name + names, "float32", 1.0, rows if lead else ())
  return out


def values(seed, rows=tuple(range(L)), scale=1.0):
  """Logical values by path, of uneven sizes; layers in the order of `rows`."""
  rng = np.random.default_rng(seed)
  out = {}
  for path, (_, shape, _) in SHAPES.items():
    lead = (L,) if path.startswith("layers/") else ()
    x = scale * rng.normal(size=lead + shape) * np.exp(rng.normal(size=shape[-1:]))
    out[path] = np.float32(x[list(rows)] if lead else x)
  return out


def pad(flat, specs):
  return {path: np.pad(x, [(0, p - n) for p, n in zip(specs[path].shape, x.shape)]) for path, x in flat.items()}


def logical(flat, specs):
  """The parts without padding, layers in their order."""
  out = {}
  for path, x in flat.items():
    x = np.asarray(x)[tuple(slice(n) for n in specs[path].logical)]
    out[path] = x[np.argsort(specs[path].rows)] if specs[path].rows else x
  return out


def padding(x, spec):
  """The padded elements."""
  inside = np.zeros(spec.shape, bool)
  inside[tuple(slice(n) for n in spec.logical)] = True
  return np.asarray(x)[~inside]


class Run:
  """An optimizer on some devices, as the step has it: jitted, arrays in role state, the state donated."""

  def __init__(self, devices=1, rows=tuple(range(L)), padded=PADDED, **options):
    base = {"model.compute_dtype": "float32", "optimizer.warmup_steps": 0, "optimizer.schedule": "constant"}
    self.config = ref.config({**base, **{key.replace("__", "."): value for key, value in options.items()}})
    shape, self.mesh = meshes.for_config(self.config, jax.devices()[:devices])
    self.rules = rules.make(self.config.sharding, shape.sizes, shape.slices)
    self.rows, self.params = rows, specs(rows, padded)
    self.optimizer = optimizer.make(self.config, self.params, self.mesh, self.rules)
    self.step = 0
    where = map_specs(self.sharding, self.params), map_specs(self.sharding, self.optimizer.specs)
    self.jitted = jax.jit(self.optimizer.update, out_shardings=where, donate_argnums=1)
    self.tree = self.place(values(0, rows))
    self.state = jax.jit(self.optimizer.init, out_shardings=where[1])(self.tree)

  def sharding(self, spec):
    return NamedSharding(self.mesh, self.rules.spec(spec.names, "state"))

  def place(self, flat):
    return nest({p: jax.device_put(x, self.sharding(self.params[p])) for p, x in pad(flat, self.params).items()})

  def take(self, gradients):
    """A step; gradients are logical, layers in the order of the rows."""
    self.tree, self.state = self.jitted(self.place(gradients), self.state, self.tree, jnp.int32(self.step))
    self.step += 1

  @property
  def whole(self):
    """Parameters and state by path, padded."""
    return flatten({"params": self.tree, "optimizer": self.state})

  @property
  def specs(self):
    return {f"{group}/{path}": spec for group, specs in (("params", self.params), ("optimizer", self.optimizer.specs))
            for path, spec in specs.items()}  # fmt: skip

  def as_program(self):
    """What `resume.leaves` wants of a program."""
    return types.SimpleNamespace(specs=self.specs, sharding=self.sharding)
