"""Kimi K2 (Kimi Team, arXiv 2507.20534). Its tensors and its class are those of another model; model_type tells."""

from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
# arXiv 2507.20534, table 2, and the published config.json.
PRESETS = {
  "kimi-k2": {
    "vocab_size": 163840, "embed": 7168, "layers": 61, "heads": 64, "mlp": 2048, "experts": 384, "experts_per_token": 8,
    "mla.q_rank": 1536, "mla.kv_rank": 512, "mla.nope_dim": 128, "mla.rope_dim": 64, "mla.v_dim": 128,
    "moe.scale": 2.827, "moe.shared": 2048, "moe.dense_layers": 1, "moe.dense_mlp": 18432, "rope_theta": 50000.0,
    "rope_scaling": {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
  },
}

FAMILY = Family(
  name="kimi",
  architectures=("DeepseekV3ForCausalLM",),
  model_type="kimi_k2",
  options={
    "norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0, "moe.score": "sigmoid",
    "moe.correction": True, "moe.group_score": "top2",
  },
  presets=PRESETS,
  fields=family.LATENT_FIELDS | {
    "moe.normalise": "norm_topk_prob", "moe.groups": "n_group", "moe.groups_per_token": "topk_group",
    "mtp": "num_nextn_predict_layers",
  },
  defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0},
  expected=family.LATENT_EXPECTED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
  read=family.read_latent,
  write=family.write_latent,
  links=family.LATENT + family.FURTHER,
)
# fmt: on
