"""Which parameters are matrices: those are decayed, factored and kept in low precision; Muon takes those of layers."""

import pytest

from maxscale.models.module import ParamSpec
from maxscale.optim import muon
from maxscale.optim.matrices import dimensions
from tests.models import reference as ref

HEADS, KV, UP = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim"), ("rank", "heads", "head_dim")
WIDE, NARROW = ("embed", "mlp"), ("mlp", "embed")
# Names of one layer's dimensions, and what is expected: v a vector, m a matrix of Muon, a another one; its inputs.
OUTSIDE = {
  "embedding": (("vocab", "embed"), "a1"), "head": (("vocab", "embed"), "a1"), "positions": ((None, "embed"), "a1"),
  "final_norm/scale": (("norm",), "v"), "final_norm/bias": (("norm",), "v"),
}  # fmt: skip
LAYER = {
  **{f"{norm}/{part}": (("norm",), "v") for part in ("scale", "bias")
     for norm in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")},
  "attention/query": (HEADS, "m1"), "attention/key": (KV, "m1"), "attention/value": (KV, "m1"),
  "attention/out": (("heads", "head_dim", "embed"), "m2"),
  "attention/query_bias": (HEADS[1:], "v"), "attention/key_bias": (KV[1:], "v"), "attention/value_bias": (KV[1:], "v"),
  "attention/out_bias": (("norm",), "v"), "attention/query_norm": (("norm",), "v"),
  "attention/key_norm": (("norm",), "v"), "attention/sinks": (("heads",), "v"),
  "attention/query_down": (("embed", None), "m1"), "attention/query_down_norm": (("norm",), "v"),
  "attention/query_up": (UP, "m1"), "attention/kv_down": (("embed", None), "m1"),
  "attention/kv_down_norm": (("norm",), "v"), "attention/kv_up": (UP, "m1"),
  "attention/query_a": (("embed", None), "m1"), "attention/query_b": ((None, "heads", "head_dim"), "m1"),
  "attention/out_a": (("heads", "head_dim", None), "m2"),
}  # fmt: skip
DENSE = {
  **{f"mlp/{prefix}{name}": (WIDE, "m1") for prefix in ("", "shared/") for name in ("gate", "up")},
  "mlp/down": (NARROW, "m1"), "mlp/shared/down": (NARROW, "m1"),
  "mlp/gate_bias": (("mlp",), "v"), "mlp/up_bias": (("mlp",), "v"), "mlp/down_bias": (("norm",), "v"),
}  # fmt: skip
MOE = {
  "mlp/router": (("embed", None), "a1"), "mlp/router_bias": ((None,), "v"), "mlp/correction": ((None,), "v"),
  "mlp/gate": (("experts", *WIDE), "m1"), "mlp/up": (("experts", *WIDE), "m1"),
  "mlp/down": (("experts", *NARROW), "m1"),
  "mlp/gate_bias": (("experts", "mlp"), "v"), "mlp/up_bias": (("experts", "mlp"), "v"),
  "mlp/down_bias": (("experts", None), "v"),
}  # fmt: skip
MTP = {
  "embedding_norm": (("norm",), "v"), "hidden_norm/scale": (("norm",), "v"), "projection": (("embed", None), "m1"),
}  # fmt: skip


def spec(path, names, lead=None):
  names = names if lead is None else (lead or None, *names)
  return ParamSpec(path, (6,) * len(names), (6,) * len(names), names, "float32", 1.0, () if lead is None else (0, 1))


PARAMETERS = [
  *((spec(path, names), kind) for path, (names, kind) in OUTSIDE.items()),
  *((spec(f"layers/{path}", names, "layers"), kind) for path, (names, kind) in {**LAYER, **DENSE}.items()),
  *((spec(f"layers/{path}", names, "layers"), kind) for path, (names, kind) in MOE.items()),
  *((spec(f"dense_layers/{path}", names, ""), kind) for path, (names, kind) in {**LAYER, **DENSE}.items()),
  *((spec(f"mtp/{path}", names, ""), kind) for path, (names, kind) in MTP.items()),
  *((spec(f"mtp/layer/{path}", names, ""), kind) for path, (names, kind) in {**LAYER, **MOE}.items()),
]


@pytest.mark.parametrize(("spec", "kind"), PARAMETERS, ids=lambda x: getattr(x, "path", x))
def test_every_parameter_is_a_vector_or_a_matrix(spec, kind):
  d = dimensions(spec)
  assert d.is_matrix == (kind != "v")
  assert muon.applies(spec) == (kind[0] == "m")
  assert (*d.batch, *d.inputs, *d.outputs) == tuple(range(len(spec.names)))
  assert len(d.batch) == bool(spec.rows) + ("experts" in spec.names)
  assert kind == "v" or len(d.inputs) == int(kind[1])


def test_the_vectors_of_the_model_are_its_norms():
  skeleton = ref.program(ref.MOE).skeleton
  vectors = {path for path, spec in skeleton.specs.items() if not dimensions(spec).is_matrix}
  assert vectors == {"layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"}
