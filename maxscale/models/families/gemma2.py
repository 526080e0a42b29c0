"""Gemma 2 (Gemma Team, arXiv 2408.00118)."""

from typing import Any

from maxscale.config import Model
from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
GEMMA2 = {"vocab_size": 256000, "windows": (4096, 0), "attention_softcap": 50.0, "logit_softcap": 30.0}

# arXiv 2408.00118, table 1, and the published config.json.
PRESETS = {
  "gemma2-2b": GEMMA2 | {"embed": 2304, "layers": 26, "heads": 8, "kv_heads": 4, "head_dim": 256, "mlp": 9216,
                         "query_scale": 256**-0.5},
  "gemma2-9b": GEMMA2 | {"embed": 3584, "layers": 42, "heads": 16, "kv_heads": 8, "head_dim": 256, "mlp": 14336,
                         "query_scale": 256**-0.5},
  "gemma2-27b": GEMMA2 | {"embed": 4608, "layers": 46, "heads": 32, "kv_heads": 16, "head_dim": 128, "mlp": 36864,
                          "query_scale": 144**-0.5},
}
# fmt: on


def read(hf: dict[str, Any]) -> dict[str, Any]:
  return family.read_rope(hf) | family.read_windows(hf, full_every=2) | family.read_softcaps(hf)


def write(model: Model) -> dict[str, Any]:
  return family.write_rope(model) | family.write_windows(model) | family.write_softcaps(model)


FAMILY = Family(
  name="gemma2",
  architectures=("Gemma2ForCausalLM",),
  model_type="gemma2",
  options={
    "norm": "rms_plus_one", "post_norms": True, "activation": "gelu_tanh", "gated": True, "tied_embeddings": True,
  },
  presets=PRESETS,
  fields=family.FIELDS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
  defaults={
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
  },
  expected={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
  read=read,
  write=write,
  links=family.EMBEDDINGS + family.FOUR_NORMS + family.ATTENTION + family.MLP,
)  # fmt: skip
