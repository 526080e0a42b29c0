"""GPT-2 (Radford et al., 2019) and GPT-3 (Brown et al., arXiv 2005.14165)."""

from typing import Any

from maxscale.models.family import Family, Link

# fmt: off
GPT2 = {"vocab_size": 50257, "max_positions": 1024}

# The published config.json; arXiv 2005.14165, table 2.1, all of whose layers see all keys here.
PRESETS = {
  "gpt2-124m": GPT2 | {"embed": 768, "layers": 12, "heads": 12, "mlp": 3072},
  "gpt2-355m": GPT2 | {"embed": 1024, "layers": 24, "heads": 16, "mlp": 4096},
  "gpt2-774m": GPT2 | {"embed": 1280, "layers": 36, "heads": 20, "mlp": 5120},
  "gpt2-1.5b": GPT2 | {"embed": 1600, "layers": 48, "heads": 25, "mlp": 6400},
  "gpt3-175b": GPT2 | {"embed": 12288, "layers": 96, "heads": 96, "mlp": 49152, "max_positions": 2048},
}

LINKS = (
  Link("transformer.wte.weight", "embedding", "vd -> vd"),
  Link("transformer.wpe.weight", "positions", "pd -> pd"),
  Link("transformer.ln_f.weight", "final_norm/scale", "d -> d"),
  Link("transformer.ln_f.bias", "final_norm/bias", "d -> d"),
  Link("lm_head.weight", "head", "vd -> vd"),
  Link("lm_head.weight", "embedding", "vd -> vd", copy=True),  # tied
  Link("transformer.h.{layer}.ln_1.weight", "layers/attention_norm/scale", "d -> d"),
  Link("transformer.h.{layer}.ln_1.bias", "layers/attention_norm/bias", "d -> d"),
  Link("transformer.h.{layer}.ln_2.weight", "layers/mlp_norm/scale", "d -> d"),
  Link("transformer.h.{layer}.ln_2.bias", "layers/mlp_norm/bias", "d -> d"),
  Link("transformer.h.{layer}.attn.c_attn.weight",
       ("layers/attention/query", "layers/attention/key", "layers/attention/value"), "d(jnh) -> dnh"),
  Link("transformer.h.{layer}.attn.c_attn.bias",
       ("layers/attention/query_bias", "layers/attention/key_bias", "layers/attention/value_bias"), "(jnh) -> nh"),
  Link("transformer.h.{layer}.attn.c_proj.weight", "layers/attention/out", "(nh)d -> nhd"),
  Link("transformer.h.{layer}.attn.c_proj.bias", "layers/attention/out_bias", "d -> d"),
  Link("transformer.h.{layer}.mlp.c_fc.weight", "layers/mlp/up", "df -> df"),
  Link("transformer.h.{layer}.mlp.c_fc.bias", "layers/mlp/up_bias", "f -> f"),
  Link("transformer.h.{layer}.mlp.c_proj.weight", "layers/mlp/down", "fd -> fd"),
  Link("transformer.h.{layer}.mlp.c_proj.bias", "layers/mlp/down_bias", "d -> d"),
)
# fmt: on


def read(hf: dict[str, Any]) -> dict[str, Any]:
  sizes = {"kv_heads": hf["n_head"], "head_dim": hf["n_embd"] // hf["n_head"]}
  return sizes | {"mlp": hf["n_inner"] or 4 * hf["n_embd"]}


FAMILY = Family(
  name="gpt2",
  architectures=("GPT2LMHeadModel",),
  model_type="gpt2",
  options={
    "norm": "layer", "activation": "gelu_tanh", "gated": False, "mlp_bias": True, "qkv_bias": True, "out_bias": True,
    "tied_embeddings": True, "embedding_scale": 1.0, "norm_eps": 1e-5,
  },
  presets=PRESETS,
  fields={
    "vocab_size": "vocab_size", "embed": "n_embd", "layers": "n_layer", "heads": "n_head", "norm_eps": "layer_norm_epsilon",
    "max_positions": "n_positions", "tied_embeddings": "tie_word_embeddings",
  },
  defaults={"n_inner": None, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
  expected={
    "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
  },
  read=read,
  write=lambda model: {"n_inner": model.mlp},
  links=LINKS,
  ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # the causal mask
  extra={"use_cache": True, "initializer_range": 0.02},
)  # fmt: skip
