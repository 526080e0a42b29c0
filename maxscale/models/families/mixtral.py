"""Mixtral 8x7B and 8x22B (Jiang et al., arXiv 2401.04088)."""

from maxscale.config import Model
from maxscale.models import family
from maxscale.models.family import Family, Link

# fmt: off
MIXTRAL = {"vocab_size": 32000, "kv_heads": 8, "head_dim": 128, "experts": 8, "experts_per_token": 2, "rope_theta": 1e6,
           "norm_eps": 1e-5}

# arXiv 2401.04088, table 1, and the published config.json.
PRESETS = {
  "mixtral-8x7b": MIXTRAL | {"embed": 4096, "layers": 32, "heads": 32, "mlp": 14336},
  "mixtral-8x22b": MIXTRAL | {"embed": 6144, "layers": 56, "heads": 48, "mlp": 16384},
}

EXPERTS = (
  Link("model.layers.{layer}.block_sparse_moe.gate.weight", "layers/mlp/router", "ed -> de"),
  Link("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "layers/mlp/gate", "fd -> df"),
  Link("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "layers/mlp/up", "fd -> df"),
  Link("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "layers/mlp/down", "df -> fd"),
)
# fmt: on


def write(model: Model) -> dict:
  return family.write_rope(model) | {"sliding_window": family.write_windows(model)["sliding_window"]}


FAMILY = Family(
  name="mixtral",
  architectures=("MixtralForCausalLM",),
  model_type="mixtral",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0},
  presets=PRESETS,
  fields=family.FIELDS | {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
  defaults=family.DEFAULTS | {"rope_theta": 1e6},
  expected={"hidden_act": "silu", "router_jitter_noise": 0.0},
  read=lambda hf: family.read_rope(hf) | family.read_windows(hf),
  write=write,
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + EXPERTS,
)
