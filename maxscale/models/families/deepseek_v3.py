"""DeepSeek-V3 and R1 (DeepSeek-AI, arXiv 2412.19437 and 2501.12948).

The published checkpoint holds a module of multi-token prediction as a layer behind the last. transformers neither reads
nor writes it: where config.json counts one that the checkpoint lacks, it is left out.
"""

from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
# arXiv 2412.19437, 4.2, and the published config.json.
PRESETS = {
  "deepseek-v3": {
    "vocab_size": 129280, "embed": 7168, "layers": 61, "heads": 128, "mlp": 2048, "experts": 256, "experts_per_token": 8,
    "mla.q_rank": 1536, "mla.kv_rank": 512, "mla.nope_dim": 128, "mla.rope_dim": 64, "mla.v_dim": 128, "moe.scale": 2.5,
    "moe.groups": 8, "moe.groups_per_token": 4, "moe.shared": 2048, "moe.dense_layers": 3, "moe.dense_mlp": 18432,
    "mtp": 1,
    "rope_scaling": {"type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
  },
}

FAMILY = Family(
  name="deepseek_v3",
  architectures=("DeepseekV3ForCausalLM",),
  model_type="deepseek_v3",
  options={
    "norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0, "moe.score": "sigmoid",
    "moe.correction": True, "moe.group_score": "top2",
  },
  presets=PRESETS,
  fields=family.LATENT_FIELDS | {
    "moe.normalise": "norm_topk_prob", "moe.groups": "n_group", "moe.groups_per_token": "topk_group",
    "mtp": "num_nextn_predict_layers",
  },
  defaults={
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "q_lora_rank": 1536, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 0,
  },
  expected=family.LATENT_EXPECTED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
  read=family.read_latent,
  write=family.write_latent,
  links=family.LATENT + family.FURTHER,
)
# fmt: on
