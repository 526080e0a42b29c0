"""Plain math against transformers (tiny random models, float32, weights copied here by hand), and against Python loops
for what transformers does not have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale import check
from maxscale.models import module, plain
from tests.models import reference as ref

V, D, N, K, H, F, E = 61, 32, 4, 2, 8, 24, 8
THETA = 100.0
DOCUMENTS = ((9, 12), (24,))  # lengths, of two rows of 24 places: the last three of the first are padding
LAYERS = "model.layers.{}."
SIZES = {"model.vocab_size": V, "model.embed": D, "model.heads": N, "model.kv_heads": K, "model.head_dim": H,
         "model.mlp": F, "model.compute_dtype": "float32", "model.rope_theta": THETA, "model.embedding_scale": 1.0,
         "data.length": 24}  # fmt: skip
HF_SIZES = {"vocab_size": V, "hidden_size": D, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H,
            "intermediate_size": F, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": None,
            "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}  # fmt: skip
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}


# ---- copying: arrays of transformers by name -> arrays by path; gradients are copied as values are


class Copy(dict):
  """What is made of `arrays`; `take` adds one, `stack` one of each layer."""

  def __init__(self, arrays, layers):
    super().__init__()
    self.arrays, self.layers = arrays, layers

  def take(self, path, name, make=lambda w: w):
    if name in self.arrays:
      self[path] = make(self.arrays[name])

  def stack(self, path, name, make=lambda w: w):
    if name.format(self.layers[0]) in self.arrays:
      self[path] = np.stack([make(self.arrays[name.format(i)]) for i in self.layers])


transposed = lambda w: w.swapaxes(-1, -2)  # noqa: E731
into_heads = lambda n: lambda w: w.T.reshape(w.shape[1], n, -1)  # noqa: E731
out_of_heads = lambda w: w.T.reshape(N, -1, w.shape[0])  # noqa: E731
of_heads = lambda n: lambda b: b.reshape(n, -1)  # noqa: E731


def outside(c):
  c.take("embedding", "model.embed_tokens.weight")
  c.take("final_norm/scale", "model.norm.weight")
  c.take("head", "lm_head.weight")


def inside(c, stack="layers", norms=("input_layernorm", "post_attention_layernorm")):
  """Attention and gated MLP as most models of transformers have them."""
  names = ("attention_norm", "mlp_norm") if len(norms) == 2 else (
    "attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")  # fmt: skip
  for path, name in zip(names, norms, strict=True):
    c.stack(f"{stack}/{path}/scale", f"{LAYERS}{name}.weight")
  for path, name, n in (("query", "q", N), ("key", "k", K), ("value", "v", K)):
    c.stack(f"{stack}/attention/{path}", f"{LAYERS}self_attn.{name}_proj.weight", into_heads(n))
    c.stack(f"{stack}/attention/{path}_bias", f"{LAYERS}self_attn.{name}_proj.bias", of_heads(n))
    c.stack(f"{stack}/attention/{path}_norm", f"{LAYERS}self_attn.{name}_norm.weight")
  c.stack(f"{stack}/attention/out", LAYERS + "self_attn.o_proj.weight", out_of_heads)
  c.stack(f"{stack}/attention/out_bias", LAYERS + "self_attn.o_proj.bias")
  c.stack(f"{stack}/attention/sinks", LAYERS + "self_attn.sinks")
  for path in ("gate", "up", "down"):
    c.stack(f"{stack}/mlp/{path}", f"{LAYERS}mlp.{path}_proj.weight", transposed)
    c.stack(f"{stack}/mlp/shared/{path}", f"{LAYERS}mlp.shared_experts.{path}_proj.weight", transposed)


def experts(c):
  c.stack("layers/mlp/router", LAYERS + "mlp.gate.weight", transposed)
  c.stack("layers/mlp/correction", LAYERS + "mlp.gate.e_score_correction_bias")
  both = LAYERS + "mlp.experts.gate_up_proj"
  c.stack("layers/mlp/gate", both, lambda w: transposed(w[:, : w.shape[1] // 2]))
  c.stack("layers/mlp/up", both, lambda w: transposed(w[:, w.shape[1] // 2 :]))
  c.stack("layers/mlp/down", LAYERS + "mlp.experts.down_proj", transposed)


def llama(c):
  outside(c)
  inside(c)


def mixtral(c):
  llama(c)
  experts(c)


def gemma(c):
  outside(c)
  inside(c, norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                   "post_feedforward_layernorm"))  # fmt: skip


def gpt_oss(c):
  llama(c)
  c.stack("layers/mlp/router", LAYERS + "mlp.router.weight", transposed)
  c.stack("layers/mlp/router_bias", LAYERS + "mlp.router.bias")
  for path, first in (("gate", 0), ("up", 1)):
    c.stack(f"layers/mlp/{path}", LAYERS + "mlp.experts.gate_up_proj", lambda w: w[..., first::2])  # noqa: B023
    c.stack(f"layers/mlp/{path}_bias", LAYERS + "mlp.experts.gate_up_proj_bias", lambda w: w[..., first::2])  # noqa: B023
  c.stack("layers/mlp/down", LAYERS + "mlp.experts.down_proj")
  c.stack("layers/mlp/down_bias", LAYERS + "mlp.experts.down_proj_bias")


def gpt2(c):
  layer = "transformer.h.{}."
  c.take("embedding", "transformer.wte.weight")
  c.take("positions", "transformer.wpe.weight")
  for name in ("scale", "bias"):
    theirs = "weight" if name == "scale" else name
    c.take(f"final_norm/{name}", f"transformer.ln_f.{theirs}")
    c.stack(f"layers/attention_norm/{name}", f"{layer}ln_1.{theirs}")
    c.stack(f"layers/mlp_norm/{name}", f"{layer}ln_2.{theirs}")
  for i, path in enumerate(("query", "key", "value")):  # its matrices are [in, out]
    part = slice(i * D, (i + 1) * D)
    c.stack(f"layers/attention/{path}", layer + "attn.c_attn.weight", lambda w: w[:, part].reshape(D, N, -1))  # noqa: B023
    c.stack(f"layers/attention/{path}_bias", layer + "attn.c_attn.bias", lambda b: b[part].reshape(N, -1))  # noqa: B023
  c.stack("layers/attention/out", layer + "attn.c_proj.weight", lambda w: w.reshape(N, -1, D))
  c.stack("layers/attention/out_bias", layer + "attn.c_proj.bias")
  for path, name in (("up", "c_fc"), ("down", "c_proj")):
    c.stack(f"layers/mlp/{path}", f"{layer}mlp.{name}.weight")
    c.stack(f"layers/mlp/{path}_bias", f"{layer}mlp.{name}.bias")


def falcon(c):
  layer = "transformer.h.{}."
  c.take("embedding", "transformer.word_embeddings.weight")
  for name, theirs in (("scale", "weight"), ("bias", "bias")):
    c.take(f"final_norm/{name}", f"transformer.ln_f.{theirs}")
    c.stack(f"layers/attention_norm/{name}", f"{layer}input_layernorm.{theirs}")
  for path, part in (("query", slice(0, N)), ("key", slice(N, N + 1)), ("value", slice(N + 1, N + 2))):
    c.stack(f"layers/attention/{path}", layer + "self_attention.query_key_value.weight",
            lambda w: w.T.reshape(D, N + 2, H)[:, part])  # fmt: skip  # noqa: B023
  c.stack("layers/attention/out", layer + "self_attention.dense.weight", out_of_heads)
  c.stack("layers/mlp/up", layer + "mlp.dense_h_to_4h.weight", transposed)
  c.stack("layers/mlp/down", layer + "mlp.dense_4h_to_h.weight", transposed)


MLA = {"nope_dim": 8, "rope_dim": 4, "v_dim": 6}


def deepseek(c):
  """Its rotary pairs are neighbours: (0, 2, ..., 1, 3, ...) puts them half a head apart."""
  outside(c)
  nope, rope = MLA["nope_dim"], MLA["rope_dim"]
  order = np.r_[:nope, nope : nope + rope : 2, nope + 1 : nope + rope : 2]
  halves = lambda w: np.concatenate([w[..., :-rope], w[..., -rope::2], w[..., 1 - rope :: 2]], -1)  # noqa: E731
  every = c.layers
  for stack, c.layers in (("dense_layers", every[:1]), ("layers", every[1:])):
    inside(c, stack)
    attention, theirs = f"{stack}/attention/", LAYERS + "self_attn."
    c.stack(attention + "query", theirs + "q_proj.weight", lambda w: into_heads(N)(w)[..., order])
    c.stack(attention + "query_down", theirs + "q_a_proj.weight", transposed)
    c.stack(attention + "query_down_norm", theirs + "q_a_layernorm.weight")
    c.stack(attention + "query_up", theirs + "q_b_proj.weight", lambda w: into_heads(N)(w)[..., order])
    c.stack(attention + "kv_down", theirs + "kv_a_proj_with_mqa.weight", lambda w: halves(w.T))
    c.stack(attention + "kv_down_norm", theirs + "kv_a_layernorm.weight")
    c.stack(attention + "kv_up", theirs + "kv_b_proj.weight", into_heads(N))
  experts(c)
  c.layers = every


DEEPSEEK = {
  **HF_SIZES, "num_hidden_layers": 3, "num_key_value_heads": N, "n_routed_experts": E, "num_experts_per_tok": 3,
  "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
  "first_k_dense_replace": 1, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
  "head_dim": 4,
}  # fmt: skip
OUR_DEEPSEEK = {
  "model.layers": 3, "model.kv_heads": N, "model.mlp": 16, "model.experts": E, "model.experts_per_token": 3,
  "model.mla.kv_rank": 12, **{f"model.mla.{name}": size for name, size in MLA.items()}, "model.moe.scale": 2.5,
  "model.moe.groups": 4, "model.moe.groups_per_token": 2, "model.moe.shared": 16, "model.moe.dense_layers": 1,
  "model.moe.dense_mlp": F, "model.norm_eps": 1e-6,
}  # fmt: skip

# name -> (class of transformers, what its config has, our options beside SIZES, how it is copied)
MODELS = {
  "Llama 3": (
    "Llama",
    {**HF_SIZES, "rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA3}, "rms_norm_eps": 1e-5},
    {"model.rope_scaling": {"type": "llama3", **LLAMA3}, "model.norm_eps": 1e-5},
    llama,
  ),
  "GPT-2": (
    "GPT2",
    {"vocab_size": V, "n_embd": D, "n_head": N, "n_layer": 2, "n_inner": F, "n_positions": 64,
     **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
    {"model.kv_heads": N, "model.max_positions": 64, "model.norm": "layer", "model.norm_eps": 1e-5,
     "model.activation": "gelu_tanh", "model.gated": False, "model.mlp_bias": True, "model.qkv_bias": True,
     "model.out_bias": True, "model.tied_embeddings": True},
    gpt2,
  ),
  "Falcon": (
    "Falcon",
    {"vocab_size": V, "hidden_size": D, "num_attention_heads": N, "num_hidden_layers": 2, "ffn_hidden_size": F,
     "rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
    {"model.kv_heads": 1, "model.norm": "layer", "model.norm_eps": 1e-5, "model.parallel_block": True,
     "model.activation": "gelu", "model.gated": False, "model.tied_embeddings": True},
    falcon,
  ),
  "Gemma 2": (
    "Gemma2",
    {**HF_SIZES, "num_hidden_layers": 4, "query_pre_attn_scalar": 12, "sliding_window": 6,
     "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    {"model.layers": 4, "model.norm": "rms_plus_one", "model.post_norms": True, "model.activation": "gelu_tanh",
     "model.tied_embeddings": True, "model.embedding_scale": 0.0, "model.query_scale": 12**-0.5,
     "model.windows": [6, 0], "model.attention_softcap": 2.0, "model.logit_softcap": 3.0},
    gemma,
  ),
  "Gemma 3": (
    "Gemma3",
    {**HF_SIZES, "num_hidden_layers": 7, "query_pre_attn_scalar": 12, "sliding_window": 6, "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": THETA}}},
    {"model.layers": 7, "model.norm": "rms_plus_one", "model.post_norms": True, "model.activation": "gelu_tanh",
     "model.tied_embeddings": True, "model.embedding_scale": 0.0, "model.query_scale": 12**-0.5,
     "model.windows": [6, 6, 6, 6, 6, 0], "model.qk_norm": True, "model.rope_theta": 1000.0,
     "model.rope_local_theta": 100.0, "model.rope_scaling": {"type": "linear", "factor": 8.0}},
    gemma,
  ),
  "Qwen 3": ("Qwen3", HF_SIZES, {"model.qk_norm": True}, llama),
  "Mixtral": (
    "Mixtral",
    {**HF_SIZES, "num_local_experts": E, "num_experts_per_tok": 3},
    {"model.norm_eps": 1e-5, "model.experts": E, "model.experts_per_token": 3},
    mixtral,
  ),
  "gpt-oss": (
    "GptOss",
    {**HF_SIZES, "num_local_experts": E, "num_experts_per_tok": 3, "sliding_window": 6,
     "rope_parameters": {"rope_type": "yarn", "rope_theta": THETA, "truncate": False, **YARN}},
    {"model.norm_eps": 1e-5, "model.experts": E, "model.experts_per_token": 3, "model.moe.router_bias": True,
     "model.mlp_bias": True, "model.qkv_bias": True, "model.out_bias": True, "model.attention_sinks": True,
     "model.activation": "clamped_swiglu", "model.windows": [6, 0], 
     "model.rope_scaling": {"type": "yarn", "truncate": False, **YARN}},
    gpt_oss,
  ),
  "DeepSeek-V2": (
    "DeepseekV2",
    {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    {**OUR_DEEPSEEK, "model.moe.normalise": False},
    deepseek,
  ),
  "DeepSeek-V3": (
    "DeepseekV3",
    {**DEEPSEEK, "q_lora_rank": 10, "num_mtp_layers": 0, "rope_parameters": {
      "rope_type": "yarn", "rope_theta": THETA, "mscale": 1.0, "mscale_all_dim": 0.7, **YARN}},
    {**OUR_DEEPSEEK, "model.mla.q_rank": 10, "model.moe.score": "sigmoid", "model.moe.correction": True,
     "model.moe.group_score": "top2", 
     "model.rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7, **YARN}},
    deepseek,
  ),
}  # fmt: skip


def packed(seed=0):
  """Documents of random tokens in two rows: tokens, targets, segments, positions."""
  rng, shape = np.random.default_rng(seed), (len(DOCUMENTS), 24)
  out = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
  out["targets"] = np.full(shape, -1, np.int32)
  for row, lengths in enumerate(DOCUMENTS):
    for i, (start, length) in enumerate(zip(np.cumsum((0, *lengths)), lengths)):
      tokens = rng.integers(0, V, length)
      out["tokens"][row, start : start + length] = tokens
      out["targets"][row, start : start + length - 1] = tokens[1:]
      out["segments"][row, start : start + length] = i + 1
      out["positions"][row, start : start + length] = np.arange(length)
  return out


def theirs(name, hf, batch, weights):
  """Arrays by name, logits [B, T, V] (zero in padding), and gradients by name of sum(logits * weights)."""
  pytest.importorskip("torch", reason="torch is not installed")
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  import torch

  kind = "Gemma3Text" if name == "Gemma3" else name
  config = getattr(transformers, f"{kind}Config")(**hf, attn_implementation="eager", experts_implementation="eager")
  torch.manual_seed(0)
  model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).float().eval()
  with torch.no_grad():
    for path, w in [*model.named_parameters(), *model.named_buffers()]:
      if w.is_floating_point() and "inv_freq" not in path and "embed_scale" not in path:
        std = 3 if name == "GptOss" and "gate_up_proj" in path else 0.2  # wide enough for the clamps
        w.copy_(w * (w.ndim == 1) + std * torch.randn_like(w))
  logits = torch.zeros(weights.shape)
  for row, lengths in enumerate(DOCUMENTS):
    for start, length in zip(np.cumsum((0, *lengths)), lengths):
      tokens = torch.tensor(batch["tokens"][None, row, start : start + length], dtype=torch.int64)
      logits[row, start : start + length] = model(tokens, use_cache=False).logits[0]
  (logits * torch.tensor(weights)).sum().backward()
  parameters = dict(model.named_parameters())
  arrays = {path: w.detach().numpy() for path, w in {**dict(model.named_buffers()), **parameters}.items()}
  gradients = {p: np.zeros_like(a) if p not in parameters else parameters[p].grad.numpy() for p, a in arrays.items()}
  return arrays, logits.detach().numpy(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name):
  kind, hf, options, copy = MODELS[name]
  config = ref.config({**SIZES, "model.layers": 2, **options})
  batch = packed()
  weights = np.random.default_rng(1).standard_normal((2, 24, V)).astype(np.float32)
  weights *= (batch["segments"] > 0)[..., None]
  arrays, expected, expected_gradients = theirs(kind, hf, batch, weights)
  params, gradients = (Copy(a, range(config.model.layers)) for a in (arrays, expected_gradients))
  copy(params)
  copy(gradients)

  def weighted(params):
    logits = plain.logits(config, params, batch)
    return jnp.sum(logits * weights), logits

  f = jax.jit(jax.value_and_grad(weighted, has_aux=True))
  (_, logits), found = f(module.nest(params))
  ref.assert_close(np.where(batch["segments"][..., None] > 0, logits, 0), expected, 1e-5)
  found = ref.host(found)
  if config.model.max_positions:  # a softmax does not see what all keys have
    assert max(abs(g.pop("layers/attention/key_bias")).max() for g in (gradients, found)) < 1e-4
  ref.assert_close(found, dict(gradients), 5e-5)


# ---- what transformers does not have


def value_and_gradients(f, *args):
  """f's value, and its gradients by the first argument as path -> array."""
  value, gradients = jax.jit(jax.value_and_grad(f))(*args)
  return float(value), ref.host(gradients)


def random_params(config, seed=0):
  params = check.parameters(config)
  rng = np.random.default_rng(seed)
  return module.nest({path: w + 0.1 * rng.standard_normal(w.shape).astype(np.float32) for path, w in params.items()})


def test_a_chunk_is_a_document():
  options = {**SIZES, "model.layers": 2, "model.windows": [5], "model.window_kind": "chunked"}
  config, batch = ref.config(options), packed()
  chunks = {**batch, "segments": batch["segments"] * 10 + batch["positions"] // 5, "positions": batch["positions"] % 5}
  whole = ref.config({**options, "model.windows": []})
  params, inside = random_params(config), batch["segments"][..., None] > 0
  found, expected, without = (
    np.where(inside, plain.logits(c, params, b), 0) for c, b in ((config, batch), (whole, chunks), (whole, batch))
  )
  ref.assert_close(found, expected, 1e-5)
  assert ref.different(without, expected)


@pytest.mark.parametrize("kind", ["relu", "relu2"])
def test_rectifiers(kind):
  rng = np.random.default_rng(0)
  w = {"up": rng.standard_normal((D, F)), "down": rng.standard_normal((F, D))}
  x, config = rng.standard_normal((5, D)), ref.config({**SIZES, "model.activation": kind, "model.gated": False})
  hidden = np.maximum(x @ w["up"], 0) ** (2 if kind == "relu2" else 1)
  ref.assert_close(plain._mlp(config, jax.tree.map(jnp.float32, w), jnp.float32(x)), hidden @ w["down"], 1e-5)


MOE = {**SIZES, "model.experts": E, "model.experts_per_token": 3, "model.mlp": 16, "loss.balance_loss": 0.3,
       "loss.router_z_loss": 0.2}  # fmt: skip
ROUTERS = {
  "softmax, groups by their best": {"model.moe.groups": 4, "model.moe.groups_per_token": 2},
  "softmax, not normalised, capacity": {"model.moe.normalise": False, "model.moe.capacity": 0.8},
  "sigmoid, correction, groups by two": {
    "model.moe.score": "sigmoid", "model.moe.correction": True, "model.moe.groups": 4, "model.moe.groups_per_token": 2,
    "model.moe.group_score": "top2", "model.moe.scale": 2.5, "model.moe.shared": 12, "model.moe.router_bias": True,
    "model.moe.capacity": 1.1,
  },
}  # fmt: skip


def ids_of(config, w, token):
  """The experts of a token, in numpy."""
  moe, logits = config.model.moe, token @ w["router"] + (w["router_bias"] if config.model.moe.router_bias else 0)
  order = np.exp(logits) / np.exp(logits).sum() if moe.score == "softmax" else 1 / (1 + np.exp(-logits))
  order = np.reshape(order + (w["correction"] if moe.correction else 0), (moe.groups, -1))
  value = np.sort(order)[:, -1 if moe.group_score == "max" else -2 :].sum(-1)
  left_out = np.argsort(-value)[moe.groups_per_token :]
  order[left_out] = -np.inf
  return np.argsort(-order.ravel())[: config.model.experts_per_token]


def one_by_one(config, w, x, valid, ids):
  """plain._experts, token by token: output, the losses, and how many choices were dropped."""
  moe, chosen, dropped, losses, rows = config.model.moe, config.model.experts_per_token, 0, 0.0, []
  room = int(np.ceil(moe.capacity * x.shape[1] * chosen / E)) if moe.capacity else 10**9
  for row in range(len(x)):
    taken, probs, log_z, outputs = np.zeros(E, int), 0.0, 0.0, []
    for t, token in enumerate(x[row]):
      e = jnp.exp(token @ w["router"] + (w["router_bias"] if moe.router_bias else 0))
      scores = e / e.sum() if moe.score == "softmax" else e / (1 + e)
      total = sum(scores[i] for i in ids[row][t]) if moe.normalise else 1
      y = gated(token, w["shared"]) if moe.shared else jnp.zeros(D)
      for i in ids[row][t]:
        taken[i] += valid[row, t]
        if taken[i] <= room or not valid[row, t]:
          y += moe.scale * scores[i] / total * gated(token, {name: w[name][i] for name in ("gate", "up", "down")})
        else:
          dropped += 1
      if valid[row, t]:
        probs += scores / scores.sum()
        log_z += jnp.log(e.sum()) ** 2
      outputs.append(y)
    rows.append(jnp.stack(outputs))
    share = taken / (chosen * max(1, valid[row].sum()))
    losses += config.loss.balance_loss * E * (share * probs).sum() + config.loss.router_z_loss * log_z
  return jnp.stack(rows), losses, dropped


def gated(x, w):
  hidden = x @ w["gate"]
  return (hidden / (1 + jnp.exp(-hidden)) * (x @ w["up"])) @ w["down"]


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_token_by_token(name):
  config = ref.config({**MOE, "model.layers": 1, **ROUTERS[name]})
  w = jax.tree.map(lambda a: a[0], random_params(config)["layers"]["mlp"])
  rng = np.random.default_rng(0)
  x, dy = rng.standard_normal((2, 2, 12, D)).astype(np.float32)
  valid = np.arange(12) < np.array([[12], [7]])
  dy *= valid[..., None]
  ids = [[ids_of(config, w, token) for token in row] for row in x]
  y, losses, dropped = one_by_one(config, w, x, valid, ids)
  assert bool(dropped) == bool(config.model.moe.capacity)
  found, found_losses, margin = plain._experts(config, w, jnp.asarray(x), jnp.asarray(valid))
  ref.assert_close(np.where(valid[..., None], found, 0), np.where(valid[..., None], y, 0))
  assert abs(found_losses - losses) < 1e-5 * losses and ((margin > 0) & (margin < 1)).all()
  objective = lambda f: lambda w: (lambda y, losses, _: jnp.sum(y * dy) + losses)(*f(w))  # noqa: E731
  gradients = value_and_gradients(objective(lambda w: plain._experts(config, w, jnp.asarray(x), jnp.asarray(valid))), w)
  expected = jax.grad(objective(lambda w: one_by_one(config, w, x, valid, ids)))
  ref.assert_close(gradients[1], ref.host(expected(w)), 2e-5)


def test_the_next_expert_is_close_by_score_and_correction():
  config = ref.config({**MOE, "model.moe.score": "sigmoid", "model.moe.correction": True, "model.experts_per_token": 1})
  scores = jnp.array([[0.5, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
  choice, gap = plain._choose(config, scores, scores + jnp.array([0, 0.2, 0, 0.39, 0, 0, 0, 0]))
  assert choice[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and gap[0] == pytest.approx((0.6 - 0.5) / 0.5)
  _, gap = plain._choose(config, scores, scores + jnp.array([0, 0.2, 0, 0.49, 0, 0, 0, 0]))
  assert gap[0] == pytest.approx((0.6 - 0.59) / 0.4)


@pytest.mark.parametrize("experts", [0, E])
def test_further_tokens_document_by_document(experts):
  more = {"model.experts": experts, "model.windows": [0, 4], "model.rope_local_theta": 30.0, "loss.mtp": 0.7}
  config = ref.config({**MOE, "model.layers": 2, "model.mtp": 2, "model.embedding_scale": 3.0, **more})
  params, batch = random_params(config), packed()

  def expected(params):
    total, auxiliary = 0.0, 0.0
    for row, lengths in enumerate(DOCUMENTS):
      for start, n in zip(np.cumsum((0, *lengths)), lengths):
        tokens = batch["tokens"][row, start : start + n]
        alone = {"tokens": tokens[None], "segments": np.ones((1, n), np.int32), "positions": np.arange(n)[None]}
        h, more, _ = plain._layers(config, params, alone)
        h = norm(h, params["final_norm"])
        total, auxiliary = total + surprise(params, h, tokens, 1), auxiliary + more
        for k in range(2):
          w = jax.tree.map(lambda a: a[k], params["mtp"])  # noqa: B023
          embedded = jnp.zeros((1, n, D)).at[0, : n - k - 1].set(3 * params["embedding"][tokens[k + 1 :]])
          x = (
            norm(h, w["hidden_norm"]) @ w["projection"][:D] + norm(embedded, w["embedding_norm"]) @ w["projection"][D:]
          )
          h, more, _ = plain._layer(config, w["layer"], x, alone, 2 + k)
          h = norm(h, w["final_norm"])
          total += 0.7 / 2 * surprise(params, h, tokens, k + 2)
          auxiliary += more
    return (total + auxiliary) / (batch["targets"] >= 0).sum()

  def surprise(params, h, tokens, ahead):
    log_p = jax.nn.log_softmax(h[0, : len(tokens) - ahead] @ params["head"].T)
    return -sum(log_p[t, tokens[t + ahead]] for t in range(len(tokens) - ahead))

  def norm(x, w):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w["scale"]

  config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, z_loss=0.0, balance_loss=0.0))
  loss, gradients = value_and_gradients(lambda p: plain.loss(config, p, batch)[0], params)
  wanted, wanted_gradients = value_and_gradients(expected, params)
  assert abs(loss - wanted) < 1e-5 * wanted
  ref.assert_close(gradients, wanted_gradients, 2e-5)
