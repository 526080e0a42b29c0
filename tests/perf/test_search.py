"""The search: what it considers, in which order, what it compiles and chooses, and what it says."""

import dataclasses
import math
import types

import pytest

from maxscale import config as config_lib
from maxscale.config import MESH_AXES, ConfigError
from maxscale.models import remat
from maxscale.perf import search
from maxscale.perf.closed import analytic
from tests.models import reference as ref

DENSE = {"model.embed": 2048, "model.layers": 8, "model.heads": 16, "model.kv_heads": 4, "model.head_dim": 128,
         "model.mlp": 8192, "model.vocab_size": 32768, "data.batch_size": 32, "data.length": 4096,
         "model.compute_dtype": "bfloat16"}  # fmt: skip
MOE = {**DENSE, "model.experts": 8, "model.mlp": 4096}
TOPOLOGY = "v5p:2x2x2"


def ranking(options=DENSE, topology=TOPOLOGY, slices=1, **chip):
  made, chips = analytic.parse(topology)
  return search.Ranking(ref.config(options), dataclasses.replace(made, **chip), chips, slices, analytic.DEFAULT)


@pytest.fixture(scope="module")
def moe():
  return ranking(MOE).all()


def test_every_factorisation():
  found = list(search._factors(8, [8] * 3))
  assert sorted(found) == sorted(
    (a, b, c) for a in range(1, 9) for b in range(1, 9) for c in range(1, 9) if a * b * c == 8
  )
  assert list(search._factors(6, [1, 2, 6])) == [(1, 1, 6), (1, 2, 3)]


def test_meshes_have_all_devices_and_each_slice_one_axis():
  config = ref.config(MOE)
  for options in search.meshes(config, 16, 2):
    assert math.prod(options[f"mesh.{axis}"] for axis in MESH_AXES) == 16
    assert sorted(options[f"mesh.dcn.{axis}"] for axis in MESH_AXES) == [1, 1, 1, 1, 1, 2]
  assert not any(o["mesh.expert"] > 1 for o in search.meshes(ref.config(DENSE), 16, 1))


def test_candidates_can_run(moe):
  """Each passes the checks of its options and of the step, and computes what the config computes."""
  config = ref.config(MOE)
  chip, chips = analytic.parse(TOPOLOGY)
  for c in moe[:: max(1, len(moe) // 40)]:
    made = search.with_options(config, c.options)
    config_lib.check(made)
    assert made.hash == config.hash and made.data == config.data
    step, shape = analytic.program(made, chip, chips)
    step.check(config.data.batch_size, config.data.length)
    assert shape.devices == 8
    assert analytic.estimate(made, chip, chips) == c.estimate  # what is shared between policies changes nothing


def test_order_is_that_of_the_closed_form_and_always_the_same(moe):
  fits = [c.estimate.fits for c in moe]
  assert fits == sorted(fits, reverse=True)
  seconds = [c.estimate.step_seconds for c in moe if c.estimate.fits]
  assert seconds == sorted(seconds) and len(seconds) > 200
  again = ranking(MOE).all()
  assert [c.name for c in again] == [c.name for c in moe]
  assert len({c.name for c in moe}) == len(moe)


def test_every_family_and_policy_is_looked_at(moe):
  assert {f for c in moe for f in c.families} == set(search.FAMILIES)
  assert {c.options["remat.policy"] for c in moe} == {*remat.PRESETS, "none"}
  tables = [c.options["remat.table"] for c in moe]
  assert {"attention": "offload"} in tables and {"attention": "keep", "router": "keep"} in tables
  assert {c.options.get("sharding.experts") for c in moe if "expert" in c.families} == {"exchange", "gather"}
  assert not any("sharding.experts" in c.options for c in moe if "expert" not in c.families)
  pipelines = [c for c in moe if "pipeline" in c.families]
  assert pipelines and not any("offload" in c.options["remat.table"].values() for c in pipelines)
  assert {c.options["sharding.repeats"] for c in pipelines} == {1, 2, 4}


def test_nothing_better_among_the_meshes_that_are_left_out():
  """The best of all policies of all meshes is found though policies are only varied for the best meshes."""
  r = ranking({**DENSE, "data.batch_size": 8}, "v5p:2x2x1")
  found = r.all()[0]
  everything = [c for mesh in search.meshes(r.config, 4, 1) for s in search.schedules(r.config, mesh)
                for p in search.policies(r.config) if (c := r.look({**mesh, **s, **p}))]  # fmt: skip
  best = min(everything, key=lambda c: c.order)
  assert best.name == found.name and len(everything) > 200


def test_a_slow_network_between_chips_makes_tensor_parallelism_dear():
  def behind(**chip):
    found = ranking(DENSE, **chip).all()
    tensor = next(c for c in found if "tensor" in c.families)
    return tensor.estimate.step_seconds / found[0].estimate.step_seconds

  assert behind(link_bytes=1e10) > behind() > behind(link_bytes=1e13)


def test_little_memory_takes_another_candidate(moe):
  little = [c for c in ranking(MOE, hbm=11 * 2**30).all() if c.estimate.fits]
  assert little[0].estimate.bytes < 11 * 2**30 < moe[0].estimate.bytes
  assert little[0].estimate.step_seconds >= moe[0].estimate.step_seconds


def said(candidate, seconds=0.0, **more):
  return search.Compiled(candidate, {}, seconds, **more)


def turn(candidates, count, results=()):
  """Candidates in the order in which they are compiled: each gets the next result, then all work."""
  compiled, out, results = [], [], iter(results)
  for c in search.in_turn(candidates, compiled, count):
    out.append(c)
    compiled.append(said(c, **next(results, {"seconds": 1.0})))
  return out


def test_several_meshes_are_compiled(moe):
  short = turn(moe, 4)
  meshes = [c.mesh for c in short]
  assert len(short) == 4 and max(map(meshes.count, meshes)) <= 2 and short[0] is moe[0]
  assert all(c.estimate.fits for c in short)


def test_after_too_little_memory_comes_what_needs_as_much_less(moe):
  first = moe[0]
  ratio = 1.3 * first.estimate.limit / first.estimate.bytes  # the program needs so much more than the closed form says
  refused = {"error": "RESOURCE_EXHAUSTED", "hbm": ratio * first.estimate.bytes}
  second = turn(moe, 1, [refused])[1]
  leaner = lambda c: c.estimate.bytes * (ratio if c.families == first.families else 1) <= c.estimate.limit  # noqa: E731
  assert second is next(c for c in moe[1:] if leaner(c))
  same = [c for c in moe if c.families == first.families]
  third = turn(same, 1, [refused])[1]
  assert third.estimate.bytes * ratio <= third.estimate.limit and third is next(c for c in same if leaner(c))
  # what was refused does not count as one of its mesh, and more are tried until enough work
  assert len(turn(moe, 4, [refused] * 3)) == 7 and len(turn(moe, 2, [refused] * 99)) <= 8
  huge = {**refused, "hbm": 1e15}
  assert all(c.families != first.families for c in turn(moe, 2, [huge])[1:])


def test_what_fails_otherwise_is_left_with_its_mesh(moe):
  first, second, *_ = turn(moe, 1, [{"error": "INTERNAL"}])
  assert second.mesh != first.mesh and second is next(c for c in moe if c.mesh != first.mesh)
  assert len(turn(moe, 2, [{"error": "INTERNAL"}] * 99)) == 8
  assert turn(moe[:1], 2, [{"error": "INTERNAL"}]) == moe[:1]


# ---- compiles, which a function stands in for


def run(monkeypatch, results, **options):
  """A search whose compiles give results in turn: seconds, or an error; of one for memory also what it needs."""
  calls = []

  def compile(config, topology, slices, seconds):
    calls.append(config)
    result = results[len(calls) - 1]
    if isinstance(result, str):
      return {"error": result, "hbm": 100 * 2**30 if "EXHAUSTED" in result else 0.0}
    return {"seconds": result, "low": result, "high": result, "classes": {"matmul": result}, "hbm": 2**30}

  monkeypatch.setattr(search, "in_process", compile)
  said = []
  found = search.run(ref.config(DENSE), "configs/x.py", TOPOLOGY, say=said.append, **options)
  return found, calls, said


def test_the_shortest_compiled_step_is_the_plan(monkeypatch):
  found, calls, printed = run(monkeypatch, [3.0, "RESOURCE_EXHAUSTED", 1.5, 2.0, 4.0])
  short = [c.candidate for c in found.compiled]
  assert calls == [search.with_options(ref.config(DENSE), c.options) for c in short] and len(calls) == 5
  assert found.plan.options == short[2].options and found.plan.predicted["seconds"] == 1.5
  assert found.plan.predicted["by"] == "compiled" and "RESOURCE_EXHAUSTED" in "\n".join(printed)
  assert found.plan.predicted["tokens_per_second_per_chip"] == pytest.approx(32 * 4096 / 1.5 / 8)
  assert f"(compiled: {3.0:.3f} s, 1.0 GiB) [best]" in found.lines[0]


def test_every_set_of_flags_is_compiled(monkeypatch):
  sets = [{}, {"xla_a": "1"}]
  found, calls, _ = run(monkeypatch, [3.0, 2.0, 4.0, 2.5], flag_sets=sets, compiles=2)
  assert [c.run.flags for c in calls] == sets * 2
  assert found.plan.options["run.flags"] == {"xla_a": "1"} and found.plan.flags["compile"]["xla_a"] == "1"
  again = config_lib.load("configs/tiny.py", found.plan.overrides())
  assert again.run.flags == {"xla_a": "1"} and again.mesh == calls[1].mesh and again.remat == calls[1].remat


def test_others_are_compiled_until_enough_work(monkeypatch):
  found, calls, _ = run(monkeypatch, ["RESOURCE_EXHAUSTED"] * 3 + [2.0, "INTERNAL", 1.0], compiles=2)
  assert len(calls) == 6 and found.plan.options == found.compiled[5].candidate.options
  assert found.plan.predicted["by"] == "compiled"
  sets = [{}, {"xla_a": "1"}]
  found, calls, _ = run(monkeypatch, ["INTERNAL", 2.0], compiles=1, flag_sets=sets)
  assert len(calls) == 2 and found.plan.options["run.flags"] == {"xla_a": "1"}


def test_where_nothing_works_there_is_no_plan(monkeypatch):
  with pytest.raises(ConfigError, match=r"none of the 8 programs .* v5p:2x2x2 works(.|\n)*no 0\n(.|\n)*no 7"):
    run(monkeypatch, [f"no {n}" for n in range(8)], compiles=2)
  seconds = iter(range(0, 3000, 500))
  monkeypatch.setattr(search.time, "perf_counter", lambda: float(next(seconds)))
  with pytest.raises(ConfigError, match="none of the 1 programs"):
    run(monkeypatch, ["no"] * 9)


def test_the_plan_has_what_the_user_changed_below_what_was_found(monkeypatch):
  own = {"data.batch_size": "32", "remat.table.gate": "keep", "mesh.fsdp": "3", "run.flags.xla_b": "2", "run.name": "x"}
  found, *_ = run(monkeypatch, [1.0, 2.0, 2.0, 2.0], overrides=own)
  options = found.plan.options
  assert options["data.batch_size"] == "32" and options["run.flags.xla_b"] == "2" and options["run.name"] == "x"
  assert options["mesh.fsdp"] == found.compiled[0].candidate.options["mesh.fsdp"] and "remat.table.gate" not in options
  again = config_lib.load("configs/tiny.py", found.plan.overrides())
  assert again.data.batch_size == 32 and again.run.flags == {"xla_b": 2}
  assert again.remat.table == found.compiled[0].candidate.options["remat.table"]


def test_without_time_or_programs_the_closed_form_decides(monkeypatch):
  for results, options in [([], {"budget": 0.0}), ([], {"compiles": 0})]:
    found, calls, _ = run(monkeypatch, results, **options)
    assert len(calls) == len(results)
    assert found.plan.options == found.candidates[0].options and found.plan.predicted["by"] == "closed form"


def test_chips_without_a_compiler_here_are_not_compiled(monkeypatch):
  monkeypatch.setattr(search, "in_process", lambda *_: pytest.fail("compiled"))
  found = search.run(ref.config(DENSE), "configs/x.py", "h100:8", say=lambda _: None)
  assert found.plan.topology == "h100:8" and found.candidates[0].estimate.fits


def test_what_fits_nowhere_is_one_message():
  huge = {**DENSE, "model.embed": 32768, "model.layers": 64, "model.mlp": 131072}
  with pytest.raises(ConfigError, match=r"nothing fits v5p:2x2x2: the leanest candidate .* GiB"):
    search.run(ref.config(huge), "configs/x.py", TOPOLOGY, compiles=0, say=lambda _: None)
  with pytest.raises(ConfigError, match=r"change data.batch_size"):
    ranking({**DENSE, "data.batch_size": 7, "model.kv_heads": 1, "model.layers": 7, "data.length": 256}).all()


# ---- words


def test_a_line_for_each_that_matters(moe):
  lines = search.explain(moe)
  text = "\n".join(lines)
  assert lines[0].count("[best]") == 1 and text.count("[best]") == 1
  for family in ("tensor", "expert", "context", "pipeline"):
    best = next(c for c in moe if family in c.families)
    assert sum(f" {best.name} [" in line for line in lines) == 1
  same = [c for c in moe if all(moe[0].options[p] == v for p, v in c.options.items() if not p.startswith("remat."))]
  for kind in ("remat full", "remat projections", "something kept", "something offloaded"):
    best = next(c for c in same if c.kind == kind)
    assert sum(f" {best.name} [" in line for line in lines) == 1


def looked(r, options):
  found = r.look(options)
  assert found is not None
  return found


def test_what_a_candidate_loses_on():
  r = ranking(DENSE)
  mesh = {f"mesh.{axis}": 1 for axis in MESH_AXES} | {f"mesh.dcn.{axis}": 1 for axis in MESH_AXES}
  rest = {"sharding.microbatches": 1, "sharding.repeats": 1, "remat.policy": "attention", "remat.table": {}}
  fsdp, tensor = (looked(r, {**mesh, "mesh.fsdp": 8 // n, "mesh.tensor": n, **rest}) for n in (1, 4))
  assert "s more exposed ICI collectives along tensor" in search.loses(tensor, fsdp)
  full = looked(r, {**fsdp.options, "remat.policy": "full"})
  assert "s more attention" in search.loses(full, fsdp)
  small = looked(ranking(DENSE, hbm=4 * 2**30), fsdp.options)
  missing = (small.estimate.bytes - small.estimate.limit) / 2**30
  assert search.loses(small, fsdp).startswith(f"does not fit by {missing:.1f} GiB")


def test_a_childs_seconds_and_bytes_are_those_of_a_plan(monkeypatch):
  """HBM with the program's code and without what is on the host; what cannot be predicted is an error."""
  from maxscale import environment
  from maxscale.perf.compiled import aot, predict, trace

  analysis = types.SimpleNamespace(
    peak_memory_in_bytes=1000, host_argument_size_in_bytes=300, generated_code_size_in_bytes=7
  )
  made = types.SimpleNamespace(executable=types.SimpleNamespace(memory_analysis=lambda: analysis))
  monkeypatch.setattr(environment, "prepare_plan", lambda *_: None)
  monkeypatch.setattr(aot, "compile_step", lambda *_: made)
  found = types.SimpleNamespace(seconds=2.0, low=1.0, high=3.0, classes={"matmul": 2.0})
  monkeypatch.setattr(predict, "predict", lambda _: found)
  events = (trace.Work("matmul", "mlp forward", 7),)
  monkeypatch.setattr(predict, "events_of", lambda _: events)
  assert search.compile_candidate(ref.config(DENSE), TOPOLOGY, 1) == {
    **vars(found), "hbm": 707, "events": trace.to_json(events)
  }  # fmt: skip

  def unknown(_):
    raise ValueError("the trips of a loop are unknown")

  monkeypatch.setattr(predict, "predict", unknown)
  assert search.compile_candidate(ref.config(DENSE), TOPOLOGY, 1) == {
    "error": "the trips of a loop are unknown", "hbm": 0.0
  }  # fmt: skip

  def large(_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.01G of 31.25G hbm.")

  monkeypatch.setattr(predict, "predict", large)
  assert search.compile_candidate(ref.config(DENSE), TOPOLOGY, 1)["hbm"] == pytest.approx(33.01 * 2**30)


@pytest.mark.slow
def test_a_real_compile_in_its_own_process():
  pytest.importorskip("libtpu")
  tiny = {**DENSE, "model.embed": 256, "model.heads": 2, "model.kv_heads": 2, "model.mlp": 512, "model.layers": 2,
          "model.vocab_size": 1024, "data.batch_size": 8, "data.length": 512}  # fmt: skip
  said = []
  found = search.run(ref.config(tiny), "configs/x.py", "v5p:2x2x1", compiles=1, say=said.append)
  (c,) = found.compiled
  assert not c.error, c.error
  assert 0 < c.low <= c.seconds <= c.high and 0 < c.hbm < 2**30
  assert sum(c.classes.values()) == pytest.approx(c.seconds, rel=0.01)
