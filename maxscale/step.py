"""loss -> gradients -> update: the one jitted program, and everything that is known of its arrays before it runs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxscale.config import Config, ConfigError
from maxscale.models import decoder, loss, module, remat
from maxscale.models.module import ParamSpec, Tree
from maxscale.models.parts import Dropout, Shape
from maxscale.optim import optimizer
from maxscale.sharding import audit, context
from maxscale.sharding.rules import Rules

BATCH_KEYS = ("tokens", "targets", "segments", "positions")  # [B, T] int32; "rows" is [B]
COUNTERS = ("step", "skipped")


@dataclasses.dataclass(frozen=True)
class Program:
  """The programs of a config on a mesh. `config` and `vocab_size` say what, `mesh` and `rules` where."""

  config: Config
  vocab_size: int
  mesh: Mesh
  rules: Rules

  @functools.cached_property
  def shape(self) -> Shape:
    return Shape.of(self.config, self.vocab_size)

  @functools.cached_property
  def skeleton(self) -> module.Skeleton:
    return decoder.skeleton(self.shape)

  @functools.cached_property
  def optimizer(self) -> optimizer.Optimizer:
    return optimizer.make(self.config, self.skeleton.specs)

  # ---- what the state is

  @functools.cached_property
  def specs(self) -> dict[str, ParamSpec]:
    """Path of every array of the state -> its spec."""
    specs = {f"params/{path}": s for path, s in self.skeleton.specs.items()}
    specs |= {f"optimizer/{path}": s for path, s in self.optimizer.specs.items()}
    specs |= {name: ParamSpec(name, (), (), (), "int32", None, False) for name in COUNTERS}
    return {path: dataclasses.replace(s, path=path) for path, s in specs.items()}

  def infos(self) -> list[audit.ArrayInfo]:
    """The state as the audit sees it. Master weights and moments are in role `state`."""
    return [audit.ArrayInfo(p, s.shape, s.names, jnp.dtype(s.dtype).itemsize, "state") for p, s in self.specs.items()]

  def sharding(self, spec: ParamSpec, role: str = "state") -> NamedSharding:
    return NamedSharding(self.mesh, self.rules.spec(spec.names, role))

  def abstract_state(self) -> Tree:
    return module.map_specs(
      lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype), sharding=self.sharding(s)), self.specs
    )

  def batch_sharding(self, key: str) -> NamedSharding:
    names = ("batch",) if key == "rows" else ("batch", "length")
    return NamedSharding(self.mesh, self.rules.spec(names, "compute"))

  def abstract_batch(self, batch: int, length: int) -> Tree:
    shapes = dict.fromkeys(BATCH_KEYS, (batch, length)) | {"rows": (batch,)}
    return {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=self.batch_sharding(k)) for k, s in shapes.items()}

  def check(self, batch: int, length: int) -> None:
    """Refuses what the rules cannot place on the mesh, before anything is compiled.

    Raises:
      ConfigError: names the array, the sizes and what to change.
    """
    s, m = self.shape, self.config.sharding.microbatches
    audit.check(self.infos(), self.rules, self.config.sharding.replicated_limit)
    names = ("batch", "length", "embed")
    self.rules.check("the batch of a microbatch", names, (batch // m, length, s.D), "compute")
    self.rules.check(
      "attention", ("batch", "length", "heads", "head_dim"), (batch // m, length, s.N_pad, s.H), "compute"
    )
    # Inside `on_shards` these dimensions meet: an axis that split both would sum over devices with other tokens.
    self.rules.check("the logits", ("batch", "length", "vocab"), (batch // m, length, s.V_pad), "compute")
    self.rules.check("the MLP", ("batch", "length", "mlp"), (batch // m, length, s.F), "compute")
    self._check_compute()

  def _check_compute(self) -> None:
    """Refuses rules of role compute that no operation here is written for; they would be wrong without an error."""
    for name in ("embed", "length", "residual_length", "head_dim", "experts", "layers", "norm"):
      if self.rules.factor(name, "compute") > 1:
        raise ConfigError(
          f"sharding.compute.{name} splits it over {' * '.join(self.rules.axes(name, 'compute'))}, and no operation "
          f"works on a part of {name} yet; leave it out of sharding.compute"
        )
    heads, kv = (self.rules.factor(name, "compute") for name in ("heads", "kv_heads"))
    if heads != kv:
      raise ConfigError(
        f"sharding.compute splits heads over {heads} devices and kv_heads over {kv}, but a query head must be where its "
        "key and value head is; give both the same rule, and pad with model.kv_head_multiple"
      )

  # ---- the programs

  def initialise(self) -> jax.stages.Wrapped:
    """() -> state, each array made already sharded."""

    def init() -> Tree:
      with context.use(self.mesh, self.rules):
        params = module.map_specs(lambda s: module.initialise(s, self.config.run.seed), self.skeleton.specs)
        counters = {name: jnp.zeros((), jnp.int32) for name in COUNTERS}
        return {"params": params, "optimizer": self.optimizer.init(params), **counters}

    return jax.jit(init, out_shardings=module.map_specs(self.sharding, self.specs))

  def train(self) -> jax.stages.Wrapped:
    """(state, batch) -> (state, metrics). The state is donated."""
    shardings = module.map_specs(self.sharding, self.specs)
    return jax.jit(
      self._train,
      in_shardings=(shardings, {k: self.batch_sharding(k) for k in (*BATCH_KEYS, "rows")}),
      out_shardings=(shardings, NamedSharding(self.mesh, PartitionSpec())),
      donate_argnums=0,
    )

  def evaluate(self) -> jax.stages.Wrapped:
    """(params, batch) -> (sum of the plain loss, number of targets)."""

    def run(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
      with context.use(self.mesh, self.rules):
        _, sums = self.loss(params, batch, None, jnp.float32(1))
        return sums["nll"], jnp.sum(batch["targets"] >= 0)

    return jax.jit(run)

  def loss(self, params: Tree, batch: Tree, step: jax.Array | None, scale: jax.Array) -> tuple[jax.Array, Tree]:
    """The loss of a batch times `scale`, and sums for the metrics; `step` (for dropout) is None when evaluating.

    Everything is a sum over tokens or sequences, so that parts of a batch add up to the whole.
    """
    c = self.config
    model = self.skeleton.merge(params)
    x, aux, _ = model(
      batch["tokens"], batch["segments"], batch["positions"], self._dropout(batch, step),
      remat=lambda f: remat.wrap(f, remat.table(c.remat)),
    )  # fmt: skip
    head = model.head_table()
    spec = loss.LossSpec(self.vocab_size, c.loss.z_loss, c.loss.chunk, head.names, c.optimizer.grad_reduce_dtype)
    total, nll = loss.cross_entropy(spec, x, head.get_value(), batch["targets"], scale)
    sums = {"nll": nll}
    if aux:
      balance, router_z = aux["balance_loss"].sum(), aux["router_z_loss"].sum()
      total += scale * (c.loss.balance_loss * balance + c.loss.router_z_loss * router_z)
      sums |= {"balance_loss": balance, "expert_tokens": aux["expert_tokens"]}
    return total, sums

  def _dropout(self, batch: Tree, step: jax.Array | None) -> Dropout | None:
    if step is None or not self.shape.dropout:
      return None
    key = jax.random.fold_in(module.path_key(self.config.run.seed, "dropout"), step)
    length = batch["tokens"].shape[1]
    return Dropout(key, batch["rows"][:, None] * length + jnp.arange(length), self.shape.dropout)

  def _train(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
    with context.use(self.mesh, self.rules):
      targets = jnp.sum(batch["targets"] >= 0)
      scale = 1 / jnp.maximum(targets, 1).astype(jnp.float32)
      grads, total, sums = self._gradients(state["params"], batch, state["step"], scale)
      norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
      clip = self.config.optimizer.clip_norm
      if clip:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / (norm + 1e-6)).astype(g.dtype), grads)
      params, moments = self.optimizer.update(grads, state["optimizer"], state["params"], state["step"])
      good = jnp.isfinite(total) & jnp.isfinite(norm)
      keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
      new = {
        "params": keep(params, state["params"]),
        "optimizer": keep(moments, state["optimizer"]),
        "step": state["step"] + 1,
        "skipped": state["skipped"] + ~good,
      }
      return new, self._metrics(state["step"], total, sums, targets, norm, new["skipped"])

  def _metrics(self, step: jax.Array, total: jax.Array, sums: Tree, targets: jax.Array, norm: jax.Array,
               skipped: jax.Array) -> Tree:  # fmt: skip
    n = jnp.maximum(targets, 1)
    out = {
      "loss": sums["nll"] / n, "objective": total, "targets": targets, "grad_norm": norm, "skipped": skipped,
      "learning_rate": self.optimizer.learning_rate(step),
    }  # fmt: skip
    if "expert_tokens" in sums:
      per_layer = sums["expert_tokens"]  # [L, E]
      out["balance_loss"] = sums["balance_loss"] / (n * self.shape.L)
      out["expert_load"] = jnp.max(per_layer.max(-1) / jnp.maximum(per_layer.mean(-1), 1))
    return out

  def _gradients(self, params: Tree, batch: Tree, step: jax.Array, scale: jax.Array) -> tuple[Tree, jax.Array, Tree]:
    """Gradients, loss and sums of the batch, its microbatches one after another; all of them exact sums."""
    names = {path: s.names for path, s in self.skeleton.specs.items()}
    place = lambda tree, role: module.nest(  # noqa: E731
      {p: context.constrain(x, names[p], role) for p, x in module.flatten(tree).items()}
    )
    params = place(params, "param")

    def run(part: Tree) -> tuple[Tree, jax.Array, Tree]:
      (total, sums), grads = jax.value_and_grad(self.loss, has_aux=True)(params, part, step, scale)
      return place(grads, "state"), total, sums

    m = self.config.sharding.microbatches
    if m == 1:
      return run(batch)
    # [B, ...] -> [M, B/M, ...] by striding, so that every device keeps its own rows
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // m, m, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, jax.tree.map(lambda x: x[0], parts))
    )
    zeros = (place(zeros[0], "state"), *zeros[1:])
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, run(part)), None), zeros, parts)[0]
