"""Qwen2.5 (Qwen Team, arXiv 2412.15115)."""

from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
QWEN25 = {"vocab_size": 151936, "rope_theta": 1e6, "norm_eps": 1e-6}
SMALL = QWEN25 | {"tied_embeddings": True, "kv_heads": 2}
LARGE = QWEN25 | {"vocab_size": 152064, "head_dim": 128}

# arXiv 2412.15115, table 1, and the config.json of the base models.
PRESETS = {
  "qwen2.5-0.5b": SMALL | {"embed": 896, "layers": 24, "heads": 14, "head_dim": 64, "mlp": 4864},
  "qwen2.5-1.5b": SMALL | {"embed": 1536, "layers": 28, "heads": 12, "head_dim": 128, "mlp": 8960},
  "qwen2.5-3b": SMALL | {"embed": 2048, "layers": 36, "heads": 16, "head_dim": 128, "mlp": 11008},
  "qwen2.5-7b": LARGE | {"embed": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944},
  "qwen2.5-14b": LARGE | {"embed": 5120, "layers": 48, "heads": 40, "kv_heads": 8, "mlp": 13824, "norm_eps": 1e-5},
  "qwen2.5-32b": LARGE | {"embed": 5120, "layers": 64, "heads": 40, "kv_heads": 8, "mlp": 27648, "norm_eps": 1e-5},
  "qwen2.5-72b": LARGE | {"embed": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "mlp": 29568, "norm_eps": 1e-5},
}
# fmt: on

FAMILY = Family(
  name="qwen2",
  architectures=("Qwen2ForCausalLM",),
  model_type="qwen2",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0, "qkv_bias": True},
  presets=PRESETS,
  fields=family.FIELDS,
  defaults=family.DEFAULTS,
  expected={"hidden_act": "silu", "use_sliding_window": False},
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + family.MLP,
)
