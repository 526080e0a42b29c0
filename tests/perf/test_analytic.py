"""The closed form against the traced program, the audit, the compiler's memory, and counts by hand.

Programs for TPUs are traced in a process of their own (`python -m tests.perf.test_analytic`), which loads libtpu.
"""

import collections
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from jax.interpreters import partial_eval

from maxscale import config as config_lib
from maxscale.perf import calibration, flops, hardware, network, traffic
from maxscale.perf.closed import analytic, layer
from maxscale.perf.closed.local import Dot, Kernel, Local
from maxscale.perf.closed.work import Work
from maxscale.perf.compiled import aot
from maxscale.sharding import audit
from tests import multidevice
from tests.models import reference as ref

BASE = {"model.embed": 512, "model.layers": 4, "model.heads": 4, "model.kv_heads": 4, "model.head_dim": 128,
        "model.mlp": 1024, "model.vocab_size": 4096, "data.batch_size": 16, "data.length": 512,
        "model.compute_dtype": "bfloat16", "remat.policy": "full"}  # fmt: skip
MOE = {**BASE, "model.experts": 8, "model.mlp": 512, "sharding.expert_buffer": 1.0}
LATENT = {"kv_rank": 128, "q_rank": 256, "nope_dim": 128, "rope_dim": 64, "v_dim": 128}
V5P = next(c for c in hardware.CHIPS if c.name == "TPU v5p")

# name -> (topology, slices, options)
LAYOUTS = {
  "fsdp, two microbatches, projections": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 8, "remat.policy": "projections",
                                                            "sharding.microbatches": 2}),
  "fsdp, attention": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 8, "remat.policy": "attention"}),
  "fsdp, none": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 8, "remat.policy": "none"}),
  "data, fsdp, tensor": ("v5p:2x2x2", 1, {**BASE, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
  "tensor, whole sequences": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 4, "mesh.tensor": 2,
                                               "sharding.compute": {"residual_length": ["context"]}}),
  "ring": ("v5p:2x2x2", 1, {**BASE, "mesh.context": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
  "gather": ("v5p:2x2x1", 1, {**BASE, "mesh.context": 2, "mesh.fsdp": 2, "sharding.context": "gather"}),
  "ulysses": ("v5p:2x2x1", 1, {**BASE, "mesh.context": 4, "mesh.fsdp": 1, "sharding.context": "ulysses"}),
  "pipeline": ("v5p:2x2x2", 1, {**BASE, "mesh.pipeline": 2, "mesh.fsdp": 4, "sharding.microbatches": 4,
                                "sharding.repeats": 2}),
  "experts, tensor": ("v5p:2x2x2", 1, {**MOE, "mesh.expert": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
                                       "model.moe.shared": 256, "remat.policy": "projections"}),
  "experts, gathered": ("v5p:2x2x2", 1, {**MOE, "mesh.expert": 4, "mesh.fsdp": 2, "sharding.experts": "gather"}),
  "dense layers, mtp": ("v5p:2x2x2", 1, {**MOE, "mesh.fsdp": 8, "model.moe.dense_layers": 1,
                                         "model.moe.dense_mlp": 1024, "model.layers": 5, "model.mtp": 1}),
  "latent": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 4, "mesh.tensor": 2, "model.kv_heads": 0, "model.mla": LATENT,
                              "remat.policy": "projections"}),
  "norms": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 8, "model.qk_norm": True, "model.post_norms": True,
                             "remat.policy": "projections"}),
  "windows, parallel": ("v5p:2x2x2", 1, {**BASE, "mesh.fsdp": 8, "model.windows": [128, 0],
                                         "model.tied_embeddings": True, "model.parallel_block": True}),
  "slices, zero": ("v5p:2x2x1", 2, {**BASE, "mesh.data": 2, "mesh.fsdp": 2, "sharding.state": {"embed": ["fsdp", "data"]}}),
  "slices, fsdp across": ("v5p:2x2x1", 2, {**BASE, "mesh.fsdp": 4, "mesh.dcn": {"fsdp": 2, "data": 1}}),
}  # fmt: skip


def work(topology, slices, options, backend="tpu"):
  chip, chips = analytic.parse(topology)
  return Work(analytic.program(ref.config(options), chip, chips, slices)[0], backend)


def live(jaxpr):
  """Without what nobody uses, also inside of loops and checkpoints, as XLA would have it."""
  jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
  used, eqns = {id(v) for v in jaxpr.outvars}, []
  for e in reversed(jaxpr.eqns):
    if e.primitive.name == "pallas_call" and not any(id(v) in used for v in e.outvars):
      continue  # JAX leaves dead kernels to XLA
    used |= {id(v) for v in e.invars}
    if e.primitive.name == "remat2":
      e = e.replace(params={**e.params, "jaxpr": live(e.params["jaxpr"])})
    elif e.primitive.name in ("scan", "shard_map"):
      inner = e.params["jaxpr"]
      body = live(getattr(inner, "jaxpr", inner))
      e = e.replace(params={**e.params, "jaxpr": inner.replace(jaxpr=body) if hasattr(inner, "jaxpr") else body})
    eqns.append(e)
  return jaxpr.replace(eqns=eqns[::-1])


def traced(topology, slices, options):
  """{flops: of products and experts' kernels; moved: [kind, axes, dtype, bytes of a step and device]}."""
  config = ref.config(options)
  step, _ = aot.program_for(config, topology, slices)
  program = step.trace(config.data.batch_size, config.data.length)
  moved = collections.Counter()
  for t in traffic.transfers(program):
    moved[t.kind, t.axes, t.dtype] += t.total
  return {"flops": flops.jaxpr_flops(live(program.jaxpr.jaxpr)), "moved": [[*key, n] for key, n in moved.items()]}


@pytest.fixture(scope="module")
def asked():
  command = [sys.executable, "-m", "tests.perf.test_analytic"]
  done = subprocess.run(command, cwd=multidevice.ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_traced_step_multiplies_and_sends_the_same(asked, name):
  topology, slices, options = LAYOUTS[name]
  w = work(topology, slices, options)
  # attention kernels say no FLOPs of their own
  products = sum(p.times * sum(d.flops for d in p.dots) for p in w.parts)
  assert products * math.prod(w.local.rules.sizes.values()) == pytest.approx(asked[name]["flops"], rel=0.002)
  found = collections.Counter()
  for p in w.parts:
    for t in p.transfers:
      found[t.kind, t.axes, t.dtype] += t.total
  wanted = {(kind, tuple(axes), dtype): n for kind, axes, dtype, n in asked[name]["moved"]}
  # segment ids of split sequences, sums of norms and the like are left out
  for key in {*found, *wanted}:
    if max(found[key], wanted.get(key, 0)) > 2**15 and key[2] != "int32":
      assert found[key] == pytest.approx(wanted.get(key, 0), rel=0.01), key


@pytest.mark.parametrize("policy", ["full", "attention", "projections", "none"])
@pytest.mark.parametrize("more", [{}, {"model.windows": [128, 0], "model.kv_heads": 2}], ids=["causal", "windows"])
def test_a_step_with_attention_of_plain_products(policy, more):
  """On one device, whose attention XLA makes of products that the count sees."""
  options = {**BASE, **more, "remat.policy": policy, "mesh.fsdp": 1, "data.batch_size": 4}
  step = ref.program(options, vocab=4096)
  counted = flops.jaxpr_flops(live(step.trace(4, 512).jaxpr.jaxpr))
  w = Work(step, "xla")
  assert sum(p.times * p.flops for p in w.parts) == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("name", ["llama3_8b", "mixtral_8x7b", "deepseek_v3", "gpt_oss_20b"])
def test_without_recomputation_products_are_three_forwards(name):
  config = config_lib.load(f"configs/{name}.py", [("model.mtp", "0")])
  config = dataclasses.replace(config, mesh=config_lib.Mesh(fsdp=1, expert=1), remat=config_lib.Remat("none", {}))
  w = Work(analytic.program(config, dataclasses.replace(V5P, devices=1), (1,))[0], "tpu")
  parts = [p for p in w.parts if not p.name.startswith("dense_layers")]
  if config.dense_layers:  # which are computed once more for the backward of the embedding
    parts += [dataclasses.replace(p, times=p.times / (1 + ("forward" in p.name))) for p in w.parts if p not in parts]
  products = sum(p.times * sum(d.flops for d in p.dots) for p in parts)
  model = flops.from_config(config, config.model.vocab_size)
  model = dataclasses.replace(model, attention=())
  tokens = config.data.batch_size * config.data.length
  m, mla = config.model, config.model.mla
  if mla.kv_rank:  # latents have no name: checkpoints of sharded weights would make them again; here none is
    assert w.plain
    n, h = m.heads, mla.nope_dim + mla.rope_dim
    turns, room = n * h**2 + mla.rope_dim**2, mla.kv_rank * n * mla.rope_dim  # `room`: columns of zeros for rotary keys
  else:
    turns, room = (m.heads + m.kv_heads) * m.head_dim**2, 0
  more = 2 * (2 * turns + 3 * room) * m.layers * tokens  # turns have no weights: there are two, not three
  assert products - more == pytest.approx(flops.flops_per_token(model, config.data.length) * tokens, rel=0.003)


def test_blocks_of_attention():
  """Of n x n equal blocks of a causal mask (n + 1) / 2n are computed; with a window, the band and its edges."""
  assert layer._block_pairs(8192, 8192, 1024, 1024, 0) == (8 + 1) / (2 * 8) * 8192**2
  assert layer._block_pairs(8192, 8192, 1024, 1024, 1024) == (1 + 7 * 2) * 1024**2
  assert layer._block_pairs(4096, 4096, 512, 512, 1) == 8 * 512**2
  seen = sum(min(4, i // 128 + 1) * 128 * 128 for i in range(0, 512, 128))
  assert layer._xla_pairs(512, 512, 0, "") == seen


def test_bytes_of_the_state_are_the_audits():
  for name, options in [("llama3_70b", []), ("mixtral_8x7b", []), ("deepseek_v3", [("optimizer.state_dtype", "int8")]),
                        ("gpt_oss_20b", [("optimizer.name", "adafactor")])]:  # fmt: skip
    config = config_lib.load(f"configs/{name}.py", options)
    step, _ = analytic.program(config, *analytic.parse(config.mesh.topology), config.mesh.slices or 1)
    assert sum(Local(step, "tpu").state_bytes) == audit.bytes_per_device(step.infos(), step.rules)


# Bytes at the peak that the compiler says (libtpu 0.0.42): topology, options over those of 8 layers, GiB.
EIGHT = {"model.embed": 2048, "model.layers": 8, "model.heads": 16, "model.kv_heads": 4, "model.head_dim": 128,
         "model.mlp": 8192, "model.vocab_size": 32768, "data.batch_size": 16, "data.length": 4096,
         "remat.policy": "full", "model.compute_dtype": "bfloat16", "mesh.fsdp": 4}  # fmt: skip
PEAKS = [
  ("v5p:2x2x1", {}, 4.62),
  ("v5p:2x2x1", {"remat.policy": "attention"}, 5.05),
  ("v5p:2x2x1", {"remat.policy": "projections"}, 9.46),
  ("v5p:2x2x1", {"sharding.microbatches": 4}, 3.86),
  ("v5p:2x2x1", {"mesh.fsdp": 2, "mesh.tensor": 2}, 4.97),
  ("v5p:2x2x1", {"mesh.fsdp": 2, "mesh.pipeline": 2, "sharding.microbatches": 4}, 4.39),
  (
    "v5p:2x2x1",
    {"model.experts": 8, "model.mlp": 4096, "sharding.microbatches": 2, "remat.policy": "projections"},
    13.39,
  ),
]


@pytest.mark.parametrize("topology, options, peak", PEAKS)
def test_memory_is_the_compilers(topology, options, peak):
  e = analytic.estimate(ref.config({**EIGHT, **options}), *analytic.parse(topology))
  assert e.bytes / 2**30 == pytest.approx(peak, rel=0.1)


# ---- seconds


def test_gather_of_a_layer_by_hand():
  """70B by FSDP over 4x4x4 v5p: all of a layer's matrices in bfloat16, over three closed rings of 90 GB/s links."""
  config = config_lib.load("configs/llama3_70b.py", [("mesh.topology", "v5p:4x4x4")])
  config = dataclasses.replace(config, mesh=config_lib.Mesh(fsdp=64))
  step, shape = analytic.program(config, V5P, (4, 4, 4))
  clock = analytic.Clock(V5P, (4, 4, 4), shape, step.rules, analytic.Efficiency(overlap=0))
  forward, backward, *_ = Work(step, "tpu").layers["layers", 0, True]
  d, f = 8192, 28672
  weights = d * (64 + 8 + 8) * 128 + 64 * 128 * d + 3 * d * f
  latency = 7 * 3 * 2 * network.HOP_SECONDS  # seven matrices, three rings of four
  expected = 2 * weights * 63 / 64 / (3 * 2 * 90e9) + latency
  assert clock.part(forward)["ici fsdp"] == pytest.approx(expected)
  # backward gathers once more, and scatters float32 gradients
  assert clock.part(backward)["ici fsdp"] == pytest.approx(3 * expected - latency)
  hidden = analytic.Clock(V5P, (4, 4, 4), shape, step.rules, analytic.DEFAULT)
  assert hidden.part(forward)["ici fsdp"] == pytest.approx((1 - analytic.DEFAULT.most) * expected)
  assert hidden.part(forward, tight=True)["ici fsdp"] == pytest.approx((1 - analytic.DEFAULT.tight) * expected)


@pytest.mark.parametrize("chip, chips, ici, axis, dims, share", [
  ("TPU v5p", (4, 4, 4), (1, 1, 64, 1, 1, 1), 2, ((4, True),) * 3, 1),
  ("TPU v5p", (4, 4, 4), (1, 1, 16, 1, 1, 4), 5, ((4, True),), 1),
  ("TPU v5p", (2, 2, 2), (1, 1, 8, 1, 1, 1), 2, ((2, False),) * 3, 1),
  ("TPU v6e", (16, 16, 1), (1, 1, 256, 1, 1, 1), 2, ((16, True),) * 2, 1),
  ("TPU v6e", (4, 4, 1), (1, 1, 4, 1, 1, 4), 5, ((4, False),), 1),
  ("TPU7x", (4, 4, 4), (1, 1, 64, 1, 1, 2), 5, (), 1),  # the two cores of a chip
  ("TPU7x", (4, 4, 4), (1, 1, 64, 1, 1, 2), 2, ((4, True),) * 3, 2),  # whose links both share
])  # fmt: skip
def test_where_an_axis_lies(chip, chips, ici, axis, dims, share):
  chip = next(c for c in hardware.CHIPS if c.name == chip)
  assert analytic._box(chip, chips, ici, (axis,)) == (dims, share)


def test_dies_of_a_chip_exchange_over_their_own_link():
  """The two devices of a TPU7x chip: six times as fast as a link of 89 GB/s, of which each sends and gets a half."""
  config = config_lib.load("configs/llama3_8b.py", [("mesh.topology", "tpu7x:4x4x4"), ("mesh.tensor", "2")])
  chip, chips = analytic.parse("tpu7x:4x4x4")
  step, shape = analytic.program(config, chip, chips)
  clock = analytic.Clock(chip, chips, shape, step.rules, analytic.DEFAULT)
  sent = traffic.Transfer("all-gather", ("tensor",), "bfloat16", 2**30, 1, 0)
  assert clock.transfer(sent) == pytest.approx(2**29 / (6 * 89e9), rel=1e-3)


def test_attention_takes_what_the_calibration_says():
  """FLOPs of the blocks that are computed by the rate of kernels that compiled steps are charged with."""
  config = config_lib.load("configs/llama3_8b.py", [("mesh.topology", "v5p:4x4x4")])
  step, shape = analytic.program(config, V5P, (4, 4, 4))
  clock = analytic.Clock(V5P, (4, 4, 4), shape, step.rules, analytic.DEFAULT)
  kernel = Kernel(heads=32, pairs=1e8, qk=128, v=128, score=1, mix=1)
  expected = 4 * 32 * 1e8 * 128 / (459e12 * calibration.rates(V5P).attention)
  assert clock.kernel(kernel) == pytest.approx(expected, rel=0.001)
  narrow = clock.kernel(kernel._replace(qk=64, v=64))  # a half of a matrix unit is idle
  assert narrow == pytest.approx(expected, rel=0.001)
  assert analytic.Clock(V5P, (4, 4, 4), shape, step.rules, analytic.Efficiency(attention=0.5)).attention == 0.5
  h100 = next(c for c in hardware.CHIPS if c.name == "H100")  # which has no rates
  assert analytic.Clock(h100, (64,), shape, step.rules, analytic.DEFAULT).attention == 0.55


@pytest.mark.parametrize("dot, moved", [
  (Dot(256, 4096, 2048, 16), 2 * (256 * 4096 + 16 * 4096 * 2048) + 2 * 256 * 2048),  # rows, a matrix for each group
  (Dot(4096, 256, 2048, 16, out=4, outer=True), 2 * (4096 * 256 + 256 * 2048) + 4 * 16 * 4096 * 2048),  # their gradients
])  # fmt: skip
def test_few_rows_of_many_groups_take_what_their_matrices_do(dot, moved):
  config = config_lib.load("configs/llama3_8b.py", [("mesh.topology", "v5p:4x4x4")])
  step, shape = analytic.program(config, V5P, (4, 4, 4))
  clock = analytic.Clock(V5P, (4, 4, 4), shape, step.rules, analytic.Efficiency(hidden=1, launch=0, stream=0.5))
  assert clock.dot(dot) == pytest.approx(moved / (2765e9 * 0.5))


def test_what_hides_in_backward():
  config = config_lib.load("configs/llama3_8b.py", [("mesh.topology", "v5p:4x4x4"), ("mesh.tensor", "4")])
  step, shape = analytic.program(config, V5P, (4, 4, 4))
  part = Work(step, "tpu").layers["layers", 0, True][0]

  def exposed(name: str, **efficiency: float) -> float:
    clock = analytic.Clock(V5P, (4, 4, 4), shape, step.rules, analytic.Efficiency(**efficiency))
    return clock.part(dataclasses.replace(part, name=name))["ici tensor"]

  sent = exposed("layers forward")
  assert exposed("layers backward", beside=0) == sent > 0
  assert exposed("layers backward") == pytest.approx(0.35 * sent)


def test_without_spare_memory_gathers_hide_less():
  chip, chips = analytic.parse("v5p:4x4x4")
  config = config_lib.load("configs/llama3_8b.py", [("mesh.topology", "")])
  roomy = analytic.estimate(config, chip, chips)
  small = dataclasses.replace(chip, hbm=roomy.bytes / 0.96 + analytic.DEFAULT.reserved)
  tight = analytic.estimate(config, small, chips)
  assert roomy.fits and tight.fits and tight.memory == roomy.memory
  assert tight.seconds["ici fsdp"] > 5 * roomy.seconds["ici fsdp"] and tight.step_seconds > roomy.step_seconds
  assert {n: s for n, s in tight.seconds.items() if n != "ici fsdp"} == pytest.approx(
    {n: s for n, s in roomy.seconds.items() if n != "ici fsdp"}
  )


def seconds(topology="v5p:4x4x4", chip=None, name="llama3_8b", **options: Any):
  made, chips = analytic.parse(topology)
  overrides = [("mesh.topology", ""), *((k.replace("__", "."), str(v)) for k, v in options.items())]
  return analytic.estimate(config_lib.load(f"configs/{name}.py", overrides), chip or made, chips)


def test_more_work_takes_longer():
  base = seconds()
  assert seconds(data__batch_size=1024).step_seconds > 1.9 * base.step_seconds
  assert seconds("v5p:4x4x8").step_seconds < 0.6 * base.step_seconds
  policies = [seconds(remat__policy=p) for p in ("full", "attention", "projections")]
  assert [p.flops for p in policies] == sorted((p.flops for p in policies), reverse=True)
  assert [p.bytes for p in policies] == sorted(p.bytes for p in policies)
  assert policies[0].seconds["attention"] > 1.25 * policies[1].seconds["attention"]


def test_slow_links_show_as_exposed_collectives():
  layout: dict[str, Any] = {"mesh__tensor": 4}
  slow = dataclasses.replace(V5P, link_bytes=V5P.link_bytes / 10)
  fast, slowed = seconds(**layout), seconds(chip=slow, **layout)
  assert slowed.seconds["ici tensor"] > 9 * fast.seconds["ici tensor"] > 0
  assert slowed.step_seconds > fast.step_seconds
  assert seconds(chip=dataclasses.replace(V5P, link_bytes=V5P.link_bytes / 1000)).bound == "ici fsdp"


def test_a_pipeline_waits_by_its_formula():
  e = seconds(mesh__pipeline=4, sharding__microbatches=8, mesh__fsdp=16)
  stages = e.step_seconds  # all but embedding, head and update are stages
  assert 0.7 * 3 / 11 < e.seconds["bubble"] / stages < 3 / 11
  assert (
    seconds(mesh__pipeline=4, sharding__microbatches=8, sharding__repeats=2).seconds["bubble"] < e.seconds["bubble"]
  )


def test_slices_cross_the_slow_network_once_a_step():
  chip, chips = analytic.parse("v5p:4x4x4")
  config = config_lib.load("configs/llama3_8b.py", [("mesh.topology", ""), ("data.batch_size", "1024")])
  e = analytic.estimate(config, chip, chips, slices=2)
  across = dataclasses.replace(config, mesh=config_lib.Mesh(dcn=config_lib.Dcn(data=1, fsdp=2)))
  assert analytic.estimate(across, chip, chips, 2).seconds["dcn fsdp"] > 1.5 * e.seconds["dcn data"]
  shard = 4 * 8.03e9 / 64  # float32 gradients of a chip
  assert e.seconds["dcn data"] == pytest.approx(2 * shard / 2 / 6.25e9, rel=0.03)


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "gb200", "mi300x", "a100"])
def test_gpus(name):
  e = seconds(f"{name}:64", data__batch_size=64)
  assert 0.02 < e.mfu < 0.7
  inside, across = (seconds(f"{name}:{n}", mesh__tensor=8, data__batch_size=n).seconds["ici tensor"] for n in (8, 16))
  assert 0 < inside == pytest.approx(across, rel=0.05)  # tensor stays inside of a domain
  wide = seconds(f"{name}:72", name="llama3_8b", mesh__fsdp=72, data__batch_size=72, model__embed=4608)
  assert wide.step_seconds > 0


def test_offload_is_exposed_where_the_bus_is_slow():
  table = {"remat.policy": "custom", "remat.table": "{'attention': 'offload'}"}
  options = {k.replace(".", "__"): v for k, v in table.items()}
  slow = dataclasses.replace(V5P, host_bytes=1e9)
  assert seconds(chip=slow, **options).seconds["offload"] > 1
  kept = seconds(remat__policy="attention")
  assert seconds(**options).memory["kept"] < kept.memory["kept"]


def test_names_of_topologies():
  assert analytic.parse("v6e:4x4")[1] == (4, 4) and analytic.parse("h100:64")[0].name == "H100"
  for name in ("v9:2x2", "v5p", "v5p:2xx", "h100:0"):
    with pytest.raises(config_lib.ConfigError, match="topology"):
      analytic.parse(name)


if __name__ == "__main__":
  print(json.dumps({name: traced(*layout) for name, layout in LAYOUTS.items()}))
