"""Options of compilers: which a program gets, that libtpu takes them, what becomes of those that it does not; plans.

`python -m tests.perf.test_compiler` compiles small programs for chips that need not be here and prints what was read; it
is a process of its own, because libtpu reads its environment once.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from maxscale import assemble, environment, train
from maxscale import config as config_lib
from maxscale.config import Config, ConfigError
from maxscale.perf import compiler, hardware, plans
from maxscale.perf.compiled import collectives, program
from tests import multidevice

GATHER, OFFLOAD, FUSE, VMEM = (f"{compiler._OFFLOAD}all_gather", compiler._OFFLOAD, compiler._FUSE, compiler._VMEM)
CHIPS = {"TPU v5p": "v5p:2x2x2", "TPU v6e": "v6e:2x4", "TPU7x": "tpu7x:2x2x1"}


def compiled():
  """Name -> [kind, asynchronous, on the SparseCores] of the collectives of two layers that gather their weights."""
  os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  def look(topology, options):
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices), ("fsdp",))

    def step(w, x):
      def layer(h, w):
        return jax.nn.silu(h @ jax.lax.all_gather(w.astype(jnp.bfloat16), "fsdp", tiled=True)), None

      return jax.grad(lambda w: jax.lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32).sum())(w)

    specs = P(None, "fsdp"), P("fsdp")
    shapes = ((2, 1024, 1024), jnp.float32), ((256 * len(devices), 1024), jnp.bfloat16)
    arrays = [jax.ShapeDtypeStruct(*a, sharding=NamedSharding(mesh, s)) for a, s in zip(shapes, specs)]
    f = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False))
    text = f.lower(*arrays).compile(compiler_options=compiler._typed(options)).as_text() or ""
    return [[c.kind, c.asynchronous, c.sparsecore] for c in collectives.collectives(program.read(text))]

  out = {}
  for chip, topology in CHIPS.items():
    tuned = compiler.resolve(chip, ("tuned", "dense")).compile
    out[chip] = look(topology, tuned)
    # Its two values of VMEM, too: a compile refuses an option that it does not know.
    look(topology, compiler.resolve(chip, ("tuned", "moe")).compile)
    if chip == "TPU v5p":
      out["without 3d"] = look(topology, {n: v for n, v in tuned.items() if "3d_all_gather" not in n})
      out["none"] = look(topology, {})
  return out


# ---- the table


def test_the_table_is_sound():
  for o in compiler.OPTIONS:
    assert set(o.chips) <= {chip.name for chip in hardware.CHIPS} and o.reason and o.source, o.name
    assert o.where == ("init" if o.name.startswith("xla_sc_") else "compile"), o.name
  for chip in hardware.CHIPS:
    for kind in ("dense", "moe"):
      names = [o.name for o in compiler.OPTIONS if chip.name in o.chips and set(o.features) <= {kind, "tuned"}]
      assert len(names) == len(set(names)), f"{chip.name}: two rows for one option"


def config(**options):
  tree = dataclasses.asdict(Config())
  config_lib.change(tree, {"run.steps": 10, **{path.replace("__", "."): v for path, v in options.items()}})
  return config_lib._build(Config, tree, "")


FEATURES = [
  ({}, {"dense"}), ({"model__experts": 8}, {"moe"}), ({"mesh__pipeline": 2}, {"dense", "pipeline"}),
  ({"mesh__dcn__pipeline": 2}, {"dense", "pipeline"}), ({"mesh__context": 2, "mesh__tensor": 2},
                                                        {"dense", "context", "tensor"}),
  ({"mesh__expert": 4, "model__experts": 8}, {"moe", "expert"}), ({"mesh__slices": 2}, {"dense", "slices"}),
  ({"optimizer__offload": True}, {"dense", "offload"}), ({"remat__table": {"gate": "offload"}}, {"dense", "offload"}),
  ({"remat__table": {"gate": "keep"}}, {"dense"}), ({"run__steps": 100_000}, {"dense", "tuned"}),
]  # fmt: skip


@pytest.mark.parametrize("options, expected", FEATURES)
def test_features(options, expected):
  assert compiler.features(config(**options)) == expected


def test_slices_of_the_devices_are_a_feature():
  assert "slices" in compiler.features(config(), 2)


def test_only_long_runs_are_tuned():
  chip = "TPU v6e"
  assert VMEM not in compiler.resolve(chip, ("dense",)).compile
  assert compiler.resolve(chip, ("dense", "tuned")).compile[VMEM] == "98304"
  assert compiler.resolve(chip, ("moe", "tuned")).compile[VMEM] == "81920"


# ---- who wins


def test_what_the_environment_says_stays_there():
  plain = compiler.resolve("TPU v5p", ("dense", "tuned"))
  found = compiler.resolve("TPU v5p", ("dense", "tuned"), {VMEM: "1024", GATHER: "true"})
  assert plain.compile.keys() - found.compile.keys() == {VMEM, GATHER} and found.init == plain.init
  assert len(found.dropped) == 1 and VMEM in found.dropped[0] and "1024" in found.dropped[0]  # the other agrees


def test_the_configs_flags_replace_add_and_leave_out():
  plain = compiler.resolve("TPU v5p", ("dense", "tuned"))
  flags = {VMEM: 32768, GATHER: "", "xla_tpu_new": True, "xla_sc_new": "1", "xla_sc_disjoint_spmem": ""}
  found = compiler.resolve("TPU v5p", ("dense", "tuned"), {}, flags)
  assert found.compile == {n: v for n, v in plain.compile.items() if n != GATHER} | {
    VMEM: "32768",
    "xla_tpu_new": "True",
  }
  assert found.init.keys() == plain.init.keys() - {"xla_sc_disjoint_spmem"} | {"xla_sc_new"}
  assert not found.dropped
  assert compiler.resolve("TPU v5p", (), {VMEM: "1"}, {VMEM: "2"}).compile == compiler.resolve("TPU v5p", ()).compile
  assert compiler.resolve(None, ("dense",), {}, {"xla_cpu_a": "1"}).compile == {"xla_cpu_a": "1"}


@pytest.mark.parametrize("place", ["given", "flags"])
def test_fusion_and_sparsecores_exclude_each_other(place):
  found = compiler.resolve("TPU v6e", (), **{place: {f"{FUSE}all_gather": "true"}})
  assert not [name for name in found.compile if name.startswith(OFFLOAD) and "gather" in name]
  assert f"{OFFLOAD}reduce_scatter" in found.compile
  assert len(found.dropped) == 2 and all(f"{FUSE}all_gather" in text for text in found.dropped)
  off = compiler.resolve("TPU v6e", (), **{place: {f"{FUSE}all_gather": "false"}})
  assert GATHER in off.compile and not off.dropped


def test_an_option_that_conflicts_stays_if_the_user_asks_for_it():
  both = {f"{FUSE}all_gather": "true", GATHER: "true"}
  assert compiler.resolve("TPU v6e", (), {}, both).compile.items() >= both.items()


def test_options_of_the_environment_are_read(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_a=1 --xla_b")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{VMEM}=4")
  monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O2")
  assert compiler.given() == {"xla_gpu_a": "1", "xla_b": "true", VMEM: "4", "optimization_level": "O2"}
  assert VMEM not in compiler.options("TPU v5", config(run__steps=10**6))
  assert "optimization_level" not in compiler.options("NVIDIA H100 80GB HBM3", config())
  monkeypatch.delenv("JAX_OPTIMIZATION_LEVEL")
  assert compiler.options("NVIDIA H100 80GB HBM3", config()) == {"optimization_level": str(level())}
  assert compiler.options("cpu", config()) == {}


def level():
  from jax._src import config as jax_config

  return jax_config.EffortLevel.O1.value


# ---- before JAX loads


def test_chips_are_found_without_jax(monkeypatch, tmp_path):
  names = {"v5p:8x8x8": "TPU v5p", "v5litepod-16": "TPU v5e", "v6e-256": "TPU v6e", "tpu7x:2x2x1": "TPU7x",
           "h100:64": "H100", "": None, "v9:2": None}  # fmt: skip
  assert {name: compiler.chip_of_topology(name) for name in names} == names
  monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
  for n, (vendor, device) in enumerate([("0x10de", "0x0062"), ("0x1ae0", "0x0001"), ("0x1ae0", "0x006f")]):
    folder = tmp_path / str(n)
    folder.mkdir()
    assert compiler.local_chip(str(tmp_path)) is None
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "device").write_text(device + "\n")
  assert compiler.local_chip(str(tmp_path)) == "TPU v6e"
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-128")
  assert compiler.local_chip(str(tmp_path)) == "TPU v5p"


@pytest.fixture
def attempts(monkeypatch):
  """The flags of each attempt, of which `refuse(flags)` says what is wrong; nothing is compiled."""
  seen = []

  def attempt(job, init=None, seconds=600.0):
    seen.append(dict(init or {}))
    return attempt.refuse(seen[-1])

  attempt.refuse = lambda flags: ""
  attempt.seen = seen
  monkeypatch.setattr(compiler, "attempt", attempt)
  monkeypatch.setattr(compiler, "say", lambda text: attempt.lines.append(text))
  attempt.lines = []
  version = compiler.importlib.metadata.version
  monkeypatch.setattr(compiler.importlib.metadata, "version", lambda n: "9.9" if n == "libtpu" else version(n))
  return attempt


@pytest.mark.parametrize("how", ["train", "plan", "simulated", "cpu"])
def test_libtpus_flags_are_set_for_train_and_plan_alike(monkeypatch, attempts, tmp_path, how):
  own = "--xla_sc_disjoint_spmem=true --xla_mine=1"
  monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
  for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    monkeypatch.setenv(name, "cpu" if how == "cpu" else "")
  monkeypatch.setattr(compiler, "local_chip", lambda: "TPU v5p")
  monkeypatch.setitem(sys.modules, "jax", None)
  monkeypatch.delitem(sys.modules, "jax")
  c = config(run__compile_cache=str(tmp_path))
  if how == "plan":
    environment.prepare_plan(c, "v5p:2x2x1")
  elif how == "simulated":
    for name in ("XLA_FLAGS", "NPROC", "JAX_CPU_COLLECTIVES_IMPLEMENTATION"):
      monkeypatch.setenv(name, "")
    environment.prepare(dataclasses.replace(c, run=dataclasses.replace(c.run, simulated_devices=2)))
  else:
    environment.prepare(c)
  if how in ("simulated", "cpu"):
    assert os.environ["LIBTPU_INIT_ARGS"] == own and not attempts.seen
  else:
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [
      *own.split(), "--xla_sc_disable_megacore_partitioning=true", "--xla_sc_enable_instruction_fusion=false"
    ]  # fmt: skip
    assert len(attempts.lines) == 1 and "xla_sc_disjoint_spmem=false is left out" in attempts.lines[0]


def test_what_a_parent_added_is_not_the_users(monkeypatch, attempts, tmp_path):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_mine=1")
  monkeypatch.setenv(compiler.ADDED, "")
  compiler.before_jax(config(run__compile_cache=str(tmp_path)), "TPU v5p")
  assert "--xla_sc_disjoint_spmem=false" in os.environ["LIBTPU_INIT_ARGS"]
  assert compiler.given() == {"xla_mine": "1"} == {"xla_mine": compiler.in_force()["xla_mine"]}
  assert compiler.in_force()["xla_sc_disjoint_spmem"] == "false"
  compiler.before_jax(config(run__flags={"xla_sc_disjoint_spmem": "true"}, run__compile_cache=""), "TPU v5p")  # a child
  assert compiler.in_force()["xla_sc_disjoint_spmem"] == "true" and not attempts.lines
  assert os.environ["LIBTPU_INIT_ARGS"].count("xla_sc_disjoint_spmem") == 1
  compiler.before_jax(config(), "TPU v5e")  # which has no such flags
  assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_mine=1"


def test_an_attempt_has_the_users_flags_and_its_own_alone(monkeypatch):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_mine=1 --xla_sc_a=1 --xla_sc_b=2")
  monkeypatch.setenv(compiler.ADDED, "--xla_sc_a=1 --xla_sc_b=2")
  seen = []

  def ran(command, env, **_):
    seen.append(env["LIBTPU_INIT_ARGS"])
    return subprocess.CompletedProcess(command, int("xla_sc_b" in seen[-1]), "", "crash")

  monkeypatch.setattr(subprocess, "run", ran)
  flags = compiler.Flags({}, {"xla_sc_a": "1", "xla_sc_b": "2"}, [])
  assert compiler.culprit(config(), "v5p:2x2x1", 1, flags) == "xla_sc_b"
  assert seen == ["--xla_mine=1", "--xla_mine=1 --xla_sc_b=2", "--xla_mine=1 --xla_sc_a=1"]


# ---- what libtpu does not know


def test_flags_are_tried_once_for_each_version(attempts, tmp_path, monkeypatch):
  attempts.refuse = lambda flags: "ERROR: Unknown command line flag 'xla_b'\n" if "xla_b" in flags else ""
  flags = {"xla_a": "1", "xla_b": "2", "xla_c": "3"}
  good = {"xla_a": "1", "xla_c": "3"}
  assert compiler.probe("TPU v5p", flags, str(tmp_path)) == good
  assert attempts.seen == [flags, good] and len(attempts.lines) == 1 and "xla_b=2 is left out" in attempts.lines[0]
  assert compiler.probe("TPU v5p", flags, str(tmp_path)) == good and len(attempts.seen) == 2
  assert compiler.probe("TPU v5p", {**flags, "xla_c": "4"}, str(tmp_path)) == {**good, "xla_c": "4"}
  assert len(attempts.seen) == 4  # another value; xla_b, too, as it is known to be refused alone
  monkeypatch.setattr(compiler.importlib.metadata, "version", lambda n: "9.10")
  compiler.probe("TPU v5p", flags, str(tmp_path))
  assert len(attempts.seen) == 6
  for file in tmp_path.glob("*.json"):
    file.write_text(file.read_text()[:20])  # torn
  assert compiler.probe("TPU v5p", flags, str(tmp_path)) == good and len(attempts.seen) == 8
  assert compiler.probe("TPU v5p", flags, "") == good and len(attempts.seen) == 10


def test_a_flag_that_breaks_compiles_without_a_word_is_found(attempts, tmp_path):
  attempts.refuse = lambda flags: "Fatal: signal 6" if "xla_b" in flags else ""
  assert compiler.probe("TPU v6e", {"xla_a": "1", "xla_b": "2"}, str(tmp_path)) == {"xla_a": "1"}
  assert len(attempts.lines) == 1 and "xla_b=2 is left out" in attempts.lines[0]


def test_nothing_is_set_or_kept_where_nothing_compiles(attempts, tmp_path):
  attempts.refuse = lambda flags: "no space left"
  assert compiler.probe("TPU v6e", {"xla_a": "1"}, str(tmp_path)) == {} and not list(tmp_path.iterdir())
  assert len(attempts.lines) == 1 and "no space left" in attempts.lines[0]


def test_without_libtpu_there_are_no_flags(attempts, monkeypatch):
  def missing(name):
    raise compiler.importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(compiler.importlib.metadata, "version", missing)
  assert compiler.probe("TPU v6e", {"xla_a": "1"}, "") == {} and not attempts.seen


def test_an_option_that_a_compile_refuses_is_one_line(capsys):
  compiler.say.cache_clear()
  lowered = jax.jit(lambda x: x + 1).lower(np.float32(1))
  options = {"xla_tpu_unknown": "true", "xla_cpu_enable_fast_math": "true", "xla_gpu_enable_triton_gemm": "perhaps"}
  for _ in range(2):
    assert compiler.compile(lowered, options)(np.float32(1)) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2 and "xla_tpu_unknown=true" in lines[0] and "xla_gpu_enable_triton_gemm=perhaps" in lines[1]


def test_another_error_of_a_compile_is_raised():
  class Lowered:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: xla_a and too much else")

  with pytest.raises(jax.errors.JaxRuntimeError, match="too much else"):
    compiler.compile(Lowered(), {"xla_a": "1"})


# ---- which option breaks a compile


def test_bisect_finds_the_option_that_breaks_a_compile():
  options = {name: "1" for name in "abcdef"}
  tried = []

  def works(some):
    tried.append(some)
    return "d" not in some

  assert compiler.bisect(options, works) == "d" and len(tried) == 5
  assert compiler.bisect(options, lambda some: False) is None  # it fails without any
  assert compiler.bisect(options, lambda some: not {"b", "d"} & some.keys()) is None  # two: neither alone is enough
  assert compiler.bisect(options, lambda some: not {"b", "d"} <= some.keys()) == "b"  # the two do not go together
  assert compiler.bisect(options, works, limit=3) is None and compiler.bisect(options, works, seconds=-1) is None
  assert compiler.bisect({}, works) is None


def test_the_culprit_is_looked_for_with_the_step_of_the_config(monkeypatch):
  jobs = []

  def attempt(job, init, seconds):
    jobs.append((job, init))
    return "crash" if "xla_sc_b" in init else ""

  monkeypatch.setattr(compiler, "attempt", attempt)
  flags = compiler.Flags({"xla_a": "1"}, {"xla_sc_b": "2"}, [])
  assert compiler.culprit(config(), "v5p:2x2x1", 2, flags) == "xla_sc_b"
  assert [(job["compile"], init) for job, init in jobs] == [
    ({}, {}), ({}, {"xla_sc_b": "2"}), ({"xla_a": "1"}, {})
  ]  # fmt: skip
  assert jobs[0][0]["topology"] == "v5p:2x2x1" and config_lib.from_json(jobs[0][0]["config"]) == config()


def test_the_culprit_is_looked_for_in_so_many_seconds_in_all(monkeypatch):
  now, given = [0.0], []

  def attempt(job, init, seconds):
    given.append(seconds)
    now[0] += min(seconds, 400.0)
    return "crash" if init else ""

  monkeypatch.setattr(compiler, "attempt", attempt)
  monkeypatch.setattr(compiler.time, "monotonic", lambda: now[0])
  flags = compiler.Flags({}, dict.fromkeys(["xla_sc_a", "xla_sc_b", "xla_sc_c", "xla_sc_d"], "1"), [])
  assert compiler.culprit(config(), "v5p:2x2x1", 1, flags, 900.0) is None
  assert given == [900.0, 500.0, 100.0, 1.0] and now[0] <= 901.0


@pytest.fixture(scope="module")
def libtpu():
  pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")


def test_the_real_libtpu_is_asked(libtpu, tmp_path, capsys):
  compiler.say.cache_clear()
  table = compiler.resolve("TPU v5p", ()).init
  assert len(table) >= 3
  flags = {**table, "xla_no_such_flag": "true", "xla_nor_this": "1"}
  assert compiler.probe("TPU v5p", flags, str(tmp_path)) == table
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2 and all("is left out: libtpu does not know it" in line for line in lines)


def test_an_option_that_the_real_compiler_refuses_without_its_name_is_found(libtpu):
  bad = "xla_tpu_enable_latency_hiding_layer_scheduler"  # it needs another one: "Latency hiding layer scheduler ..."
  options = {bad: "true", GATHER: "true"}
  job = {"topology": "v5p:2x2x1"}
  assert bad not in compiler.attempt({**job, "compile": options})
  assert compiler.bisect(options, lambda some: not compiler.attempt({**job, "compile": some})) == bad


@pytest.fixture(scope="module")
def programs(libtpu):
  command = [sys.executable, "-m", "tests.perf.test_compiler"]
  done = subprocess.run(command, cwd=multidevice.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-5000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", CHIPS)
def test_with_the_table_every_gather_and_scatter_is_asynchronous(programs, chip):
  found = {(kind, asynchronous, core) for kind, asynchronous, core in programs[chip]}
  assert found == {("all-gather", True, True), ("reduce-scatter", True, True)}


def test_each_of_these_options_is_needed(programs):
  assert not any(asynchronous for _, asynchronous, _ in programs["none"])
  assert ["all-gather", False, False] in programs["without 3d"]


# ---- plans that train is given


PLAN = plans.Plan("elsewhere/tiny.py", "v5p:2x2x2", 1, {"mesh.fsdp": 4, "mesh.tensor": 2, "remat.policy": "none"},
                  {"compile": {VMEM: "65536", GATHER: ""}, "init": {"xla_sc_a": "1"}})  # fmt: skip
PLAIN = ["--config", "configs/tiny.py", "--config.run.simulated_devices=0", "--config.run.compile_cache="]


def printed(capsys, *arguments):
  assert train.main([*PLAIN, *arguments, "--print_config"]) == 0
  return config_lib.from_json(capsys.readouterr().out)


def test_a_plan_is_below_what_the_user_says(tmp_path, capsys):
  path = str(tmp_path / "plan.json")
  PLAN.save(path)
  found = printed(capsys, "--plan", path)
  assert (found.mesh.fsdp, found.mesh.tensor, found.remat.policy) == (4, 2, "none")
  assert found.run.flags == {VMEM: "65536", GATHER: "", "xla_sc_a": "1"}
  assert found.hash == printed(capsys).hash
  own = printed(capsys, "--plan", path, "--config.mesh.fsdp=8", f"--config.run.flags.{VMEM}=1024")
  assert (own.mesh.fsdp, own.mesh.tensor) == (8, 2) and own.run.flags == {VMEM: 1024, GATHER: "", "xla_sc_a": "1"}
  assert compiler.options("TPU v5", own)[VMEM] == "1024" and GATHER not in compiler.options("TPU v5", own)


REFUSED = [
  ("other.py", [], ["a plan for other.py, not for configs/tiny.py"]),
  ("tiny.py", ["--small"], ["--small runs on simulated devices"]),
  ("tiny.py", [], ["the plan is for 1 x v5p:2x2x2", "1 x 1 chips (cpu)"]),
]


@pytest.mark.parametrize("name, arguments, messages", REFUSED)
def test_a_plan_for_something_else_is_one_message(tmp_path, capsys, monkeypatch, name, arguments, messages):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  path = str(tmp_path / "plan.json")
  dataclasses.replace(PLAN, config=name).save(path)
  run = [f"--config.run.dir={tmp_path}/run", f"--config.data.cache={tmp_path}/data"]
  assert train.main([*PLAIN, *run, *arguments, "--plan", path]) == 2
  err = capsys.readouterr().err
  assert all(message in err for message in messages) and "Traceback" not in err and len(err.splitlines()) == 1


def tpus(kind, shape, slices=1, cores=1):
  places = itertools.product(range(slices), *map(range, shape), range(cores))
  return [types.SimpleNamespace(platform="tpu", device_kind=kind, slice_index=s, coords=coords, core_on_chip=core)
          for s, *coords, core in places]  # fmt: skip


def test_a_plan_is_for_a_chip_a_shape_and_a_number_of_slices():
  for topology, slices, devices in (
    ("v5p:2x2x4", 1, tpus("TPU v5", (2, 2, 4))), ("v5p:2x2x4", 2, tpus("TPU v5", (4, 2, 2), 2)),
    ("v6e:4x4", 1, tpus("TPU v6 lite", (4, 4, 1))), ("tpu7x:2x2x1", 1, tpus("TPU7x", (2, 2, 1), cores=2)),
    ("h100:16", 1, [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")] * 16),
  ):  # fmt: skip
    assemble.check_devices(plans.Plan("c.py", topology, slices), devices)
  for topology, slices, devices in (
    ("v5p:2x2x4", 2, tpus("TPU v5", (2, 2, 4))), ("v5p:2x2x4", 1, tpus("TPU v5", (2, 2, 2))),
    ("v5p:4x4x4", 1, tpus("TPU v5", (2, 4, 8))), ("v5e:4x4", 1, tpus("TPU v6 lite", (4, 4, 1))),
    ("v6e:4x4", 1, tpus("TPU v9", (4, 4, 1))),
    ("h100:16", 1, [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")] * 8),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=f"the plan is for {slices} x {topology}"):
      assemble.check_devices(plans.Plan("c.py", topology, slices), devices)


if __name__ == "__main__":
  print(json.dumps(compiled()))
