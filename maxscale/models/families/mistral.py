"""Mistral 7B (Jiang et al., arXiv 2310.06825)."""

from maxscale.config import Model
from maxscale.models import family
from maxscale.models.family import Family

# fmt: off
MISTRAL = {"embed": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "mlp": 14336, "norm_eps": 1e-5}

# arXiv 2310.06825, table 1, and the published config.json.
PRESETS = {
  "mistral-7b-v0.1": MISTRAL | {"vocab_size": 32000, "windows": (4096,)},
  "mistral-7b-v0.3": MISTRAL | {"vocab_size": 32768, "rope_theta": 1e6},
}
# fmt: on


def write(model: Model) -> dict:
  return family.write_rope(model) | {"sliding_window": family.write_windows(model)["sliding_window"]}


FAMILY = Family(
  name="mistral",
  architectures=("MistralForCausalLM",),
  model_type="mistral",
  options={"norm": "rms", "activation": "silu", "gated": True, "embedding_scale": 1.0},
  presets=PRESETS,
  fields=family.FIELDS,
  defaults=family.DEFAULTS | {"sliding_window": 4096},
  expected={"hidden_act": "silu"},
  read=lambda hf: family.read_rope(hf) | family.read_windows(hf),
  write=write,
  links=family.EMBEDDINGS + family.NORMS + family.ATTENTION + family.MLP,
)
