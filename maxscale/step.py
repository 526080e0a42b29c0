"""loss -> gradients -> update: the one jitted program, and everything that is known of its arrays before it runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
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
from maxscale.models import attention, decoder, further, loss, module, monitor, remat, router
from maxscale.models.module import ParamSpec, Tree
from maxscale.models.parts import Dropout, Shape
from maxscale.optim import optimizer
from maxscale.perf import compiler
from maxscale.sharding import audit, context, pipeline, rules, sequence
from maxscale.sharding import mesh as meshes

BATCH_KEYS = ("tokens", "targets", "segments", "positions")  # [B, T] int32; "rows" is [B]
COUNTERS = ("step", "skipped")
# What a layer with experts says of a batch, and the names of the dimensions behind those of the layers: sums, or maxima.
EXPERTS = {"balance_loss": (), "expert_tokens": (None,), "entropy": (), "dropped": (), "max_tie": ()}


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
    return decoder.skeleton(self.shape, self.schedule.rows(self.shape.L - self.shape.L_dense))

  @functools.cached_property
  def trained(self) -> dict[str, ParamSpec]:
    """The parameters that have gradients and an optimizer's state."""
    return {path: s for path, s in self.skeleton.specs.items() if s.trained}

  @functools.cached_property
  def optimizer(self) -> optimizer.Optimizer:
    return optimizer.make(self.config, self.trained, self.mesh, self.rules)

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

  def param_specs(self, role: str, trained: bool = False) -> Tree:
    """PartitionSpec of every (trained) parameter in a role."""
    return module.map_specs(lambda s: self.rules.spec(s.names, role), self.trained if trained else self.skeleton.specs)

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
    weights = {re.sub(r"^(mtp/layer|dense_layers|layers)/", "", path) for path in self.skeleton.specs}
    others = ("_bias", "_norm", "scale", "bias", "sinks", "router", "correction", "projection", *module.ADAPTERS)
    weights = {weight for weight in weights if "/" in weight and not weight.endswith(others)}
    for pattern in self.config.model.quantize:
      if not any(re.fullmatch(pattern, weight) for weight in weights):
        raise ConfigError(f"model.quantize has {pattern!r}, which no weight of a product is called; they are "
                          f"{', '.join(sorted(weights))}")  # fmt: skip
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
    p, v, m, layers = (self.schedule.stages, self.schedule.repeats, self.schedule.microbatches,
                       self.shape.L - self.shape.L_dense)  # fmt: skip
    if p == 1 and v > 1:
      raise ConfigError(f"sharding.repeats={v} is for a pipeline, and mesh.pipeline is 1; set sharding.repeats=1")
    if layers % (p * v):
      near = [n for n in (layers // (p * v) * p * v, -(-layers // (p * v)) * p * v) if n]
      raise ConfigError(
        f"{self._layers_text()} is not divisible by mesh.pipeline={p} * sharding.repeats={v}; mesh.pipeline could be "
        f"{nearest_divisors(max(1, layers // v), p)}, or model.layers "
        f"{' or '.join(str(n + self.shape.L_dense) for n in near)}"
      )
    period = len(self.shape.m.windows) or 1
    if p * v > 1 and layers // (p * v) % period:
      raise ConfigError(
        f"a stage's {layers // (p * v)} layers are no whole number of the {period} kinds of model.windows, and stages run "
        f"one program; set mesh.pipeline * sharding.repeats so that layers / (their product) is a multiple of {period}"
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

  def _layers_text(self) -> str:
    first = self.shape.L_dense
    return f"model.layers={self.shape.L}" + (f" less model.moe.dense_layers={first}" if first else "")

  # ---- the programs

  def initialise(self) -> jax.stages.Wrapped:
    """(parameters that are there already, nested; none by default) -> state, each array made already sharded."""

    def init(given: Tree | None = None) -> Tree:
      flat = module.flatten(given or {})
      params = module.map_specs(
        lambda s: flat[s.path] if s.path in flat else module.initialise(s, self.config.run.seed), self.skeleton.specs
      )
      counters = {name: jnp.zeros((), jnp.int32) for name in COUNTERS}
      return {"params": params, "optimizer": self.optimizer.init(self._trained(params)), **counters}

    return jax.jit(init, out_shardings=module.map_specs(self.sharding, self.specs), donate_argnums=0)

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
    return self.train().trace(*self.abstract(batch, length))

  def abstract(self, batch: int, length: int) -> tuple[Tree, Tree]:
    """State and batch, as shapes with shardings."""
    return self.abstract_state(), self.abstract_batch(batch, length)

  def compile(self, traced: jax.stages.Traced) -> jax.stages.Compiled:
    """Compiles with the options that are known to be good for this program on the mesh's devices (perf/compiler.py)."""
    kind, slices = self.mesh.devices.flat[0].device_kind, math.prod(self.rules.slices.values())
    return compiler.compile(traced.lower(), compiler.options(kind, self.config, slices))

  def evaluate(self) -> jax.stages.Wrapped:
    """(params, batch) -> (sum of the plain loss, number of targets)."""

    def run(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
      _, _, sums = self.on_mesh(params, batch, None, jnp.float32(1), gradients=False)
      return sums["nll"], jnp.sum(batch["targets"] >= 0)

    return jax.jit(run)

  def watch(self) -> jax.stages.Wrapped:
    """(state, batch) -> (state, {"max_logit": [L]}): the largest attention logit of each layer, and the state after
    QK-clip, where the config has it (models/monitor.py). The state is donated."""

    def run(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
      _, _, sums = self.on_mesh(state["params"], batch, None, jnp.float32(1), gradients=False, watch=True)
      found = {stack: sums[stack]["max_logit"] for stack in ("dense_layers", "layers") if stack in sums}
      state = {**state, "params": monitor.qk_clip(self.shape, self.config.optimizer.qk_clip, state["params"], found)}
      order = np.argsort(self.skeleton.specs["layers/attention_norm/scale"].rows)
      found["layers"] = found["layers"][order]
      return state, {"max_logit": jnp.concatenate(list(found.values()))[:, : self.shape.N].max(-1)}

    shardings = module.map_specs(self.sharding, self.specs)
    batch = {k: self.batch_sharding(k) for k in (*BATCH_KEYS, "rows")}
    whole = NamedSharding(self.mesh, PartitionSpec())
    return jax.jit(run, in_shardings=(shardings, batch), out_shardings=(shardings, whole), donate_argnums=0)

  def on_mesh(
    self, params: Tree, batch: Tree, step: jax.Array | None, scale: jax.Array, gradients: bool = True,
    watch: bool = False,
  ) -> tuple[Tree, jax.Array, Tree]:  # fmt: skip
    """Gradients (None without `gradients`), loss and sums for the metrics of a batch: one program manual over the mesh.

    The loss is a sum over tokens and sequences times `scale`, so that parts of a batch add up to the whole. `step`
    (for dropout) is None when evaluating. Parameters and gradients are in role state. Multi-token prediction is part of
    training alone. With `watch` the sums hold the largest attention logits of each layer.
    """
    if self.shape.m.mtp and gradients:
      batch = further.with_places(batch, self.shape.m.mtp)
    state = self.param_specs("state")
    batch_specs = {key: self.batch_sharding(key).spec for key in batch}
    f, whole = functools.partial(self._shard, gradients=gradients, watch=watch), PartitionSpec()
    out = (self.param_specs("state", trained=True) if gradients else None, whole, self._sums_specs(gradients, watch))
    return context.on_mesh(f, self.mesh, self.rules, (state, batch_specs, whole, whole), out)(
      params, batch, step, scale
    )

  def _sums_specs(self, gradients: bool, watch: bool) -> Tree:
    seen = {"max_logit": ("heads",)} if watch else {}
    names: Tree = {"layers": ("layers", EXPERTS | seen if self.shape.E else seen)}
    if self.shape.L_dense and watch:
      names["dense_layers"] = (None, seen)
    if self.shape.m.mtp and gradients:
      names["mtp"] = (None, EXPERTS if self.shape.E else {})
    specs = {stack: {key: self.rules.spec((lead, *more), "compute") for key, more in keys.items()}
             for stack, (lead, keys) in names.items() if keys}  # fmt: skip
    return {"nll": PartitionSpec(), **({"mtp_nll": PartitionSpec()} if "mtp" in names else {}), **specs}

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

  def _shard(
    self, params: Tree, batch: Tree, step: jax.Array | None, scale: jax.Array, gradients: bool, watch: bool
  ) -> Any:
    specs = self.skeleton.specs
    names = {path: s.names for path, s in specs.items()}
    flat = {p: context.gather_param(x, names[p], "state", "param") for p, x in module.flatten(params).items()}
    stack = {path: x for path, x in flat.items() if path.startswith("layers/")}
    outer = {path: x for path, x in flat.items() if path not in stack}
    m = self.config.sharding.microbatches
    # [B, ...] -> [M, B/M, ...] by striding, so that every device keeps its own rows
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // m, m, *x.shape[1:]).swapaxes(0, 1), self._ordered(batch))
    head_loss, stage_loss, head_sums, stage_sums, *grads = pipeline.run(
      self.schedule, self._pieces(step, scale, gradients, watch), outer, stack, parts,
      (lambda path: specs[path].trained) if gradients else None,
    )  # fmt: skip
    total = context.token_sum(head_loss, residual=False) + context.psum(
      context.token_sum(stage_loss, residual=True), "layers"
    )
    sums = {**head_sums, **({"layers": stage_sums} if stage_sums else {})}
    sums = {key: self._over_tokens(s) if isinstance(s, dict) else context.token_sum(s, residual=False)
            for key, s in sums.items()}  # fmt: skip
    if not gradients:
      return None, total, sums
    flat = {**grads[0], **grads[1]}
    complete = context.complete_gradients(flat, names, self.config.optimizer.grad_reduce_dtype)
    return module.nest(complete), total, sums

  def _over_tokens(self, sums: Tree) -> Tree:
    """What layers say of this device's tokens -> of all."""
    inside = ("dropped", "max_logit")  # said inside a block, of all places of `length`
    over = lambda key: context.token_max if key.startswith("max_") else context.token_sum  # noqa: E731
    return {key: over(key)(x, residual=key not in inside) for key, x in sums.items()}

  def _ordered(self, batch: Tree) -> Tree:
    """This device's places of every sequence; `places` says which they are, [T] of them."""
    length = batch["tokens"].shape[1] * context.parts("length")
    order = sequence.order(length, context.parts("length"), attention.balanced(self.config.sharding.context))
    size = length // context.parts("length")
    mine = jax.lax.dynamic_slice_in_dim(jnp.asarray(order), context.shard_index("length") * size, size)
    out = dict(batch)
    if (order != np.arange(length)).any():
      for key in (key for key, x in batch.items() if x.ndim == 2):
        whole = jax.lax.all_gather(batch[key], context.mesh_axes("length"), axis=1, tiled=True)
        out[key] = whole[:, mine]
    out["places"] = jnp.broadcast_to(mine, batch["tokens"].shape)
    return out

  def _pieces(self, step: jax.Array | None, scale: jax.Array, gradients: bool, watch: bool) -> pipeline.Pieces:
    c = self.config
    # Parameters ready for use are not to be kept: gathered they are whole, and a pipeline would keep them for each unit.
    gathers = any(self.rules.split(n, "param") != self.rules.split(n, "compute") for n in self.rules.tables["param"])
    wrap = functools.partial(remat.wrap, actions=remat.table(c.remat), drop_weights=gathers or self.schedule.stages > 1)
    spec = loss.LossSpec(self.vocab_size, c.loss.z_loss, c.loss.chunk, c.model.logit_softcap)

    def model(flat: Tree) -> Any:
      return self.skeleton.merge(module.nest(flat))

    def call(part: Tree) -> decoder.Call:
      return decoder.Call(self._dropout(part, step), wrap, watch)

    def losses(aux: Tree) -> tuple[jax.Array, Tree]:
      """What layers add to the loss, and what is kept of what they say."""
      kept = {key: x for key, x in aux.items() if key in EXPERTS or key == "max_logit"}
      if "balance_loss" not in aux:
        return jnp.float32(0), kept
      add = scale * (c.loss.balance_loss * aux["balance_loss"] + c.loss.router_z_loss * aux["router_z_loss"])
      return add.sum(), kept

    def embed(outer: Tree, part: Tree) -> jax.Array:
      return model(outer).embed(part, call(part))[0]

    def stage(stack: Tree, x: jax.Array, part: Tree, layers: jax.Array) -> Any:
      x, aux, _ = model(stack).run_layers(x, layers, part, call(part))
      return x, *losses(aux)

    def head(outer: Tree, x: jax.Array, part: Tree) -> Any:
      total, nll = model(outer).loss(spec, x, part["targets"], scale)
      sums = {"nll": nll}
      if watch and self.shape.L_dense:
        sums["dense_layers"] = losses(model(outer).embed(part, call(part))[1])[1]
      if self.shape.m.mtp and gradients:
        further, sums["mtp_nll"], aux = model(outer).further(spec, x, part, scale * c.loss.mtp, call(part))
        more, aux = losses(aux)
        total = total + further + context.whole_length(more)
        sums |= {"mtp": aux} if aux else {}
      return total, sums

    return pipeline.Pieces(embed, stage, head)

  def _dropout(self, part: Tree, step: jax.Array | None) -> Dropout | None:
    if step is None or not self.shape.m.dropout:
      return None
    key = jax.random.fold_in(module.path_key(self.config.run.seed, "dropout"), step)
    length = part["tokens"].shape[1] * context.parts("length")
    return Dropout(key, context.own_part(part["rows"][:, None] * length + part["places"]), self.shape.m.dropout)

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
    trained = self._trained(state["params"])
    with jax.named_scope("optimizer"):
      params, moments = self.optimizer.update(grads, old, trained, state["step"])
    good = jnp.isfinite(total) & jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    flat = module.flatten(state["params"]) | module.flatten(params) | self._corrections(state["params"], sums)
    new = {
      "params": keep(module.nest(flat), state["params"]),
      "optimizer": self._moments(keep(moments, old), "pinned_host"),
      "step": state["step"] + 1,
      "skipped": state["skipped"] + ~good,
    }
    metrics = self._metrics(state["step"], total, sums, targets, norm, new["skipped"])
    if self.config.log.monitor_every and "layers" in trained:
      order = np.argsort(self.skeleton.specs["layers/attention_norm/scale"].rows)
      metrics |= monitor.layers(trained, params, grads, order)
    return new, metrics

  def _trained(self, params: Tree) -> Tree:
    flat = module.flatten(params)
    return module.nest({path: flat[path] for path in self.trained})

  def _corrections(self, params: Tree, sums: Tree) -> Tree:
    """The biases that balance the experts, after a step, by path."""
    if self.config.lora.rank:  # what adapters are trained beside stays as it is
      return {}
    flat, rate = module.flatten(params), self.config.model.moe.correction_rate
    paths = {"layers": "layers/mlp/correction", "mtp": "mtp/layer/mlp/correction"}
    return {path: router.corrected(flat[path], sums[stack]["expert_tokens"], rate)
            for stack, path in paths.items() if path in flat}  # fmt: skip

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
    if "mtp_nll" in sums:
      out["mtp_loss"] = sums["mtp_nll"] / n
    if self.shape.E:
      out |= self._balance(sums["layers"], n)
    return out

  def _balance(self, layers: Tree, targets: jax.Array) -> Tree:
    """How evenly tokens went to experts; expert_load: of the busiest expert of a layer, over the mean."""
    tokens = layers["expert_tokens"]  # [layers with experts, E]
    routed = jnp.maximum(tokens.sum(-1), 1) / self.shape.A
    return {
      "balance_loss": layers["balance_loss"].sum() / (targets * len(tokens)),
      "expert_load": jnp.max(tokens.max(-1) / jnp.maximum(tokens.mean(-1), 1)),
      "expert_dropped": layers["dropped"].sum(),
      "router_entropy": jnp.mean(layers["entropy"] / routed),
      "router_margin": -jnp.max(layers["max_tie"]),
    }
