"""Gemma 3, the models of text (Gemma Team, arXiv 2503.19786)."""

from typing import Any

from maxscale.config import Model
from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
GEMMA3 = {"rope_theta": 1e6, "rope_local_theta": 1e4}
LARGE = GEMMA3 | {"vocab_size": 262208, "windows": (1024,) * 5 + (0,), "rope_scaling": {"type": "linear", "factor": 8.0}}

# arXiv 2503.19786, table 1, and the published config.json; of the larger ones its text_config.
PRESETS = {
  "gemma3-1b": GEMMA3 | {"vocab_size": 262144, "embed": 1152, "layers": 26, "heads": 4, "kv_heads": 1, "head_dim": 256,
                         "mlp": 6912, "windows": (512,) * 5 + (0,), "query_scale": 256**-0.5},
  "gemma3-4b": LARGE | {"embed": 2560, "layers": 34, "heads": 8, "kv_heads": 4, "head_dim": 256, "mlp": 10240,
                        "query_scale": 256**-0.5},
  "gemma3-12b": LARGE | {"embed": 3840, "layers": 48, "heads": 16, "kv_heads": 8, "head_dim": 256, "mlp": 15360,
                         "query_scale": 256**-0.5},
  "gemma3-27b": LARGE | {"embed": 5376, "layers": 62, "heads": 32, "kv_heads": 16, "head_dim": 128, "mlp": 21504,
                         "query_scale": 168**-0.5},
}
# fmt: on


def read(hf: dict[str, Any]) -> dict[str, Any]:
  windows = family.read_windows(hf, full_every=hf["sliding_window_pattern"])
  return family.read_rope(hf) | windows | family.read_softcaps(hf)


def write(model: Model) -> dict[str, Any]:
  return family.write_rope(model) | family.write_windows(model) | family.write_softcaps(model)


FAMILY = Family(
  name="gemma3",
  architectures=("Gemma3ForCausalLM",),
  model_type="gemma3_text",
  options={
    "norm": "rms_plus_one", "post_norms": True, "qk_norm": True, "activation": "gelu_tanh", "gated": True,
    "tied_embeddings": True,
  },
  presets=PRESETS,
  fields=family.FIELDS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
  defaults={
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
  },
  expected={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
  read=read,
  write=write,
  links=family.EMBEDDINGS + family.FOUR_NORMS + family.ATTENTION + family.MLP,
)  # fmt: skip
