"""Cases on 8 simulated devices: checkpoints of runs, on any mesh, become Hugging Face's (tests/multidevice.py runs them)."""

import contextlib
import io
import json
import pathlib
import tempfile

import jax
import ml_dtypes
import numpy as np

from maxscale import config as config_lib
from maxscale import resume
from maxscale.checkpoint import Checkpointer, Meta
from maxscale.models import module
from tests.interop import checkpoints as hf
from tests.models import reference as ref

LLAMA = {"model.embedding_scale": 1.0, "model.embed": 16, "model.heads": 4, "model.kv_heads": 2, "model.head_dim": 8,
         "model.mlp": 24, "model.vocab_multiple": 8}  # fmt: skip


def save(folder, options, devices, seed=5):
  """A checkpoint of a run, with its optimizer's state; the logical parameters by path, rows in the order of layers."""
  program = ref.program({**LLAMA, "run.dir": folder, **options}, devices)
  state, rng = program.initialise()(), np.random.default_rng(seed)
  values, placed = {}, {}
  for path, s in program.skeleton.specs.items():
    values[path] = rng.standard_normal(s.logical).astype(np.float32)
    stacked = values[path][list(s.rows)] if s.rows else values[path]  # values: layer i in row i
    padded = np.pad(stacked, [(0, n - m) for n, m in zip(s.shape, s.logical)])
    placed[path] = jax.device_put(padded, program.sharding(s))
  checkpointer = Checkpointer(folder, 3, 0, 600.0)
  meta = Meta(config=config_lib.to_json(program.config))
  checkpointer.save(7, {**state, "params": module.nest(placed)}, resume.leaves(program), meta)
  checkpointer.close()
  return values


def written(folder, *more):
  """What the export of a run holds: name -> float32 array; its config.json."""
  out = pathlib.Path(folder) / "theirs"
  with contextlib.redirect_stdout(io.StringIO()):
    assert hf.to_theirs(folder, out, *more) == 0
  tensors = {}
  for name, (dtype, shape, data) in hf.read(out).items():
    tensors[name] = np.frombuffer(data, hf.safetensors.DTYPES[dtype]).reshape(shape).astype(np.float32)
  return tensors, json.loads((out / "config.json").read_text())


def assert_llama(tensors, values, dtype=np.float32):
  """The tensors are those of the values, by plain formulas, each layer in its place."""
  layers, d = values["layers/mlp/gate"].shape[:2]
  want = {"model.embed_tokens.weight": values["embedding"], "lm_head.weight": values["head"],
          "model.norm.weight": values["final_norm/scale"]}  # fmt: skip
  for i in range(layers):
    own = {path: values[f"layers/{path}"][i] for path in
           ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/gate", "mlp/up", "mlp/down",
            "attention_norm/scale", "mlp_norm/scale")}  # fmt: skip
    here = {
      "self_attn.q_proj": own["attention/query"].reshape(d, -1).T,
      "self_attn.k_proj": own["attention/key"].reshape(d, -1).T,
      "self_attn.v_proj": own["attention/value"].reshape(d, -1).T,
      "self_attn.o_proj": own["attention/out"].reshape(-1, d).T,
      "mlp.gate_proj": own["mlp/gate"].T, "mlp.up_proj": own["mlp/up"].T, "mlp.down_proj": own["mlp/down"].T,
      "input_layernorm": own["attention_norm/scale"], "post_attention_layernorm": own["mlp_norm/scale"],
    }  # fmt: skip
    want |= {f"model.layers.{i}.{name}.weight": x for name, x in here.items()}
  assert tensors.keys() == want.keys(), tensors.keys() ^ want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(tensors[name], x.astype(dtype).astype(np.float32), err_msg=name)


def case_any_mesh():
  layouts = {
    "fsdp, tensor, data": ({"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 2}, 8),
    "padded heads": ({"model.kv_heads": 1, "model.kv_head_multiple": 2, "mesh.tensor": 2}, 2),
    "interleaved pipeline": ({"mesh.pipeline": 2, "mesh.fsdp": 2, "sharding.microbatches": 4, "sharding.repeats": 2,
                              "model.layers": 4}, 4),
  }  # fmt: skip
  for options, devices in layouts.values():
    with tempfile.TemporaryDirectory() as folder:
      values = save(folder, {"model.family": "llama", **options}, devices)
      tensors, config = written(folder, "--dtype", "float32")
      assert_llama(tensors, values)
      assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
      assert config["vocab_size"] == len(values["embedding"])


def case_bfloat16_by_default_and_the_family_can_be_given():
  with tempfile.TemporaryDirectory() as folder:
    values, said = save(folder, {}, 1), io.StringIO()
    with contextlib.redirect_stderr(said):
      assert hf.to_theirs(folder, pathlib.Path(folder) / "theirs") == 1
    assert "has no model.family" in said.getvalue() and "give --family, one of llama, gpt2" in said.getvalue()
    tensors, config = written(folder, "--family", "llama")
    assert_llama(tensors, values, ml_dtypes.bfloat16)
    assert config["dtype"] == "bfloat16"


def case_adapters_are_added_to_their_weights():
  lora = {"lora.rank": 3, "lora.alpha": 6.0, "lora.targets": "layers/(attention/(query|out)|mlp/down)"}
  mesh = {"mesh.fsdp": 2, "mesh.tensor": 2}
  with tempfile.TemporaryDirectory() as folder:
    values = save(folder, {"model.family": "llama", **lora, **mesh}, 4)
    merged = {path: x for path, x in values.items() if not path.endswith(module.ADAPTERS)}
    product = {"attention/query": "ldr,lrnh->ldnh", "attention/out": "lnhr,lrd->lnhd", "mlp/down": "lfr,lrd->lfd"}
    for path, spec in product.items():
      path = f"layers/{path}"
      merged[path] = values[path] + 2 * np.einsum(spec, values[f"{path}_a"], values[f"{path}_b"])
    tensors, _ = written(folder, "--dtype", "float32")
    rounded = ("q_proj.weight", "o_proj.weight", "down_proj.weight")
    assert_llama({n: _near(n, x, merged) if n.endswith(rounded) else x for n, x in tensors.items()}, merged)


def _near(name, x, merged):
  """The expected values where they are the tensor's within rounding."""
  layer, kind = int(name.split(".")[2]), name.split(".")[-2]
  path = {"q_proj": "attention/query", "o_proj": "attention/out", "down_proj": "mlp/down"}[kind]
  w = merged[f"layers/{path}"][layer]
  want = w.reshape(w.shape[0], -1).T if kind != "o_proj" else w.reshape(-1, w.shape[-1]).T
  np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5, err_msg=name)
  return want


def case_the_original_is_found_where_a_run_began():
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)
    config = {**hf.LLAMA, "vocab_size": ref.VOCAB, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24,
              "num_hidden_layers": 2, "rms_norm_eps": 1e-6}  # fmt: skip
    tensors = hf.tensors(config, np.float16)
    source = hf.write(base / "hf", config, tensors)
    (source / "tokenizer.json").write_text("{}")
    with contextlib.redirect_stdout(io.StringIO()):
      assert hf.to_ours(source, base / "ours") == 0
    began = {
      "model.family": "llama",
      "run.init_from": str(base / "ours"),
      "model.rope_theta": 9000.0,
      "model.layers": 2,
    }
    values = save(str(base / "run"), began, 2)
    found, about = written(base / "run")
    assert_llama(found, values, np.float16)
    # All is as in the original, but what the run has otherwise.
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}
    assert about == {k: v for k, v in config.items() if k != "rope_theta"} | rope
    assert (base / "run/theirs/tokenizer.json").exists()
