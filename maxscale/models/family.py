"""What a model family is: its options, its public sizes, and its Hugging Face form as one table used both ways.

Nothing here imports JAX. A family is a file in models/families that ends with `FAMILY = Family(...)`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from maxscale.config import Model
from maxscale.errors import UserError


class FamilyError(UserError):
  """A model that a family cannot express; the message names the key of config.json or the option."""


@dataclasses.dataclass(frozen=True)
class Link:
  """A tensor of a Hugging Face checkpoint, and the parameters that hold the same numbers.

  A link applies to the parameters that the model has: one that it lacks (a bias, an output head) drops out. Where
  several links name a parameter, the one applies that fits it: its form has as many letters on the right as the
  parameter has dimensions, or one fewer where theirs has `{expert}`, which counts the first of them.

  Attributes:
    theirs: name of the tensor. `{layer}` is the number of a layer, `{expert}` that of an expert. Layers are counted as
      the model counts them: `layers/x` means `dense_layers/x` in the first `moe.dense_layers` layers, and `mtp/x` is
      found in layer `layers + k`, for the k-th module that predicts a further token.
    ours: path of the parameter, or of several that lie in the one tensor along the letter `j`.
    form: theirs -> ours, as einsum writes dimensions, of one layer, and of one expert where theirs has `{expert}`;
      parentheses join dimensions, as in "(nh)d -> dnh". `j` is left out on the right: "(jf)d -> df". Sizes are the
      parameters' own. Where `j` comes first in its parentheses, the parts may differ in size.
    rotary: letter of a dimension that ends in rotary pairs which lie side by side in theirs and halves apart in ours;
      `mla.rope_dim` of its elements, or all without latent attention.
    swapped: letter of a dimension whose two halves are the other way round in theirs.
    copy: theirs repeats a parameter that another tensor holds, or may (a tied output head). It is compared when it is
      read, and written where the original had it. Used for a tensor that no other link fits.
  """

  theirs: str
  ours: str | tuple[str, ...]
  form: str
  rotary: str = ""
  swapped: str = ""
  copy: bool = False

  @property
  def parts(self) -> tuple[str, ...]:
    """The paths of the parameters."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  @property
  def dims(self) -> tuple[list[str], str]:
    """Letters of each dimension of theirs, those of ours: "(nh)d -> dnh" is (["nh", "d"], "dnh")."""
    theirs, ours = self.form.replace(" ", "").split("->")
    return [group.strip("()") for group in re.findall(r"\(\w+\)|\w", theirs)], ours


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    name: as `model.family` and the file say it.
    architectures: class names in config.json that it reads; the first is what it writes.
    model_type: what config.json calls it.
    options: options of `model` that all of the family have; "moe.score" is in a group.
    presets: public sizes: name -> options.
    fields: option -> key of config.json, both ways.
    defaults: what config.json means where it lacks a key or has null there; None: our default, and our 0 is written as
      null. A key that is neither there nor here is an error.
    aliases: another name of a key -> the one that is said here and written.
    expected: key of config.json -> the only value that `options` can mean. A key that is absent or null means this, too.
    read: the options that `fields` cannot say, from a config.json.
    write: the entries of config.json that `fields` cannot say, from a `resolved` model.
    links: the tensors.
    ignored: regular expressions of whole names of tensors that hold nothing to keep.
    extra: entries of a config.json that is written without an original.
  """

  name: str
  architectures: tuple[str, ...]
  model_type: str
  options: Mapping[str, Any]
  presets: Mapping[str, Mapping[str, Any]]
  fields: Mapping[str, str]
  links: tuple[Link, ...]
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  expected: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: read_rope(hf)
  write: Callable[[Model], dict[str, Any]] = lambda model: write_rope(model)
  ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
  extra: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(EXTRA))

  def options_of(self, hf: dict[str, Any]) -> dict[str, Any]:
    """Options of `model` for a config.json: dotted name -> value.

    Raises:
      FamilyError: a key is missing, or has a value that this family's code does not mean.
    """
    hf = {self.aliases.get(key, key): value for key, value in hf.items()}
    for key, value in self.expected.items():
      if hf.get(key) is not None and hf[key] != value:
        raise FamilyError(f"config.json: {key}={hf[key]!r}; {self.name} models are read with {key}={value!r} only")
    out = {"family": self.name, **self.options}
    for option, key in self.fields.items():
      value = hf.get(key)
      if value is None and key not in self.defaults:
        raise FamilyError(f"config.json has no {key!r}, which {self.name} models need")
      value = self.defaults[key] if value is None else value
      if value is not None:
        out[option] = value
    return out | self.read({**self.defaults, **hf})

  def json_of(self, model: Model) -> dict[str, Any]:
    """The entries of config.json that say what `model` is; the inverse of `options_of`.

    Raises:
      FamilyError: the model has an option that this family cannot have.
    """
    for option in ("experts", "mla.kv_rank"):
      if option in self.fields and not get(model, option):
        raise FamilyError(f"model.{option}=0 cannot be written as a {self.name} model; set model.family to another")
    model = resolved(model)
    null = {key for key, value in self.defaults.items() if value is None}
    entries = {key: get(model, option) for option, key in self.fields.items()}
    entries = {key: None if key in null and not value else value for key, value in entries.items()}
    entries |= {"architectures": [self.architectures[0]], "model_type": self.model_type}
    entries |= dict(self.expected) | self.write(model)
    # Reading back what would be written finds every option that the family has no word for.
    again = {**options(Model()), **self.options_of(entries)}
    again |= {"kv_heads": again["kv_heads"] or again["heads"],
              "head_dim": again["head_dim"] or again["embed"] // again["heads"]}  # fmt: skip
    unused = tuple(group for group, used in (("mla.", model.mla.kv_rank), ("moe.", model.experts)) if not used)
    unused += ("kv_heads", "head_dim") if model.mla.kv_rank else ()
    unused += () if model.experts else ("experts_per_token",)
    unused += () if model.windows else ("window_kind",)
    for option, value in options(model).items():
      if option not in RUNTIME and not option.startswith(unused) and not _same(value, again[option], model.layers):
        raise FamilyError(
          f"model.{option}={value!r} cannot be written as a {self.name} model, which would have {again[option]!r}; "
          "set model.family to the family that has it"
        )
    return entries


# Options that say how a model is computed or trained, not what it is.
RUNTIME = frozenset({
  "dropout", "compute_dtype", "quantize", "vocab_multiple", "kv_head_multiple", "expert_multiple",
  "moe.correction_rate", "moe.capacity", "moe.route", "family",
})  # fmt: skip


def options(model: Model) -> dict[str, Any]:
  """Dotted name -> value of each option of a model."""
  out = {}
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    if dataclasses.is_dataclass(value):
      out.update({f"{field.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)})
    else:
      out[field.name] = value
  return out


def get(model: Model, option: str) -> Any:
  """The value of an option by its dotted name."""
  value: Any = model
  for key in option.split("."):
    value = getattr(value, key)
  return value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"moe.score": x} -> {"moe": {"score": x}}."""
  out: dict[str, Any] = {}
  for option, value in flat.items():
    *groups, name = option.split(".")
    node = out
    for group in groups:
      node = node.setdefault(group, {})
    node[name] = value
  return out


def resolved(model: Model) -> Model:
  """The model with the sizes that 0 stands for."""
  kv_heads, head_dim = model.kv_heads or model.heads, model.head_dim or model.embed // model.heads
  moe = (
    dataclasses.replace(model.moe, dense_mlp=model.moe.dense_mlp or model.mlp) if model.moe.dense_layers else model.moe
  )
  return dataclasses.replace(model, kv_heads=kv_heads, head_dim=head_dim, moe=moe)


def _same(a: Any, b: Any, layers: int) -> bool:
  """Whether two values of an option mean the same; tuples are repeated over the layers, floats may be rounded."""
  if isinstance(a, (tuple, list)):
    every = lambda x: [x[i % len(x)] if x else 0 for i in range(layers)]  # noqa: E731
    return every(a) == every(b)
  return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b


# ---- rotary embeddings and windows, which most families write in the same way

ROPE_TYPES = ("linear", "llama3", "yarn")


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
  """`rope_theta`, `rope_scaling` and `rope_local_theta`, from the keys of transformers 5 or those before it.

  Raises:
    FamilyError: a kind of scaling that no model here has.
  """
  given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  local = given.get("sliding_attention") or {}
  main = given.get("full_attention") or ({} if local else given)
  old = {"rope_theta": hf.get("rope_theta"), "rope_local": hf.get("rope_local_base_freq")}
  out: dict[str, Any] = {"rope_scaling": _read_scaling(main, hf)}
  theta = main.get("rope_theta") or old["rope_theta"]
  if theta is not None:
    out["rope_theta"] = float(theta)
  theta = local.get("rope_theta") or old["rope_local"]
  if theta is not None:
    out["rope_local_theta"] = float(theta)
  if _read_scaling(local, hf):
    raise FamilyError("config.json: rope_parameters.sliding_attention is scaled; only layers without a window can be")
  return out


def _read_scaling(rope: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise FamilyError(f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1.0")
  if kind == "default":
    return {}
  if kind not in ROPE_TYPES:
    raise FamilyError(f"config.json: rope_type={kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")
  other = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  scaling = {"type": kind} | {k: v for k, v in rope.items() if k not in other and v is not None}
  if kind != "linear":
    scaling.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if "factor" not in scaling:
      scaling["factor"] = hf["max_position_embeddings"] / scaling["original_max_position_embeddings"]
  return scaling


def write_rope(model: Model) -> dict[str, Any]:
  """The inverse of `read_rope`, as transformers 5 writes it."""
  scaling = {k: v for k, v in model.rope_scaling.items() if k != "type"}
  main = {"rope_type": model.rope_scaling.get("type", "default"), "rope_theta": model.rope_theta, **scaling}
  if not model.rope_local_theta:
    return {"rope_parameters": main}
  local = {"rope_type": "default", "rope_theta": model.rope_local_theta}
  return {"rope_parameters": {"full_attention": main, "sliding_attention": local}}


SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(hf: dict[str, Any], full_every: int = 0) -> dict[str, Any]:
  """`windows` from `layer_types` and `sliding_window`; without `layer_types`, all layers have the window but every
  `full_every`-th."""
  window, kinds = hf.get("sliding_window"), hf.get("layer_types")
  if not kinds:
    return {"windows": (window,) * max(1, full_every - 1) + (0,) * (full_every > 0) if window else ()}
  unknown = sorted(set(kinds) - {SLIDING, FULL})
  if unknown:
    raise FamilyError(f"config.json: layer_types has {unknown}; known: {SLIDING}, {FULL}")
  windows = shortest_period(tuple(window if kind == SLIDING else 0 for kind in kinds))
  return {"windows": windows if any(windows) else ()}


def write_windows(model: Model) -> dict[str, Any]:
  """The inverse of `read_windows`.

  Raises:
    FamilyError: layers have windows of different sizes.
  """
  windows = [model.windows[i % len(model.windows)] if model.windows else 0 for i in range(model.layers)]
  sizes = sorted(set(windows) - {0})
  if len(sizes) > 1:
    raise FamilyError(f"model.windows={model.windows} has several sizes; config.json holds one")
  kinds = [SLIDING if window else FULL for window in windows]
  return {"layer_types": kinds, "sliding_window": sizes[0] if sizes else None}


def shortest_period(values: tuple) -> tuple:
  """The shortest beginning that, repeated, gives the values: (4, 4, 0, 4, 4, 0, 4) -> (4, 4, 0)."""
  n = next(n for n in range(1, len(values) + 1) if all(v == values[i % n] for i, v in enumerate(values)))
  return values[:n]


def read_softcaps(hf: dict[str, Any]) -> dict[str, Any]:
  """`query_scale` and both softcaps, from keys that must be there, or in the defaults."""
  caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
  return {"query_scale": hf["query_pre_attn_scalar"] ** -0.5} | {o: hf[key] or 0.0 for o, key in caps.items()}


def write_softcaps(model: Model) -> dict[str, Any]:
  """The inverse of `read_softcaps`."""
  return {
    "query_pre_attn_scalar": round((model.query_scale or model.head_dim**-0.5) ** -2),
    "attn_logit_softcapping": model.attention_softcap or None,
    "final_logit_softcapping": model.logit_softcap or None,
  }


# ---- what the families that follow Llama share

# fmt: off
FIELDS = {
  "vocab_size": "vocab_size", "embed": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "mlp": "intermediate_size", "norm_eps": "rms_norm_eps",
  "tied_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
# fmt: on
EXTRA = {"max_position_embeddings": 8192, "use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02}

EMBEDDINGS = (
  Link("model.embed_tokens.weight", "embedding", "vd -> vd"),
  Link("model.norm.weight", "final_norm/scale", "d -> d"),
  Link("lm_head.weight", "head", "vd -> vd"),
  Link("lm_head.weight", "embedding", "vd -> vd", copy=True),  # tied
)
NORMS = (
  Link("model.layers.{layer}.input_layernorm.weight", "layers/attention_norm/scale", "d -> d"),
  Link("model.layers.{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
)
FOUR_NORMS = (
  Link("model.layers.{layer}.input_layernorm.weight", "layers/attention_norm/scale", "d -> d"),
  Link("model.layers.{layer}.post_attention_layernorm.weight", "layers/attention_post_norm/scale", "d -> d"),
  Link("model.layers.{layer}.pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
  Link("model.layers.{layer}.post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "d -> d"),
)
ATTENTION = (
  Link("model.layers.{layer}.self_attn.q_proj.weight", "layers/attention/query", "(nh)d -> dnh"),
  Link("model.layers.{layer}.self_attn.k_proj.weight", "layers/attention/key", "(kh)d -> dkh"),
  Link("model.layers.{layer}.self_attn.v_proj.weight", "layers/attention/value", "(kh)d -> dkh"),
  Link("model.layers.{layer}.self_attn.o_proj.weight", "layers/attention/out", "d(nh) -> nhd"),
  Link("model.layers.{layer}.self_attn.q_proj.bias", "layers/attention/query_bias", "(nh) -> nh"),
  Link("model.layers.{layer}.self_attn.k_proj.bias", "layers/attention/key_bias", "(kh) -> kh"),
  Link("model.layers.{layer}.self_attn.v_proj.bias", "layers/attention/value_bias", "(kh) -> kh"),
  Link("model.layers.{layer}.self_attn.o_proj.bias", "layers/attention/out_bias", "d -> d"),
  Link("model.layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm", "h -> h"),
  Link("model.layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm", "h -> h"),
)
MLP = (
  Link("model.layers.{layer}.mlp.gate_proj.weight", "layers/mlp/gate", "fd -> df"),
  Link("model.layers.{layer}.mlp.up_proj.weight", "layers/mlp/up", "fd -> df"),
  Link("model.layers.{layer}.mlp.down_proj.weight", "layers/mlp/down", "df -> fd"),
  Link("model.layers.{layer}.mlp.gate_proj.bias", "layers/mlp/gate_bias", "f -> f"),
  Link("model.layers.{layer}.mlp.up_proj.bias", "layers/mlp/up_bias", "f -> f"),
  Link("model.layers.{layer}.mlp.down_proj.bias", "layers/mlp/down_bias", "d -> d"),
)
EXPERTS = (
  Link("model.layers.{layer}.mlp.gate.weight", "layers/mlp/router", "ed -> de"),
  Link("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "layers/mlp/gate", "fd -> df"),
  Link("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layers/mlp/up", "fd -> df"),
  Link("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "layers/mlp/down", "df -> fd"),
)

# ---- latent attention, first layers with a dense MLP, and then experts beside an MLP that every token passes

# fmt: off
LATENT_FIELDS = {
  "vocab_size": "vocab_size", "embed": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
  "tied_embeddings": "tie_word_embeddings", "mlp": "moe_intermediate_size", "experts": "n_routed_experts",
  "experts_per_token": "num_experts_per_tok", "mla.kv_rank": "kv_lora_rank", "mla.nope_dim": "qk_nope_head_dim",
  "mla.rope_dim": "qk_rope_head_dim", "mla.v_dim": "v_head_dim", "moe.scale": "routed_scaling_factor",
  "moe.dense_layers": "first_k_dense_replace", "moe.dense_mlp": "intermediate_size", "norm_eps": "rms_norm_eps",
}
# rms_norm_eps is not that of the latents: published code and transformers normalise those with 1e-6, whatever it says.
LATENT_EXPECTED = {
  "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
}
# fmt: on


def read_latent(hf: dict[str, Any]) -> dict[str, Any]:
  """What `LATENT_FIELDS` cannot say; `q_lora_rank` and `n_shared_experts` must be there, or in the defaults."""
  shared = (hf["n_shared_experts"] or 0) * hf["moe_intermediate_size"]
  return read_rope(hf) | {"mla.q_rank": hf["q_lora_rank"] or 0, "moe.shared": shared}


def write_latent(model: Model) -> dict[str, Any]:
  """The inverse of `read_latent`."""
  sizes = {"n_shared_experts": model.moe.shared // model.mlp, "q_lora_rank": model.mla.q_rank or None}
  return write_rope(model) | sizes | {"num_key_value_heads": model.heads}


LATENT_ATTENTION = (
  Link("model.layers.{layer}.self_attn.q_proj.weight", "layers/attention/query", "(nh)d -> dnh", rotary="h"),
  Link("model.layers.{layer}.self_attn.q_a_proj.weight", "layers/attention/query_down", "rd -> dr"),
  Link("model.layers.{layer}.self_attn.q_a_layernorm.weight", "layers/attention/query_down_norm", "r -> r"),
  Link("model.layers.{layer}.self_attn.q_b_proj.weight", "layers/attention/query_up", "(nh)r -> rnh", rotary="h"),
  Link("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", "layers/attention/kv_down", "rd -> dr", rotary="r"),
  Link("model.layers.{layer}.self_attn.kv_a_layernorm.weight", "layers/attention/kv_down_norm", "r -> r"),
  Link("model.layers.{layer}.self_attn.kv_b_proj.weight", "layers/attention/kv_up", "(nh)r -> rnh"),
  Link("model.layers.{layer}.self_attn.o_proj.weight", "layers/attention/out", "d(nh) -> nhd"),
)
SHARED_EXPERTS = (
  Link("model.layers.{layer}.mlp.gate.e_score_correction_bias", "layers/mlp/correction", "e -> e"),
  Link("model.layers.{layer}.mlp.shared_experts.gate_proj.weight", "layers/mlp/shared/gate", "fd -> df"),
  Link("model.layers.{layer}.mlp.shared_experts.up_proj.weight", "layers/mlp/shared/up", "fd -> df"),
  Link("model.layers.{layer}.mlp.shared_experts.down_proj.weight", "layers/mlp/shared/down", "df -> fd"),
)
LATENT = EMBEDDINGS + NORMS + LATENT_ATTENTION + MLP + EXPERTS + SHARED_EXPERTS
# Around the layer of multi-token prediction, which lies behind the last.
FURTHER = (
  Link("model.layers.{layer}.enorm.weight", "mtp/embedding_norm/scale", "d -> d"),
  Link("model.layers.{layer}.hnorm.weight", "mtp/hidden_norm/scale", "d -> d"),
  # The embedding comes first there, as vLLM and SGLang compute it; the paper and we have the hidden state first.
  Link("model.layers.{layer}.eh_proj.weight", "mtp/projection", "ed -> de", swapped="d"),
  Link("model.layers.{layer}.shared_head.norm.weight", "mtp/final_norm/scale", "d -> d"),
  Link("model.layers.{layer}.embed_tokens.weight", "embedding", "vd -> vd", copy=True),
  Link("model.layers.{layer}.shared_head.head.weight", "head", "vd -> vd", copy=True),
)
