"""HBM by class: a schedule whose live ranges are known, compiled steps, and what the compiler says of one too large.

`python -m tests.perf.test_memory` compiles small steps for chips that need not be here and prints what was read; it is a
process of its own, because libtpu reads its environment once.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from maxscale.perf.compiled import memory, program

ROOT = pathlib.Path(__file__).parents[2]
UNIT = 256 * 128 * 4  # bytes of f32[256,128]
ARRAY = "f32[256,128]{1,0:T(8,128)}"
VMEM, HOST = "f32[256,128]{1,0:T(8,128)S(1)}", "f32[256,128]{1,0:T(8,128)S(5)}"
STACK, CAST, INDEX = "f32[4,256,128]{2,1,0:T(8,128)}", "bf16[256,128]{1,0:T(8,128)(2,1)}", "s32[]{:T(128)S(6)}"
STATE = f"({INDEX}, {ARRAY}, {STACK}, {CAST})"
# Four trips keep what they make in a stack; a parameter is cast before them; behind them it is updated in place.
SCHEDULE = f"""HloModule jit_step, is_scheduled=true, input_output_alias={{ {{0}}: (0, {{}}, may-alias), {{1}}: (2, {{}}, may-alias) }}, num_partitions=4

%condition (a: {STATE}) -> pred[] {{
  %a = {STATE} parameter(0)
  %i = {INDEX} get-tuple-element(%a), index=0
  %limit = s32[]{{:T(128)}} constant(4)
  ROOT %less = pred[]{{:T(512)S(6)}} compare(%i, %limit), direction=LT
}}

%body (s: {STATE}) -> {STATE} {{
  %s = {STATE} parameter(0)
  %i.1 = {INDEX} get-tuple-element(%s), index=0
  %x.1 = {ARRAY} get-tuple-element(%s), index=1
  %stack.1 = {STACK} get-tuple-element(%s), index=2
  %cast.1 = {CAST} get-tuple-element(%s), index=3
  %one = s32[]{{:T(128)}} constant(1)
  %fast = {VMEM} copy(%x.1)
  %y = {ARRAY} fusion(%x.1, %cast.1, %fast), kind=kLoop, calls=%f, backend_config={{ALIASING}}
  %stack.2 = {STACK} dynamic-update-slice(%stack.1, %y, %i.1)
  %i.2 = {INDEX} add(%i.1, %one)
  ROOT %t = {STATE} tuple(%i.2, %y, %stack.2, %cast.1)
}}

ENTRY %main (w: f32[256,128], x: f32[256,128], h: f32[256,128]) -> (f32[256,128], f32[256,128], f32[]) {{
  %w = {ARRAY} parameter(0)
  %h = {HOST} parameter(2)
  %x = {ARRAY} parameter(1)
  %zero.1 = s32[]{{:T(128)}} constant(0)
  %zero = {INDEX} copy(%zero.1)
  %early = {STACK} custom-call(%x), custom_call_target="early"
  %mean = {ARRAY} fusion(%early), kind=kLoop, calls=%g
  %cast = {CAST} convert(%w)
  %stack = {STACK} custom-call(), custom_call_target="AllocateBuffer"
  %state = {STATE} tuple(%zero, %mean, %stack, %cast)
  %loop = {STATE} while(%state), condition=%condition, body=%body
  %kept = {STACK} get-tuple-element(%loop), index=2
  %gradient = {ARRAY} fusion(%kept), kind=kLoop, calls=%h
  %sent = {HOST} copy(%gradient)
  %new = {ARRAY} add(%w, %gradient), backend_config={{"aliasing_operands":{{"lists":[{{"indices":["0","2"]}}]}}}}
  %loss = f32[]{{:T(128)}} constant(0)
  ROOT %result = ({ARRAY}, {HOST}, f32[]{{:T(128)}}) tuple(%new, %sent, %loss)
}}
"""
IN_PLACE = '{"aliasing_operands":{"lists":[{"indices":["0","3"]}]}}'
KNOWN = memory.Known(("parameters", "batch", "optimizer"), (("residual", "f32", (256, 128)),), frozenset({(128, 256)}))
SMALL = {"model.embed": 512, "model.layers": 4, "model.heads": 8, "model.kv_heads": 4, "model.head_dim": 128,
         "model.mlp": 1024, "model.vocab_size": 1536, "data.batch_size": 16, "data.length": 1024,
         "mesh.fsdp": -1}  # fmt: skip
STEPS = {
  "full": {},
  "projections": {"remat__policy": "projections"},
  "moe": {"model__experts": 4, "remat__policy": "custom", "remat__table": {"attention": "keep", "query": "offload"},
          "optimizer__offload": True, "sharding__microbatches": 2},
}  # fmt: skip
SHORT = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (44.91G) exceeds "
  "available HBM (31.25G)."
)
LONG = r"""RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 101.25G of 94.74G hbm. Exceeded hbm capacity by 6.51G.

Total hbm usage >= 101.51G:
    reserved        260.00M
    program          16.13G
    arguments        85.12G

  Largest program allocations in hbm:

  1. Size: 384.00M
     Operator: op_name="params[\'layers\'][\'gate\']"
     Shape: bf16[128,4096,352]{2,1,0:T(16,128)(2,1)}
     Unpadded size: 352.00M
     XLA label: copy.1326 = copy(copy.1657)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0K
     Shape: f32[512,256]{1,0:T(8,128)}
     XLA label: fusion.3 = fusion(p)
     Allocation type: HLO temp
     ==========================
"""


def compiled():
  """Name of a step -> what was read of it. In a process of its own."""
  import jax

  from maxscale.perf.compiled import aot
  from tests.models import reference as ref

  jax.config.update("jax_exec_time_optimization_effort", -1.0)  # faster to compile; any schedule will do
  out = {}
  for name, options in STEPS.items():
    c = aot.compile_step(ref.config(SMALL, **options), "v5p:2x2x1")
    m, analysis = memory.classes(c), c.executable.memory_analysis()
    fields = ("peak_memory", "argument_size", "host_argument_size", "host_temp_size", "generated_code_size")
    out[name] = {"parts": m.parts, "host": m.host, "peak": m.peak, "unattributed": m.unattributed, "text": m.text(),
                 **{field: getattr(analysis, f"{field}_in_bytes") for field in fields}}  # fmt: skip
  return out


@pytest.fixture(scope="module")
def tpu():
  pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  out = subprocess.run([sys.executable, "-m", "tests.perf.test_memory"], capture_output=True, text=True, env=env,
                       cwd=ROOT, timeout=600)  # fmt: skip
  assert out.returncode == 0, out.stderr[-3000:]
  return json.loads(out.stdout.splitlines()[-1])


def schedule(in_place=True):
  """Where the state is not written over in place, it is copied first: a loop leaves its state where it found it."""
  if in_place:
    return program.read(SCHEDULE.replace("{ALIASING}", IN_PLACE))
  text = SCHEDULE.replace("{ALIASING}", "{}").replace("fusion(%x.1,", "fusion(%x.2,")
  return program.read(text.replace("  %fast", f"  %x.2 = {ARRAY} copy(%x.1)\n  %fast"))


@pytest.mark.parametrize(
  ("type", "size"),
  [
    ("f32[256,128]{1,0:T(8,128)}", 256 * 128 * 4),
    ("f32[5,100]{1,0:T(8,128)}", 8 * 128 * 4),
    ("f32[5,100]{0,1:T(8,128)}", 104 * 128 * 4),  # the minor dimension is the one of 5
    ("bf16[3,5,100]{2,1,0:T(8,128)(2,1)}", 3 * 8 * 128 * 2),
    ("bf16[300]{0:T(256)(128)(2,1)}", 512 * 2),
    ("pred[2,4096]{1,0:T(4,128)(4,1)}", 4 * 4096),
    ("s32[]{:T(128)}", 512),
    ("f32[7]", 28),
    ("token[]", 0),
  ],
)
def test_bytes_of_an_array_as_it_is_laid_out(type, size):
  assert memory.arrays(type).bytes == size


def test_types_are_trees_with_memory_spaces():
  inner, host, empty = memory.arrays(f"(({VMEM}, /*index=1*/{ARRAY}), {HOST}, ())")
  assert [a.space for a in inner] == [1, 0] and host.space == 5 and empty == ()
  assert host.dims == (256, 128) and host.dtype == "f32"


@pytest.mark.parametrize(("in_place", "state"), [(True, 1), (False, 2)])
def test_peak_of_a_schedule_with_known_live_ranges(in_place, state):
  """In the loop: the stack, the state (and what takes its place, unless that is written over it), the cast."""
  peak, alive = memory.Schedule(schedule(in_place)).peak()
  assert peak == (4 + state) * UNIT + UNIT // 2
  assert sum(v.array.bytes for v in alive) == peak


def test_classes_of_a_schedule():
  parts, host = memory.attribute(schedule(), KNOWN)
  assert parts == {"parameters": UNIT, "batch": UNIT, "activations/residual": 4 * UNIT, "weights_in_use": UNIT // 2,
                   "gradients": UNIT}  # fmt: skip
  assert host == {"optimizer": UNIT}  # the copy there takes the memory of the donated argument


def test_a_stack_of_layers_without_a_name_is_an_activation():
  parts, _ = memory.attribute(schedule(), memory.Known(KNOWN.arguments, layers=frozenset({4})))
  assert parts["activations/other"] == 4 * UNIT and "gradients" not in parts and parts["temporaries"] == UNIT


def test_a_result_that_is_not_donated_has_memory_of_its_own():
  text = SCHEDULE.replace("{1}: (2, {}, may-alias)", "").replace("{ALIASING}", IN_PLACE)
  assert memory.attribute(program.read(text), KNOWN)[1] == {"optimizer": UNIT, "gradients": UNIT}


def test_the_table_says_whether_it_fits():
  m = memory.Memory(3 * 2.0**30, 2 * 2**30, {"parameters": 2**30, "logits": 2**29}, {"optimizer": 2**28})
  assert m.unattributed == 2**29 and m.fits and m.headroom == 2**30
  rows = [line.split() for line in m.text().splitlines()]
  assert ["parameters", "1.000", "50.0%"] in rows and ["unattributed", "0.500", "25.0%"] in rows
  assert "fits: 1.00 GiB are free" in m.text()
  assert "does not fit by 1.00 GiB" in memory.Memory(2.0**30, 2 * 2**30, {}).text()


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_classes_add_up_to_the_compilers_peak(tpu, name):
  step = tpu[name]
  assert step["peak"] == step["peak_memory"] - step["host_argument_size"] + step["generated_code_size"]
  assert abs(step["unattributed"]) < 0.005 * step["peak"]
  assert step["parts"].get("temporaries", 0) < 0.5 * step["peak"]
  arguments = sum(step["parts"][key] for key in ("parameters", "optimizer", "batch"))
  assert arguments == pytest.approx(step["argument_size"], abs=2048)  # offloaded, but for the counters


@pytest.mark.slow
def test_remat_moves_the_bytes_of_the_kept_activations(tpu):
  layers, rows, tokens, heads, kv, dim, mlp = 4, 4, 1024, 8, 4, 128, 1024
  names = {
    "query": heads * dim * 2,
    "key": kv * dim * 2,
    "value": kv * dim * 2,
    "gate": mlp * 2,
    "up": mlp * 2,
    "attention": heads * (dim * 2 + 4),
  }  # with the float32 log-sum-exp of a head; fmt: skip
  expected = {f"activations/{name}": layers * rows * tokens * size for name, size in names.items()}
  kept = {policy: {key: size for key, size in tpu[policy]["parts"].items() if key.startswith("activations/")}
          for policy in ("full", "projections")}  # fmt: skip
  residual = {"activations/residual": layers * rows * tokens * 512 * 2}
  assert kept == {"full": residual, "projections": residual | expected}


@pytest.mark.slow
def test_what_is_on_the_host_is_apart(tpu):
  step, rows = tpu["moe"], 16 // 4 // 2
  assert step["host"].pop("optimizer") == step["host_argument_size"] > 0
  assert step["host"] == {"activations/query": 4 * rows * 1024 * 8 * 128 * 2} and "on the host" in step["text"]
  assert step["host_temp_size"] == step["host"]["activations/query"]
  assert step["parts"]["activations/attention"] > 0 and "activations/query" not in step["parts"]


def test_out_of_memory_says_by_how_much():
  oom = memory.out_of_memory(RuntimeError(SHORT))
  assert oom and not oom.largest
  assert oom.excess == pytest.approx((44.91 - 31.25) * 2**30) and oom.text().startswith("does not fit by 13.66 GiB")


def test_out_of_memory_lists_the_largest_buffers():
  oom = memory.out_of_memory(RuntimeError(LONG))
  assert oom and oom.limit == round(94.74 * 2**30)
  assert oom.largest == (
    (384 * 2**20, r"params[\'layers\'][\'gate\']", "bf16[128,4096,352]{2,1,0:T(16,128)(2,1)}"),
    (512 * 2**10, "", "f32[512,256]{1,0:T(8,128)}"),
  )
  assert "0.38 GiB  bf16[128,4096,352]" in oom.text()


@pytest.mark.parametrize(
  "text",
  ["INVALID_ARGUMENT: no such option", LONG.replace("hbm", "vmem"), "RESOURCE_EXHAUSTED: too many open files"],
)
def test_other_errors_are_not_out_of_memory(text):
  assert memory.out_of_memory(RuntimeError(text)) is None


if __name__ == "__main__":
  print(json.dumps(compiled()))
