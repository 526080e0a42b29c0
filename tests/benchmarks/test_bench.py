"""The benchmark's statistics, and its deterministic part: FLOPs and estimated cycles beside the plain step."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from maxscale.benchmarks import cases, measure, plain
from maxscale.models import module
from maxscale.models.parts import Shape
from maxscale.perf.compiled import program
from maxscale.perf.flops import jaxpr_flops


def test_pairs_alternate_and_the_median_ignores_one_bad_pair(monkeypatch):
  clock, order = [0.0], []
  monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

  def run(name, seconds):
    order.append(name)
    clock[0] += seconds * (50 if len(order) == 6 else 1)

  ratio = measure.alternate(lambda: run("a", 3.0), lambda: run("b", 2.0), pairs=5)
  assert order[2:] == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
  assert ratio.median == pytest.approx(1.5) and ratio.low <= 1.5 <= ratio.high
  assert (ratio.a_seconds, ratio.b_seconds, ratio.pairs) == (pytest.approx(3), pytest.approx(2), 5)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_the_plain_step_is_the_same_model(experts):
  """Loss of the framework and of the plain step for the same parameters, small, on one device."""
  import dataclasses

  config = cases.config(experts, "float32", 2)
  small = dataclasses.replace(config.model, embed=32, layers=2, heads=4, head_dim=8, mlp=48, vocab_size=128)
  config = dataclasses.replace(config, model=small, data=dataclasses.replace(config.data, length=32))
  ours = cases.Case(config, jax.devices()[0])
  shape = Shape.of(config, 128)
  prog = cases.Program(config, 128, ours.program().mesh, ours.program().rules)
  batch = {k: v % 128 if k == "tokens" else np.where(v < 0, v, v % 128) for k, v in ours.batch().items()}
  params = jax.jit(lambda: module.map_specs(lambda s: module.initialise(s, 0), prog.skeleton.specs))()
  scale = np.float32(1 / (batch["targets"] >= 0).sum())
  _, total, _ = prog.on_mesh(params, batch, None, scale)
  layers, mlp = params["layers"], params["layers"]["mlp"]
  names = {"q": "query", "k": "key", "v": "value", "o": "out"}
  theirs = {
    "embed": params["embedding"], "head": params["head"], "norm": params["final_norm"]["scale"],
    "layers": {k: layers["attention"][n] for k, n in names.items()}
    | {"n1": layers["attention_norm"]["scale"], "n2": layers["mlp_norm"]["scale"]} | mlp,
  }  # fmt: skip
  expected = plain._loss(shape, plain.attention_for("cpu"), config.loss.z_loss, theirs, batch)
  # Its balance loss is a mean over sequences, ours a sum over tokens: here rows are as long, but the last has no target.
  assert float(total) == pytest.approx(float(expected), rel=1e-5 if not experts else 2e-4)


def test_matmul_flops_are_those_of_the_plain_step():
  """Beside the products that swap rotary pairs, of queries and keys, forward and backward."""
  case = cases.Case(cases.config(0, "float32", 2), jax.devices()[0])
  m = case.config.model
  swaps = 2 * case.tokens * m.layers * 2 * m.heads * 2 * m.head_dim**2
  assert jaxpr_flops(case.ours().jaxpr) == jaxpr_flops(case.plain().jaxpr) + swaps


def test_a_scheduled_program_is_read_with_its_trips():
  text = """
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %fusion.1)
}
%fused (q: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} convolution(%q, %q), window={}
}
%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"3"}
  %w = (s32[], f32[8]{0}) while(%tuple), condition=%cond.1, body=%body.1
  ROOT %add = f32[8]{0} add(%copy.1, %copy.1), backend_config={"estimated_cycles":"4"}
}
"""
  read = program.read(text)
  assert read.entry == "main"
  assert read.cycles() == {"copy": 3, "matmul": 70, "vector": 4}
  assert [(i.name, times, depth) for i, times, depth in read.walk() if i.cycles] == [
    ("copy.1", 1, 0),
    ("fusion.1", 7, 1),
    ("add", 1, 0),
  ]


def test_a_loop_of_unknown_trips_is_an_error():
  text = (
    "%c (p: s32[]) -> pred[] {\n  ROOT %x = pred[] compare(%p, %p), direction=LT\n}\nENTRY %m (a: s32[]) -> s32[] {\n"
  )
  with pytest.raises(ValueError, match="trips are unknown"):
    program.read(text + "}\n").trip_count("c")


@pytest.mark.slow
def test_compiled_for_a_tpu_it_is_no_slower_than_plain(tmp_path):
  pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
  out = tmp_path / "bench.json"
  command = [sys.executable, "-m", "maxscale.bench", "--only", "tpu", "--json", str(out)]
  subprocess.run(command, check=True, env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}, timeout=900)
  for name, row in json.loads(out.read_text())["tpu"].items():
    assert 1 < row["flops_ratio"] < 1.01, name  # rotary pairs are swapped by products
    assert row["cycles_ratio"] <= 1.01, name


@pytest.mark.slow
def test_on_this_machine_the_shares_are_reached(tmp_path):
  """Ratios to baselines of the same run; the machine may be busy, so the step's own bound is loose."""
  out = tmp_path / "bench.json"
  command = [sys.executable, "-m", "maxscale.bench", "--only", "cpu", "--pairs", "6", "--json", str(out)]
  subprocess.run(command, check=True, timeout=1200)
  rows = json.loads(out.read_text())["cpu"]
  assert rows["moe_share_of_dense"] >= 0.4
  assert rows["dense"]["ratio"] < 1.25 and rows["moe"]["ratio"] < 0.8
