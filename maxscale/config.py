"""Every option: its default, its meaning, its class, its checks. The only place with defaults.

A config file has `get_config()`, which starts from `default()` (an ml_collections.ConfigDict) and changes what it
needs. `load()` applies the overrides of the command line, checks everything that can be checked without JAX, and
returns the frozen `Config`. Nothing here imports JAX: a wrong config is refused before any device is touched.

Each option has a class, which says what happens when it differs between a run and its resume:
  identity  it defines the run; a difference refuses the resume. The config hash covers these alone.
  schedule  it may change; the change is written to the event log.
  runtime   it is free: where and how the program runs, not what it computes.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import typing
from typing import Any

import ml_collections

from maxscale.errors import UserError

IDENTITY, SCHEDULE, RUNTIME = "identity", "schedule", "runtime"
MESH_AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")  # outermost first
REMAT_ACTIONS = ("keep", "recompute", "offload")


class ConfigError(UserError):
  """A config that cannot run. The message names the option and says what to change."""

  exit_code = 2


def option(default: Any, kind: str, meaning: str, choices: tuple = ()) -> Any:
  """A field of the option tree: default, class (identity, schedule, runtime), one-line meaning, legal values."""
  metadata = {"kind": kind, "meaning": meaning, "choices": choices}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Run:
  name: str = option("", RUNTIME, "name of the run; empty: the name of the config file")
  dir: str = option("", RUNTIME, "directory of the run; empty: runs/<name>")
  seed: int = option(0, IDENTITY, "seed of initialisation, data order and dropout")
  steps: int = option(1000, SCHEDULE, "optimizer steps of the whole run")
  simulated_devices: int = option(0, RUNTIME, "CPU devices to simulate; 0: use the machine's own devices")
  compile_cache: str = option("~/.cache/maxscale/xla", RUNTIME, "directory of compiled programs; empty: none")
  init_from: str = option("", RUNTIME, "directory with the checkpoint whose parameters a new run starts from")
  flags: dict = option(
    {}, RUNTIME, "compiler options, added to those of perf/compiler.py or in their place; '': that one is left out"
  )


@dataclasses.dataclass(frozen=True)
class Mla:
  """Multi-head latent attention (DeepSeek-AI, arXiv 2405.04434); kv_rank 0: grouped-query attention instead."""

  q_rank: int = option(0, IDENTITY, "width of the latent queries; 0: queries come from the residual stream")
  kv_rank: int = option(0, IDENTITY, "width of the latent keys and values; 0: no latent attention")
  nope_dim: int = option(128, IDENTITY, "width of a head's queries and keys without rotary embedding")
  rope_dim: int = option(64, IDENTITY, "width of a head's rotary queries, and of the rotary key that heads share")
  v_dim: int = option(128, IDENTITY, "width of a head's values")
  norm_eps: float = option(1e-6, IDENTITY, "epsilon of the norms of the latents")


@dataclasses.dataclass(frozen=True)
class Moe:
  score: str = option("softmax", IDENTITY, "what makes scores of router logits", ("softmax", "sigmoid"))
  normalise: bool = option(True, IDENTITY, "the weights of a token's experts are divided by their sum")
  scale: float = option(1.0, IDENTITY, "the weights of a token's experts are multiplied by this")
  groups: int = option(1, IDENTITY, "groups of experts; a token's experts come from the best of them")
  groups_per_token: int = option(1, IDENTITY, "groups that a token's experts may come from")
  group_score: str = option("max", IDENTITY, "score of a group: its best expert's, or its best two's", ("max", "top2"))
  router_bias: bool = option(False, IDENTITY, "the router's logits have a bias")
  correction: bool = option(False, IDENTITY, "a bias without gradient corrects the choice of experts, and balances it")
  correction_rate: float = option(1e-3, SCHEDULE, "step of that bias towards balance; 0: it stays as it is")
  shared: int = option(0, IDENTITY, "hidden width of the MLP that every token passes beside its experts; 0: none")
  dense_layers: int = option(0, IDENTITY, "first layers that have a dense MLP instead of experts")
  dense_mlp: int = option(0, IDENTITY, "hidden width of the MLP of those layers; 0: model.mlp")
  capacity: float = option(
    0.0, SCHEDULE, "tokens of a sequence that an expert takes, over the balanced number; 0: all (dropless)"
  )
  route: str = option(
    "sparse", RUNTIME, "sorted rows, or every expert for every token (to compare)", ("sparse", "dense")
  )


@dataclasses.dataclass(frozen=True)
class Model:
  vocab_size: int = option(0, IDENTITY, "tokens of the vocabulary; 0: the tokenizer's")
  family: str = option("", RUNTIME, "family (models/families) whose Hugging Face form `maxscale.convert` writes")
  embed: int = option(512, IDENTITY, "width of the residual stream (D)")
  layers: int = option(8, IDENTITY, "number of layers (L)")
  heads: int = option(8, IDENTITY, "query heads (N)")
  kv_heads: int = option(0, IDENTITY, "key and value heads (K); 0: as many as query heads")
  head_dim: int = option(0, IDENTITY, "width of a head (H); 0: embed / heads")
  mlp: int = option(2048, IDENTITY, "hidden width of the MLP, or of each expert (F)")
  experts: int = option(0, IDENTITY, "experts of a layer (E); 0: a dense MLP")
  experts_per_token: int = option(2, IDENTITY, "experts that each token uses (k)")
  tied_embeddings: bool = option(False, IDENTITY, "the output head is the embedding table")
  embedding_scale: float = option(0.0, IDENTITY, "factor of the embeddings; 0: the square root of embed")
  max_positions: int = option(0, IDENTITY, "rows of a learned table of positions; 0: rotary embeddings")
  rope_theta: float = option(10000.0, IDENTITY, "base of the rotary embedding")
  rope_local_theta: float = option(0.0, IDENTITY, "base in layers with a window, never scaled; 0: as other layers")
  rope_scaling: dict = option(
    {}, IDENTITY, "scaling of rotary frequencies: {type: linear | llama3 | yarn, ...} (models/rope.py)"
  )
  norm: str = option("rms", IDENTITY, "RMSNorm, RMSNorm with 1 + scale, or LayerNorm", ("rms", "rms_plus_one", "layer"))
  norm_eps: float = option(1e-6, IDENTITY, "epsilon of the norms")
  post_norms: bool = option(False, IDENTITY, "the output of each block is normalised, too")
  parallel_block: bool = option(False, IDENTITY, "attention and MLP of a layer have the same input")
  activation: str = option(
    "silu", IDENTITY, "of MLPs", ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")
  )
  gated: bool = option(True, IDENTITY, "MLPs have a gate beside the hidden product")
  mlp_bias: bool = option(False, IDENTITY, "products of MLPs and experts have a bias")
  qkv_bias: bool = option(False, IDENTITY, "queries, keys and values have a bias")
  out_bias: bool = option(False, IDENTITY, "the output of attention has a bias")
  qk_norm: bool = option(False, IDENTITY, "queries and keys are normalised, head by head")
  query_scale: float = option(0.0, IDENTITY, "factor of the attention logits; 0: head_dim ** -0.5")
  attention_softcap: float = option(0.0, IDENTITY, "attention logits are c * tanh(logits / c); 0: as they are")
  attention_sinks: bool = option(False, IDENTITY, "each head has a learned logit that takes weight and has no value")
  logit_softcap: float = option(0.0, IDENTITY, "output logits are c * tanh(logits / c); 0: as they are")
  windows: tuple = option((), IDENTITY, "keys that a layer's queries see, layer after layer, repeated; 0: all")
  window_kind: str = option("sliding", IDENTITY, "the last keys, or those of the same chunk", ("sliding", "chunked"))
  mtp: int = option(0, IDENTITY, "modules that predict a further token each (multi-token prediction)")
  mla: Mla = dataclasses.field(default_factory=Mla)
  moe: Moe = dataclasses.field(default_factory=Moe)
  dropout: float = option(0.0, SCHEDULE, "dropout rate on each block's output while training")
  compute_dtype: str = option("bfloat16", SCHEDULE, "dtype of matmuls", ("float32", "bfloat16"))
  quantize: dict = option({}, SCHEDULE, "regular expression of weight names -> int8 | fp8 | int8_tensor | fp8_tensor")
  vocab_multiple: int = option(128, RUNTIME, "the table of embeddings is padded to a multiple of this")
  kv_head_multiple: int = option(1, RUNTIME, "key and value heads are padded to a multiple of this")
  expert_multiple: int = option(1, RUNTIME, "experts are padded to a multiple of this")


@dataclasses.dataclass(frozen=True)
class Loss:
  z_loss: float = option(1e-4, SCHEDULE, "weight of the squared log-normaliser of the output softmax")
  balance_loss: float = option(0.01, SCHEDULE, "weight of the expert balance loss, defined per sequence")
  router_z_loss: float = option(1e-3, SCHEDULE, "weight of the squared log-normaliser of the router")
  mtp: float = option(0.1, SCHEDULE, "weight of the loss of further tokens (model.mtp)")
  chunk: int = option(0, RUNTIME, "positions whose logits exist at once; 0: chosen from the vocabulary")


@dataclasses.dataclass(frozen=True)
class Data:
  sources: dict = option(
    {"stdlib": {"kind": "stdlib"}}, SCHEDULE, "name -> {kind, path, column, dtype, heldout} (data/sources.py)"
  )
  mixture: dict = option({}, SCHEDULE, "source name -> weight; empty: every source equally")
  tokenizer: str = option("bytes", IDENTITY, "bytes, or the path of a tokenizer.json or SentencePiece .model")
  batch_size: int = option(32, SCHEDULE, "sequences of a global batch")
  length: int = option(512, SCHEDULE, "tokens of a sequence (T)")
  phases: tuple = option((), SCHEDULE, "changes from a step on: ({start, batch_size?, length?, mixture?}, ...)")
  cache: str = option("~/.cache/maxscale/data", RUNTIME, "directory of tokenised corpora")
  prefetch: int = option(8, RUNTIME, "batches read ahead")
  threads: int = option(2, RUNTIME, "threads that read batches")
  deadline: float = option(3600.0, RUNTIME, "seconds to wait for another process that tokenises the corpus")


@dataclasses.dataclass(frozen=True)
class Phase:
  """What holds from a step on."""

  start: int
  batch_size: int
  length: int
  mixture: dict


def phases(data: Data) -> list[Phase]:
  """The phases of a schedule: the first is `data.*` itself, each later one inherits what it does not change."""
  out = [Phase(0, data.batch_size, data.length, data.mixture)]
  for changes in data.phases:
    out.append(dataclasses.replace(out[-1], **changes))
  return out


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adaptation (Hu et al., arXiv 2106.09685): the base is frozen, two thin matrices beside a weight are trained."""

  rank: int = option(0, IDENTITY, "rank of the adapters; 0: everything is trained, without adapters")
  alpha: float = option(16.0, IDENTITY, "adapters are multiplied by alpha / rank")
  targets: str = option(".*/(query|value)", IDENTITY, "regular expression of the weights that have an adapter")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  name: str = option("adamw", IDENTITY, "the optimizer (optim/optimizer.py)", ("adamw", "adafactor", "lion", "muon"))
  state_dtype: str = option(
    "float32", IDENTITY, "dtype of the moments; int8 has a scale for each block", ("float32", "bfloat16", "int8")
  )
  learning_rate: float = option(3e-4, SCHEDULE, "peak learning rate")
  schedule: str = option("cosine", SCHEDULE, "shape after the warm-up", ("cosine", "linear", "wsd", "constant"))
  warmup_steps: int = option(100, SCHEDULE, "steps of linear warm-up")
  decay_steps: int = option(0, SCHEDULE, "steps of the final decay of wsd; 0: a tenth of the run")
  final_fraction: float = option(0.1, SCHEDULE, "learning rate of the last step, as a fraction of the peak")
  b1: float = option(0.9, SCHEDULE, "decay of the first moment")
  b2: float = option(0.95, SCHEDULE, "decay of the second moment")
  eps: float = option(1e-8, SCHEDULE, "epsilon of the update")
  weight_decay: float = option(0.1, SCHEDULE, "decoupled weight decay of matrices (not of norms and biases)")
  clip_norm: float = option(1.0, SCHEDULE, "global gradient norm is clipped to this; 0: never")
  qk_clip: float = option(0.0, SCHEDULE, "attention logit above which a head's query and key weights shrink; 0: never")
  offload: bool = option(False, RUNTIME, "the optimizer's moments live in host memory between steps")
  grad_reduce_dtype: str = option(
    "float32", SCHEDULE, "dtype in which weight gradients are made and reduced", ("float32", "bfloat16")
  )


@dataclasses.dataclass(frozen=True)
class Dcn:
  data: int = option(-1, RUNTIME, "slices along data; -1: what is left")
  fsdp: int = option(1, RUNTIME, "slices along fsdp")
  expert: int = option(1, RUNTIME, "slices along expert")
  context: int = option(1, RUNTIME, "slices along context")
  tensor: int = option(1, RUNTIME, "slices along tensor")
  pipeline: int = option(1, RUNTIME, "slices along pipeline")


@dataclasses.dataclass(frozen=True)
class Mesh:
  data: int = option(1, RUNTIME, "devices of a slice along data (replicas)")
  fsdp: int = option(-1, RUNTIME, "devices of a slice along fsdp (sharded parameters); -1: what is left")
  expert: int = option(1, RUNTIME, "devices of a slice along expert")
  context: int = option(1, RUNTIME, "devices of a slice along context (split sequences)")
  tensor: int = option(1, RUNTIME, "devices of a slice along tensor (split matrices)")
  pipeline: int = option(1, RUNTIME, "devices of a slice along pipeline (stages)")
  slices: int = option(0, RUNTIME, "slices to simulate; 0: those that the devices report")
  topology: str = option(
    "", RUNTIME, "chips of a slice that the config is for, as v5p:8x8x8; nothing is required of the devices"
  )
  dcn: Dcn = dataclasses.field(default_factory=Dcn)


@dataclasses.dataclass(frozen=True)
class Sharding:
  param: dict = option({}, RUNTIME, "logical axis -> mesh axes of resident parameters; adds to the default table")
  state: dict = option({}, RUNTIME, "the same for master weights and optimizer state; defaults to param")
  compute: dict = option({}, RUNTIME, "the same for operations and activations")
  microbatches: int = option(1, RUNTIME, "parts of a batch: gradients are accumulated, pipeline stages work on several")
  repeats: int = option(1, RUNTIME, "chunks of layers of a pipeline stage (circular schedule): a smaller bubble")
  context: str = option(
    "ring", RUNTIME, "attention over split sequences: K and V go around, are gathered, or heads are exchanged",
    ("ring", "gather", "ulysses"),
  )  # fmt: skip
  experts: str = option(
    "exchange", RUNTIME, "split experts: a token goes to each that it chose, or to all of a group, from which sums come back",
    ("exchange", "gather"),
  )  # fmt: skip
  expert_buffer: float = option(
    2.0, RUNTIME, "rows that a device's experts can receive, as a multiple of the balanced load"
  )
  replicated_limit: float = option(64.0, RUNTIME, "MiB that an array may hold replicated without being an error")


@dataclasses.dataclass(frozen=True)
class Remat:
  policy: str = option("full", RUNTIME, "what backward keeps", ("none", "full", "attention", "projections", "custom"))
  table: dict = option({}, RUNTIME, "activation name -> keep | recompute | offload; overrides the policy")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = option(500, RUNTIME, "steps between checkpoints; the last step is always saved")
  keep: int = option(3, RUNTIME, "newest checkpoints to keep")
  keep_every: int = option(0, RUNTIME, "also keep every checkpoint at a multiple of this step; 0: none")
  timeout: float = option(1800.0, RUNTIME, "seconds that a save may take before the run stops")


@dataclasses.dataclass(frozen=True)
class Eval:
  every: int = option(500, RUNTIME, "steps between evaluations on held-out text; 0: never")
  batches: int = option(8, RUNTIME, "batches of an evaluation")


@dataclasses.dataclass(frozen=True)
class Log:
  every: int = option(10, RUNTIME, "steps between lines of the terminal")
  monitor_every: int = option(0, RUNTIME, "steps between looks at the numerics of each layer; 0: never")
  tensorboard: bool = option(True, RUNTIME, "write TensorBoard files beside metrics.jsonl")
  profile_start: int = option(0, RUNTIME, "first step of a profile; 0: none")
  profile_steps: int = option(3, RUNTIME, "steps of the profile")
  sample_prompt: str = option("", RUNTIME, "prompt of the text sampled at the end")
  sample_tokens: int = option(0, RUNTIME, "tokens sampled at the end; 0: none")
  peak_tflops: float = option(0.0, RUNTIME, "peak of a device for MFU; 0: the hardware table, or measured on a CPU")


@dataclasses.dataclass(frozen=True)
class Config:
  run: Run = dataclasses.field(default_factory=Run)
  model: Model = dataclasses.field(default_factory=Model)
  loss: Loss = dataclasses.field(default_factory=Loss)
  data: Data = dataclasses.field(default_factory=Data)
  lora: Lora = dataclasses.field(default_factory=Lora)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  sharding: Sharding = dataclasses.field(default_factory=Sharding)
  remat: Remat = dataclasses.field(default_factory=Remat)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  eval: Eval = dataclasses.field(default_factory=Eval)
  log: Log = dataclasses.field(default_factory=Log)

  @property
  def run_dir(self) -> str:
    return self.run.dir or os.path.join("runs", self.run.name)

  @property
  def kv_heads(self) -> int:
    return self.model.kv_heads or self.model.heads

  @property
  def head_dim(self) -> int:
    """Width of a query or key of a head."""
    mla = self.model.mla
    return mla.nope_dim + mla.rope_dim if mla.kv_rank else self.model.head_dim or self.model.embed // self.model.heads

  @property
  def value_dim(self) -> int:
    """Width of a value of a head."""
    return self.model.mla.v_dim if self.model.mla.kv_rank else self.head_dim

  @property
  def dense_layers(self) -> int:
    """Layers with a dense MLP before those with experts."""
    return self.model.moe.dense_layers if self.model.experts else 0

  @property
  def hash(self) -> str:
    """The first 12 hex digits of SHA-256 over the identity options."""
    identity = {path: value for path, (value, field) in flatten(self).items() if field.metadata["kind"] == IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


# ---- the tree as paths


def flatten(config: Any, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
  """Path of each option -> (value, field), in the order of the tree."""
  out = {}
  for field in dataclasses.fields(config):
    value, path = getattr(config, field.name), prefix + field.name
    out.update(flatten(value, path + ".") if dataclasses.is_dataclass(value) else {path: (value, field)})
  return out


def to_json(config: Config) -> str:
  """The resolved config as indented JSON: what `--print_config` prints and every run saves."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
  """The inverse of `to_json`; options that an older file lacks take their defaults.

  Raises:
    ConfigError: the file has an option that this version does not know.
  """
  return _build(Config, json.loads(text), "")


def default() -> ml_collections.ConfigDict:
  """A locked ConfigDict of all options with their defaults; the dicts in it accept new keys."""
  config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
  config.lock()
  for path, (value, _) in flatten(Config()).items():
    if isinstance(value, dict):
      node: Any = config
      for key in path.split("."):
        node = node[key]
      node.unlock()
  return config


def differences(old: Config, new: Config) -> list[tuple[str, str, Any, Any]]:
  """(path, class, old value, new value) of every option that differs."""
  a, b = flatten(old), flatten(new)
  return [(p, f.metadata["kind"], a[p][0], v) for p, (v, f) in b.items() if a[p][0] != v]


# ---- a small copy


# What `--small` changes beside the model, so that a laptop trains it.
SMALL: dict[str, Any] = {
  "run.simulated_devices": 8, "run.steps": 20, "run.flags": {}, "mesh": {"fsdp": -1, "tensor": 2}, "sharding.repeats": 1,
  "sharding.microbatches": 1, "optimizer.offload": False, "optimizer.warmup_steps": 5, "model.vocab_size": 0,
  "data.batch_size": 16, "data.length": 128, "data.phases": (), "data.tokenizer": "bytes", "data.mixture": {},
  "eval.batches": 2,
}  # fmt: skip


def scaled_down(config: Config, unit: int, layers: int, length: int) -> dict[str, Any]:
  """Options of a small model that has every choice of a config's: what `--small` trains and `maxscale.check` compares.

  Args:
    unit: its width in 32; other sizes go with it.
    layers: those of each kind (windows), beside one dense layer where experts begin later.
    length: tokens of its sequences; windows are a quarter of it.
  """
  m, mla, moe = config.model, config.model.mla, config.model.moe
  kv = 3 if config.kv_heads & (config.kv_heads - 1) else min(2 * config.kv_heads, 4) if config.kv_heads > 1 else 1
  experts = min(m.experts, _few_experts(m.experts, m.experts_per_token))
  windows = tuple(dict.fromkeys(min(window, length // 4) for window in m.windows))  # each kind of layer once
  dense = min(config.dense_layers, 1)
  return {
    "model.embed": 32 * unit, "model.layers": dense + layers * max(1, len(windows)), "model.windows": windows,
    "model.heads": kv * min(m.heads // config.kv_heads, 4), "model.kv_heads": kv, "model.kv_head_multiple": 4,
    "model.head_dim": 8 * unit, "model.mlp": (32 if experts else 64) * unit,
    "model.experts": experts, "model.expert_multiple": 8 if experts % 8 else 1,
    "model.max_positions": min(m.max_positions, length), "model.mtp": min(m.mtp, 1),
    "model.mla": {"q_rank": min(mla.q_rank, 16 * unit), "kv_rank": min(mla.kv_rank, 16 * unit),
                  "nope_dim": 8 * unit, "rope_dim": 4 * unit, "v_dim": 6 * unit},
    "model.moe.shared": min(moe.shared, 16 * unit), "model.moe.dense_layers": dense,
    "model.moe.dense_mlp": min(moe.dense_mlp, 48 * unit), **_few_groups(m, experts),
    "model.compute_dtype": "float32",
  }  # fmt: skip


def _few_experts(count: int, chosen: int) -> int:
  """Experts of the copy: enough to choose from and for 8 devices, a power of two only if `count` is one."""
  size = 8
  while size < 2 * chosen:
    size *= 2
  return size + 2 if count & (count - 1) else size


def _few_groups(m: Model, experts: int) -> dict[str, int]:
  """Groups for the experts of the copy: a few, where one group is left out and experts inside the others are, too."""
  if experts == m.experts or m.moe.groups == 1:
    return {}
  groups = next(n for n in (4, 3, 2) if n <= m.moe.groups and experts % n == 0)
  limited = min(m.experts_per_token * groups // experts + 1, groups - 1)
  chosen = limited if m.moe.groups_per_token < m.moe.groups else groups
  return {"model.moe.groups": groups, "model.moe.groups_per_token": chosen}


def change(tree: dict, options: dict[str, Any]) -> None:
  """Sets options, by path, in nested dicts."""
  for path, value in options.items():
    *groups, last = path.split(".")
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = value


# ---- loading: file, overrides, types


def load(path: str, overrides: typing.Sequence[tuple[str, str]] = (), small: bool = False) -> Config:
  """Reads a config file (Python, or the config.json of a run), applies `(dotted option, text)` overrides, checks, freezes.

  `small` makes the small copy of it before the overrides, and gives the run a directory of its own.

  Raises:
    ConfigError: the file, an option or a combination is wrong; nothing was touched.
  """
  tree = _read_file(path)
  if small:
    change(tree, {**SMALL, **scaled_down(_build(Config, tree, ""), 4, 2, SMALL["data.length"])})
  for key, text in overrides:
    _override(tree, key, text)
  config = _build(Config, tree, "")
  if not config.run.name:
    name = os.path.splitext(os.path.basename(path))[0] + ("-small" if small else "")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
  check(config)
  return config


def split_overrides(arguments: list[str]) -> list[tuple[str, str]]:
  """`--config.a.b=v` or `--config.a.b v` -> [("a.b", "v")].

  Raises:
    ConfigError: an argument is not of that form.
  """
  out, rest = [], list(arguments)
  while rest:
    argument = rest.pop(0)
    if not argument.startswith("--config."):
      raise ConfigError(f"unknown argument {argument!r}; options are set as --config.group.option=value")
    key, equals, text = argument.removeprefix("--config.").partition("=")
    if not equals:
      if not rest:
        raise ConfigError(f"{argument} has no value; write {argument}=value")
      text = rest.pop(0)
    out.append((key, text))
  return out


def _read_file(path: str) -> dict:
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or "."
    near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [], 1)
    hint = f"; did you mean {os.path.join(folder, near[0])}?" if near else ""
    raise ConfigError(f"there is no config file {path}{hint}")
  if path.endswith(".json"):  # what a run saved, or a conversion wrote
    try:
      with open(path, encoding="utf-8") as f:
        tree = json.load(f)
    except ValueError as e:
      raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(tree, dict):
      raise ConfigError(f"{path} must hold groups of options, as the config.json that a run saves")
    return tree
  spec = importlib.util.spec_from_file_location("maxscale_config_file", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except ConfigError:
    raise
  except Exception as e:  # a config is code of the user's: its error is theirs to read, without our stack
    raise ConfigError(f"{path}: {type(e).__name__}: {str(e).strip() or 'no message'}") from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(f"{path}: get_config() must return the ConfigDict made by maxscale.config.default()")
  return config.to_dict()


def _nearest(path: str, paths: typing.Iterable[str]) -> str:
  paths = list(paths)
  # the same last name elsewhere in the tree is what people most often mean
  same = [p for p in paths if p.split(".")[-1] == path.split(".")[-1]]
  near = difflib.get_close_matches(path, same, 1, 0) or difflib.get_close_matches(path, paths, 1, 0.5)
  return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted({p.split('.')[0] for p in paths}))}"


def _override(tree: dict, path: str, text: str) -> None:
  fields = flatten(Config())
  keys = path.split(".")
  owner = next((p for p in (".".join(keys[:n]) for n in range(len(keys), 0, -1)) if p in fields), None)
  is_dict = owner is not None and isinstance(fields[owner][0], dict)
  if owner is None or (owner != path and not is_dict):
    groups = {f.name for f in dataclasses.fields(Config)}
    if keys[0] not in groups:
      raise ConfigError(f"unknown option {path!r}{_nearest(keys[0], groups)}")
    raise ConfigError(f"unknown option {path!r}{_nearest(path, fields)}")
  want = type(fields[owner][0]) if owner == path else object
  node = tree
  for i, key in enumerate(keys[:-1]):
    node = node.setdefault(key, {})
    if not isinstance(node, dict):
      raise ConfigError(f"{path}: {'.'.join(keys[: i + 1])}={node!r} has nothing inside it")
  node[keys[-1]] = _parse(path, text, want)


def _parse(path: str, text: str, want: type) -> Any:
  if want is str:
    return text
  if want is bool and text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    if want is object:
      return text
    raise ConfigError(f"{path}={text!r} is not a value of type {want.__name__}") from None


def _build(cls: type, tree: Any, prefix: str) -> Any:
  """A frozen dataclass from nested dicts, with every key known and every type right."""
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if not isinstance(tree, dict):
    raise ConfigError(f"{prefix.rstrip('.')} is a group of options, not a value; got {tree!r}")
  for key in tree:
    if key not in fields:
      raise ConfigError(f"unknown option {prefix + key!r}{_nearest(prefix + key, [prefix + f for f in fields])}")
  values = {}
  for key, value in tree.items():
    path, want = prefix + key, hints[key]
    if dataclasses.is_dataclass(want):
      values[key] = _build(typing.cast(type, want), value, path + ".")
    else:
      values[key] = _typed(path, value, want)
      choices = fields[key].metadata["choices"]
      if choices and values[key] not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}={value!r} is not one of {', '.join(choices)}{hint}")
  return cls(**values)


def _typed(path: str, value: Any, want: type) -> Any:
  if want is float and type(value) is int:
    value = float(value)
  if want is tuple and isinstance(value, list):
    value = tuple(value)
  if type(value) is not want:
    raise ConfigError(f"{path}={value!r} must be of type {want.__name__}, not {type(value).__name__}")
  if want is float and not math.isfinite(value):
    raise ConfigError(f"{path}={value!r} must be a finite number")
  if want in (dict, tuple):  # through JSON: what is saved with the run compares equal when it is read again
    try:
      value = want(json.loads(json.dumps(value)))
    except TypeError:
      raise ConfigError(f"{path}={value!r} may hold only numbers, texts, lists and dicts") from None
  return value


# ---- checks of values that need neither devices nor JAX

AT_LEAST_ONE = [
  "run.steps",
  "model.embed",
  "model.layers",
  "model.heads",
  "model.mlp",
  "model.experts_per_token",
  "model.moe.groups",
  "model.moe.groups_per_token",
  "model.mla.nope_dim",
  "model.mla.rope_dim",
  "model.mla.v_dim",
  "model.vocab_multiple",
  "model.kv_head_multiple",
  "model.expert_multiple",
  "data.batch_size",
  "data.length",
  "data.prefetch",
  "data.threads",
  "sharding.microbatches",
  "sharding.repeats",
  "sharding.expert_buffer",
  "checkpoint.every",
  "checkpoint.keep",
  "eval.batches",
  "log.every",
  "log.profile_steps",
]
NOT_NEGATIVE = [
  "run.simulated_devices",
  "model.vocab_size",
  "model.kv_heads",
  "model.head_dim",
  "model.experts",
  "model.embedding_scale",
  "model.max_positions",
  "model.rope_local_theta",
  "model.query_scale",
  "model.attention_softcap",
  "model.logit_softcap",
  "model.mtp",
  "model.mla.q_rank",
  "model.mla.kv_rank",
  "model.moe.correction_rate",
  "model.moe.shared",
  "model.moe.dense_layers",
  "model.moe.dense_mlp",
  "model.moe.capacity",
  "lora.rank",
  "loss.mtp",
  "loss.z_loss",
  "loss.balance_loss",
  "loss.router_z_loss",
  "loss.chunk",
  "optimizer.learning_rate",
  "optimizer.warmup_steps",
  "optimizer.decay_steps",
  "optimizer.final_fraction",
  "optimizer.eps",
  "optimizer.weight_decay",
  "optimizer.clip_norm",
  "optimizer.qk_clip",
  "mesh.slices",
  "sharding.replicated_limit",
  "checkpoint.keep_every",
  "eval.every",
  "log.monitor_every",
  "log.profile_start",
  "log.sample_tokens",
  "log.peak_tflops",
]
FRACTIONS = ("model.dropout", "optimizer.b1", "optimizer.b2")
PHASE_KEYS = {"start": int, "batch_size": int, "length": int, "mixture": dict}


def check(config: Config) -> None:
  """Refuses values and combinations that cannot run.

  Raises:
    ConfigError: names the option, its value, and what to change.
  """
  values = {path: value for path, (value, _) in flatten(config).items()}
  for path in AT_LEAST_ONE:
    _require(values[path] >= 1, f"{path}={values[path]} must be at least 1")
  for path in NOT_NEGATIVE:
    _require(values[path] >= 0, f"{path}={values[path]} must not be negative")
  _require(config.optimizer.eps > 0, "optimizer.eps=0 divides by zero where a gradient is zero; set it above 0")
  for path in FRACTIONS:
    _require(0 <= values[path] < 1, f"{path}={values[path]} must be at least 0 and below 1")
  _check_model(config)
  _check_schedule(config)
  _check_lengths(config)
  _check_mesh(config)
  for name, action in config.remat.table.items():
    _require(action in REMAT_ACTIONS, f"remat.table.{name}={action!r} is not one of {', '.join(REMAT_ACTIONS)}")


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def nearest_divisors(n: int, value: int) -> str:
  """The divisors of n on either side of value, for messages: '4 or 6'."""
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  below, above = [d for d in divisors if d < value][-1:], [d for d in divisors if d > value][:1]
  return " or ".join(map(str, below + above))


def _check_model(config: Config) -> None:
  m = config.model
  _require(
    bool(m.head_dim) or m.embed % m.heads == 0,
    f"model.embed={m.embed} is not divisible by model.heads={m.heads}; set model.heads to "
    f"{nearest_divisors(m.embed, m.heads)}, or give model.head_dim",
  )
  _require(
    m.heads % config.kv_heads == 0,
    f"model.heads={m.heads} is not divisible by model.kv_heads={config.kv_heads}; set model.kv_heads to "
    f"{nearest_divisors(m.heads, config.kv_heads)}",
  )
  rotary = m.mla.rope_dim if m.mla.kv_rank else config.head_dim
  name = "model.mla.rope_dim" if m.mla.kv_rank else "model.head_dim"
  _require(bool(m.max_positions) or rotary % 2 == 0, f"{name}={rotary} must be even: rotary embeddings turn pairs")
  _require(
    not m.mla.kv_rank or config.kv_heads == m.heads,
    f"model.kv_heads={m.kv_heads}: with latent attention (model.mla.kv_rank) every head has its own; set it to 0",
  )
  for window in m.windows:
    _require(
      type(window) is int and window >= 0, f"model.windows={list(m.windows)} must hold numbers of keys, or 0 for all"
    )
  _require(
    m.gated or m.activation != "clamped_swiglu", "model.activation=clamped_swiglu has a gate; set model.gated=True"
  )
  _require(
    not config.optimizer.qk_clip or (bool(config.log.monitor_every) and not m.qk_norm),
    "optimizer.qk_clip acts where logits are looked at, and on weights whose size is the logits': set log.monitor_every=1 "
    "(or more), and model.qk_norm=False",
  )
  _require(not (config.optimizer.qk_clip and config.lora.rank), "optimizer.qk_clip changes weights that adapters are "
           "trained beside (lora.rank); set one of them to 0")  # fmt: skip
  _require(
    not m.mla.kv_rank or not (m.qk_norm or m.qkv_bias),
    "latent attention (model.mla.kv_rank) has neither model.qk_norm nor model.qkv_bias; set them to False",
  )
  _require(
    bool(m.mla.kv_rank) or not m.mla.q_rank, f"model.mla.q_rank={m.mla.q_rank} has no effect without model.mla.kv_rank"
  )
  for name in ("dense_layers", "correction", "shared", "router_bias"):
    _require(bool(m.experts) or not getattr(m.moe, name), f"model.moe.{name} has no effect without model.experts")
  _require(m.moe.scale > 0 and config.lora.alpha > 0, "model.moe.scale and lora.alpha must be above 0")
  try:
    re.compile(config.lora.targets)
  except re.error as e:
    raise ConfigError(f"lora.targets={config.lora.targets!r} is no regular expression: {e}") from e
  if m.experts:
    _check_experts(m)


def _check_experts(m: Model) -> None:
  moe = m.moe
  _require(
    m.experts_per_token <= m.experts,
    f"model.experts_per_token={m.experts_per_token} is more than model.experts={m.experts}",
  )
  _require(
    moe.dense_layers < m.layers,
    f"model.moe.dense_layers={moe.dense_layers} leaves none of model.layers={m.layers} with experts",
  )
  _require(
    m.experts % moe.groups == 0,
    f"model.experts={m.experts} is not divisible by model.moe.groups={moe.groups}; set it to "
    f"{nearest_divisors(m.experts, moe.groups)}",
  )
  reach = moe.groups_per_token * m.experts // moe.groups
  _require(
    moe.groups_per_token <= moe.groups and m.experts_per_token <= reach,
    f"model.moe.groups_per_token={moe.groups_per_token} of {moe.groups} groups hold {reach} experts, and a token uses "
    f"model.experts_per_token={m.experts_per_token}",
  )
  _require(
    moe.group_score == "max" or m.experts // moe.groups >= 2,
    f"model.moe.group_score=top2 needs two experts in each of model.moe.groups={moe.groups} groups",
  )


def _check_schedule(config: Config) -> None:
  d = config.data
  _require(bool(d.sources), "data.sources is empty; name at least one source")
  mixtures, last = {"data.mixture": d.mixture}, 0
  for i, phase in enumerate(d.phases):
    path = f"data.phases[{i}]"
    _require(isinstance(phase, dict) and "start" in phase, f"{path}={phase!r} must be a dict with a start step")
    for key, value in phase.items():
      _require(key in PHASE_KEYS, f"{path} has an unknown key {key!r}{_nearest(key, PHASE_KEYS)}")
      _require(type(value) is PHASE_KEYS[key], f"{path}.{key}={value!r} must be of type {PHASE_KEYS[key].__name__}")
      _require(type(value) is not int or value >= 1, f"{path}.{key}={value} must be at least 1")
    _require(phase["start"] > last, f"{path}.start={phase['start']} must come after step {last}")
    last = phase["start"]
    mixtures[f"{path}.mixture"] = phase.get("mixture", {})
  for path, mixture in mixtures.items():
    for name, weight in mixture.items():
      _require(name in d.sources, f"{path} names {name!r}, which is not in data.sources{_nearest(name, d.sources)}")
      ok = type(weight) in (int, float) and 0 <= weight < math.inf
      _require(ok, f"{path}.{name}={weight!r} must be a finite number of at least 0")
    _require(not mixture or sum(mixture.values()) > 0, f"{path} has no weight above 0")
  for batch in [d.batch_size, *(p["batch_size"] for p in d.phases if "batch_size" in p)]:
    _require(
      batch % config.sharding.microbatches == 0,
      f"a batch of {batch} is not divisible by sharding.microbatches={config.sharding.microbatches}; set it to "
      f"{nearest_divisors(batch, config.sharding.microbatches)}",
    )


def _check_lengths(config: Config) -> None:
  m, lengths = config.model, [p.length for p in phases(config.data)]
  _require(
    not m.max_positions or max(lengths) <= m.max_positions,
    f"data.length={max(lengths)} is above model.max_positions={m.max_positions}, the learned positions that there are; "
    "lower it",
  )
  _require(
    m.mtp < min(lengths), f"model.mtp={m.mtp} is not below data.length={min(lengths)}, the tokens that there are"
  )


def _check_mesh(config: Config) -> None:
  for group, node in (("mesh", config.mesh), ("mesh.dcn", config.mesh.dcn)):
    sizes = {axis: getattr(node, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
      _require(size == -1 or size >= 1, f"{group}.{axis}={size} must be at least 1, or -1 for what is left")
    unknown = [axis for axis, size in sizes.items() if size == -1]
    _require(len(unknown) < 2, f"only one of {' and '.join(f'{group}.{a}' for a in unknown)} can be -1")
