"""Conversion against transformers: what it saves is read, what is written it loads, and both compute the same."""

import json

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is optional: pip install torch for the tests against transformers")
transformers = pytest.importorskip("transformers", reason="transformers is optional: pip install transformers")

from maxscale import assemble, generate, resume  # noqa: E402
from maxscale.checkpoint.restore import restore  # noqa: E402
from maxscale.interop import quantised, safetensors  # noqa: E402
from tests.interop import checkpoints as hf  # noqa: E402
from tests.models import parity  # noqa: E402

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
  "untied": ({}, torch.bfloat16),
  "tied, scaled, biased": (
    {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    torch.float16,
  ),
}


def logits(folder, ids):
  """Of the model that transformers loads from a folder, in float32: a cast of a model would round rotary frequencies."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    return model(torch.tensor(ids)).logits.numpy()


def assert_same(folder, model, dtype):
  """transformers loads the folder as the same model, bit by bit, in the dtype that its config.json says."""
  again = transformers.AutoModelForCausalLM.from_pretrained(folder)
  assert again.dtype == dtype
  theirs, parameters = dict(again.named_parameters()), dict(model.named_parameters())
  assert theirs.keys() == parameters.keys()
  for name, x in parameters.items():
    assert torch.equal(theirs[name].float(), x.float()), name


@pytest.mark.parametrize("name", MODELS)
def test_llama_there_and_back(name, tmp_path):
  options, dtype = MODELS[name]
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options)).to(dtype)
  for n, parameter in model.named_parameters():  # transformers starts biases at zero and norms at one
    torch.nn.init.normal_(parameter, 1.0 if "norm" in n else 0.0, 0.2)
  source = tmp_path / "hf"
  model.save_pretrained(source, max_shard_size="20KB")
  assert len(list(source.glob("*.safetensors"))) > 2
  assert hf.to_ours(source, tmp_path / "ours") == 0
  ids = np.random.default_rng(0).integers(0, 90, (2, 80))
  want = logits(source, ids)
  close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(want).max()}
  np.testing.assert_allclose(ours(tmp_path / "ours", ids), want, **close)
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "back") == 0
  assert hf.read(tmp_path / "back") == hf.read(source)
  assert_same(tmp_path / "back", model, dtype)
  # Without hf.json the config.json is made from the config alone; transformers reads the same model in it.
  (tmp_path / "ours/hf.json").unlink()
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "alone", "--dtype", "float32") == 0
  assert_same(tmp_path / "alone", model, torch.float32)
  np.testing.assert_allclose(logits(tmp_path / "alone", ids), want, **close)


def ours(run_dir, ids):
  """float32 logits [B, T, V] of a converted checkpoint, restored as `generate` does."""
  config = json.loads((run_dir / "config.json").read_text())
  config["model"]["compute_dtype"], config["run"]["compile_cache"] = "float32", ""
  (run_dir / "config.json").write_text(json.dumps(config))
  config = generate.on_this_machine(generate.read_config(str(run_dir)))
  program = assemble.build(config, config.model.vocab_size, sampling=True)
  params = restore(str(run_dir), resume.leaves(program, "params/")).state["params"]
  batch = {"tokens": ids.astype(np.int32), "segments": np.ones(ids.shape, np.int32),
           "positions": np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))}  # fmt: skip
  return parity.logits(program, params, batch)


def test_experts_are_saved_one_by_one_and_loaded(tmp_path):
  torch.manual_seed(0)
  config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
  model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
  model.save_pretrained(tmp_path / "hf")
  assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in hf.read(tmp_path / "hf")
  assert hf.to_ours(tmp_path / "hf", tmp_path / "ours") == 0
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "back") == 0
  assert hf.read(tmp_path / "back") == hf.read(tmp_path / "hf")
  assert_same(tmp_path / "back", model, torch.bfloat16)


def test_mxfp4_is_dequantised_as_transformers_does(tmp_path):
  mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (3, 10, 4, 16), dtype=np.uint8)
  scales = rng.integers(100, 140, (3, 10, 4), dtype=np.uint8)
  hf.write_file(tmp_path / "a.safetensors", {"b": blocks, "s": scales})
  stored = safetensors.read_header(str(tmp_path / "a.safetensors"))
  found = quantised.mxfp4(stored["b"], stored["s"])
  want = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
  assert found.shape == tuple(want.shape) == quantised.mxfp4_shape(blocks.shape) and found.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found.astype(np.float32), want.float().numpy())
