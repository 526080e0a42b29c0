"""Tiny models of the families, made by transformers, and what it computes with them.

Weights are a function of a tensor's name and shape, so that golden files hold logits and no weights:

    python -m tests.models.parity --write      # needs torch and transformers

writes golden/<model>.json: its config.json, the names and shapes of its tensors as transformers saves them, and the
tokens that follow `PROMPT` greedily; and golden/<model>.npy: logits at `PLACES`. To add a model, add it to `MODELS` and
write.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maxscale.interop import links
from maxscale.models import families, module
from maxscale.sharding import context
from tests.models import reference as ref

GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCAB, LENGTH = 96, 128
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-2,
         "max_position_embeddings": LENGTH}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LATENT = {**SIZES, "num_key_value_heads": 4, "rms_norm_eps": 1e-4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
          "qk_rope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
          "moe_intermediate_size": 24, "first_k_dense_replace": 1, "rope_theta": 30.0,
          "rope_scaling": {**YARN, "beta_fast": 2.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.9}}  # fmt: skip
# Every kind of layer of a family, windows and original lengths shorter than the text, and no option at the value that
# it would have if it were forgotten.
MODELS = {
  "llama": {**SIZES, "model_type": "llama", "head_dim": 12, "attention_bias": True, "mlp_bias": True,
            "rope_theta": 300.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
  "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "layer_norm_epsilon": 1e-2,
           "bos_token_id": None, "eos_token_id": None},
  "mistral": {**SIZES, "model_type": "mistral", "sliding_window": 7},
  "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
              "rope_theta": 700.0},
  "qwen2": {**SIZES, "model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 700.0},
  "qwen3": {**SIZES, "model_type": "qwen3", "head_dim": 12, "rope_theta": 700.0},
  "qwen3_moe": {**SIZES, "model_type": "qwen3_moe", "head_dim": 12, "num_experts": 8, "num_experts_per_tok": 3,
                "moe_intermediate_size": 24, "norm_topk_prob": True, "attention_bias": True},
  "gemma2": {**SIZES, "model_type": "gemma2", "head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 100,
             "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
  "gemma3": {**SIZES, "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 12, "sliding_window": 7,
             "query_pre_attn_scalar": 100, "rope_theta": 700.0, "rope_local_base_freq": 30.0,
             "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
  "deepseek_v2": {**LATENT, "model_type": "deepseek_v2", "q_lora_rank": 14, "n_group": 4, "topk_group": 2,
                  "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
  "deepseek_v2_lite": {**LATENT, "model_type": "deepseek_v2", "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                       "topk_method": "greedy"},
  "deepseek_v3": {**LATENT, "model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 2,
                  "q_lora_rank": 14, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
                  "num_nextn_predict_layers": 0},
  "kimi": {**LATENT, "model_type": "kimi_k2", "q_lora_rank": 14, "n_group": 1, "topk_group": 1,
           "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0, "n_shared_experts": 1,
           "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
  "gpt_oss": {**SIZES, "model_type": "gpt_oss", "head_dim": 12, "num_local_experts": 8, "num_experts_per_tok": 3,
              "sliding_window": 7, "rope_theta": 700.0, "rope_scaling": {**YARN, "truncate": False}},
}  # fmt: skip
# Rows of the batch: documents, and what is left is padding. The first is longer than all windows and original lengths.
DOCUMENTS = ((LENGTH,), (77,), (40, 61, 20))
PROMPT, NEW = 9, 32  # tokens of the first document, and those that follow
PLACES = tuple((row, place) for row, places in enumerate(((0, 9, 64, 127), (30, 76), (0, 39, 40, 70, 120)))
               for place in places)  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Values of a tensor; bfloat16 holds them exactly."""
  draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).clip(-3.9, 3.9).astype(np.float32)
  if len(shape) == 1:
    around_one = "norm" in name or "ln_" in name
    return np.round(draw * (4 if around_one else 16)) / 16 + (around_one and not name.endswith("bias"))
  return np.round(draw * 16) / 16 * np.float32(2.0 ** round(1 - np.log2(shape[-1]) / 2))


def documents() -> Iterator[tuple[int, int, int]]:
  """(row, first place, length) of each document of the batch."""
  for row, lengths in enumerate(DOCUMENTS):
    for start, n in zip(np.cumsum((0, *lengths)), lengths):
      yield row, int(start), n


def batch() -> dict[str, np.ndarray]:
  """The batch of `DOCUMENTS`."""
  rng = np.random.RandomState(0)
  out = {key: np.zeros((len(DOCUMENTS), LENGTH), np.int32) for key in ("tokens", "segments", "positions")}
  out["targets"] = np.full_like(out["tokens"], -1)
  for i, (row, start, n) in enumerate(documents()):
    here = (row, slice(start, start + n))
    out["tokens"][here] = rng.randint(VOCAB, size=n)
    out["targets"][row, start : start + n - 1] = out["tokens"][here][1:]
    out["segments"][here], out["positions"][here] = i + 1, np.arange(n)
  return {**out, "rows": np.arange(len(DOCUMENTS), dtype=np.int32)}


# ---- ours


def program(config: dict, **more):
  """The program of a config.json, without auxiliary losses; `more`: other options."""
  options = {f"model.{option}": value for option, value in families.options_of(config).items()}
  losses = dict.fromkeys(("loss.z_loss", "loss.balance_loss", "loss.router_z_loss"), 0.0)
  plain = {"model.compute_dtype": "float32", "remat.policy": "none", "data.length": LENGTH, "data.batch_size": 3}
  return ref.program({**options, **losses, **plain, **more}, vocab=config["vocab_size"])


def parameters(program, tensors: dict[str, np.ndarray]):
  """The decoder's parameters from tensors by their name; all are used, or it is an error."""
  specs, model = program.skeleton.specs, program.config.model
  made = links.tensors(families.get(model.family), specs, model)
  assert not made.unlinked, made.unlinked
  assert made.holders.keys() == tensors.keys() - made.copies.keys(), made.holders.keys() ^ tensors.keys()
  out = {path: np.zeros(spec.shape, np.float32) for path, spec in specs.items()}
  for name, tensor in made.holders.items():
    assert tensor.shape == tensors[name].shape, (name, tensor.shape, tensors[name].shape)
    for i, part in enumerate(tensor.parts):
      value = tensor.view(tensors[name], i)[tensor.index(i, tuple((0, n) for n in part.shape))]
      there = (part.row,) * bool(specs[part.path].rows) + (part.expert,) * (part.expert >= 0)
      out[part.path][there + tuple(slice(n) for n in part.shape)] = value
  return module.nest({path: jnp.asarray(value) for path, value in out.items()})


def logits(program, params, batch) -> np.ndarray:
  """float32 logits [B, T, V]."""
  sampling = program.for_sampling()

  def run(params, batch):
    model = sampling.skeleton.merge(params)
    x, _, _ = model.embed(batch)
    return model.logits(model.run_layers(x, jnp.arange(model.shape.L - model.shape.L_dense), batch)[0])

  specs, whole = sampling.param_specs("state"), PartitionSpec()
  return np.asarray(jax.jit(context.on_mesh(run, sampling.mesh, sampling.rules, (specs, whole), whole))(params, batch))


# ---- golden files


class Golden(NamedTuple):
  """What golden files say of a model: config.json, shapes of tensors by name, greedy tokens, logits [PLACES, V]."""

  config: dict
  tensors: dict[str, list[int]]
  greedy: list[int]
  logits: np.ndarray

  @property
  def weights(self) -> dict[str, np.ndarray]:
    return {name: weight(name, tuple(shape)) for name, shape in self.tensors.items()}


def golden(name: str) -> Golden:
  return Golden(**json.loads((GOLDEN / f"{name}.json").read_text()), logits=np.load(GOLDEN / f"{name}.npy"))


# ---- theirs; torch and transformers are imported late


class Published:
  """A model in transformers, as loaded from the folder that it writes.

  Attributes:
    model: float32. config, tensors: of the folder.
  """

  def __init__(self, name: str, folder: str):
    import torch
    import transformers

    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    options = dict(MODELS[name])
    # A config.json of Kimi names this class with a model_type that transformers leaves to Kimi's own code.
    kind = {"kimi_k2": "deepseek_v3"}.get(options["model_type"], options["model_type"])
    config = transformers.AutoConfig.for_model(**{**options, "model_type": kind})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    self.tensors = {n: weight(n, value.shape) for n, value in saved(folder).items()}
    save(folder, self.tensors)
    auto = transformers.AutoModelForCausalLM.from_pretrained
    self.model: Any = auto(folder, dtype=torch.float32, attn_implementation="eager").eval()
    self.config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    self.config |= {"model_type": options["model_type"], "transformers_version": ""}

  def logits(self, batch) -> np.ndarray:
    """float32 logits [B, T, V]: a row of one document as it is, padded on the right, others each document alone."""
    import torch

    out = np.zeros((*batch["tokens"].shape, VOCAB), np.float32)
    for row, start, n in documents():
      end = LENGTH if len(DOCUMENTS[row]) == 1 else start + n
      ids, mask = (torch.tensor(x[row, None, start:end]).long() for x in (batch["tokens"], batch["segments"] > 0))
      with torch.no_grad():
        out[row, start:end] = self.model(input_ids=ids, attention_mask=mask).logits.float().numpy()
    return out

  def greedy(self, batch) -> list[int]:
    import torch

    ids = torch.tensor(batch["tokens"][:1, :PROMPT]).long()
    made = self.model.generate(
      ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    return made[0, PROMPT:].tolist()

  def loss_and_gradients(self, batch, folder: str) -> tuple[float, dict[str, np.ndarray]]:
    """The mean cross-entropy over the targets, and its gradients by the names of the tensors. Ends the model."""
    import torch

    self.model.get_input_embeddings().padding_idx = None  # whose row would have no gradient
    total: Any = 0.0
    for row, start, n in documents():
      ids = torch.tensor(batch["tokens"][row, start : start + n]).long()
      logits = self.model(input_ids=ids[None]).logits[0]
      total = total + torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    loss = total / int((batch["targets"] >= 0).sum())
    loss.backward()
    for parameter in self.model.parameters():
      parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    self.model.save_pretrained(folder)  # takes gradients to the names of tensors, as it takes weights
    return loss.item(), saved(folder)


def saved(folder: str) -> dict[str, np.ndarray]:
  import safetensors.numpy

  return safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")


def save(folder: str, tensors: dict[str, np.ndarray]) -> None:
  import safetensors.numpy

  safetensors.numpy.save_file(tensors, pathlib.Path(folder) / "model.safetensors", {"format": "pt"})


def write() -> None:
  GOLDEN.mkdir(exist_ok=True)
  for name in MODELS:
    with tempfile.TemporaryDirectory() as folder:
      theirs = Published(name, folder)
    logits = theirs.logits(batch())
    shapes = {n: list(value.shape) for n, value in theirs.tensors.items()}
    stored = {"config": theirs.config, "tensors": shapes, "greedy": theirs.greedy(batch())}
    (GOLDEN / f"{name}.json").write_text(json.dumps(stored) + "\n")
    np.save(GOLDEN / f"{name}.npy", np.stack([logits[place] for place in PLACES]))
    print(f"{name}: {len(shapes)} tensors, logits within +-{np.abs(logits).max():.2f}")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--write", action="store_true", required=True)
  parser.parse_args()
  write()
