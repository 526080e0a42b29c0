"""The families compute what transformers computes: by its golden files, and by itself where it is installed."""

import copy
import functools
import importlib.util
import json
import tempfile

import numpy as np
import pytest

from maxscale import config as config_lib
from maxscale.interop import links
from maxscale.models import decoder, families, module, sample
from maxscale.models.family import FamilyError, nested
from maxscale.models.parts import Shape
from tests.models import parity
from tests.models import reference as ref

BATCH = parity.batch()
VALID = BATCH["segments"] > 0
FLOAT32, BFLOAT16, GRADIENTS = 1e-5, 0.04, 5e-5  # relative errors

live = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("torch", "transformers", "safetensors"))),
  reason="torch, transformers or safetensors is not installed: golden files alone are compared with",
)


@functools.cache
def ours(name):
  """The program of a model, its parameters, and its logits for the batch."""
  golden = parity.golden(name)
  program = parity.program(golden.config)
  params = parity.parameters(program, golden.weights)
  return program, params, parity.logits(program, params, BATCH)


@functools.cache
def theirs(name):
  """The model in transformers, and its logits for the batch."""
  with tempfile.TemporaryDirectory() as folder:
    published = parity.Published(name, folder)
  return published, published.logits(BATCH)


def at_places(logits):
  return np.stack([logits[place] for place in parity.PLACES])


# ---- golden files


def test_every_family_has_a_model():
  found = {families.options_of(parity.golden(name).config)["family"] for name in parity.MODELS}
  assert found == set(families.NAMES)


@pytest.mark.parametrize("name", parity.MODELS)
def test_logits_are_those_of_the_golden_files(name):
  expected = parity.golden(name).logits
  assert ref.error(at_places(ours(name)[2]), expected) < FLOAT32
  assert ref.different(expected[1], expected[3], 0.1), "all places have the same logits: nothing was compared"


# Learned positions, windows, a rotary base of their own, experts, latent attention, sinks.
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_greedy_sampling_gives_the_same_tokens(name):
  program, params, _ = ours(name)
  prompt = BATCH["tokens"][0, : parity.PROMPT]
  made = sample.sample(program.for_sampling(), params, prompt, parity.NEW, 0.0, 0)
  assert made.tolist() == parity.golden(name).greedy


# ---- transformers itself


@live
@pytest.mark.parametrize("name", parity.MODELS)
def test_golden_files_are_what_transformers_does(name):
  published, logits = theirs(name)
  golden = parity.golden(name)
  assert families.options_of(published.config) == families.options_of(golden.config)
  assert {n: list(t.shape) for n, t in published.tensors.items()} == golden.tensors
  assert published.greedy(BATCH) == golden.greedy
  assert ref.error(at_places(logits), golden.logits) < FLOAT32


@live
@pytest.mark.parametrize("name", parity.MODELS)
def test_logits_are_those_of_transformers(name):
  """A whole, a padded and a packed row; longer than windows and original lengths."""
  found, expected = ours(name)[2][VALID], theirs(name)[1][VALID]
  # In the norm; at a few ill-conditioned places rounding alone comes to 1e-5 of the largest logit.
  assert np.linalg.norm(found - expected) < FLOAT32 * np.linalg.norm(expected)
  assert ref.error(found, expected) < 3 * FLOAT32


@live
@pytest.mark.parametrize("name", parity.MODELS)
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(name):
  import torch

  published, exact = copy.copy(theirs(name)[0]), theirs(name)[1]
  published.model = copy.deepcopy(published.model).to(torch.bfloat16)
  program = parity.program(parity.golden(name).config, **{"model.compute_dtype": "bfloat16"})

  def error(logits):
    """The median over places: where two experts are equally good, another may be chosen."""
    norm = lambda x: np.linalg.norm(x[VALID], axis=-1)  # noqa: E731
    return np.median(norm(logits - exact) / norm(exact))

  found = error(parity.logits(program, ours(name)[1], BATCH))
  assert 1e-4 < found < min(BFLOAT16, 1.1 * error(published.logits(BATCH)))


@live
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma2"])
def test_gradients_are_those_of_transformers(name, tmp_path):
  published = parity.Published(name, tmp_path)
  expected_loss, tensors = published.loss_and_gradients(BATCH, tmp_path)
  program, params, _ = ours(name)
  loss, _, gradients = ref.loss_and_gradients(program, params, BATCH)
  assert loss == pytest.approx(expected_loss, rel=1e-6)
  expected = {path: g for path, g in ref.host(parity.parameters(program, tensors)).items() if path in program.trained}
  assert all(np.abs(g).max() > 1e-6 for g in expected.values()), "a gradient is zero: nothing was compared"
  ref.assert_close(gradients, expected, GRADIENTS, name)


@live
def test_further_tokens_are_predicted_as_by_transformers(tmp_path):
  import torch
  from transformers.modeling_layers import MtpModel

  published, count = parity.Published("deepseek_v3", tmp_path), 2
  main, layers = published.model, published.config["num_hidden_layers"]
  program = parity.program({**published.config, "num_nextn_predict_layers": count})
  model = program.config.model
  holders = links.tensors(families.get(model.family), program.skeleton.specs, model).holders
  tensors = {name: parity.weight(name, tensor.shape) for name, tensor in holders.items()}
  parity.save(tmp_path, tensors)
  main.config.num_mtp_layers, main.config.name_or_path = count, str(tmp_path)
  main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({layers}|{layers + 1})\."]  # its own says 61
  further, total = MtpModel.from_pretrained(main).eval(), 0.0
  for row, start, n in parity.documents():
    ids = torch.tensor(BATCH["tokens"][row, None, start : start + n]).long()
    with torch.no_grad():
      hidden = main.model(input_ids=ids).last_hidden_state
      for k in range(count):
        places = torch.arange(k + 1, n)[None]
        hidden = further.forward_layer(k, hidden[:, :-1], places, None, input_ids=ids[:, k + 1 :])
        logits, targets = main.lm_head(hidden)[0, :-1], ids[0, k + 2 :]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
  _, sums, _ = ref.loss_and_gradients(program, parity.parameters(program, tensors), BATCH)
  assert float(sums["mtp_nll"]) == pytest.approx(total / count, rel=1e-6)


@live
@pytest.mark.parametrize("family", families.NAMES)
def test_transformers_understands_what_is_written(family):
  import transformers

  family = families.get(family)
  for name in family.presets:
    options = families.find_preset(name)
    written = {**family.extra, **family.json_of(config_lib.from_json(json.dumps({"model": nested(options)})).model)}
    kind = family.model_type if family.model_type in transformers.CONFIG_MAPPING else "deepseek_v3"
    again = transformers.AutoConfig.for_model(**{**written, "model_type": kind}).to_dict()
    read = family.options_of(json.loads(json.dumps(again)))
    assert {o: v for o, v in read.items() if o in options} == {o: pytest.approx(v) for o, v in options.items()}, name


# ---- config.json


# Parameters of the published checkpoints, modules of multi-token prediction left out.
COUNTS = {
  "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
  "gpt2-124m": 124_439_808, "gpt2-355m": 354_823_168, "gpt2-774m": 774_030_080, "gpt2-1.5b": 1_557_611_200,
  "gpt3-175b": 174_604_259_328, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
  "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
  "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624,
  "qwen3-235b-a22b": 235_093_634_560, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984,
  "gemma2-27b": 27_227_128_320, "gemma3-1b": 999_885_952, "gemma3-4b": 3_880_263_168, "gemma3-12b": 11_766_034_176,
  "gemma3-27b": 27_009_346_304, "deepseek-v2-lite": 15_706_484_224, "deepseek-v2": 235_741_434_880,
  "deepseek-v3": 671_026_419_200, "kimi-k2": 1_026_408_232_448, "gpt-oss-20b": 20_914_757_184,
  "gpt-oss-120b": 116_829_156_672,
}  # fmt: skip


def test_presets_have_the_published_numbers_of_parameters():
  found = {}
  for name in (name for family in families.NAMES for name in families.get(family).presets):
    config = config_lib.from_json(json.dumps({"model": nested(families.find_preset(name)), "data": {"length": 64}}))
    config_lib.check(config)
    shape = Shape.of(config, config.model.vocab_size)
    specs = decoder.skeleton(shape, tuple(range(shape.L - shape.L_dense))).specs
    found[name] = module.count({path: s for path, s in specs.items() if not path.startswith("mtp/")})
  assert found == COUNTS


# Keys of config.json as they were published, in the form of older transformers.
PUBLISHED = {
  "mistral-7b-v0.1": {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
  },
  "qwen2.5-0.5b": {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "qwen3-30b-a3b": {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
  },
  "gemma2-2b": {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
  },
  "gemma3-1b": {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144,
  },
  "deepseek-v2-lite": {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
  },
  "deepseek-v3": {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
  },
  "kimi-k2": {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 163840,
  },
  "gpt-oss-20b": {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "vocab_size": 201088,
  },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name):
  model = lambda options: config_lib.from_json(json.dumps({"model": nested(options)})).model  # noqa: E731
  found, expected = model(families.options_of(PUBLISHED[name])), model(families.find_preset(name))
  # json_of says what a model computes, whichever way its options were said
  assert families.get(expected.family).json_of(found) == families.get(expected.family).json_of(expected)
  assert found.family == expected.family


@pytest.mark.parametrize(
  ("name", "key", "value"),
  [
    ("llama", "hidden_act", "gelu"), ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
    ("gpt2", "activation_function", "relu"), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True), ("mixtral", "router_jitter_noise", 0.1), ("qwen2", "use_sliding_window", True),
    ("qwen3", "use_sliding_window", True), ("qwen3_moe", "mlp_only_layers", [1]), ("qwen3_moe", "decoder_sparse_step", 2),
    ("gemma2", "hidden_activation", "gelu"), ("gemma2", "use_bidirectional_attention", True),
    ("gemma3", "use_bidirectional_attention", True), ("gemma3", "layer_types", ["chunked_attention"] * 7),
    ("deepseek_v2", "topk_method", "noaux_tc"), ("deepseek_v2", "scoring_func", "sigmoid"),
    ("deepseek_v2", "norm_topk_prob", True), ("deepseek_v3", "topk_method", "greedy"),
    ("deepseek_v3", "scoring_func", "softmax"), ("deepseek_v3", "moe_layer_freq", 2),
    ("deepseek_v3", "attention_bias", True),
    ("deepseek_v3", "rope_interleave", False), ("gpt_oss", "swiglu_limit", 5.0), ("gpt_oss", "hidden_act", "gelu"),
  ],
)  # fmt: skip
def test_what_a_family_cannot_mean_is_refused(name, key, value):
  with pytest.raises(FamilyError, match=key if key != "rope_parameters" else "rope_type"):
    families.options_of({**parity.golden(name).config, key: value})


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("deepseek_v3", {"experts": 0}), ("deepseek_v3", {"mla.kv_rank": 0}), ("mixtral", {"experts": 0}),
    ("mistral", {"windows": [7, 0]}), ("mistral", {"qkv_bias": True}), ("gemma2", {"windows": [7, 5]}),
    ("gemma2", {"query_scale": 0.3}), ("deepseek_v3", {"moe.shared": 25}), ("gpt_oss", {"moe.scale": 2.0}),
    ("gpt2", {"mlp_bias": False}),
  ],
)  # fmt: skip
def test_what_a_family_cannot_say_is_not_written(name, change):
  options = families.options_of(parity.golden(name).config)
  family = families.get(options["family"])
  write = lambda options: family.json_of(config_lib.from_json(json.dumps({"model": nested(options)})).model)  # noqa: E731
  write(options)
  with pytest.raises(FamilyError, match="model\\."):
    write({**options, **change})
