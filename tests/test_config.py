"""The option tree: what is refused, with one message; what the hash covers; how values are written and read."""

import ast
import collections
import dataclasses
import json
import re
import subprocess
import sys

import pytest

from maxscale import config as config_lib
from maxscale import train
from maxscale.config import IDENTITY, RUNTIME, SCHEDULE, Config, ConfigError
from tests import multidevice

ROOT = multidevice.ROOT
OPTIONS = config_lib.flatten(Config())


@pytest.fixture
def write(tmp_path):
  """Lines of get_config() -> the path of a config file."""

  def write(*lines, name="mine.py"):
    body = "\n".join(f"  {line}" for line in lines)
    text = f"from maxscale.config import default\ndef get_config():\n  c = default()\n{body}\n  return c\n"
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)

  return write


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
  """(config file, arguments) -> the one message of a command that must refuse them and leave nothing behind."""
  monkeypatch.chdir(tmp_path)

  def refused(path, *arguments):
    before = sorted(p.name for p in tmp_path.iterdir())
    code = train.main(["--config", path, *arguments])
    out, err = capsys.readouterr()
    assert code == 2, f"exit {code}"
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, f"not one message:\n{out}{err}"
    assert err.startswith("python -m maxscale.train: ") and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) in (before, sorted([*before, "__pycache__"]))
    return err

  return refused


# ---- refusals: (override, what the message must say)

BAD = [
  ("modle.layers=3", ["'modle.layers'", "did you mean 'model'"]),
  ("model.layer=3", ["'model.layer'", "did you mean 'model.layers'"]),
  ("batch_size=3", ["'batch_size'"]),
  ("optimizer.batch_size=3", ["'optimizer.batch_size'", "data.batch_size"]),
  ("model=3", ["'model'"]),
  ("model.layers.x=3", ["'model.layers.x'"]),
  ("model.layers=three", ["model.layers", "'three'", "int"]),
  ("model.layers=2.5", ["model.layers=2.5", "int", "float"]),
  ("model.layers=True", ["model.layers=True", "int", "bool"]),
  ("model.tied_embeddings=1", ["model.tied_embeddings=1", "bool"]),
  ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "float"]),
  ("optimizer.learning_rate=1e999", ["optimizer.learning_rate", "finite"]),
  ("optimizer.learning_rate=-1", ["optimizer.learning_rate=-1.0", "negative"]),
  ("data.sources=3", ["data.sources=3", "dict"]),
  ("data.phases=3", ["data.phases=3", "tuple"]),
  ("data.sources={'a': {1, 2}}", ["data.sources"]),
  ("optimizer.schedule=cosin", ["optimizer.schedule='cosin'", "did you mean 'cosine'"]),
  ("model.compute_dtype=float16", ["float16", "bfloat16"]),
  ("remat.policy=some", ["remat.policy='some'", "projections"]),
  ("remat.table.gate=drop", ["remat.table.gate='drop'", "recompute"]),
  ("model.layers=0", ["model.layers=0", "at least 1"]),
  ("optimizer.warmup_steps=-1", ["optimizer.warmup_steps=-1", "negative"]),
  ("model.dropout=1.0", ["model.dropout=1.0", "below 1"]),
  ("model.heads=6", ["model.embed=512", "model.heads=6", "4 or 8"]),
  ("model.kv_heads=3", ["model.heads=8", "model.kv_heads=3", "2 or 4"]),
  ("model.kv_heads=16", ["model.kv_heads=16", "set model.kv_heads to 8"]),
  ("model.head_dim=33", ["model.head_dim=33", "even"]),
  ("model.experts=1", ["model.experts_per_token=2", "model.experts=1"]),
  ("lora.targets=(", ["lora.targets='('", "regular expression"]),
  ("model.mtp=4096", ["model.mtp=4096", "data.length"]),
  ("model.max_positions=8", ["model.max_positions=8", "data.length"]),
  ("model.mla.q_rank=8", ["model.mla.q_rank=8", "kv_rank"]),
  ("model.moe.correction=True", ["model.moe.correction", "model.experts"]),
  ("optimizer.qk_clip=9", ["optimizer.qk_clip", "log.monitor_every"]),
  ("optimizer.eps=0", ["optimizer.eps=0", "above 0"]),
  ("mesh.pipeline=-1", ["mesh.pipeline", "mesh.fsdp", "can be -1"]),
  ("mesh.tensor=0", ["mesh.tensor=0", "at least 1, or -1"]),
  ("mesh.data=-1", ["only one of mesh.data and mesh.fsdp"]),
  ("sharding.microbatches=5", ["a batch of 32", "sharding.microbatches=5", "4 or 8"]),
  ("data.phases=(5,)", ["data.phases[0]=5", "start"]),
  ("data.phases=({'length': 64},)", ["data.phases[0]", "start"]),
  ("data.phases=({'start': 5, 'lenght': 64},)", ["data.phases[0]", "'lenght'", "did you mean 'length'"]),
  ("data.phases=({'start': 5, 'length': '64'},)", ["data.phases[0].length='64'", "int"]),
  ("data.phases=({'start': 0, 'length': 64},)", ["data.phases[0].start=0", "at least 1"]),
  ("data.phases=({'start': 9}, {'start': 9})", ["data.phases[1].start=9", "after step 9"]),
  ("data.phases=({'start': 5, 'mixture': {'nowhere': 1}},)", ["data.phases[0].mixture", "'nowhere'"]),
  ("data.mixture={'stdlb': 1}", ["data.mixture", "'stdlb'", "did you mean 'stdlib'"]),
  ("data.mixture.stdlib=-1", ["data.mixture.stdlib=-1", "at least 0"]),
  ("data.mixture.stdlib=0", ["data.mixture", "no weight above 0"]),
  ("data.mixture.stdlib=much", ["data.mixture.stdlib='much'", "number"]),
  ("data.mixture.stdlib=1e999", ["data.mixture.stdlib=inf", "finite"]),
  ("data.mixture.stdlib=True", ["data.mixture.stdlib=True", "number"]),
  ("data.sources={}", ["data.sources is empty"]),
]  # fmt: skip


@pytest.mark.parametrize("override, says", BAD, ids=[b[0] for b in BAD])
def test_a_bad_override_is_refused(refused, write, override, says):
  message = refused(write(), f"--config.{override}")
  for text in says:
    assert text in message, message


def test_microbatches_must_divide_the_batch_of_every_phase(refused, write):
  phases = "--config.data.phases=({'start': 5, 'batch_size': 30},)"
  message = refused(write(), "--config.sharding.microbatches=4", phases)
  assert "a batch of 30" in message and "3 or 5" in message


def test_arguments_that_are_no_options_are_refused(refused, write):
  assert "'--model.layers=3'" in refused(write(), "--model.layers=3")
  assert "--config.model.layers has no value" in refused(write(), "--config.model.layers")
  assert "'extra'" in refused(write(), "extra")


def test_a_value_inside_a_value_is_refused(refused, write):
  path = write("c.sharding.state = {'embed': ['fsdp', 'data']}")
  assert "sharding.state.embed.x" in refused(path, "--config.sharding.state.embed.x=3")
  assert "data.sources.stdlib.kind.x" in refused(path, "--config.data.sources.stdlib.kind.x=3")


def test_a_bad_config_file_is_refused(refused, write, tmp_path):
  for lines, says in (
    (["c.model.layer = 3"], ["layer", "layers"]),
    (["c.modle = 3"], ["modle"]),
    (["c.model.layers = 'three'"], ["layers", "int"]),
    (["c.model.heads = 6"], ["model.heads=6"]),
    (["return {'model': {}}"], ["get_config() must return the ConfigDict"]),
    (["return None"], ["get_config() must return the ConfigDict"]),
    (["raise ValueError('my own words')"], ["ValueError: my own words"]),
    (["from maxscale import nothing_there"], ["nothing_there"]),
    (["c.data.sources.x = {'kind': object()}"], ["data.sources"]),
  ):
    message = refused(write(*lines), "--config.run.steps=3")
    for text in says:
      assert text in message, message
  (tmp_path / "empty.py").write_text("")
  assert "get_config" in refused(str(tmp_path / "empty.py"))
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  assert "SyntaxError" in refused(str(tmp_path / "broken.py"))


def test_a_missing_config_file_names_the_nearest(refused, write, tmp_path):
  near = write(name="tiny.py")
  assert f"there is no config file {tmp_path}/tinny.py; did you mean {near}?" in refused(str(tmp_path / "tinny.py"))
  message = refused(str(tmp_path / "quite_another.py"))
  assert "there is no config file" in message and "did you mean" not in message
  assert "there is no config file nowhere/a.py" in refused("nowhere/a.py")
  assert "there is no config file" in refused(str(tmp_path))


@pytest.mark.parametrize("override, says", [
  ("remat.table.gat=keep", ["'gat'", "did you mean 'gate'"]),
  ("mesh.tensor=3", ["tensor=3 is 3", "1 devices", "--small"]),
  ("mesh.slices=2", ["mesh.slices=2 does not divide 1"]),
  ("sharding.param.embedd=fsdp", ["sharding.param.embedd", "known"]),
  ("sharding.param.embed=fdsp", ["sharding.param.embed='fdsp'", "fsdp"]),
  ("data.tokenizer=nowhere.json", ["nowhere.json"]),
  ("run.simulated_devices=8", ["before JAX is imported"]),
])  # fmt: skip
def test_what_the_mesh_and_the_model_refuse(refused, write, override, says):
  import jax  # noqa: F401  (imported by then, as in a notebook)

  path = write("c.run.compile_cache = ''", "c.remat.policy = 'custom'")
  message = refused(path, "--audit", f"--config.{override}")
  for text in says:
    assert text in message, message


def test_a_remat_table_without_remat_is_refused(refused, write):
  path = write("c.run.compile_cache = ''", "c.remat.policy = 'none'")
  assert "remat.policy=custom" in refused(path, "--audit", "--config.remat.table.gate=keep")
  path = write("c.run.compile_cache = ''", "c.remat.table = {'gate': 'offload'}")
  assert "offload" in refused(path, "--audit")


# ---- values

GOOD = [
  ("model.tied_embeddings=true", True), ("model.tied_embeddings=False", False), ("model.layers=3", 3),
  ("optimizer.learning_rate=1", 1.0), ("optimizer.learning_rate=1e-4", 1e-4), ("run.name=12", "12"),
  ("run.dir=gs://bucket/a=b", "gs://bucket/a=b"), ("run.compile_cache=", ""), ("mesh.fsdp=-1", -1),
  ("data.phases=({'start': 5, 'length': 64},)", ({"start": 5, "length": 64},)),
  ("data.phases=[{'start': 5}]", ({"start": 5},)), ("data.phases=()", ()),
  ("sharding.state={'embed': ('fsdp', 'data')}", {"embed": ["fsdp", "data"]}),
]  # fmt: skip


@pytest.mark.parametrize("override, expected", GOOD, ids=[g[0] for g in GOOD])
def test_overrides_are_parsed(write, override, expected):
  for arguments in ([f"--config.{override}"], ["--config." + override.partition("=")[0], override.partition("=")[2]]):
    config = config_lib.load(write(), config_lib.split_overrides(arguments))
    value, _ = config_lib.flatten(config)[override.partition("=")[0]]
    assert value == expected and type(value) is type(expected)


def test_entries_of_dicts_are_added(write):
  overrides = ["--config.data.sources.mine.kind=text", "--config.data.sources.mine.heldout=0.1",
               "--config.data.mixture.mine=2", "--config.data.mixture.stdlib=1", "--config.remat.table.gate=keep",
               "--config.sharding.param.embed=['fsdp', 'data']", "--config.run.flags.xla_a=true",
               "--config.run.flags.xla_b="]  # fmt: skip
  config = config_lib.load(write(), config_lib.split_overrides(overrides))
  assert config.data.sources == {"stdlib": {"kind": "stdlib"}, "mine": {"kind": "text", "heldout": 0.1}}
  assert config.data.mixture == {"mine": 2, "stdlib": 1}
  assert config.remat.table == {"gate": "keep"} and config.sharding.param == {"embed": ["fsdp", "data"]}
  assert config.run.flags == {"xla_a": "true", "xla_b": ""}
  assert Config().remat.table == {} and Config().data.mixture == {}, "the defaults were changed in place"


def test_a_later_override_wins_and_the_file_names_the_run(write):
  config = config_lib.load(write("c.model.layers = 3"), [("model.layers", "4"), ("model.layers", "5")])
  assert config.model.layers == 5 and config.run.name == "mine" and config.run_dir == "runs/mine"
  assert config_lib.load(write(), [("run.name", "other")]).run_dir == "runs/other"


def test_the_small_copy_of_any_config_is_valid(write):
  big = write("c.model.experts = 64", "c.model.embed = 8192", "c.model.heads = 64", "c.mesh.slices = 4",
              "c.sharding.microbatches = 16", "c.data.phases = ({'start': 9, 'length': 64},)")  # fmt: skip
  small = config_lib.load(big, small=True)
  assert (small.model.embed, small.model.experts, small.run.simulated_devices) == (128, 8, 8)


def test_print_config_prints_what_runs(write, capsys):
  assert train.main(["--config", write(), "--print_config", "--config.model.layers=3"]) == 0
  out, err = capsys.readouterr()
  config = config_lib.from_json(out)
  assert config.model.layers == 3 and err == f"hash {config.hash}\n"


def test_json_round_trip():
  config = dataclasses.replace(
    Config(), data=config_lib.Data(phases=({"start": 3, "mixture": {"stdlib": 0.5}},), mixture={"stdlib": 1}),
    sharding=config_lib.Sharding(state={"embed": ["fsdp", "data"]}),
  )  # fmt: skip
  again = config_lib.from_json(config_lib.to_json(config))
  assert again == config and again.hash == config.hash
  assert config_lib.from_json("{}") == Config()  # an older file lacks options
  with pytest.raises(ConfigError, match=r"model\.layer.*did you mean 'model.layers'"):
    config_lib.from_json('{"model": {"layer": 3}}')


def test_a_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().model.layers = 3


# ---- classes and the hash


def changed(path):
  """The default config with another value of one option."""
  value, _ = OPTIONS[path]
  other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x",
           dict: lambda v: {**v, "x": 1}, tuple: lambda v: (*v, {"start": 1})}[type(value)](value)  # fmt: skip
  tree = dataclasses.asdict(Config())
  node, *keys = tree, *path.split(".")
  for key in keys[:-1]:
    node = node[key]
  node[keys[-1]] = other
  return _unchecked(Config, tree)


def _unchecked(cls, tree):
  return cls(**{f.name: _unchecked(type(getattr(cls(), f.name)), tree[f.name])
                if dataclasses.is_dataclass(getattr(cls(), f.name)) else tree[f.name]
                for f in dataclasses.fields(cls)})  # fmt: skip


@pytest.mark.parametrize("path", OPTIONS)
def test_the_hash_covers_identity_options_alone(path):
  config, kind = changed(path), OPTIONS[path][1].metadata["kind"]
  assert (config.hash != Config().hash) == (kind == IDENTITY)
  ((where, what, old, new),) = config_lib.differences(Config(), config)
  assert (where, what, old) == (path, kind, OPTIONS[path][0]) and new != old


def test_what_defines_a_run_is_identity():
  """A sample of the classes, written down a second time: a change of one is a decision."""
  expected = {
    "run.seed": IDENTITY, "model.embed": IDENTITY, "model.experts_per_token": IDENTITY, "data.tokenizer": IDENTITY,
    "model.layers": IDENTITY, "model.rope_theta": IDENTITY, "data.batch_size": SCHEDULE, "run.steps": SCHEDULE,
    "optimizer.learning_rate": SCHEDULE, "loss.z_loss": SCHEDULE, "mesh.fsdp": RUNTIME, "remat.policy": RUNTIME,
    "sharding.microbatches": RUNTIME, "model.vocab_multiple": RUNTIME, "loss.chunk": RUNTIME, "run.dir": RUNTIME,
    "run.flags": RUNTIME,
  }  # fmt: skip
  assert {path: OPTIONS[path][1].metadata["kind"] for path in expected} == expected


def test_every_option_has_a_class_and_a_meaning_and_there_are_few():
  assert len(OPTIONS) < 150
  for path, (value, field) in OPTIONS.items():
    assert field.metadata["kind"] in (IDENTITY, SCHEDULE, RUNTIME), path
    assert 5 < len(field.metadata["meaning"]) < 120 and "\n" not in field.metadata["meaning"], path
    assert not field.metadata["choices"] or value in field.metadata["choices"], path
  meanings = collections.Counter(field.metadata["meaning"] for _, field in OPTIONS.values())
  assert not [m for m, n in meanings.items() if n > 1]


def test_the_lists_of_checks_name_options():
  small = set(config_lib.SMALL) - {"mesh"}  # the whole group
  for path in (*config_lib.AT_LEAST_ONE, *config_lib.NOT_NEGATIVE, *config_lib.FRACTIONS, *small):
    assert path in OPTIONS, path


# ---- one place


def sources():
  return {p: p.read_text() for p in (ROOT / "maxscale").rglob("*.py") if p != ROOT / "maxscale/config.py"}


def test_every_option_is_read_somewhere():
  """An option that nothing reads would be accepted and do nothing."""
  text = "\n".join(sources().values()) + (ROOT / "maxscale/config.py").read_text()
  generic = {f"mesh.{axis}" for axis in config_lib.MESH_AXES} | {f"mesh.dcn.{axis}" for axis in config_lib.MESH_AXES}
  unread = [path for path in OPTIONS if path not in generic and not re.search(rf"\.{path.split('.')[-1]}\b", text)]
  assert not unread, unread


def test_defaults_are_in_one_place():
  """No function elsewhere repeats an option's default for an argument of the same name, and no getattr() has one."""
  defaults = collections.defaultdict(list)
  for path, (value, _) in OPTIONS.items():
    if value not in (0, 1, "", {}, ()):  # common numbers say nothing
      defaults[path.split(".")[-1]].append(value)
  found = []
  for path, text in sources().items():
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
        pairs = [*zip(arguments, node.args.defaults), *zip(node.args.kwonlyargs, node.args.kw_defaults)]
        found += [f"{path.name}: {a.arg}={d.value}" for a, d in pairs
                  if isinstance(d, ast.Constant) and d.value in defaults.get(a.arg, ())]  # fmt: skip
      elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) == 3:
        default, name = getattr(node.args[2], "value", None), getattr(node.args[1], "value", None)
        found += [f"{path.name}: {ast.unparse(node)}"] * (default in defaults.get(name, ()))
  assert not found, found


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py")))
def test_the_configs_of_the_repository_are_valid(path):
  config = config_lib.load(str(ROOT / path))
  assert config.run.name
  config_lib.load(str(ROOT / path), small=True)


def test_a_config_is_refused_before_jax_is_imported(write):
  code = "import sys, maxscale.config; from maxscale import train\n" \
         f"code = train.main(['--config', {write()!r}, '--config.modle.layers=3'])\n" \
         "print(code, [m for m in ('jax', 'flax', 'tensorflow', 'orbax') if m in sys.modules])"  # fmt: skip
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == "2 []\n", done.stdout
  assert "did you mean 'model'" in done.stderr


def test_the_command_itself_exits_2(write):
  command = [sys.executable, "-m", "maxscale.train", "--config", write(), "--config.model.heads=6"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.heads to 4 or 8" in done.stderr
  assert json.dumps(done.stdout) == '""'
