"""Llama 2, 3, 3.1 and 3.2 (Touvron et al., arXiv 2307.09288; Grattafiori et al., arXiv 2407.21783)."""

from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0, "norm_eps": 1e-5, "head_dim": 128, "kv_heads": 8}
LLAMA31 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
LLAMA32 = LLAMA3 | {"tied_embeddings": True, "rope_scaling": LLAMA31 | {"factor": 32.0}}

# arXiv 2307.09288, table 1 and the published config.json; arXiv 2407.21783, table 3; Llama 3.2: its config.json.
PRESETS = {
  "llama2-7b": {"vocab_size": 32000, "embed": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp": 11008,
                "norm_eps": 1e-5},
  "llama2-13b": {"vocab_size": 32000, "embed": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "mlp": 13824,
                 "norm_eps": 1e-5},
  "llama2-70b": {"vocab_size": 32000, "embed": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "mlp": 28672,
                 "norm_eps": 1e-5},
  "llama3-8b": LLAMA3 | {"embed": 4096, "layers": 32, "heads": 32, "mlp": 14336},
  "llama3-70b": LLAMA3 | {"embed": 8192, "layers": 80, "heads": 64, "mlp": 28672},
  "llama3.1-8b": LLAMA3 | {"embed": 4096, "layers": 32, "heads": 32, "mlp": 14336, "rope_scaling": LLAMA31},
  "llama3.1-70b": LLAMA3 | {"embed": 8192, "layers": 80, "heads": 64, "mlp": 28672, "rope_scaling": LLAMA31},
  "llama3.1-405b": LLAMA3 | {"embed": 16384, "layers": 126, "heads": 128, "mlp": 53248, "rope_scaling": LLAMA31},
  "llama3.2-1b": LLAMA32 | {"embed": 2048, "layers": 16, "heads": 32, "head_dim": 64, "mlp": 8192},
  "llama3.2-3b": LLAMA32 | {"embed": 3072, "layers": 28, "heads": 24, "mlp": 8192},
}
# fmt: on

FAMILY = Family(
  name="llama",
  architectures=("LlamaForCausalLM",),
  model_type="llama",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0},
  presets=PRESETS,
  fields=family.FIELDS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
  defaults=family.DEFAULTS | {"attention_bias": False, "mlp_bias": False},
  expected={"hidden_act": "silu"},
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + family.MLP,
)
