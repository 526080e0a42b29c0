"""The plan command: what it says before anything compiles, its report, the docstrings it writes, and a small compile."""

import argparse
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from maxscale import config as config_lib
from maxscale import plan
from maxscale.config import ConfigError
from maxscale.errors import UserError
from maxscale.models import loss  # noqa: F401  (JAX is there before the rest: this process runs on the CPU)
from maxscale.perf import advice, gate, page, report
from maxscale.perf.closed import analytic
from maxscale.perf.compiled import collectives, simulate
from maxscale.perf.compiled import trace as traces
from maxscale.sharding import chips

ROOT = pathlib.Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'maxscale[plan]')"
)
GIB = 2**30


# ---- what is refused


@pytest.mark.parametrize(
  ("topology", "says"),
  [
    ("v5p:4x4x9", ["2x4x4", "multiples of 4", "the nearest is v5p:4x4x8"]),
    ("v6e:16x8", ["8x16, 16x16", "the nearest is v6e:8x16"]),
    ("v5p", ["it has 2x2x1"]),
    ("v5p:64x64x64", ["up to 8960 chips"]),
    ("tpu9:2x2", ["no such chip", "v4, v5e, v5p, v6e, tpu7x"]),
    ("h100:64", ["for TPUs alone", "--search"]),
    ("cpu", ["for TPUs alone"]),
  ],
)
def test_a_topology_that_is_none_is_one_message(capsys, topology, says):
  assert plan.main(["--config", "configs/llama3_8b.py", "--topology", topology]) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith("python -m maxscale.plan: ") and "Traceback" not in err
  assert repr(topology) in err and all(text in err for text in says), err


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "--config is missing"),
    (["--config", "configs/tiny.py"], "--topology v5p:4x4x4"),
    (["--config", "configs/llama3_8b.py", "--slices", "-2"], "from 1 on"),
    (["--config", "configs/llama3_8b.py", "--slices", "0"], "from 1 on"),
    (
      ["--config", "configs/llama3_8b.py", "--search", "--json", "a", "--hlo", "b"],
      "--json and --hlo go with a plan of one",
    ),
    (["--config", "configs/llama3_8b.py", "--plan", "tests"], "--plan tests: this is a folder"),
    (
      ["--config", "configs/llama3_8b.py", "--html", "README.md/x/a.html"],
      "--html README.md/x/a.html: its folder cannot",
    ),
    (["--config", "configs/llama3_8b.py", "--hlo", "README.md"], "--hlo README.md: its folder cannot be made"),
    (["--config", "configs/lama3_8b.py"], "did you mean configs/llama3_8b.py"),
    (["--config", "configs/llama3_8b.py", "--tpology", "v5p:2x2x1"], "unknown argument '--tpology'"),
    (["--config", "configs/llama3_8b.py", "--config.mesh.fspd=2"], "fspd"),
  ],
)
def test_wrong_arguments_are_one_message(capsys, arguments, says):
  assert plan.main(arguments) == 2
  assert says in capsys.readouterr().err


def test_every_shape_that_is_listed_is_accepted():
  for kind in chips.SHAPES:
    for shape in chips.shapes(kind):
      chips.check(f"{kind}:{'x'.join(map(str, shape))}")
  assert (16, 16, 24) in chips.shapes("v5p") and (2, 4, 8) not in chips.shapes("v5p")
  assert [s for s in chips.shapes("tpu7x") if len(set(s)) == 1] == [(n,) * 3 for n in (1, 2, 4, 8, 12, 16, 20)]


# ---- the report of a made-up step


def timeline():
  work = lambda kind, part, seconds, useful=0.0: simulate.Span(  # noqa: E731
    0.0, seconds, "core", traces.Work(kind, part, useful=useful)
  )
  move = lambda kind, seconds, waited, **more: simulate.Span(  # noqa: E731
    0.0, seconds, "links", traces.Move(kind, GIB / 4, axes="fsdp", part="mlp forward", **more), waited
  )
  forward = simulate.Span(0.0, 4.0, "core", traces.Loop(4, (), "forward"), inside=(
    work("matmul", "mlp forward", 0.5), work("attention", "attention forward", 0.25, 1e12),
    move("all-gather", 0.5, 0.25)))  # fmt: skip
  backward = simulate.Span(4.0, 10.0, "core", traces.Loop(4, (), "backward"), inside=(
    work("matmul", "mlp again", 0.5), work("matmul", "mlp backward", 1.0)))  # fmt: skip
  update = work("vector", "update", 1.0)
  dcn = move("all-reduce", 0.5, 0.5, slices=2)
  return simulate.Timeline(11.5, (forward, backward, update, dcn))


PRODUCTS = {"mlp forward": 100e12, "mlp again": 100e12, "mlp backward": 200e12}


def made(**changes):
  made_parts = report.parts(timeline(), PRODUCTS, peak=100e12)
  classes = report.with_bubble(timeline(), 1, 0.0)
  predicted = report.Predicted(11.5, 10.0, 13.0, 1e4, 0.5, 0.55, 0.6, 0, classes, made_parts)
  rows = report.collective_rows(timeline(), [], None)
  values = dict(
    config="some", topology="v5p:2x2x1", slices=2, chips=8, devices=8, device_kind="TPU v5", mesh={"data": 2, "fsdp": 4},
    parameters=8_000_000_000, active_parameters=2_000_000_000, batch=16, length=8192, compile_seconds=30.0,
    versions={"jax": "1.2", "jaxlib": "1.2", "libtpu": "0.1"}, flags={}, hbm={"parameters": 2 * GIB, "unattributed": GIB},
    peak=3 * GIB, capacity=4 * GIB, host_bytes=0, predicted=predicted, collectives=rows,
    advice=[advice.Suggestion("try <this>", 0.5, GIB, "closed form")], timeline=timeline().spans, torus="a torus",
    peak_flops=100e12,
  )  # fmt: skip
  return report.Report(**(values | changes))


def test_parts_hold_all_seconds_and_say_what_bounds_them():
  found = {p.part: p for p in made().predicted.parts}
  assert sum(p.seconds for p in found.values()) == pytest.approx(11.5)
  assert found["mlp forward"].seconds == pytest.approx(4 * (0.5 + 0.25) + 0.5)  # with what it waits for
  assert found["mlp forward"].classes == {"matmul": 2.0, "exposed all-gather fsdp": 1.0, "exposed all-reduce DCN": 0.5}
  assert found["mlp forward"].at_peak == pytest.approx(1.0) and found["mlp forward"].bound == "compute"
  assert found["attention forward"].flops == 4e12  # of the kernel, in four trips
  assert found["update"].bound == "HBM" and found["update"].at_peak == 0


def test_the_bubble_of_a_pipeline_is_taken_from_the_classes_of_its_ticks():
  layers = simulate.Span(0.0, 1.0, "core", traces.Loop(2, ()), inside=(
    simulate.Span(0.0, 0.5, "core", traces.Work("matmul", "mlp forward")),))  # fmt: skip
  ticks = simulate.Span(0.0, 6.0, "core", traces.Loop(6, ()), inside=(layers,))
  head = simulate.Span(6.0, 7.0, "core", traces.Work("matmul", "head forward"))
  found = report.with_bubble(simulate.Timeline(7.0, (ticks, head)), 3, 1 / 3)
  assert found == pytest.approx({"matmul": 5.0, "pipeline bubble": 2.0})


def test_collectives_are_summed_by_kind_and_axes():
  rows = {(r.kind, r.over): r for r in made().collectives}
  gather = rows["all-gather", "fsdp"]
  assert (gather.times, gather.bytes, gather.seconds, gather.exposed) == (4, GIB, 2.0, 1.0)
  assert rows["all-reduce", "DCN"].exposed == 0.5
  c = collectives.Collective("all-gather", 1, ("bf16",), ((0, 1),), (), 1, 3, False, False, False, False, "", "x")

  devices = [argparse.Namespace(id=n, platform="cpu") for n in range(2)]
  mesh = argparse.Namespace(axis_names=("fsdp",), devices=argparse.Namespace(shape=(2,), flat=devices))
  row = next(r for r in report.collective_rows(timeline(), [c], mesh) if r.kind == "all-gather")
  assert (row.synchronous, row.asynchronous) == (3, 1)


def test_the_text_calls_what_is_predicted_so():
  shown = report.text(made())
  assert (
    "8,000,000,000 parameters (2,000,000,000 of a token)" in shown
    and "2 slices of v5p:2x2x1: 8 chips, data=2 fsdp=4" in shown
  )
  assert "step, predicted: 11.500 s (80% interval 10.000 to 13.000 s), 10,000 tokens/s/chip" in shown
  assert "fits: 1.00 GiB of 4.00 are free" in shown
  assert "does NOT fit: 1.00 GiB" in report.text(made(capacity=2 * GIB))
  for head in (
    "time by class, predicted",
    "time by part, predicted",
    "exposed s, predicted",
    "(predicted by the closed",
  ):
    assert head in shown


def test_the_json_is_flat_and_whole():
  found = json.loads(json.dumps(made().to_json()))
  keys = re.findall(r"[a-z_]+", (report.__doc__ or "").partition("  version,")[2].partition("  advice")[0])
  assert found["version"] == 1 and set(found) <= {*keys, "version", "advice"}, set(found) - set(keys)
  assert found["tokens"] == 16 * 8192 and found["fits"] is True and found["headroom"] == GIB
  assert sum(found["predicted"]["classes"].values()) == pytest.approx(found["predicted"]["seconds"])
  assert found["predicted"]["parts"][0]["part"] and found["collectives"][0]["kind"]


def test_the_page_needs_no_network():
  shown = page.html_page(made())
  own = re.sub(r"<script>.*?</script>", "", shown, count=1, flags=re.DOTALL)  # plotly itself
  assert "https://" not in own.replace("https://plot.ly", "") and "<link" not in own and "src=" not in own
  assert "try &lt;this&gt;" in own and "a torus" in own
  for text in ("forward of a layer (4 trips)", "backward of a layer (4 trips)", "all-gather fsdp", "HBM of a device"):
    assert text in own, text


# ---- FLOPs by part, from a traced step


def test_products_are_counted_by_part_and_pass():
  import jax
  import jax.numpy as jnp

  def layer(x, w):
    with jax.named_scope("mlp"):
      return jnp.tanh(x @ w), None

  def objective(ws, head, x):
    x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, ws)
    with jax.named_scope("head"):
      return (x @ head).sum()

  shapes = (jnp.ones((3, 8, 8)), jnp.ones((8, 16)), jnp.ones((4, 8)))
  found = report.part_flops(jax.make_jaxpr(jax.grad(objective, (0, 1, 2)))(*shapes))
  one = 2 * 4 * 8 * 8
  assert found == {"mlp forward": 3 * one, "mlp again": 3 * one, "mlp backward": 6 * one,
                   "head forward": 2 * one, "head backward": 4 * one}  # fmt: skip


# ---- advice


def small(*overrides):

  few = [("model.layers", "4"), ("data.batch_size", "64"), ("run.steps", "1000"), ("optimizer.warmup_steps", "10")]
  return config_lib.load(f"{ROOT}/configs/llama3_8b.py", [*few, *overrides])


def advised(config, headroom, classes=None, rows=(), flags=None, products=0.9, parts=None):
  parts = {"mlp again": 0.5, "mlp forward": 0.5} if parts is None else parts
  return advice.advise(config, "v5p:2x2x2", 1, 2.0, classes or {"matmul": 1.0}, parts, headroom, list(rows), products,
                       "TPU v5p", flags or {advice.TILES: "65536"})  # fmt: skip


def test_remat_is_advised_as_far_as_there_is_room():
  much, little = advised(small(), 60 * GIB), advised(small(), 4 * GIB)
  (kept,) = [s for s in much if "remat.policy" in s.text]
  assert kept.hbm > 4 * GIB and 0 < kept.seconds <= 0.5 and "mlp 0.500 s" in kept.text
  assert all(s.hbm < 4 * GIB for s in little)
  none = advised(small(("remat.policy", "none")), 60 * GIB, parts={})
  assert not [s for s in none if "remat.policy" in s.text]  # nothing is computed again


def test_synchronous_collectives_name_options_that_are_not_set_yet():
  rows = [
    advice.Row("all-gather", "fsdp", GIB, 4, 4, 0, 0.5, 0.5),
    advice.Row("all-reduce", "DCN", 1, 1, 0, 1, 0.2, 0.2),
  ]
  found = advised(small(("remat.policy", "none")), 0.0, rows=rows, parts={})
  gather = next(s for s in found if "all-gathers over fsdp" in s.text)
  assert gather.seconds == 0.5 and gather.by == "schedule" and "offload_all_gather=true" in gather.text
  assert next(s for s in found if "grad_reduce_dtype=bfloat16" in s.text).seconds == pytest.approx(0.1)
  option = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
  found = advised(small(("remat.policy", "none")), 0.0, rows=rows, parts={}, flags={option: "true"})
  assert option not in next(s for s in found if "all-gathers over fsdp" in s.text).text


def test_slow_products_are_advised_larger_tiles_once():
  classes = {"matmul": 1.5, "vector": 0.5}
  assert any(advice.TILES in s.text for s in advised(small(), 0.0, classes, flags={"other": "1"}))
  found = advised(small(), 0.0, classes)
  assert not any(advice.TILES in s.text for s in found)
  assert any("25% of the step is elementwise" in s.text for s in found)


def test_what_would_make_it_fit_saves_enough():
  config = small(("remat.policy", "none"), ("data.batch_size", "256"))
  found = advice.to_fit(config, "v5p:2x2x1", 1, 20 * GIB)
  assert len(found) == 3
  for line in found:
    assert float(re.findall(r"about ([\d.]+) GiB less", line)[0]) >= 20 and "--config." in line
  now = analytic.estimate(config, *analytic.parse("v5p:2x2x1"))
  kept = advice.estimate(config, {"remat.policy": "full", "remat.table": {}}, "v5p:2x2x1", 1)
  assert kept and now.bytes - kept.bytes > 20 * GIB and any("remat.policy" in line for line in found)
  assert advice.to_fit(config, "v5p:2x2x1", 1, 1000 * GIB) == []


def test_too_large_says_by_how_much_and_what_to_change():
  from maxscale.perf.compiled import memory

  oom = memory.Oom(100 * GIB, 95 * GIB)
  said = plan.too_large(small(("remat.policy", "none")), "configs/x.py", "v5p:2x2x1", 1, oom)
  assert "configs/x.py on v5p:2x2x1 does not fit by 5.00 GiB" in said
  assert "not compiled" in said and said.count("\n  ") >= 3


def test_a_compiler_that_fails_names_the_option(monkeypatch):
  import jax

  from maxscale.perf import compiler
  from maxscale.perf.compiled import aot

  def fail(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile the kernel\nmore")

  monkeypatch.setattr(aot, "compile_step", fail)
  monkeypatch.setattr(compiler, "culprit", lambda *_: "xla_some")
  with pytest.raises(UserError) as e:
    plan.compile_step(small(), "configs/x.py", "v5p:2x2x1", 1)
  said = (
    "the compiler failed on configs/x.py for v5p:2x2x1: INTERNAL: Mosaic failed to compile the kernel; without xla_some"
  )
  assert str(e.value).startswith(said) and "more" not in str(e.value) and e.value.exit_code == 1


ONE = ["--config", "configs/llama3_8b.py", "--topology", "v5p:2x2x1"]


def planned(monkeypatch, compile, report_of=lambda _: made()):
  monkeypatch.setattr(plan, "ready", lambda config, *_: config)
  monkeypatch.setattr(plan, "compile_step", compile)
  monkeypatch.setattr(report, "make", report_of)


def test_folders_are_made_before_anything_compiles(monkeypatch, tmp_path, capsys):
  folders = [tmp_path / name for name in ("json", "html", "plan", "hlo/of")]
  outputs = [
    "--json",
    f"{tmp_path}/json/r.json",
    "--html",
    f"{tmp_path}/html/r.html",
    "--plan",
    f"{tmp_path}/plan/p.json",
  ]

  def compiled(*_):
    assert all(folder.is_dir() for folder in folders)

  planned(monkeypatch, compiled)
  monkeypatch.setattr(plan, "_hlo", lambda *_: None)
  assert plan.main([*ONE, *outputs, "--hlo", f"{tmp_path}/hlo/of"]) == 0, capsys.readouterr().err
  assert json.loads((tmp_path / "json/r.json").read_text()) and (tmp_path / "plan/p.json").is_file()


@pytest.mark.parametrize(
  "error", [ValueError("the trips of loop.7 are unknown"), ConnectionError("no route to some.host")]
)
def test_what_goes_wrong_after_the_compile_is_one_line(monkeypatch, capsys, error):
  def fail(_):
    raise error

  planned(monkeypatch, lambda *_: None, fail)
  assert plan.main(ONE) == 1
  err = capsys.readouterr().err
  assert str(error) in err and err.startswith("python -m maxscale.plan: ") and len(err.splitlines()) == 1


def test_a_search_is_given_what_the_user_changed(monkeypatch, tmp_path, capsys):
  from maxscale.perf import plans, search

  def run(config, path, topology, slices, overrides, say):
    predicted = {"by": "compiled", "seconds": 1.0, "tokens_per_second_per_chip": 1.0, "hbm": GIB}
    return search.Search([], [], plans.Plan(path, topology, slices, overrides, predicted=predicted), [])

  planned(monkeypatch, pytest.fail)
  monkeypatch.setattr(search, "run", run)
  path = str(tmp_path / "new/plan.json")
  assert plan.main([*ONE, "--search", "--plan", path, "--config.data.batch_size=512"]) == 0
  assert plans.load(path).options == {"data.batch_size": "512"}


def test_hfu_has_the_products_of_the_program_and_of_the_kernels_of_the_schedule():
  import jax
  import jax.numpy as jnp
  from jax.experimental import pallas as pl

  from maxscale.perf.compiled import predict

  def step(cost):
    def double(x, out):
      out[...] = 2 * x[...]

    x = jnp.ones((8, 128), jnp.float32)
    kernel = pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=cost)
    return jax.make_jaxpr(lambda x: kernel(x) @ x.T)(x)

  product = 2 * 8 * 8 * 128
  for cost in (None, pl.CostEstimate(flops=10**15, bytes_accessed=0, transcendentals=0)):
    assert predict.executed(step(cost), 4, timeline()) == product / 4 + 4e12  # four trips


# ---- docstrings


def test_the_prediction_in_a_docstring_is_replaced_and_the_rest_stays(tmp_path):
  source = (ROOT / "configs/llama3_8b.py").read_text()
  found = made(slices=1, versions={"jax": "1", "libtpu": "2"}).to_json()
  bare = re.sub(r"\n\nPredicted \(.*?(?=\n\n)", "", source, flags=re.DOTALL)
  once = plan.with_prediction(bare, found)
  line = "Predicted (v5p:2x2x1, jax 1, libtpu 2): step 11.50 s (80% 10.00 to 13.00), 10,000 tokens/s/chip, MFU 50.0%,"
  assert line in once and "HBM 3.0 of 4.0 GiB" in " ".join(once.split())
  assert plan.with_prediction(once, found) == once
  again = plan.with_prediction(once, {**found, "peak": 2 * GIB})
  assert again == once.replace("HBM 3.0", "HBM 2.0")
  assert re.sub(r"\n\nPredicted \(.*?(?=\n\n)", "", again, flags=re.DOTALL) == bare
  assert max(map(len, once.splitlines())) <= 120
  compile(once, "config", "exec")


def test_a_docstring_may_end_with_the_prediction():
  found = made().to_json()
  short = plan.with_prediction('"""A config.\n"""\nx = 1\n', found)
  assert short.endswith('GiB\n"""\nx = 1\n') and plan.with_prediction(short, found) == short
  with pytest.raises(ConfigError, match="begins with a docstring"):
    plan.with_prediction("x = 1\n", found)


def test_docstrings_are_written_by_a_process_of_their_own(tmp_path, monkeypatch):
  path = tmp_path / "llama3_8b.py"
  shutil.copy(ROOT / "configs/llama3_8b.py", path)
  ran = []

  def fake(command, **_):
    ran.append(command)
    pathlib.Path(command[-1]).write_text(json.dumps(made().to_json()))
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", fake)
  assert plan.main(["--docstrings", str(path)]) == 0 and len(ran) == 1
  first = path.read_text()
  assert "Predicted (2 x v5p:2x2x1" in first
  assert plan.main(["--docstrings", str(path)]) == 0 and path.read_text() == first
  monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 2, "", "it does not fit"))
  assert plan.main(["--docstrings", str(path)]) == 2 - 1 and path.read_text() == first


# ---- the gate


def figures(**changes):
  found = gate.figures(made().to_json())
  return found | changes


@pytest.mark.parametrize("name", {**gate.SHORT, **gate.WHOLE, **gate.PEERS})
def test_a_case_of_the_gate_can_be_compiled(name):
  """Its options are known, and its arrays fit its mesh."""
  case = {**gate.SHORT, **gate.WHOLE, **gate.PEERS}[name]
  config = config_lib.load(f"configs/{case.config}.py", [tuple(o.split("=", 1)) for o in case.options])
  chip, chips = analytic.parse(case.topology or config.mesh.topology)
  step, _ = analytic.program(config, chip, chips)
  step.check(config.data.batch_size, config.data.length)


def test_the_gate_says_what_grew_and_where():
  golden = figures()
  assert gate.compare(golden, golden, "v", ["v"]) == ([], [])
  worse, _ = gate.compare(golden, figures(peak=3.1 * GIB, hbm={"parameters": 2.1 * GIB, "unattributed": GIB}), "v", [])
  assert len(worse) == 1 and "HBM grew by 3.3%, from 3.000 to 3.100 GiB; most in parameters (+0.100 GiB)" in worse[0]
  parts = {**golden["parts"], "mlp backward": golden["parts"]["mlp backward"] + 0.5}
  worse, _ = gate.compare(golden, figures(seconds=golden["seconds"] + 0.5, parts=parts), "v", [])
  assert len(worse) == 1 and "step grew by 4.3%" in worse[0] and "mlp backward (+0.500 s)" in worse[0]
  moved = {**golden["collectives"], "all-to-all expert": 0.03 * GIB}
  worse, _ = gate.compare(golden, figures(bytes=golden["bytes"] + 0.03 * GIB, collectives=moved), "v", [])
  assert len(worse) == 1 and "all-to-all expert" in worse[0]


def test_small_changes_and_better_figures_pass():
  golden = figures()
  assert gate.compare(golden, figures(peak=3.05 * GIB, seconds=golden["seconds"] * 1.019), "v", []) == ([], [])
  worse, notes = gate.compare(golden, figures(seconds=10.0, parts={"update": 0.1}, compile_seconds=61), "v", [])
  assert not worse and "better: the predicted step shrank by 13.0%" in notes[0] and "took 61 s, 30 s before" in notes[1]


@pytest.fixture
def one_case(tmp_path, monkeypatch):
  monkeypatch.setattr(gate, "GOLDEN", tmp_path)
  monkeypatch.setattr(gate, "SHORT", {"one": gate.Case("llama3_8b")})
  found = {"one": ("jax 1, libtpu 2", figures())}
  monkeypatch.setattr(gate, "compiled", lambda case: found["one"])
  return found


def test_the_gate_fails_on_worse_figures_of_the_same_version_alone(one_case, capsys):
  assert gate.main([]) == 0 and "nothing to compare with" in capsys.readouterr().out
  assert gate.main(["--update"]) == 0 and gate.main([]) == 0
  one_case["one"] = ("jax 1, libtpu 2", figures(peak=4 * GIB))
  assert gate.main([]) == 1 and "WORSE: HBM grew by 33.3%" in capsys.readouterr().out
  one_case["one"] = ("jax 1, libtpu 3", figures(peak=4 * GIB))
  assert gate.main([]) == 0 and "there is: jax 1, libtpu 2" in capsys.readouterr().out
  assert gate.main(["--update"]) == 0  # both are kept
  one_case["one"] = ("jax 1, libtpu 2", figures())
  assert gate.main([]) == 0
  one_case["one"] = "it does not fit"
  assert gate.main([]) == 1 and "does not compile: it does not fit" in capsys.readouterr().out


# ---- the whole command


def command(*arguments, seconds=600):
  line = [sys.executable, "-m", "maxscale.plan", *arguments]
  return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


TINY = {"model.layers": 2, "model.embed": 128, "model.mlp": 256, "model.heads": 1, "model.kv_heads": 1, "model.head_dim": 128,
        "model.vocab_size": 1024, "data.batch_size": 8, "data.length": 512, "run.steps": 100,
        "optimizer.warmup_steps": 10, "run.compile_cache": ""}  # fmt: skip


@needs_compiler
def test_a_small_config_is_planned(tmp_path):
  options = [f"--config.{path}={value}" for path, value in TINY.items()]
  outputs = ["--json", f"{tmp_path}/r.json", "--html", f"{tmp_path}/r.html", "--hlo", f"{tmp_path}/hlo", "--plan",
             f"{tmp_path}/plan.json"]  # fmt: skip
  done = command("--config", "configs/llama3_8b.py", "--topology", "v5e:2x2", *options, *outputs)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "r.json").read_text())
  # embeddings and head; a layer has query, key, value and out, three matrices of the MLP, and two norms
  layer = 4 * 128 * 128 + 3 * 128 * 256 + 2 * 128
  assert found["parameters"] == 2 * 1024 * 128 + 2 * layer + 128 == found["active_parameters"]
  p = found["predicted"]
  assert p["hfu"] >= p["mfu"] > 0
  assert p["low"] < p["seconds"] < p["high"] and sum(p["classes"].values()) == pytest.approx(p["seconds"])
  assert sum(part["seconds"] for part in p["parts"]) == pytest.approx(p["seconds"])
  assert sum(found["hbm"].values()) == pytest.approx(found["peak"]) and found["fits"]
  assert p["tokens_per_second_per_chip"] == pytest.approx(8 * 512 / p["seconds"] / 4)
  parts = {part["part"]: part for part in p["parts"]}
  assert parts["mlp forward"]["flops"] == pytest.approx(2 * 2 * 512 * 2 * 3 * 128 * 256)  # 2 sequences of a device
  assert f"{p['seconds'] * 1e3:.3f} ms (80% interval" in done.stdout and "fits: " in done.stdout
  assert "ENTRY" in (tmp_path / "hlo/program.txt").read_text()
  assert json.loads((tmp_path / "hlo/trace.json").read_text())
  from maxscale.perf import plans

  assert dict(plans.load(f"{tmp_path}/plan.json").overrides())["model.layers"] == "2"
  assert "backward of a layer (2 trips)" in (tmp_path / "r.html").read_text()


@needs_compiler
def test_what_does_not_fit_is_one_message():
  large = {**TINY, "data.batch_size": 2**15, "remat.policy": "none"}
  done = command(
    "--config", "configs/llama3_8b.py", "--topology", "v5e:2x2", *(f"--config.{p}={v}" for p, v in large.items())
  )
  assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout, done.stderr[-3000:]
  message = done.stderr.partition("python -m maxscale.plan: ")[2]
  assert re.search(r"on v5e:2x2 does not fit by [\d.]+ GiB", message), message
  assert "what would make it fit" in message and "\n  3. --config." in message


@needs_compiler
@pytest.mark.slow
def test_a_whole_config_is_planned(tmp_path):
  done = command(
    "--config", "configs/llama3_8b.py", "--topology", "v6e:16x16", "--json", f"{tmp_path}/r.json", seconds=3600
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "r.json").read_text())
  assert found["parameters"] / 1e9 == pytest.approx(8.03, rel=2e-3) and found["chips"] == 256
  assert found["fits"] and 0.2 < found["predicted"]["mfu"] < 0.8
