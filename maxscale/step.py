"""loss -> gradients -> update: the one jitted program, and everything that is known of its arrays before it runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxscale.config import (
  MESH_AXES,
  Config,
  ConfigError,
  Mesh,
  Remat,
  Sharding,
  nearest_divisors,
)
from maxscale.models import attention, decoder, loss, module, remat
from maxscale.models.module import ParamSpec, Tree
from maxscale.models.parts import Dropout, Shape
from maxscale.optim import optimizer
from maxscale.perf import compiler
from maxscale.sharding import audit, context, pipeline, rules, sequence
from maxscale.sharding import mesh as meshes

BATCH_KEYS = ("tokens", "targets", "segments", "positions")  # [B, T] int32; "rows" is [B]
COUNTERS = ("step", "skipped")


@dataclasses.dataclass(frozen=True)
class Program:
  """The programs of a config on a mesh. `config` and `vocab_size` say what, `mesh` and `rules` where."""

  config: Config
  vocab_size: int
  mesh: jax.sharding.Mesh
  rules: rules.Rules

  @functools.cached_property
  def shape(self) -> Shape:
    return Shape.of(self.config, self.vocab_size)

  @functools.cached_property
  def schedule(self) -> pipeline.Schedule:
    s = self.config.sharding
    return pipeline.Schedule(self.rules.factor("layers", "compute"), s.repeats, s.microbatches)

  @functools.cached_property
  def skeleton(self) -> module.Skeleton:
    return decoder.skeleton(self.shape, self.schedule.rows(self.shape.L))

  @functools.cached_property
  def optimizer(self) -> optimizer.Optimizer:
    return optimizer.make(self.config, self.skeleton.specs)

  # ---- what the state is

  @functools.cached_property
  def specs(self) -> dict[str, ParamSpec]:
    """Path of every array of the state -> its spec."""
    specs = {f"params/{path}": s for path, s in self.skeleton.specs.items()}
    specs |= {f"optimizer/{path}": s for path, s in self.optimizer.specs.items()}
    specs |= {name: ParamSpec(name, (), (), (), "int32", None, ()) for name in COUNTERS}
    return {path: dataclasses.replace(s, path=path) for path, s in specs.items()}

  def infos(self) -> list[audit.ArrayInfo]:
    """The state as the audit sees it. Master weights and moments are in role `state`."""
    return [audit.ArrayInfo(p, s.shape, s.names, jnp.dtype(s.dtype).itemsize, "state") for p, s in self.specs.items()]

  def sharding(self, spec: ParamSpec, role: str = "state") -> NamedSharding:
    """Where an array of the state is between steps."""
    on_host = self.config.optimizer.offload and spec.shape and spec.path.startswith("optimizer/")
    return NamedSharding(self.mesh, self.rules.spec(spec.names, role), memory_kind="pinned_host" if on_host else None)

  def param_specs(self, role: str) -> Tree:
    """PartitionSpec of every parameter in a role."""
    return module.map_specs(lambda s: self.rules.spec(s.names, role), self.skeleton.specs)

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
    self._check_stages()
    experts = self.rules.factor("experts", "compute")
    if experts > max(1, s.E):
      raise ConfigError(f"mesh.expert={experts} is more than model.experts={s.E}; lower it to {max(1, s.E)}, and give its "
                        "devices to mesh.fsdp")  # fmt: skip
    audit.check(self.infos(), self.rules, self.config.sharding.replicated_limit)
    check, parts = functools.partial(self.rules.check, role="compute"), self.rules.factor("length", "compute")
    sequence.order(length, parts, attention.balanced(self.config.sharding.context))
    check("the residual stream of a microbatch", ("batch", "residual_length", "embed"), (batch // m, length, s.D))
    check("attention", ("batch", "length", "heads", "head_dim"), (batch // m, length, s.N_pad, s.H))
    check("the logits", ("batch", "length", "vocab"), (batch // m, length, s.V_pad))
    check("the MLP", ("batch", "length", "mlp"), (batch // m, length, s.F))
    heads, kv = (n // self.rules.factor("heads", "compute") for n in (s.N_pad, s.K_pad))
    if self.config.sharding.context == "ulysses" and (heads % parts or kv % parts):
      raise ConfigError(
        f"sharding.context=ulysses exchanges heads along context: {heads} heads and {kv} key and value heads of a "
        f"device do not divide over mesh.context={parts}; use sharding.context=ring, or mesh.context of "
        f"{nearest_divisors(kv, parts)}"
      )

  def _check_stages(self) -> None:
    p, v, m, layers = self.schedule.stages, self.schedule.repeats, self.schedule.microbatches, self.shape.L
    if p == 1 and v > 1:
      raise ConfigError(f"sharding.repeats={v} is for a pipeline, and mesh.pipeline is 1; set sharding.repeats=1")
    if layers % (p * v):
      near = [n for n in (layers // (p * v) * p * v, -(-layers // (p * v)) * p * v) if n]
      raise ConfigError(
        f"model.layers={layers} is not divisible by mesh.pipeline={p} * sharding.repeats={v}; mesh.pipeline could be "
        f"{nearest_divisors(max(1, layers // v), p)}, or model.layers {' or '.join(map(str, near))}"
      )
    if m < p or (v > 1 and m % p):
      need = f"at least mesh.pipeline={p}" + (" and a multiple of it where sharding.repeats > 1" if v > 1 else "")
      raise ConfigError(
        f"sharding.microbatches={m} must be {need}, so that every stage has work; set it to {-(-m // p) * p}"
      )
    actions = remat.table(self.config.remat)
    if p > 1 and actions and "offload" in actions.values():
      raise ConfigError("remat.table offloads to host memory, and what a pipeline keeps for its backward stays in a ring "
                        "on the device; use keep or recompute, or mesh.pipeline=1")  # fmt: skip

  # ---- the programs

  def initialise(self) -> jax.stages.Wrapped:
    """() -> state, each array made already sharded."""

    def init() -> Tree:
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

  def trace(self, batch: int, length: int) -> jax.stages.Traced:
    """`train` for a global batch [B, T]."""
    return self.train().trace(self.abstract_state(), self.abstract_batch(batch, length))

  def compile(self, traced: jax.stages.Traced) -> jax.stages.Compiled:
    """Compiles with the options that are known to be good for the mesh's devices (perf/compiler.py)."""
    return traced.lower().compile(compiler_options=compiler.options(self.mesh.devices.flat[0].device_kind))

  def evaluate(self) -> jax.stages.Wrapped:
    """(params, batch) -> (sum of the plain loss, number of targets)."""

    def run(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
      _, _, sums = self.on_mesh(params, batch, None, jnp.float32(1), gradients=False)
      return sums["nll"], jnp.sum(batch["targets"] >= 0)

    return jax.jit(run)

  def on_mesh(
    self, params: Tree, batch: Tree, step: jax.Array | None, scale: jax.Array, gradients: bool = True
  ) -> tuple[Tree, jax.Array, Tree]:
    """Gradients (None without `gradients`), loss and sums for the metrics of a batch: one program manual over the mesh.

    The loss is a sum over tokens and sequences times `scale`, so that parts of a batch add up to the whole. `step`
    (for dropout) is None when evaluating. Parameters and gradients are in role state.
    """
    state = self.param_specs("state")
    batch_specs = {key: self.batch_sharding(key).spec for key in batch}
    sums = {"nll": PartitionSpec()}
    if self.shape.E:
      sums |= {k: PartitionSpec() for k in ("balance_loss", "dropped")}
      sums["expert_tokens"] = self.rules.spec(("layers", None), "compute")
    f = functools.partial(self._shard, gradients=gradients)
    whole = PartitionSpec()
    return context.on_mesh(
      f, self.mesh, self.rules, (state, batch_specs, whole, whole), (state if gradients else None, whole, sums)
    )(params, batch, step, scale)

  def for_sampling(self) -> Program:
    """The program of the same model on the same devices, for one sequence at a time: parameters split as far as they
    divide, nothing else split, since a single sequence has no batch."""
    config = dataclasses.replace(self.config, mesh=Mesh(), sharding=Sharding(), remat=Remat(policy="none"))
    devices = list(self.mesh.devices.flat)
    fsdp = math.gcd(len(devices), self.shape.D)
    shape = meshes.MeshShape(tuple({"fsdp": fsdp, "data": len(devices) // fsdp}.get(a, 1) for a in MESH_AXES),
                             (1,) * len(MESH_AXES))  # fmt: skip
    made = rules.make(config.sharding, shape.sizes)
    made = rules.Rules({**made.tables, "compute": {**made.tables["compute"], "batch": ()}}, shape.sizes)
    return Program(config, self.vocab_size, meshes.make(shape, devices), made)

  def adopt(self, params: Tree, other: Program) -> Tree:
    """The parameters of another program of the same model, as this one wants them: layers in its order, on its mesh."""

    def reorder(params: Tree) -> Tree:
      flat, mine, theirs = module.flatten(params), self.skeleton.specs, other.skeleton.specs
      for path, spec in mine.items():
        if spec.rows != theirs[path].rows:
          flat[path] = flat[path][np.argsort(theirs[path].rows)[np.asarray(spec.rows)]]
      return module.nest(flat)

    return jax.device_put(jax.jit(reorder)(params), module.map_specs(self.sharding, self.skeleton.specs))

  # ---- inside: what one device does

  def _shard(self, params: Tree, batch: Tree, step: jax.Array | None, scale: jax.Array, gradients: bool) -> Any:
    names = {path: s.names for path, s in self.skeleton.specs.items()}
    flat = {p: context.gather_param(x, names[p], "state", "param") for p, x in module.flatten(params).items()}
    outer = module.nest(flat)
    stack = {"layers": outer.pop("layers")}
    m = self.config.sharding.microbatches
    # [B, ...] -> [M, B/M, ...] by striding, so that every device keeps its own rows
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // m, m, *x.shape[1:]).swapaxes(0, 1), self._ordered(batch))
    pieces = self._pieces(step, scale)
    head_loss, stage_loss, head_sums, stage_sums, *grads = pipeline.run(
      self.schedule, pieces, outer, stack, parts, gradients
    )
    total = context.token_sum(head_loss, residual=False) + context.psum(
      context.token_sum(stage_loss, residual=True), "layers"
    )
    sums = {"nll": context.token_sum(head_sums["nll"], residual=False)}
    if stage_sums:
      dropped = context.token_sum(stage_sums.pop("dropped").sum(), residual=False)  # it counts tokens inside a block
      stage_sums = context.token_sum(stage_sums, residual=True)  # [layers of this stage, ...]
      sums |= context.psum({"balance_loss": stage_sums["balance_loss"].sum(), "dropped": dropped}, "layers")
      sums["expert_tokens"] = stage_sums["expert_tokens"]
    if not gradients:
      return None, total, sums
    flat = module.flatten({**grads[0], **grads[1]})
    complete = context.complete_gradients(flat, names, self.config.optimizer.grad_reduce_dtype)
    return module.nest(complete), total, sums

  def _ordered(self, batch: Tree) -> Tree:
    """This device's places of every sequence; `places` says which they are, [T] of them."""
    length = batch["tokens"].shape[1] * context.parts("length")
    order = sequence.order(length, context.parts("length"), attention.balanced(self.config.sharding.context))
    size = length // context.parts("length")
    mine = jax.lax.dynamic_slice_in_dim(jnp.asarray(order), context.shard_index("length") * size, size)
    out = dict(batch)
    if (order != np.arange(length)).any():
      for key in BATCH_KEYS:
        whole = jax.lax.all_gather(batch[key], context.mesh_axes("length"), axis=1, tiled=True)
        out[key] = whole[:, mine]
    out["places"] = jnp.broadcast_to(mine, batch["tokens"].shape)
    return out

  def _pieces(self, step: jax.Array | None, scale: jax.Array) -> pipeline.Pieces:
    c = self.config
    # Parameters ready for use are not to be kept: gathered they are whole, and a pipeline would keep them for each unit.
    gathers = any(self.rules.split(n, "param") != self.rules.split(n, "compute") for n in self.rules.tables["param"])
    wrap = functools.partial(remat.wrap, actions=remat.table(c.remat), drop_weights=gathers or self.schedule.stages > 1)
    spec = loss.LossSpec(self.vocab_size, c.loss.z_loss, c.loss.chunk)

    def embed(outer: Tree, part: Tree) -> jax.Array:
      return self.skeleton.merge(outer).embed(part["tokens"])

    def stage(stack: Tree, x: jax.Array, part: Tree, layers: jax.Array) -> Any:
      x, aux, _ = self.skeleton.merge(stack).run_layers(x, layers, part, self._dropout(part, step), remat=wrap)
      if not aux:
        return x, jnp.float32(0), {}
      add = scale * (c.loss.balance_loss * aux["balance_loss"] + c.loss.router_z_loss * aux["router_z_loss"])
      return x, add.sum(), {k: aux[k] for k in ("balance_loss", "expert_tokens", "dropped")}

    def head(outer: Tree, x: jax.Array, part: Tree) -> Any:
      total, nll = self.skeleton.merge(outer).loss(spec, x, part["targets"], scale)
      return total, {"nll": nll}

    return pipeline.Pieces(embed, stage, head)

  def _dropout(self, part: Tree, step: jax.Array | None) -> Dropout | None:
    if step is None or not self.shape.dropout:
      return None
    key = jax.random.fold_in(module.path_key(self.config.run.seed, "dropout"), step)
    length = part["tokens"].shape[1] * context.parts("length")
    return Dropout(key, context.own_part(part["rows"][:, None] * length + part["places"]), self.shape.dropout)

  # ---- the step

  def _train(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
    targets = jnp.sum(batch["targets"] >= 0)
    scale = 1 / jnp.maximum(targets, 1).astype(jnp.float32)
    grads, total, sums = self.on_mesh(state["params"], batch, state["step"], scale)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
    clip = self.config.optimizer.clip_norm
    if clip:
      grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / (norm + 1e-6)).astype(g.dtype), grads)
    old = self._moments(state["optimizer"], "device")
    params, moments = self.optimizer.update(grads, old, state["params"], state["step"])
    good = jnp.isfinite(total) & jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    new = {
      "params": keep(params, state["params"]),
      "optimizer": self._moments(keep(moments, old), "pinned_host"),
      "step": state["step"] + 1,
      "skipped": state["skipped"] + ~good,
    }
    return new, self._metrics(state["step"], total, sums, targets, norm, new["skipped"])

  def _moments(self, moments: Tree, memory: str) -> Tree:
    """The optimizer's arrays moved to a memory, where they live on the host."""
    if not self.config.optimizer.offload:
      return moments
    specs = self.optimizer.specs
    place = lambda s: NamedSharding(self.mesh, self.rules.spec(s.names, "state"), memory_kind=memory)  # noqa: E731
    return module.nest({
      path: jax.device_put(x, place(specs[path])) if x.ndim else x for path, x in module.flatten(moments).items()
    })  # fmt: skip

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
      out["expert_dropped"] = sums["dropped"]
    return out
