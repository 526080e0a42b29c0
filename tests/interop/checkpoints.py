"""Small Hugging Face checkpoints without torch, and the conversion of them."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np

from maxscale import convert
from maxscale.interop import safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / "models/golden"  # tests/models/parity.py writes them
FAMILIES = sorted(file.stem for file in GOLDEN.glob("*.json"))
LLAMA = {
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 70, "hidden_size": 24,
  "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
  "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
  "bos_token_id": 7, "eos_token_id": [8, 9], "tie_word_embeddings": False,
}  # fmt: skip
TINY = {**LLAMA, "num_hidden_layers": 1}


def shapes(config):
  """Name -> shape of a Llama's tensors."""
  d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
  q, kv = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
  out = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
  if not config["tie_word_embeddings"]:
    out["lm_head.weight"] = (v, d)
  for i in range(config["num_hidden_layers"]):
    layer = {
      "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d),
      "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
      "mlp.down_proj": (d, f),
    }  # fmt: skip
    out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  return out


def tensors(config, dtype=ml_dtypes.bfloat16, seed=0):
  """Random tensors of a Llama."""
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes(config).items()}


def family(name, dtype=np.float32, seed=0):
  """config.json and random tensors of a tiny model, called and shaped as transformers saves them."""
  stored = json.loads((GOLDEN / f"{name}.json").read_text())
  rng = np.random.default_rng(seed)
  return stored["config"], {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in stored["tensors"].items()}


def write(folder, config, tensors, files=1):
  """Writes a checkpoint in one file, or several with an index; `files` may say which names are in each."""
  folder.mkdir(parents=True, exist_ok=True)
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  if files == 1:
    write_file(folder / "model.safetensors", tensors)
    return folder
  weight_map = {}
  for i in range(files):
    name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
    mine = list(tensors)[i::files]
    write_file(folder / name, {n: tensors[n] for n in mine})
    weight_map |= dict.fromkeys(mine, name)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return folder


def write_file(file, tensors):
  """Plain, and apart from the code that it tests."""
  header, body = {}, b""
  for name, x in tensors.items():
    header[name] = {
      "dtype": safetensors.NAMES[x.dtype],
      "shape": x.shape,
      "data_offsets": [len(body), len(body) + x.nbytes],
    }
    body += np.ascontiguousarray(x).tobytes()
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read(folder):
  """Name -> (dtype, shape, bytes) of each tensor of a checkpoint; plain, as `write_file`."""
  out = {}
  for file in sorted(folder.glob("*.safetensors")):
    data = file.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    for name, entry in header.items():
      a, b = entry["data_offsets"]
      assert name not in out
      out[name] = (entry["dtype"], tuple(entry["shape"]), data[8 + n + a : 8 + n + b])
  return out


def to_ours(source, out, *more):
  """Exit code of the command."""
  return convert.main(["--from", "hf", str(source), "--to", str(out), *map(str, more)])


def to_theirs(source, out, *more):
  return convert.main(["--from", str(source), "--to", "hf", str(out), *map(str, more)])


def leaves(run_dir):
  """The parameters of a checkpoint, each whole on this machine."""
  from maxscale.checkpoint import host

  marker = host.Reader(str(run_dir)).marker
  return tuple(
    host.leaf_of(path, tuple(a["shape"]), tuple(marker["table"][path][0]["rows"]) if a["layer_dims"] else ())
    for path, a in marker["arrays"].items()
    if path.startswith("params/")
  )


def parameters(run_dir):
  """path -> float32 array, all layers, through the restore of checkpoints."""
  from maxscale.checkpoint import restore
  from maxscale.checkpoint.layout import flatten

  state = restore(str(run_dir), leaves(run_dir)).state["params"]
  return {path: np.asarray(x) for path, x in flatten(state).items()}
