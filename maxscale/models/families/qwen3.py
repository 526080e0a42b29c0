"""Qwen3, the dense models (Qwen Team, arXiv 2505.09388)."""

from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
QWEN3 = {"vocab_size": 151936, "kv_heads": 8, "head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6}
TIED = QWEN3 | {"tied_embeddings": True}

# arXiv 2505.09388, table 1, and the published config.json.
PRESETS = {
  "qwen3-0.6b": TIED | {"embed": 1024, "layers": 28, "heads": 16, "mlp": 3072},
  "qwen3-1.7b": TIED | {"embed": 2048, "layers": 28, "heads": 16, "mlp": 6144},
  "qwen3-4b": TIED | {"embed": 2560, "layers": 36, "heads": 32, "mlp": 9728},
  "qwen3-8b": QWEN3 | {"embed": 4096, "layers": 36, "heads": 32, "mlp": 12288},
  "qwen3-14b": QWEN3 | {"embed": 5120, "layers": 40, "heads": 40, "mlp": 17408},
  "qwen3-32b": QWEN3 | {"embed": 5120, "layers": 64, "heads": 64, "mlp": 25600},
}
# fmt: on

FAMILY = Family(
  name="qwen3",
  architectures=("Qwen3ForCausalLM",),
  model_type="qwen3",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0, "qk_norm": True},
  presets=PRESETS,
  fields=family.FIELDS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
  defaults=family.DEFAULTS | {"head_dim": 128, "attention_bias": False},
  expected={"hidden_act": "silu", "use_sliding_window": False},
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + family.MLP,
)
