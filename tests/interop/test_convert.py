"""`python -m maxscale.convert` there and back, without torch."""

import dataclasses
import json
import shutil
import threading

import jax
import ml_dtypes
import numpy as np
import pytest

from maxscale import config as config_lib
from maxscale import generate, storage
from maxscale.checkpoint import commit, host
from maxscale.checkpoint.fingerprint import fingerprint as on_devices
from maxscale.checkpoint.fingerprint import host_words
from maxscale.interop import exporting, importing, work
from maxscale.models import families
from tests import multidevice
from tests.interop import checkpoints as hf

BF16 = ml_dtypes.bfloat16
CASES = "tests.interop.convert_cases"
results = multidevice.fixture(CASES)


@pytest.mark.parametrize("name", multidevice.names(CASES))
def test_runs(results, name):
  multidevice.check(results, name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  """A sharded checkpoint with two dtypes, its tensors, and the conversion of it."""
  folder = tmp_path_factory.mktemp("llama")
  tensors = hf.tensors(hf.LLAMA)
  for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
    tensors[name] = tensors[name].astype(np.float32) + np.float32(1e-6)
  everything = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  source = hf.write(folder / "hf", hf.LLAMA, everything, files=3)
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"top_p": 0.9}')
  assert hf.to_ours(source, folder / "ours") == 0
  return source, tensors, folder / "ours"


def test_there_and_back_is_byte_identical(llama, tmp_path, capsys):
  source, tensors, ours = llama
  assert hf.to_theirs(ours, tmp_path / "back") == 0
  said = capsys.readouterr().out
  assert "MB/s" in said and "VmHWM" in said
  want = {n: (hf.safetensors.NAMES[x.dtype], x.shape, x.tobytes()) for n, x in tensors.items()}
  assert hf.read(tmp_path / "back") == want
  for name in ("config.json", "tokenizer.json", "generation_config.json"):
    read = lambda folder, name=name: json.loads((folder / name).read_text())  # noqa: E731
    assert read(tmp_path / "back") == read(source), name
  assert json.loads((ours / "hf.json").read_text())["dtypes"].keys() == {
    "model.norm.weight", "model.layers.1.input_layernorm.weight"
  }  # fmt: skip


def test_parameters_are_where_the_legend_says(llama):
  _, tensors, ours = llama
  params, plain = hf.parameters(ours), {n: x.astype(np.float32) for n, x in tensors.items()}
  q, k, o = (plain[f"model.layers.2.self_attn.{n}_proj.weight"] for n in "qko")
  for d, n, h in ((0, 0, 0), (23, 5, 7), (3, 4, 1)):
    assert params["layers/attention/query"][2, d, n, h] == q[n * 8 + h, d]
    assert params["layers/attention/out"][2, n, h, d] == o[d, n * 8 + h]
    assert params["layers/attention/key"][2, d, n % 2, h] == k[(n % 2) * 8 + h, d]
  np.testing.assert_array_equal(params["layers/mlp/down"][1], plain["model.layers.1.mlp.down_proj.weight"].T)
  np.testing.assert_array_equal(params["embedding"], plain["model.embed_tokens.weight"])
  np.testing.assert_array_equal(params["head"], plain["lm_head.weight"])
  assert {path: x.shape for path, x in params.items()} == {
    path: spec.logical for path, spec in importing.parameters(generate.read_config(str(ours))).items()
  }


def test_the_config_is_a_whole_one(llama):
  ours = llama[2]
  config = config_lib.from_json((ours / "config.json").read_text())
  config_lib.check(config)
  model = config.model
  assert (model.family, model.vocab_size, model.kv_heads, model.head_dim, model.layers) == ("llama", 70, 2, 8, 3)
  assert (model.norm_eps, model.rope_theta, model.embedding_scale) == (1e-5, 5000.0, 1.0)
  assert config.data.tokenizer == str(ours / "tokenizer.json") and config.run_dir == f"runs/{ours.name}"
  assert commit.read_marker(str(ours), 0)["meta"]["config_hash"] == config.hash


@pytest.mark.parametrize("name", hf.FAMILIES)
def test_every_family_there_and_back(name, tmp_path):
  config, tensors = hf.family(name, BF16)
  source = hf.write(tmp_path / "hf", config, tensors)
  assert hf.to_ours(source, tmp_path / "ours") == 0
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "back") == 0
  assert hf.read(tmp_path / "back") == hf.read(source)
  assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_tensors_of_a_further_token_and_copies_of_tables(tmp_path):
  config, tensors = hf.family("deepseek_v3")
  config = {**config, "num_nextn_predict_layers": 1}
  # transformers counts the module and has not its tensors
  source = hf.write(tmp_path / "without", config, tensors)
  assert hf.to_ours(source, tmp_path / "ours without") == 0
  assert hf.to_theirs(tmp_path / "ours without", tmp_path / "back without") == 0
  assert hf.read(tmp_path / "back without") == hf.read(source)
  assert json.loads((tmp_path / "back without/config.json").read_text()) == {**config, "num_nextn_predict_layers": 0}
  layers, d = config["num_hidden_layers"], config["hidden_size"]
  # The published checkpoint has it as one more layer, with copies of the embedding and the head.
  last = f"model.layers.{layers - 1}."
  more = {n.replace(last, f"model.layers.{layers}."): x[::-1].copy() for n, x in tensors.items() if n.startswith(last)}
  extra = {"enorm.weight": (d,), "hnorm.weight": (d,), "eh_proj.weight": (d, 2 * d), "shared_head.norm.weight": (d,)}
  rng = np.random.default_rng(1)
  more |= {f"model.layers.{layers}.{n}": rng.standard_normal(shape, np.float32) for n, shape in extra.items()}
  more[f"model.layers.{layers}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
  more[f"model.layers.{layers}.shared_head.head.weight"] = tensors["lm_head.weight"]
  source = hf.write(tmp_path / "with", config, {**tensors, **more})
  assert hf.to_ours(source, tmp_path / "ours with") == 0
  assert hf.to_theirs(tmp_path / "ours with", tmp_path / "back with") == 0
  assert hf.read(tmp_path / "back with") == hf.read(source)
  assert json.loads((tmp_path / "back with/config.json").read_text()) == config
  projection = hf.parameters(tmp_path / "ours with")["mtp/projection"]
  theirs = more[f"model.layers.{layers}.eh_proj.weight"]  # of [embedding, hidden state]
  np.testing.assert_array_equal(projection[0], np.concatenate([theirs.T[d:], theirs.T[:d]]))


def test_rotary_pairs_are_put_halves_apart(tmp_path):
  config, tensors = hf.family("deepseek_v3")
  assert hf.to_ours(hf.write(tmp_path / "hf", config, tensors), tmp_path / "ours") == 0
  params = hf.parameters(tmp_path / "ours")
  nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
  attention = "model.layers.3.self_attn."  # row 1 of the layers with experts: two come before them
  up = tensors[f"{attention}q_b_proj.weight"].reshape(4, nope + rope, -1)
  down = tensors[f"{attention}kv_a_proj_with_mqa.weight"]
  query, key = params["layers/attention/query_up"][1], params["layers/attention/kv_down"][1]
  np.testing.assert_array_equal(query[..., :nope], up[:, :nope].transpose(2, 0, 1))
  np.testing.assert_array_equal(key[:, :rank], down[:rank].T)
  for i in range(rope // 2):
    for half in range(2):
      np.testing.assert_array_equal(query[..., nope + half * rope // 2 + i], up[:, nope + 2 * i + half].T)
      np.testing.assert_array_equal(key[:, rank + half * rope // 2 + i], down[rank + 2 * i + half])
  np.testing.assert_array_equal(params["dense_layers/mlp/up"][1], tensors["model.layers.1.mlp.up_proj.weight"].T)
  np.testing.assert_array_equal(
    params["layers/mlp/down"][0, 5], tensors["model.layers.2.mlp.experts.5.down_proj.weight"].T
  )


# ---- what is wrong is one message, and leaves nothing


def change(**entries):
  return lambda config, tensors: config.update(entries)


def without(name):
  return lambda config, tensors: tensors.pop(name)


def put(name, value):
  return lambda config, tensors: tensors.__setitem__(name, value)


Q = "model.layers.0.self_attn.q_proj.weight"
BAD = {
  "vocabulary": (change(vocab_size=71), ["model.embed_tokens.weight has shape [70, 24]", "[71, 24] (vocab_size=71)"]),
  "shape": (put(Q, np.zeros((40, 24), BF16)), [f"{Q} has shape [40, 24]; the config says [48, 24]"]),
  "integers": (put(Q, np.zeros((48, 24), np.int32)), [f"{Q} is int32; weights are float32, float16 or bfloat16"]),
  "float8 alone": (
    put(Q, np.zeros((48, 24), ml_dtypes.float8_e4m3fn)),
    [f"{Q} is float8_e4m3fn", "or float8 with scales in a tensor ..._scale_inv"],
  ),
  "missing and unknown": (
    lambda config, tensors: (
      tensors.pop("model.norm.weight"), tensors.pop(Q), tensors.update({"model.layers.0.extra": np.zeros(3, BF16)})
    ),
    ["no parameter for: model.layers.0.extra", f"that the checkpoint lacks: {Q}, model.norm.weight"],
  ),
  "a bias that config.json does not say": (
    put("model.layers.0.self_attn.q_proj.bias", np.zeros(48, BF16)),
    ["no parameter for: model.layers.0.self_attn.q_proj.bias"],
  ),
  "tied in config.json only": (
    change(tie_word_embeddings=True),
    ["model.safetensors: lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings"],
  ),
  "untied without a head": (without("lm_head.weight"), ["that the checkpoint lacks: lm_head.weight"]),
  "architecture": (
    change(architectures=["FooForCausalLM"], foo=1),
    ["no family reads FooForCausalLM. The nearest is", "does not know foo"],
  ),
  "activation": (change(hidden_act="gelu"), ["config.json: hidden_act='gelu'", "hidden_act='silu' only"]),
  "rope": (
    change(rope_scaling={"type": "dynamic", "factor": 2.0}), ["rope_type='dynamic' is not supported", "linear, llama3"]
  ),
  "quantisation": (
    change(quantization_config={"quant_method": "gptq"}), ["config.json says quantization 'gptq'; known: fp8, mxfp4"]
  ),
  "key": (lambda config, tensors: config.pop("hidden_size"), ["config.json has no 'hidden_size'"]),
  "heads": (change(num_key_value_heads=4), ["model.heads=6 is not divisible by model.kv_heads=4"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_contradicts_itself_is_refused(case, tmp_path, capsys):
  config, tensors = dict(hf.TINY), hf.tensors(hf.TINY)
  spoil, messages = BAD[case]
  spoil(config, tensors)
  refused(hf.write(tmp_path / "hf", config, tensors), tmp_path, capsys, messages)


def refused(source, tmp_path, capsys, messages):
  """The conversion says one message, without a stack, and leaves nothing behind."""
  before = {p.name for p in tmp_path.iterdir()}
  assert hf.to_ours(source, tmp_path / "out") in (1, 2)
  out, err = capsys.readouterr()
  assert out == "" and err.count("python -m maxscale.convert: ") == 1 and "Traceback" not in err
  for message in messages:
    assert message in err, err
  assert {p.name for p in tmp_path.iterdir()} == before


def remove(folder):
  (folder / "model-00002-of-00002.safetensors").unlink()


def truncate(folder):
  file = folder / "model-00002-of-00002.safetensors"
  file.write_bytes(file.read_bytes()[:-5])


def corrupt(folder):
  file = folder / "model-00002-of-00002.safetensors"
  file.write_bytes(file.read_bytes()[:8] + b"\xff" * 40 + file.read_bytes()[48:])


def pickles(folder):
  for file in folder.glob("*.safetensors*"):
    file.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
  "spoil, messages",
  [
    (remove, ["lacks model-00002-of-00002.safetensors, named in model.safetensors.index.json"]),
    (truncate, ["model-00002-of-00002.safetensors: ", "the file is truncated"]),
    (corrupt, ["model-00002-of-00002.safetensors is damaged: its header is not one"]),
    (pickles, ["pytorch_model.bin is a pickle, which can run any code", "save_pretrained"]),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'), ["index.json is damaged"]),
    (
      lambda f: (f / "model.safetensors.index.json").unlink(),
      ["2 safetensors files and no model.safetensors.index.json"],
    ),
    (lambda f: (f / "config.json").unlink(), ["has no config.json", "--preset"]),
    (lambda f: (f / "config.json").write_text("{"), ["config.json is not JSON"]),
  ],
)
def test_damaged_files_are_refused(spoil, messages, tmp_path, capsys):
  source = hf.write(tmp_path / "hf", hf.TINY, hf.tensors(hf.TINY), files=2)
  spoil(source)
  refused(source, tmp_path, capsys, messages)


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
  source, fired = hf.write(tmp_path / "hf", hf.TINY, hf.tensors(hf.TINY)), []

  def fail(store, piece):
    fired.append(piece)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(host.arrays, "write_file", fail)
  refused(source, tmp_path, capsys, ["cannot be written", "No space left on device"])
  assert fired


def test_what_a_killed_conversion_left_does_not_stay(llama, tmp_path):
  (tmp_path / ".out.partial").mkdir()
  (tmp_path / ".out.partial" / "half").write_text("half")
  assert hf.to_ours(llama[0], tmp_path / "out") == 0
  assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "half").exists()


def test_an_output_that_is_there_is_not_touched(llama, tmp_path, capsys):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("mine")
  assert hf.to_ours(llama[0], tmp_path / "out") == 1 and "out is there already" in capsys.readouterr().err
  assert hf.to_theirs(llama[2], tmp_path / "out") == 1 and "out is there already" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "mine").read_text() == "mine"


def test_arguments_that_mean_nothing(tmp_path, capsys):
  for arguments in (["--from", "a", "--to", "b"], ["--from", "hf", "a", "--to", "hf", "b"]):
    assert hf.convert.main(arguments) == 2 and "--from hf DIR --to CKPT" in capsys.readouterr().err
  assert hf.to_ours("a", tmp_path / "b", "--dtype", "float32") == 2
  assert "--dtype is for the other direction" in capsys.readouterr().err


# ---- back from a damaged or another checkpoint


def test_a_damaged_checkpoint_is_not_written(llama, tmp_path, capsys):
  copied = tmp_path / "ours"
  shutil.copytree(llama[2], copied)
  file = next(p for p in (copied / "checkpoints").rglob("attention/query/c/*/*/*/*") if p.is_file())
  data = bytearray(file.read_bytes())
  data[100] ^= 1
  file.write_bytes(data)
  assert hf.to_theirs(copied, tmp_path / "out") == 1
  assert "params/layers/attention/query, layer" in capsys.readouterr().err
  data[100] ^= 1
  file.write_bytes(data)
  marker = commit.read_marker(str(copied), 0)
  marker["fingerprints"]["params/head"][0][1] ^= 1  # as if the data were whole but not what was saved
  storage.write_sealed(commit.folder(str(copied), 0) / commit.MARKER, marker)
  assert hf.to_theirs(copied, tmp_path / "out") == 1
  assert "params/head, layer 0: its fingerprint differs" in capsys.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} == {"ours"}
  assert hf.to_theirs(copied, tmp_path / "out", "--step", 5) == 1
  assert "holds no whole checkpoint of step 5; steps that it holds: [0]" in capsys.readouterr().err


def test_dtype_and_what_changed_in_the_config(llama, tmp_path):
  source, tensors, ours = llama
  assert hf.to_theirs(ours, tmp_path / "f32", "--dtype", "float32") == 0
  back = hf.read(tmp_path / "f32")
  assert {dtype for dtype, _, _ in back.values()} == {"F32"}
  assert all(back[n][2] == x.astype(np.float32).tobytes() for n, x in tensors.items())
  config = json.loads((source / "config.json").read_text())
  assert json.loads((tmp_path / "f32/config.json").read_text()) == {**config, "torch_dtype": "float32"}


def test_fingerprints_on_the_host_are_those_of_the_devices():
  rng = np.random.default_rng(0)
  for shape in ((), (5,), (5, 6, 7), (40000, 3), (3, 70000)):
    x = np.asarray(rng.standard_normal(shape), np.float32)
    leaf = host.leaf_of("a", shape, ())
    want = on_devices({"a": jax.device_put(x, leaf.sharding)}, (leaf,))["a"][0]
    for file in {shape, tuple(-(-n // 2) for n in shape), (*(-(-n // 3) for n in shape[:1]), *shape[1:])}:
      words = np.zeros(2, np.uint32)
      for where in host.blocks(shape, file):
        words += host_words(x[tuple(slice(a, b) for a, b in where)], where, shape)
      assert words.tolist() == want.tolist(), (shape, file)


# ---- memory


def test_memory_is_bounded(tmp_path):
  config = {**hf.LLAMA, "vocab_size": 24000, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6,
            "head_dim": 64, "num_hidden_layers": 6, "tie_word_embeddings": True}  # fmt: skip
  source = hf.write(tmp_path / "hf", config, {n: np.ones(s, BF16) for n, s in hf.shapes(config).items()})
  for convert, arguments in (
    (importing.from_hf, (source, tmp_path / "ours")),
    (exporting.to_hf, (tmp_path / "ours", tmp_path / "back")),
  ):
    report = convert(*map(str, arguments))
    assert report.largest == 4 * 24000 * 384
    assert report.largest / 4 < report.held <= 2.5 * report.largest
    assert report.peak is None or report.peak < 3 * report.largest, str(report)


def test_jobs_hold_no_more_than_the_budget_and_the_first_error_ends_them():
  budget, lock, held, most = work.Budget(100), threading.Lock(), [0], [0]
  sizes = [30, 80, 10, 10, 10, 60, 250, 5, 45, 45] * 5

  def job(n):
    with lock:
      held[0] += n
      most[0] = max(most[0], held[0] if n <= 100 else 0)
    threading.Event().wait(0.001)
    with lock:
      assert n <= 100 or held[0] == n  # one that is too large runs alone
      held[0] -= n

  work.run([(n, lambda n=n: job(n)) for n in sizes], budget)
  assert 80 <= most[0] <= 100 and budget.peak == 250 and held == [0]
  begun = []

  def failing(i):
    begun.append(i)
    if i == 3:
      raise ValueError("the third")

  with pytest.raises(ValueError, match="the third"):
    work.run([(100, lambda i=i: failing(i)) for i in range(1000)], work.Budget(100))
  assert len(begun) < 1000


# ---- config.json


def test_presets_are_whole_and_written_and_read_back():
  for name in families.NAMES:
    for preset in families.get(name).presets:
      config = config_lib.default()
      families.preset(config, preset)
      model = config_lib.from_json(json.dumps(config.to_dict())).model
      written = families.get(name).json_of(model)
      options = families.get(name).options_of(json.loads(json.dumps(written)))
      again = config_lib.from_json(json.dumps({"model": families.nested(options)})).model
      assert families.get(name).json_of(again) == written, preset


def test_rope_is_read_in_both_forms():
  llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
  old = {**hf.LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
  new = {k: v for k, v in hf.LLAMA.items() if k != "rope_theta"}
  new |= {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
  assert families.options_of(old) == families.options_of(new)
  assert families.options_of(old)["rope_scaling"] == {"type": "llama3", **llama3}
  assert families.options_of(old)["rope_theta"] == 5e5


def test_a_model_that_its_family_cannot_say_is_refused(llama):
  model = config_lib.from_json((llama[2] / "config.json").read_text()).model
  with pytest.raises(families.FamilyError, match=r"model\.attention_sinks=True cannot be written as a llama model"):
    families.get("llama").json_of(dataclasses.replace(model, attention_sinks=True))


def test_a_preset_stands_for_config_json(tmp_path, monkeypatch, capsys):
  family = families.get("llama")
  small = {k: v for k, v in family.options_of(hf.TINY).items() if k not in family.options and k != "family"}
  monkeypatch.setitem(family.presets, "llama-test", small)
  source = hf.write(tmp_path / "hf", None, hf.tensors(hf.TINY))
  assert hf.to_ours(source, tmp_path / "ours", "--preset", "llama-tost") == 1
  assert "there is no preset 'llama-tost'; nearest: llama-test" in capsys.readouterr().err
  assert hf.to_ours(source, tmp_path / "ours", "--preset", "llama-test") == 0
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "back") == 0
  assert hf.read(tmp_path / "back") == hf.read(source)
  about = json.loads((tmp_path / "back/config.json").read_text())
  assert about["architectures"] == ["LlamaForCausalLM"] and about["dtype"] == "bfloat16"
  assert (about["bos_token_id"], about["eos_token_id"], about["max_position_embeddings"]) == (256, 257, 512)


def test_names_without_their_first_part_as_the_published_gpt2_has_them(tmp_path):
  config, tensors = hf.family("gpt2")
  whole = hf.write(tmp_path / "whole", config, tensors)
  short = {name.removeprefix("transformer."): x for name, x in tensors.items() if name != "lm_head.weight"}
  assert len(short) > 10 and not any(name.startswith("transformer.") for name in short)
  assert hf.to_ours(whole, tmp_path / "a") == 0
  assert hf.to_ours(hf.write(tmp_path / "short", config, short), tmp_path / "b") == 0
  a, b = (hf.parameters(tmp_path / name) for name in "ab")
  assert a.keys() == b.keys() and all((a[path] == b[path]).all() for path in a)
