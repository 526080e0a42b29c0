"""gpt-oss (OpenAI, arXiv 2508.10925)."""

from typing import Any

from maxscale.config import Model
from maxscale.models import family
from maxscale.models.family import Family, Link

# fmt: off
GPT_OSS = {
  "vocab_size": 201088, "embed": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "mlp": 2880, "experts_per_token": 4,
  "windows": (128, 0), "rope_theta": 150000.0, "norm_eps": 1e-5, "qkv_bias": True, "out_bias": True,
  "rope_scaling": {"type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                   "original_max_position_embeddings": 4096},
}

# arXiv 2508.10925, table 1, and the published config.json.
PRESETS = {
  "gpt-oss-20b": GPT_OSS | {"layers": 24, "experts": 32},
  "gpt-oss-120b": GPT_OSS | {"layers": 36, "experts": 128},
}

# Gate and up lie side by side in one tensor, column by column; the matrices of experts are (in, out).
LINKS = (
  Link("model.layers.{layer}.self_attn.sinks", "layers/attention/sinks", "n -> n"),
  Link("model.layers.{layer}.mlp.router.weight", "layers/mlp/router", "ed -> de"),
  Link("model.layers.{layer}.mlp.router.bias", "layers/mlp/router_bias", "e -> e"),
  Link("model.layers.{layer}.mlp.experts.gate_up_proj", ("layers/mlp/gate", "layers/mlp/up"), "ed(fj) -> edf"),
  Link("model.layers.{layer}.mlp.experts.gate_up_proj_bias", ("layers/mlp/gate_bias", "layers/mlp/up_bias"), "e(fj) -> ef"),
  Link("model.layers.{layer}.mlp.experts.down_proj", "layers/mlp/down", "efd -> efd"),
  Link("model.layers.{layer}.mlp.experts.down_proj_bias", "layers/mlp/down_bias", "ed -> ed"),
)
# fmt: on


def read(hf: dict[str, Any]) -> dict[str, Any]:
  return family.read_rope(hf) | family.read_windows(hf, full_every=2)


def write(model: Model) -> dict[str, Any]:
  return family.write_rope(model) | family.write_windows(model)


FAMILY = Family(
  name="gpt_oss",
  architectures=("GptOssForCausalLM",),
  model_type="gpt_oss",
  options={
    "norm": "rms", "activation": "clamped_swiglu", "gated": True, "embedding_scale": 1.0, "mlp_bias": True,
    "attention_sinks": True, "moe.router_bias": True,
  },
  presets=PRESETS,
  fields=family.FIELDS | {
    "experts": "num_local_experts", "experts_per_token": "num_experts_per_tok", "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
  },
  defaults={
    "head_dim": 64, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "attention_bias": True, "rope_theta": 150000.0,
    "sliding_window": 128,
  },
  expected={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
  read=read,
  write=write,
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + LINKS,
)  # fmt: skip
