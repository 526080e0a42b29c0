"""DeepSeek-V2 and V2-Lite (DeepSeek-AI, arXiv 2405.04434)."""

from typing import Any

from maxscale.config import Model
from maxscale.models import family
from maxscale.models.family import Family, FamilyError

# fmt: off
DEEPSEEK_V2 = {
  "vocab_size": 102400, "experts_per_token": 6, "mla.kv_rank": 512, "mla.nope_dim": 128, "mla.rope_dim": 64,
  "mla.v_dim": 128, "moe.dense_layers": 1,
  "rope_scaling": {"type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707,
                   "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096},
}

# arXiv 2405.04434, 3.1.2 and appendix B, and the published config.json.
PRESETS = {
  "deepseek-v2-lite": DEEPSEEK_V2 | {"embed": 2048, "layers": 27, "heads": 16, "mlp": 1408, "experts": 64,
                                     "moe.shared": 2816, "moe.dense_mlp": 10944},
  "deepseek-v2": DEEPSEEK_V2 | {"embed": 5120, "layers": 60, "heads": 128, "mlp": 1536, "experts": 160,
                                "moe.shared": 3072, "moe.dense_mlp": 12288, "mla.q_rank": 1536, "moe.groups": 8,
                                "moe.groups_per_token": 3, "moe.scale": 16.0},
}
# fmt: on
GREEDY, GROUPS = "greedy", "group_limited_greedy"


def read(hf: dict[str, Any]) -> dict[str, Any]:
  if hf["topk_method"] not in (GREEDY, GROUPS):
    raise FamilyError(f"config.json: topk_method={hf['topk_method']!r} is not supported; known: {GREEDY}, {GROUPS}")
  grouped = hf["topk_method"] == GROUPS
  groups = {"moe.groups": hf["n_group"], "moe.groups_per_token": hf["topk_group"]} if grouped else {}
  return family.read_latent(hf) | groups


def write(model: Model) -> dict[str, Any]:
  groups = {"n_group": model.moe.groups, "topk_group": model.moe.groups_per_token}
  return family.write_latent(model) | groups | {"topk_method": GROUPS if model.moe.groups > 1 else GREEDY}


FAMILY = Family(
  name="deepseek_v2",
  architectures=("DeepseekV2ForCausalLM",),
  model_type="deepseek_v2",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0, "moe.normalise": False},
  presets=PRESETS,
  fields=family.LATENT_FIELDS,
  defaults={
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "topk_method": GREEDY, "q_lora_rank": 1536, "n_shared_experts": 2,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
  },
  expected=family.LATENT_EXPECTED | {"scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
  read=read,
  write=write,
  links=family.LATENT,
)  # fmt: skip
