"""The closed form against all layouts of a config, compiled: those of tests/perf/golden, and how they are compared."""

import dataclasses
import json
import pathlib

import pytest

from maxscale.config import ConfigError
from maxscale.perf import proof, search
from maxscale.perf.closed import analytic
from maxscale.perf.compiled import trace
from tests.models import reference as ref
from tests.perf.test_search import DENSE, MOE, TOPOLOGY, ranking

GOLDEN = pathlib.Path(__file__).parent / "golden"
SERIES = {"llama3_8b": "v6e:4x4"}


@pytest.mark.parametrize("name", SERIES)
def test_the_closed_form_orders_layouts_as_the_compiler_does(name):
  """Of the layouts of a config on 16 chips, all compiled: order, what a search chooses, and what fits."""
  series = proof.load(GOLDEN / f"proof_{name}.json.gz")
  found = proof.compare(series)
  assert series.topology == SERIES[name] and len(found.rows) >= 20
  assert found.spearman >= 0.9, proof.text(found)
  assert found.regret < 0.02, proof.text(found)
  assert found.agree >= 0.8 * len(found.rows), proof.text(found)


# ---- which layouts


def test_all_layouts_where_they_are_few():
  found = ranking({**DENSE, "data.batch_size": 8}, "v5p:2x2x1").all()
  chosen = proof.layouts(found)
  meshes = {c.mesh for c in found if c.estimate.bytes < proof.OVER * c.estimate.limit}
  assert {c.mesh for c in chosen} == meshes and len(chosen) == len(meshes) <= proof.MOST
  for c in chosen:
    assert c is next(other for other in found if other.mesh == c.mesh)


def test_of_many_layouts_some_of_every_kind():
  found = ranking(MOE, hbm=10 * 2**30).all()
  every, chosen = proof.layouts(found, 999), proof.layouts(found)
  assert len(every) > 30 and len(chosen) == len({c.mesh for c in chosen}) == proof.MOST
  assert chosen[: proof.BEST] == every[: proof.BEST] and {c.families for c in chosen} == {c.families for c in every}
  places = [every.index(c) for c in chosen]
  assert places == sorted(places) and places[-1] > 0.8 * len(every)
  assert any(not c.estimate.fits for c in every) and all(c.estimate.bytes < 1.1 * c.estimate.limit for c in every)


# ---- how they are compared


def work(seconds):
  """A trace that takes so long, nearly: of attention at its peak."""
  return [["loop", 2, "", [["vector", "mlp forward", int(seconds * 1.75e9 / 2), 0.0, 0.0, 0.0, 1]]]]


def series(compiled):
  """Layouts on 8 v5p of which the closed form says what it says; `compiled`: from a layout's rank, and it, what to say."""
  chosen = proof.layouts(ranking().all(), 12)
  said = [(c.options, {"hbm": 1e9, "error": "", "events": [], **compiled(i, c)}) for i, c in enumerate(chosen)]
  return proof.Series(ref.config(DENSE), TOPOLOGY, said, {"jax": "1"})


def test_a_perfect_closed_form_has_no_regret():
  made = series(lambda i, c: {"events": work(3 * c.estimate.step_seconds)})
  found = proof.compare(made)
  assert found.spearman == 1.0 and found.regret == 0.0 and found.agree == len(found.rows) == 12
  assert "Spearman 1.000" in proof.text(found) and len(proof.text(found).splitlines()) == 15


def test_regret_is_of_the_best_that_is_not_compiled():
  made = series(lambda i, c: {"events": work({0: 3.0, 2: 2.0, 8: 1.6}.get(i, 5.0))})
  found = proof.compare(made, compiles=4)
  assert found.chosen is found.rows[2] and found.regret == pytest.approx(2.0 / 1.6 - 1)
  assert proof.compare(made, compiles=1).regret == pytest.approx(3.0 / 1.6 - 1)
  assert proof.compare(made, compiles=9).regret == 0.0 and found.spearman < 0.9


def test_what_does_not_fit_is_replaced_and_counted():
  made = series(lambda i, c: {"error": "RESOURCE_EXHAUSTED", "hbm": 1e12} if i == 0 else {"events": work(1 + i)})
  found = proof.compare(made, compiles=1)
  first = found.rows[0]
  assert found.chosen is next(r for r in found.rows if r.candidate.families != first.candidate.families)
  assert found.agree == 11 and "compiles not" in proof.text(found).splitlines()[2]
  with pytest.raises(ConfigError, match="fewer than two"):
    proof.compare(series(lambda i, c: {"error": "INTERNAL"} if i else {"events": work(1)}))
  with pytest.raises(ConfigError, match="no longer legal"):
    proof.compare(dataclasses.replace(made, found=[({**first.candidate.options, "mesh.fsdp": 64}, made.found[0][1])]))


@pytest.mark.parametrize("name", ["f.json", "f.json.gz"])
def test_a_series_is_kept_and_goes_on(tmp_path, monkeypatch, name):
  calls, chosen = [], [c.options for c in proof.layouts(ranking().all(), 3)]

  def compile(config, topology, slices, seconds):
    calls.append(config)
    if len(calls) == 2:
      return {"error": "RESOURCE_EXHAUSTED", "hbm": 5e10}
    return {"seconds": 1.0, "low": 1.0, "high": 1.0, "classes": {}, "hbm": 4e9, "events": work(1.0)}

  monkeypatch.setattr(search, "in_process", compile)
  empty = proof.Series(ref.config(DENSE), TOPOLOGY, [], search.versions())
  path = tmp_path / name
  done = proof.compile_all(empty, chosen[:2], lambda s: s.save(path), lambda _: None)
  assert calls == [search.with_options(empty.config, o) for o in chosen[:2]]
  assert proof.load(path) == done and done.found[1][1] == {"hbm": 5e10, "error": "RESOURCE_EXHAUSTED", "events": []}
  assert done.found[0][1]["events"] == proof.plain(work(1.0)) and done.found[0][0] == chosen[0]
  more = proof.compile_all(proof.load(path), chosen, lambda s: s.save(path), lambda _: None)
  assert len(calls) == 3 and [o for o, _ in more.found] == chosen


def test_a_trace_without_names_takes_as_long():
  events = (
    trace.Work("matmul", "mlp forward", 5), trace.Work("matmul", "attention forward", 7),
    trace.Start(1, trace.Move("all-gather", 1e6, ((4, True),), part="mlp forward", axes="fsdp")),
    trace.Loop(3, (trace.Work("vector", "norm", 2), trace.Work("vector", "mlp", 2)), "layers"), trace.Done(1),
    trace.Sync(trace.Move("all-reduce", 1e6, ((4, True),), part="head")),
  )  # fmt: skip
  short = trace.from_json(proof.plain(trace.to_json(events)))
  assert short[0] == trace.Work("matmul", "", 12, count=2) and len(short) == 5
  assert isinstance(short[2], trace.Loop) and short[2].body == (trace.Work("vector", "", 4, count=2),)
  chip, rates = analytic.parse(TOPOLOGY)[0], proof.calibration.rates(analytic.parse(TOPOLOGY)[0])
  old, new = proof.simulate.run(events, chip, rates), proof.simulate.run(short, chip, rates)
  assert new.seconds == pytest.approx(old.seconds) and new.classes() == pytest.approx(old.classes())
  assert json.loads(json.dumps(proof.plain(trace.to_json(events)))) == proof.plain(trace.to_json(events))


# ---- the command


def test_the_command_compiles_and_compares_again(tmp_path, monkeypatch, capsys):
  def compile(config, *_):
    return {"hbm": 4e9, "events": work(1.0 + config.mesh.tensor)}

  monkeypatch.setattr(search, "in_process", compile)
  path = tmp_path / "f.json.gz"
  asked = ["--config", "configs/tiny.py", "--topology", "v5p:2x2x1", "--config.data.batch_size=8", "--json", str(path)]
  assert proof.main(asked) == 0
  first = capsys.readouterr().out
  assert "layouts of v5p:2x2x1" in first and "Spearman" in first
  assert proof.main(["--from", str(path)]) == 0
  assert capsys.readouterr().out.splitlines() == first.splitlines()[-len(proof.load(path).found) - 3 :]


def test_what_is_missing_is_one_line(capsys):
  assert proof.main([]) == 2
  assert capsys.readouterr().err == "python -m maxscale.perf.proof: --config or --from is missing\n"
  assert proof.main(["--from", "nowhere.json"]) == 2
