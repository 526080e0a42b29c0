"""Qwen3, the models with experts (Qwen Team, arXiv 2505.09388)."""

from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
QWEN3 = {"vocab_size": 151936, "kv_heads": 4, "head_dim": 128, "experts": 128, "experts_per_token": 8, "rope_theta": 1e6,
         "norm_eps": 1e-6}

# arXiv 2505.09388, table 2, and the published config.json.
PRESETS = {
  "qwen3-30b-a3b": QWEN3 | {"embed": 2048, "layers": 48, "heads": 32, "mlp": 768},
  "qwen3-235b-a22b": QWEN3 | {"embed": 4096, "layers": 94, "heads": 64, "mlp": 1536},
}
# fmt: on

FAMILY = Family(
  name="qwen3_moe",
  architectures=("Qwen3MoeForCausalLM",),
  model_type="qwen3_moe",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0, "qk_norm": True},
  presets=PRESETS,
  fields=family.FIELDS
  | {
    "mlp": "moe_intermediate_size", "experts": "num_experts", "experts_per_token": "num_experts_per_tok",
    "moe.normalise": "norm_topk_prob", "qkv_bias": "attention_bias", "out_bias": "attention_bias",
  },
  defaults=family.DEFAULTS | {"norm_topk_prob": False, "attention_bias": False},
  aliases={"num_local_experts": "num_experts"},  # as transformers 5 writes it
  expected={"hidden_act": "silu", "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + family.EXPERTS,
)  # fmt: skip
