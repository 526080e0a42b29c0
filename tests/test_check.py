"""`python -m maxscale.check`: the copy it makes of a config, its meshes, what it says and what it finds."""

import dataclasses
import itertools
import re
import subprocess
import sys

import pytest

from maxscale import check
from maxscale import config as config_lib
from maxscale.config import MESH_AXES, ConfigError
from maxscale.models import module, plain
from maxscale.sharding import layouts, mesh, rules
from maxscale.step import Program
from tests import check_cases, multidevice
from tests.models import reference as ref

CASES = "tests.check_cases"
results = multidevice.fixture(CASES)


@pytest.mark.parametrize("name", multidevice.names(CASES))
def test_case(results, name):
  multidevice.check(results, name)


# ---- the copy

SIZES = {
  "three key heads": {"model.embed": 3072, "model.heads": 24, "model.kv_heads": 3, "model.head_dim": 128},
  "one key head": {"model.heads": 8, "model.kv_heads": 1},
  "odd vocabulary, tied": {"model.vocab_size": 50257, "model.tied_embeddings": True, "loss.chunk": 4096},
  "all heads are key heads": {"model.embed": 768, "model.heads": 12, "model.layers": 12, "model.dropout": 0.1},
  "60 experts, 4 a token": {"model.experts": 60, "model.experts_per_token": 4, "sharding.context": "gather"},
  "256 experts, 8 a token": {"model.experts": 256, "model.experts_per_token": 8, "model.layers": 61},
  "2 experts, 1 a token": {"model.experts": 2, "model.experts_per_token": 1},
  "choices": {
    "model.heads": 32, "model.kv_heads": 8, "loss.z_loss": 0.5, "remat.policy": "projections",
    "remat.table": {"gate": "offload"}, "sharding.context": "ulysses", "sharding.microbatches": 64,
    "sharding.compute": {"residual_length": ["context"]}, "data.phases": ({"start": 9, "batch_size": 64},),
    "data.batch_size": 64, "data.length": 8192, "optimizer.grad_reduce_dtype": "bfloat16", "mesh.slices": 4,
    "mesh.pipeline": 8, "mesh.dcn.data": -1, "sharding.repeats": 4,
  },
}  # fmt: skip
CONFIGS = {
  **SIZES,
  **check_cases.MODELS,
  "adapted, quantised": {"lora.rank": 8, "model.quantize": {".*": "int8"}, "model.windows": [4096, 4096, 4096, 0]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_is_small_and_its_meshes_are_possible(name):
  config = ref.config(CONFIGS[name])
  small = check.shrink(config)
  kinds = len(set(config.model.windows)) or 1
  assert small.model.layers == 4 * kinds + min(1, config.model.moe.dense_layers)
  assert (small.model.embed, small.data.length, small.model.compute_dtype) == (32, 64, "float32")
  assert small.model.heads <= 16 and small.model.dropout == 0 and not small.data.phases
  assert small.lora.rank == 0 and not small.model.quantize
  assert bool(small.model.experts) == bool(config.model.experts)
  assert small.model.experts_per_token == config.model.experts_per_token
  for path in (
    "model.tied_embeddings",
    "loss",
    "remat.policy",
    "sharding.compute",
    "sharding.context",
    "model.norm_eps",
  ):
    group, _, option = path.partition(".")
    a, b = (getattr(getattr(c, group), option) if option else getattr(c, group) for c in (small, config))
    assert a == b or (path == "loss" and dataclasses.replace(a, chunk=b.chunk) == b), path
  for layout in layouts.every(config, small):
    assert layouts.devices(layout) in (1, 2, 4, 8, 16)
    possible(small, layout)


@pytest.mark.parametrize("name", check_cases.MODELS)
def test_a_copy_keeps_every_choice(name):
  config = ref.config(check_cases.MODELS[name])
  a, b = (config_lib.flatten(c.model) for c in (config, check.shrink(config)))
  for path, (value, _) in a.items():
    small = b[path][0]
    assert small == value or type(value) not in (bool, str), path
    assert bool(small) == bool(value) or path in ("vocab_size", "kv_heads"), path  # 0 is not none of them
  assert a["rope_scaling"][0].keys() == b["rope_scaling"][0].keys()
  small = check.shrink(config).model
  assert (small.moe.groups_per_token < small.moe.groups) == (config.model.moe.groups > 1)
  reach = small.moe.groups_per_token * small.experts // small.moe.groups
  assert small.experts_per_token < reach or not small.experts  # there is a choice inside the groups, too


# What takes parameters away is compared without them; the others of an option that would need more are not here.
PARAMETERS = {"model.mlp_bias": ("gate_bias", "up_bias", "down_bias"), "model.out_bias": ("out_bias",),
              "model.qkv_bias": ("query_bias", "key_bias", "value_bias"), "model.moe.correction": ("correction",),
              "model.moe.router_bias": ("router_bias",)}  # fmt: skip
OPTIONS = (
  "norm", "post_norms", "activation", "attention_softcap", "logit_softcap", "qk_norm", "rope_local_theta",
  "rope_scaling", "query_scale", "windows", "window_kind", "embedding_scale", "attention_sinks", "mlp_bias", "qkv_bias",
  "out_bias", "moe.router_bias", "moe.score", "moe.normalise", "moe.correction", "moe.group_score",
  "moe.groups_per_token", "moe.shared", "moe.scale", "moe.capacity",
)  # fmt: skip


@pytest.mark.parametrize("name", check_cases.MODELS)
def test_an_option_that_is_left_out_shows(name, monkeypatch):
  monkeypatch.setattr(check, "LAYERS", 1)
  options = check_cases.MODELS[name]
  small = check.shrink(ref.config(options))
  params = check.parameters(small)
  batch = {key: value[:2] for key, value in check.make_batch(small, 0, packed=False).items()}

  def logits(config, params):
    return plain.logits(config, module.nest(params), batch)

  whole, seen = logits(small, params), 0
  for option in OPTIONS:
    path = f"model.{option}"
    if path in options:
      default = config_lib.flatten(config_lib.Config())[path][0]
      value = small.model.moe.groups if option == "moe.groups_per_token" else default
      left = {p: w for p, w in params.items() if not p.endswith(PARAMETERS.get(path, "/none"))}
      error = ref.error(logits(layouts.apply(small, {path: value}), left), whole)
      assert error > 10 * check.GRADIENT, (path, error)
      seen += 1
  assert seen > 5


def possible(small, layout):
  """Raises where the framework refuses the layout; needs no devices."""
  config = layouts.apply(small, layout)
  shape = mesh.resolve(config.mesh, layouts.devices(layout), max(1, config.mesh.slices))
  program = Program(config, check.VOCAB, None, rules.make(config.sharding, shape.sizes, shape.slices))
  program.check(check.BATCH, check.LENGTH)


def test_a_copy_keeps_ratios_where_it_can():
  heads = {name: check.shrink(ref.config(options)).model for name, options in SIZES.items()}
  assert {name: (m.heads, m.kv_heads) for name, m in heads.items()} == {
    "three key heads": (12, 3), "one key head": (4, 1), "odd vocabulary, tied": (4, 4),
    "all heads are key heads": (3, 3), "60 experts, 4 a token": (4, 4), "256 experts, 8 a token": (4, 4),
    "2 experts, 1 a token": (4, 4), "choices": (16, 4),
  }  # fmt: skip
  experts = {name: (m.experts, m.experts_per_token) for name, m in heads.items() if m.experts}
  assert list(experts.values()) == [(10, 4), (16, 8), (2, 1)]


def test_what_is_offloaded_is_kept_and_said():
  config = ref.config(CONFIGS["choices"])
  small = check.shrink(config)
  assert small.remat.table == {"gate": "keep"} and "offloaded is kept" in check.say(config, small)
  assert "offload" not in check.say(small, small)


# ---- the meshes


def test_four_axes_at_a_time_are_every_three_axes():
  covered = {three for axes in layouts.FOUR_AXES for three in itertools.combinations(sorted(axes.split()), 3)}
  assert covered == set(itertools.combinations(sorted(MESH_AXES), 3))


@pytest.mark.parametrize(
  "text",
  ["one device", "data=2,fsdp=4", "slices=2,dcn.pipeline=2,fsdp=4", "sharding.state.embed=fsdp+data,context=2",
   "fsdp=2,sharding.context=gather,model.kv_head_multiple=8"],
)  # fmt: skip
def test_a_layout_is_written_as_it_is_read(text):
  assert layouts.name(layouts.parse("" if text == "one device" else text)) == text


@pytest.mark.parametrize("text", ["data", "dta=2", "data=2;fsdp=2", "model.embed=64", "sharding.bogus=1"])
def test_what_is_no_layout_is_refused(text):
  with pytest.raises(ConfigError, match="is not axis=size"):
    layouts.parse(text)


@pytest.mark.parametrize(
  ("options", "own"),
  [
    ({}, "fsdp=2"),
    ({"run.simulated_devices": 8, "mesh.tensor": 2}, "fsdp=4,tensor=2"),
    ({"mesh.fsdp": 16}, "fsdp=16"),
    ({"mesh.fsdp": 16, "sharding.microbatches": 4}, "fsdp=2"),
    ({"mesh.fsdp": 2, "mesh.pipeline": 8}, "pipeline=2,fsdp=2"),
    ({"mesh.fsdp": 2, "mesh.pipeline": 4, "mesh.tensor": 2}, "pipeline=4,fsdp=2,tensor=2"),
    ({"mesh.fsdp": 256, "mesh.tensor": 8}, "fsdp=2,tensor=2"),
    ({"mesh.fsdp": 3}, "fsdp=2"),
    ({"mesh.slices": 4, "mesh.fsdp": 64}, "fsdp=2,dcn.data=2,slices=2"),
    ({"mesh.dcn.pipeline": 2, "mesh.fsdp": 4, "sharding.repeats": 3}, "fsdp=4,dcn.pipeline=2,slices=2,sharding.repeats=2"),
  ],
)  # fmt: skip
def test_the_own_mesh_of_a_config_is_shrunk_where_it_must_be(options, own):
  assert layouts.name(layouts.own(ref.config(options))) == own


PIPELINE = ["mesh.expert=2", "mesh.pipeline=2", "mesh.fsdp=2"]


@pytest.mark.parametrize(
  ("overrides", "text"),
  [
    ([], "fsdp=2 expert=2 tensor=2"),
    (PIPELINE, "pipeline=2 fsdp=2 expert=2"),
    ([*PIPELINE, "mesh.slices=2", "run.simulated_devices=16"], "pipeline=2 data=2 fsdp=2 expert=2 over 2 slices"),
    (["mesh.slices=2", "mesh.dcn.pipeline=2"], "pipeline=2 fsdp=2 expert=2 over 2 slices"),
  ],
)
def test_the_config_with_experts_has_the_meshes_that_it_names(overrides, text):
  config = config_lib.load(f"{multidevice.ROOT}/configs/tiny_moe.py", [tuple(o.split("=")) for o in overrides])
  shape = mesh.resolve(config.mesh, config.run.simulated_devices, max(1, config.mesh.slices))
  assert str(shape) == text
  table = rules.make(config.sharding, shape.sizes, shape.slices)
  Program(config, check.VOCAB, None, table).check(config.data.batch_size, config.data.length)


# ---- the command


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "maxscale.check", *arguments], cwd=multidevice.ROOT, capture_output=True, text=True
  )


def test_the_command_says_that_a_mesh_is_equal():
  done = command("--config", "configs/tiny.py", "--mesh", "data=2,tensor=2", "--config.model.kv_heads=1")
  assert done.returncode == 0, done.stderr
  title, line, last = done.stdout.splitlines()
  assert "dense, 4 layers, 32 wide, 4 heads on 1" in title
  assert re.fullmatch(r"data=2,tensor=2 +4 devices  loss \S+e-0\d  \S+/\w+ \S+e-0\d  [\d.]+ s  equal", line)
  assert re.fullmatch(r"1 meshes in \d+ s: 1 equal", last)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.model.heads=3"], "model.embed=256 is not divisible by model.heads=3"),
    (["--mesh", "dta=2"], "'dta=2' is not axis=size"),
    (["--mesh", "data=32"], "needs 32 devices; 16 are simulated"),
    (["--meshes", "data=2"], "unknown argument '--meshes'"),
  ],
)
def test_a_wrong_config_is_one_message(capsys, arguments, message):
  assert check.main(["--config", f"{multidevice.ROOT}/configs/tiny.py", *arguments]) == 2
  out, err = capsys.readouterr()
  assert not out and message in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", check_cases.MODELS)
def test_every_option_is_equal_under_every_three_axes(name):
  model = check_cases.MODELS[name]
  options = [f"--config.{path}={value}" for path, value in model.items()]
  for axes in layouts.FOUR_AXES:  # every three of the axes are in one of these
    options += ["--mesh", ",".join(f"{a}=2" for a in axes.split() if a != "expert" or "model.experts" in model)]
  done = command("--config", "configs/tiny.py", "--config.run.compile_cache=", *options)
  *lines, _ = done.stdout.splitlines()
  refused = [line for line in lines if line.endswith("refused")]  # capacity counts along whole sequences
  assert all("model.moe.capacity" in line and "context=" in line for line in refused), refused
  assert done.returncode == bool(refused) and "DIFFERENT" not in done.stdout, done.stdout + done.stderr
  assert sum(line.endswith("equal") for line in lines) + len(refused) == len(layouts.FOUR_AXES)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny", "tiny_moe"])
def test_every_mesh_is_equal(config):
  done = command("--config", f"configs/{config}.py", "--config.run.compile_cache=")
  assert done.returncode == 0, done.stdout + done.stderr
  *lines, last = done.stdout.splitlines()
  assert re.fullmatch(r"(\d+) meshes in \d+ s: \1 equal", last)
  assert sum("16 devices" in line for line in lines) == (6 if config == "tiny_moe" else 2)
