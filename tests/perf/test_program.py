"""The reader of compiled programs: trips of loops, and collectives whose bytes, times and devices have a closed form.

`python -m tests.perf.test_program` compiles small programs for chips that need not be here and prints what was read; it
is a process of its own, because libtpu reads its environment once.
"""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from maxscale.perf.compiled import collectives, program, trace

DATA = pathlib.Path(__file__).parent / "data"
LAYERS, ROWS, WIDTH = 5, 256, 1024  # rows of a device
CHIPS = {"v5p": ("v5p:2x2x2", (2, 4)), "v6e": ("v6e:4x4", (2, 8)), "tpu7x": ("tpu7x:2x2x1", (2, 4))}
OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
SPARSECORE = {OFFLOAD + kind: "true" for kind in
              ("all_gather", "2d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")}  # fmt: skip
SPARSECORE["xla_tpu_prefer_async_allgather_to_allreduce"] = "true"
GRADIENT = 2**22  # bytes on a device of what the two-slice programs reduce
CROSSING = ("psum", "psum_scatter", "all_gather", "all_to_all", "ppermute")


def compiled():
  """Name of a program -> what each of its collectives is. In a process of its own."""
  import jax
  import jax.numpy as jnp
  from jax import lax
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  rows = P(("data", "fsdp"))

  def read(topology, shape, body, arrays, specs, out, **options):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology[0], **topology[1]).devices
    mesh = Mesh(np.asarray(devices).reshape(shape), ("data", "fsdp"))
    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
    arrays = [jax.ShapeDtypeStruct(*a, sharding=NamedSharding(mesh, s)) for a, s in zip(arrays(mesh), specs)]
    found = collectives.collectives(program.read(f.lower(*arrays).compile(**options).as_text() or ""))
    return [{"kind": c.kind, "bytes": c.bytes, "dtypes": c.dtypes, "axes": collectives.mesh_axes_of(c, mesh),
             "size": c.group_size, "count": len(c.groups) or len(c.pairs), "depth": c.depth, "times": c.times,
             "how": c.asynchronous + c.sparsecore, "dcn": c.dcn, "op": c.op_name.split("/")[-1]}
            for c in found], collectives.summary(found, mesh)  # fmt: skip

  def layers(w, x):
    n = lax.axis_size("fsdp")

    def layer(h, w):
      h = jnp.tanh(h @ lax.all_gather(w.astype(jnp.bfloat16), "fsdp", tiled=True))
      h = lax.all_to_all(h.reshape(n, -1, WIDTH), "fsdp", 0, 0).reshape(h.shape)
      h = lax.ppermute(h, "data", [(0, 1), (1, 0)])
      return h, lax.psum_scatter(x.T @ h, "fsdp", tiled=True).astype(jnp.float32)

    h, gradients = lax.scan(layer, x, w)
    return h, lax.psum(gradients, "data")

  def crossing(x):
    return {
      "psum": lambda: lax.psum(x, "data"),
      "psum_scatter": lambda: lax.psum_scatter(x, "data", tiled=True),
      "all_gather": lambda: lax.all_gather(x, "data", tiled=True),
      "all_to_all": lambda: lax.all_to_all(x, "data", 0, 0, tiled=True),
      "ppermute": lambda: lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]),
    }

  def weights(mesh):
    return ((LAYERS, WIDTH, WIDTH), "float32"), ((ROWS * mesh.size, WIDTH), "bfloat16")

  def gradient(mesh):
    return [((mesh.size * GRADIENT // 4 // WIDTH, WIDTH), "float32")]

  out, stacked = {}, P(None, "fsdp")
  for chip, (topology, shape) in CHIPS.items():
    for name, options in (("default", {}), ("sparsecore", SPARSECORE)):
      out[f"{chip} {name}"] = read((topology, {}), shape, layers, weights, (stacked, rows), (rows, stacked),
                                   compiler_options=options)  # fmt: skip
  for name in CROSSING:
    out[name] = read(("v5p:2x2x1", {"num_slices": 2}), (4, 2), lambda x, name=name: crossing(x)[name](), gradient,
                     (rows,), rows)  # fmt: skip
  return out


@pytest.fixture(scope="module")
def tpu():
  pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  out = subprocess.run([sys.executable, "-m", "tests.perf.test_program"], capture_output=True, text=True, env=env,
                       cwd=DATA.parents[2], timeout=600)  # fmt: skip
  assert out.returncode == 0, out.stderr[-3000:]
  return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", ["default", "sparsecore"])
@pytest.mark.parametrize("chip", CHIPS)
def test_collectives_of_a_scan_are_the_closed_form(tpu, chip, options):
  data, fsdp = CHIPS[chip][1]
  found, text = tpu[f"{chip} {options}"]
  # By default the compiler makes of the reduce-scatter an all-reduce of the same bytes and a slice, on v6e.
  scatter = "reduce-scatter" if options == "sparsecore" or found[3]["kind"] != "all-reduce" else "all-reduce"
  activation, matrix = ROWS * WIDTH * 2, WIDTH * WIDTH * 2
  expected = [
    ("all-gather", matrix, ["bf16"], ["fsdp"], fsdp, data, 1, LAYERS),
    ("all-to-all", activation, ["bf16"], ["fsdp"], fsdp, data, 1, LAYERS),
    ("collective-permute", activation, ["bf16"], ["data"], 2, data * fsdp, 1, LAYERS),
    (scatter, matrix, ["bf16"], ["fsdp"], fsdp, data, 1, LAYERS),
    ("all-reduce", LAYERS * matrix * 2 // fsdp, ["f32"], ["data"], data, fsdp, 0, 1),
  ]
  fields = ("kind", "bytes", "dtypes", "axes", "size", "count", "depth", "times")
  assert [tuple(c[f] for f in fields) for c in found] == expected
  names = ("all_gather", "all_to_all", "ppermute", "reduce_scatter", "psum")
  assert all(c["op"] in (name, "while") for c, name in zip(found, names))  # rewritten, it is named by its loop
  offloaded = options == "sparsecore" or chip == "tpu7x"
  assert [c["how"] for c in found] == [2, 0, 1, 2, 2] if offloaded else [0, 0, 1, 0, 0]
  assert not any(c["dcn"] for c in found)
  assert [line.split()[1:4] for line in text.splitlines() if line.startswith("all-gather")] == [["fsdp", "1", "1"]]


def test_a_sum_over_two_slices_is_reduced_in_them_first(tpu):
  """Along data = 2 slices x 2 devices; over DCN each device has a half of its bytes."""
  assert [(c["kind"], c["dcn"], c["bytes"], c["depth"]) for c in tpu["psum"][0]] == [
    ("reduce-scatter", False, GRADIENT, 0),
    ("all-reduce", True, GRADIENT // 2, 0),
    ("all-gather", False, GRADIENT, 0),
  ]
  # A scattered one is a whole all-reduce in the slice, twice what it needs.
  assert [(c["kind"], c["dcn"], c["bytes"]) for c in tpu["psum_scatter"][0]] == [
    ("all-reduce", False, GRADIENT),
    ("reduce-scatter", True, GRADIENT // 2),
  ]


def test_other_operations_over_two_slices(tpu):
  found = {name: [(c["kind"], c["dcn"], c["bytes"]) for c in tpu[name][0]] for name in CROSSING[2:]}
  assert found == {
    "all_gather": [("all-gather", True, 2 * GRADIENT), ("all-gather", False, 4 * GRADIENT)],
    "all_to_all": [("all-to-all", True, GRADIENT)],
    "ppermute": [("collective-permute", True, GRADIENT), ("collective-permute", False, GRADIENT)],
  }
  for name in CROSSING:
    assert all(c["axes"] == ["data"] for c in tpu[name][0]), name
    assert "(DCN)" in tpu[name][1]


def found_in(text):
  return collectives.collectives(program.read(text))


def test_asynchronous_fusions_and_scatters_are_counted_once():
  """A program for 16 v5e chips: a gather that three fusions repeat, and an all-reduce that is a reduce-scatter."""
  found = found_in((DATA / "v5e_async.txt").read_text())
  matrix = 4096 * 4096 * 2
  assert [(c.kind, c.bytes, c.times, c.asynchronous) for c in found] == [
    ("all-gather", matrix, 4, False),
    ("all-gather", matrix, 4, True),
    ("reduce-scatter", matrix, 4, False),
    ("all-reduce", matrix // 8, 4, False),
  ]
  rows = tuple(tuple(range(8 * n, 8 * n + 8)) for n in range(2))
  assert [c.groups for c in found] == [rows, rows, rows, tuple(zip(*rows))]
  assert found[2].op_name == "jit(loss)/transpose(jvp())/while/body/closed_call/dot_general"


def test_a_scatter_has_the_bytes_of_its_padding():
  """A program for 4 v5p chips, which pads 4096 rows to 4480 and shifts the excess along."""
  found = found_in((DATA / "v5p_padded_scatter.txt").read_text())
  assert [(c.kind, c.bytes // (2 * 4096), c.times) for c in found] == [
    ("all-gather", 4096, 3), ("all-gather", 4096, 3), ("reduce-scatter", 4480, 3), ("collective-permute", 288, 3),
  ]  # fmt: skip
  assert found[3].pairs == ((0, 1), (1, 2), (2, 3)) and found[3].groups == ()


def loop(limit="4", step="2", start="0", direction="LT", add="add", dtype="u32"):
  """Text of a loop in a loop of 3 trips, whose limit the outer loop passes on."""
  return f"""HloModule m, is_scheduled=true, num_partitions=8
%inner_body (p: ({dtype}[], f32[8], {dtype}[])) -> ({dtype}[], f32[8], {dtype}[]) {{
  %p = ({dtype}[]{{:T(128)}}, f32[8]{{0:T(256)}}, /*index=2*/{dtype}[]{{:T(128)}}) parameter(0)
  %by = {dtype}[]{{:T(128)}} constant({step})
  %i = {dtype}[]{{:T(128)}} get-tuple-element(%p), index=0
  %n = {dtype}[]{{:T(128)}} get-tuple-element(%p), index=2
  %x = f32[8]{{0:T(256)}} get-tuple-element(%p), index=1
  %y = f32[8]{{0:T(256)}} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  %next = {dtype}[]{{:T(128)S(6)}} {add}(%i, %by)
  ROOT %t = ({dtype}[]{{:T(128)}}, f32[8]{{0:T(256)}}, {dtype}[]{{:T(128)}}) tuple(%next, %y, /*index=2*/%n)
}}
%inner_cond (p: ({dtype}[], f32[8], {dtype}[])) -> pred[] {{
  %p = ({dtype}[]{{:T(128)}}, f32[8]{{0:T(256)}}, {dtype}[]{{:T(128)}}) parameter(0)
  %i = {dtype}[]{{:T(128)}} get-tuple-element(%p), index=0
  %n = {dtype}[]{{:T(128)}} get-tuple-element(%p), index=2
  ROOT %go = pred[]{{:T(512)}} compare(%i, %n), direction={direction}
}}
%outer_body (q: (s32[], f32[8], {dtype}[])) -> (s32[], f32[8], {dtype}[]) {{
  %q = (s32[], f32[8]{{0:T(256)}}, {dtype}[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %one = s32[] constant(1)
  %z = f32[8]{{0:T(256)}} get-tuple-element(%q), index=1
  %limit = {dtype}[] get-tuple-element(%q), index=2
  %start = {dtype}[] constant({start})
  %copied = {dtype}[] copy(%start)
  %state = ({dtype}[], f32[8]{{0:T(256)}}, {dtype}[]) tuple(%copied, %z, %limit)
  %w = ({dtype}[], f32[8]{{0:T(256)}}, {dtype}[]) while(%state), condition=%inner_cond, body=%inner_body
  %out = f32[8]{{0:T(256)}} get-tuple-element(%w), index=1
  %j2 = s32[] add(%j, %one)
  ROOT %u = (s32[], f32[8]{{0:T(256)}}, {dtype}[]) tuple(%j2, %out, %limit)
}}
%outer_cond (q: (s32[], f32[8], {dtype}[])) -> pred[] {{
  %q = (s32[], f32[8]{{0:T(256)}}, {dtype}[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %go = pred[] compare(%j, %three), direction=LT
}}
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0:T(256)}} parameter(0)
  %zero = s32[] constant(0)
  %limit = {dtype}[] {f"constant({limit})" if limit else "custom-call(%a)"}
  %state = (s32[], f32[8]{{0:T(256)}}, {dtype}[]) tuple(%zero, %a, %limit)
  %w = (s32[], f32[8]{{0:T(256)}}, {dtype}[]) while(%state), condition=%outer_cond, body=%outer_body
  ROOT %r = f32[8]{{0:T(256)}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize("trips, options", [
  (2, {}),  # as in a collective matmul, which is unrolled by two
  (3, {"limit": "5"}),
  (4, {"step": "1"}),
  (6, {"start": "2", "limit": "20", "step": "3", "dtype": "s32"}),
  (2, {"start": "1", "limit": "3", "step": "1"}),
  (3, {"direction": "LE"}),
  (8, {"start": "7", "limit": "0", "step": "-1", "direction": "GE", "dtype": "s32"}),
  (7, {"start": "7", "limit": "0", "step": "1", "direction": "GT", "add": "subtract", "dtype": "s32"}),
  (0, {"start": "5"}),
])  # fmt: skip
def test_trips_follow_from_start_step_and_limit(trips, options):
  (c,) = found_in(loop(**options))
  assert (c.times, c.depth) == (3 * trips, 2)
  assert (c.kind, c.bytes, c.groups) == ("all-reduce", 32, ((0, 1, 2, 3), (4, 5, 6, 7)))


def test_trips_that_depend_on_data_are_an_error():
  with pytest.raises(ValueError, match="trips are unknown"):
    found_in(loop(limit=""))


def one(instruction, *more, computations=""):
  """The only collective of a program of 8 devices that executes this."""
  body = "\n".join(f"  {line}" for line in (instruction, *more))
  head = "HloModule m, num_partitions=8\n"
  (c,) = found_in(f"{head}{computations}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n")
  return c


@pytest.mark.parametrize("text, groups", [
  ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
  ("{}", [list(range(8))]),
  ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
  ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ("mesh['a'=2,'b'=1,'c'=4] {'a','b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
  ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ("mesh['a'=4,'b'=2], device_ids=(0,2,1,3,4,6,5,7) {'b'}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
  ("mesh[a=8] {a:(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
  ("mesh['a'=2,'b'=4] {'a','b':(1)2}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
])  # fmt: skip
def test_every_form_of_groups(text, groups):
  c = one(f"ROOT %r = f32[8] all-reduce(%a), channel_id=1, replica_groups={text}, use_global_device_ids=true")
  assert [list(g) for g in c.groups] == groups


@pytest.mark.parametrize("lines, kind, size, dtypes, asynchronous", [
  (["%r = (f32[1024,256]{1,0:T(8,128)S(1)}, /*index=1*/bf16[64]{0:T(128)(2,1)}, pred[3]) all-reduce(%a, %b, %c), "
    "replica_groups={}, to_apply=%sum"], "all-reduce", 2**20 + 128 + 3, ("f32", "bf16", "pred"), False),
  (["%r = f8e4m3fn[16,8]{1,0:T(8,128)(4,1)} reduce-scatter(%a), replica_groups={}, dimensions={0}"],
   "reduce-scatter", 16 * 8 * 8, ("f8e4m3fn",), False),
  (["%r = s4[7]{0} all-gather(%a), replica_groups={}, dimensions={0}"], "all-gather", 3, ("s4",), False),
  (["%r = (f32[2]{0}, f32[2]{0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}"], "all-to-all", 16, ("f32",), False),
  (["%x = bf16[64,2]{1,0} parameter(0)", "%r = bf16[128,2]{1,0} ragged-all-to-all(%x, %y, %z), replica_groups={}"],
   "ragged-all-to-all", 256, ("bf16",), False),
  (["%s = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}",
    "%r = f32[16,4]{1,0} all-gather-done(%s)"], "all-gather", 256, ("f32",), True),
  (["%s = (bf16[2]{0}, bf16[2]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), "
    "source_target_pairs={{0,1},{1,0}}", "%r = bf16[2]{0} collective-permute-done(%s)"],
   "collective-permute", 4, ("bf16",), True),
])  # fmt: skip
def test_bytes(lines, kind, size, dtypes, asynchronous):
  c = one(*lines)
  assert (c.kind, c.bytes, c.dtypes, c.asynchronous) == (kind, size, dtypes, asynchronous)


def test_what_another_thread_runs():
  """Reduce-scatter on the SparseCores (TPU), and wrapped to be asynchronous (GPU)."""
  inner = ("%wrapped (p: f32[8]) -> f32[2] {\n"
           "  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}\n}\n")  # fmt: skip
  c = one('%s = ((f32[8], token[]), f32[2]) call-start(%a, %t), async_execution_thread="sparsecore", to_apply=%wrapped',
          "%r = f32[2]{0} call-done(%s)", computations=inner)  # fmt: skip
  assert (c.kind, c.bytes, c.asynchronous, c.sparsecore) == ("reduce-scatter", 32, True, True)
  c = one("%s = ((f32[8]), f32[2]) async-start(%a), calls=%wrapped", computations=inner)
  assert (c.kind, c.bytes, c.asynchronous, c.sparsecore) == ("reduce-scatter", 32, True, False)


@pytest.mark.parametrize("attributes", ["branch_computations={%yes, %no}",
                                        "true_computation=%yes, false_computation=%no"])  # fmt: skip
def test_branches_are_marked(attributes):
  branches = ("%yes (p: f32[8]) -> f32[8] {\n  ROOT %y = f32[8]{0} all-reduce(%p), replica_groups={}\n}\n"
              "%no (p: f32[8]) -> f32[8] {\n  ROOT %n = f32[8]{0} negate(%p)\n}\n")  # fmt: skip
  c = one(f"%r = f32[8]{{0}} conditional(%i, %a, %a), {attributes}", computations=branches)
  assert c.branch and c.times == 1


def test_a_host_transfer_is_no_collective():
  text = ("ENTRY %main (a: f32[8]) -> f32[8] {\n  %s = (f32[8]{0}, u32[], token[]) send(%a, %t), channel_id=2, "
          'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="callback"}\n}\n')  # fmt: skip
  assert found_in(text) == []


def test_a_mesh_without_the_devices_is_an_error():
  c = one("%r = f32[8] all-reduce(%a), replica_groups={}")
  device = types.SimpleNamespace(platform="tpu", id=0)
  mesh = types.SimpleNamespace(devices=np.array([[device] * 2] * 2), axis_names=("data", "fsdp"))
  with pytest.raises(ValueError, match="mesh \\(2, 2\\)"):
    collectives.mesh_axes_of(c, mesh)


def test_a_program_of_this_machine_is_read():
  import jax
  import jax.numpy as jnp

  def body(x):
    return jax.lax.scan(lambda h, _: (jax.lax.psum(jnp.sin(h), "data"), None), x, None, length=7)[0]

  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  f = jax.shard_map(body, mesh=mesh, in_specs=jax.sharding.PartitionSpec(), out_specs=jax.sharding.PartitionSpec())
  read = program.read(jax.jit(f).lower(jnp.zeros((4, 4))).compile().as_text() or "")
  (loops,) = (s for s in read.steps() if s.instruction.opcode == "while")
  assert read.trips(loops.instruction, loops.computation) == 7
  for c in collectives.collectives(read):  # one device: the compiler may have dropped it
    assert (c.kind, c.times, collectives.mesh_axes_of(c, mesh)) == ("all-reduce", 7, ())


if __name__ == "__main__":
  print(json.dumps(compiled()))


def test_an_instruction_that_the_compiler_cannot_estimate_is_known_as_such():
  line = '  %fusion.1 = f32[8]{{0}} fusion(%p), kind=kOutput, calls=%f, backend_config={{"estimated_cycles":"{}"}}'
  text = "HloModule m, is_scheduled=true\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{}\n}}\n"
  for cycles, expected, unknown in ((1200, 1200, False), (2**63 - 1, 0, True)):
    (i,) = program.read(text.format(line.format(cycles))).computations["main"]
    assert (i.cycles, i.unknown) == (expected, unknown)


def test_the_configuration_of_a_kernel_may_go_on_at_the_margin():
  text = """HloModule m, is_scheduled=true

%inside (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %kernel = bf16[4,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"body": "AA=", "cost_estimate": {
"bytes_accessed":64,
"flops":5772436045824,
"transcendentals":0
}, "serialization_format": 1}}
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  ROOT %fusion = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%inside, metadata={op_name="jit(step)/jvp()/experts/grouped_product/pallas_call"}
}
"""
  read = program.read(text)
  assert [i.name for i in read.computations["inside"]] == ["p", "kernel"]
  assert '"flops":5772436045824' in read.computations["inside"][1].text
  (work,) = trace.of_program(read, [(0, 0, 0, 0, 0)], "TPU v5")
  assert (work.flops, work.bytes) == (5772436045824, 64)
