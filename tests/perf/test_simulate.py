"""The walk of a schedule: seconds by hand, for transfers alone, beside work, in loops, and for a program's text."""

import dataclasses
import json

import pytest

from maxscale.perf import network
from maxscale.perf.compiled import program, simulate, trace
from maxscale.perf.compiled.trace import Done, Loop, Move, Start, Sync, Work
from maxscale.perf.hardware import CHIPS

V5P = next(c for c in CHIPS if c.name == "TPU v5p")
RATES = simulate.Rates(clock=1e9, attention=0.5, grouped=0.8, links=1.0, host=1e10)
CUBE = ((4, True), (4, True), (4, True))
LINK = 90e9


def work(milliseconds, kind="matmul", part="mlp forward"):
  return Work(kind, part, cycles=round(milliseconds * 1e6))


def gather(milliseconds):
  """A gather over a cube of 4x4x4 chips, 63/64 of whose bytes pass 3 rings of 2 links, less its 6 hops."""
  return Move("all-gather", (milliseconds * 1e-3 - 6e-6) * 6 * LINK * 64 / 63, CUBE)


# ---- the network


@pytest.mark.parametrize(
  "kind, dims, size, seconds",
  [
    ("all-gather", ((4, True),), 720e6, 720e6 * 3 / 4 / (2 * LINK) + 2e-6),  # a ring: both ways
    ("all-gather", ((4, False),), 720e6, 720e6 * 3 / 4 / LINK + 3e-6),  # a line: half the rate, every hop
    ("reduce-scatter", ((4, True), (4, True)), 720e6, 720e6 * 15 / 16 / (4 * LINK) + 4e-6),
    ("all-reduce", ((4, True),), 720e6, 2 * (720e6 * 3 / 4 / (2 * LINK) + 2e-6)),
    ("all-to-all", ((16, True),), 90e6, 90e6 * 16 / (8 * LINK) + 8e-6),
    ("all-to-all", ((4, True), (8, False)), 90e6, 90e6 * 8 / (4 * LINK) + 9e-6),  # the longest and open one bounds it
    ("collective-permute", ((2, False),), 90e6, 1e-3 + 1e-6),
    ("all-gather", (), 720e6, 0.0),
  ],
)
def test_a_collective_by_hand(kind, dims, size, seconds):
  assert network.seconds(kind, size, V5P, dims) == pytest.approx(seconds, rel=1e-12)


def test_an_all_to_all_of_one_ring_is_a_quarter_of_a_gather():
  """With the whole array of all chips: v n bytes in V / (4 W), W being both directions (the scaling book)."""
  v, n = 1e9, 16
  exchange = network.seconds("all-to-all", v, V5P, ((n, True),)) - 8e-6
  assert exchange == pytest.approx(v * n / (4 * 2 * LINK))


def test_half_the_links_take_twice_as_long():
  whole, half = (network.seconds("all-gather", 1e12, V5P, CUBE, share) for share in (1.0, 0.5))
  assert half == pytest.approx(2 * whole, rel=1e-4)


def test_between_slices():
  assert network.dcn_seconds("all-reduce", 6.25e9, V5P, 4) == pytest.approx(1.5 + 1e-4)
  assert network.dcn_seconds("all-gather", 6.25e9, V5P, 1) == 0


def test_switches_add_what_crosses_nodes():
  h100 = next(c for c in CHIPS if c.name == "H100")
  inside, across = (network.switch_seconds("all-gather", 8e9, h100, 16, nodes) for nodes in (1, 2))
  assert inside == pytest.approx(8e9 * 15 / 16 / 450e9 + 45e-6)
  assert across > 0.5e9 / h100.dcn_bytes > inside / 10


# ---- the walk


def test_work_follows_work():
  made = simulate.run((work(2), work(3, "vector")), V5P, RATES)
  assert made.seconds == pytest.approx(5e-3)
  assert made.classes() == pytest.approx({"vector": 3e-3, "matmul": 2e-3})


def test_a_kernel_is_bound_by_its_products_or_by_memory():
  attention = Work("attention", flops=459e12 * 0.5 * 2e-3, useful=1)
  copying = Work("grouped", flops=1e9, bytes=2765e9 * 3e-3)
  assert simulate.run((attention, copying), V5P, RATES).seconds == pytest.approx(5e-3)


def test_a_transfer_hides_behind_work_and_what_is_left_is_waited_for():
  hidden = simulate.run((Start(1, gather(2)), work(5), Done(1)), V5P, RATES)
  assert hidden.seconds == pytest.approx(5e-3) and list(hidden.classes()) == ["matmul"]
  longer = simulate.run((Start(1, gather(7)), work(5), Done(1), work(1)), V5P, RATES)
  assert longer.seconds == pytest.approx(8e-3)
  assert longer.classes()["exposed all-gather ICI"] == pytest.approx(2e-3)


def test_a_synchronous_transfer_is_waited_for_whole():
  made = simulate.run((work(1), Sync(gather(2))), V5P, RATES)
  assert made.seconds == pytest.approx(3e-3)


def test_transfers_share_the_links_one_after_another():
  events = (Start(1, gather(2)), Start(2, gather(2)), work(3), Done(1), Done(2))
  assert simulate.run(events, V5P, RATES).seconds == pytest.approx(4e-3)


def test_permutations_of_both_directions_do_not_share():
  ring = Move("collective-permute", LINK * 2e-3 - 1e-6 * LINK, ((2, False),), lane="0+")
  other = Move("collective-permute", LINK * 2e-3 - 1e-6 * LINK, ((2, False),), lane="0-")
  assert simulate.run((Start(1, ring), Start(2, other), Done(1), Done(2)), V5P, RATES).seconds == pytest.approx(2e-3)
  assert simulate.run((Start(1, ring), Start(2, ring), Done(1), Done(2)), V5P, RATES).seconds == pytest.approx(4e-3)


def test_the_host_takes_both_directions_at_once():
  out, back = Move("to-host", 2e7), Move("from-host", 2e7)
  assert simulate.run((Start(1, out), Start(2, back), Done(1), Done(2)), V5P, RATES).seconds == pytest.approx(2e-3)


def test_a_loop_is_walked_once_and_counted_as_often_as_it_runs():
  body = (Start(1, gather(3)), work(2), Done(1))
  made = simulate.run((work(1), Loop(10, body, "forward"), Loop(2, (Loop(3, (work(1),)),))), V5P, RATES)
  assert made.seconds == pytest.approx(1e-3 + 30e-3 + 6e-3)
  assert made.classes() == pytest.approx({"matmul": 1e-3 + 20e-3 + 6e-3, "exposed all-gather ICI": 10e-3})


def test_totals_add_up_to_the_step():
  events = (
    work(1),
    Sync(gather(1)),
    Loop(4, (Start(1, gather(5)), work(2, part="head forward"), Done(1))),
    work(2, "copy"),
  )
  made = simulate.run(events, V5P, RATES)
  assert sum(made.totals().values()) == pytest.approx(made.seconds)


# ---- from text

PLACES = [(0, x, y, z, 0) for x in range(4) for y in range(4) for z in range(4)]
GROUPS = "{" + ",".join("{" + ",".join(str(16 * x + r) for x in range(4)) + "}" for r in range(16)) + "}"
TEXT = f"""HloModule step, is_scheduled=true, num_partitions=64

%inside (p: f32[8]) -> f32[8] {{
  ROOT %p = f32[8]{{0}} parameter(0)
}}

%condition (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %ag-start = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%x), replica_groups={GROUPS}, dimensions={{0}}, metadata={{op_name="jit(step)/jvp()/while/body/mlp/all_gather"}}
  %a = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inside, metadata={{op_name="jit(step)/jvp()/while/body/mlp/add"}}, backend_config={{"estimated_cycles":"700"}}
  %b = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%inside, metadata={{op_name="jit(step)/jvp()/while/body/mlp/mul"}}, backend_config={{"estimated_cycles":"300"}}
  %ag-done = f32[32]{{0}} all-gather-done(%ag-start)
  %out = (f32[6,1024]{{1,0:S(5)}}, f32[1024]{{0}}, u32[]) dynamic-update-slice-start(%b, %b)
  %sent = f32[6,1024]{{1,0:S(5)}} dynamic-update-slice-done(%out)
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %b)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %q = bf16[2,4,1024,128]{{3,2,1,0}} parameter(1)
  %k = bf16[2,2,1024,128]{{3,2,1,0}} parameter(2)
  %kernel = bf16[2,4,1024,128]{{3,2,1,0}} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,4,2]{{2,1,0}}, bf16[2,4,1024,128]{{3,2,1,0}}, bf16[2,2,1024,128]{{3,2,1,0}}, bf16[2,2,1024,128]{{3,2,1,0}}, s32[2,1024,128]{{2,1,0}}, s32[2,8,1024]{{2,1,0}}, s32[1024,128]{{1,0}}}}, frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 256, \\"block_kv\\": 512, \\"block_q_dkv\\": 128}}"
}}}}, metadata={{op_name="jit(step)/transpose(jvp())/rematted_computation/attention/splash_mha_fwd_residuals/pallas_call"}}
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]{{0}}) tuple(%zero, %x)
  %loop = (s32[], f32[8]{{0}}) while(%t), condition=%condition, body=%body, metadata={{op_name="jit(step)/jvp()/while"}}
  ROOT %r = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


def test_a_program_becomes_events():
  made = trace.of_program(program.read(TEXT), PLACES, "TPU v5")
  kernel, loop = made
  # 2 x 4 heads, 1024 x 1024, 128 + 128 wide; of the 4 x 2 blocks of 256 x 512 rows 1, 1, 2 and 2 have a visible key.
  full = 2.0 * 8 * 1024 * 1024 * 256
  assert (kernel.kind, kernel.part) == ("attention", "attention again")
  assert (kernel.flops, kernel.useful) == (full * 6 / 8, full / 2)
  assert loop.times == 6 and loop.part == "forward"
  start, computed, done, sent, finished = loop.body
  assert start.move == Move("all-gather", 128, ((4, True),), part="mlp forward") and done == Done(start.key)
  assert computed == Work("vector", "mlp forward", 1000, count=2)
  assert sent.move.kind == "to-host" and sent.move.bytes == 4096 and finished == Done(sent.key)


def test_attention_without_a_causal_mask_has_all_its_pairs():
  """A block of keys from another device of a ring: its operands are segments, but no positions."""
  text = TEXT.replace(", s32[1024,128]{1,0}", "")
  assert text != TEXT
  kernel = trace.of_program(program.read(text), PLACES, "TPU v5")[0]
  assert kernel.flops == kernel.useful == 2.0 * 8 * 1024 * 1024 * 256


def test_a_trace_survives_json():
  made = trace.of_program(program.read(TEXT), PLACES, "TPU v5")
  assert trace.from_json(json.loads(json.dumps(trace.to_json(made)))) == made


def events(entry, computations="", places=PLACES, kind="TPU v5", **options):
  """Of a program with this entry, on 64 chips."""
  text = f"HloModule step, is_scheduled=true, num_partitions={len(places)}\n\n{computations}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{entry}\n}}\n"
  return trace.of_program(program.read(text), places, kind, **options)


def test_a_collective_on_the_sparsecores_begins_where_it_gets_its_operand():
  """As libtpu 0.0.52 writes it: start, update and done of a computation on another thread."""
  made = events(
    """  %x = f32[8]{0} parameter(0)
  %start = ((), (), (s32[8]{0})) custom-call-start(), async_execution_thread="sparsecore", called_computations={%beside}
  %update = ((f32[8]{0}), f32[32]{0}, (s32[8]{0})) custom-call-update(%start, %x)
  %a = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"7"}
  %done = f32[32]{0} custom-call-done(%update)
  ROOT %r = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"9"}""",
    f"""%beside (x: f32[8]) -> f32[32] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %g = f32[32]{{0}} all-gather(%x), replica_groups={GROUPS}, dimensions={{0}}
}}
""",
  )
  start, first, done, second = made
  assert start.move.kind == "all-gather" and start.move.bytes == 128 and done == Done(start.key)
  assert (first.cycles, second.cycles) == (7, 9)


def test_the_slowest_way_and_the_mean_distance_of_a_permutation():
  """A ring over both devices of 4 chips: half of its steps stay on a chip, which must not make it free."""
  places = [(0, x, 0, 0, core) for x in range(4) for core in range(2)]
  pairs = ",".join(f"{{{n},{(n + 1) % 8}}}" for n in range(8))
  (move,) = [
    e.move
    for e in events(
      f"""  %x = f32[8]{{0}} parameter(0)
  ROOT %p = f32[8]{{0}} collective-permute(%x), source_target_pairs={{{pairs}}}""",
      places=places,
      kind="TPU7x",
    )
  ]
  assert move.hops == (1 + 1 + 1 + 3) / 8 and move.share == 0.5  # 4x1x1 chips do not close: 3 hops back
  chip = next(c for c in CHIPS if c.name == "TPU7x")
  assert simulate.seconds_of(move, chip, RATES) == pytest.approx(32 * 0.75 / (chip.link_bytes / 2) + 3e-6)


def test_both_devices_of_a_chip_send_over_its_links():
  places = [(0, x, 0, 0, core) for x in range(4) for core in range(2)]
  exchange = (
    "  %x = f32[8]{{0}} parameter(0)\n  ROOT %p = f32[8]{{0}} all-to-all(%x), replica_groups={}, dimensions={{0}}"
  )
  chip = next(c for c in CHIPS if c.name == "TPU7x")
  one, two = (
    simulate.seconds_of(events(exchange.format(g), places=places, kind="TPU7x")[0].move, chip, RATES) - 3e-6
    for g in ("{{0,1,2,3,4,5,6,7}}", "{{0,2,4,6},{1,3,5,7}}")
  )
  assert one == pytest.approx(two)


def test_a_transfer_between_slices_ends_with_its_own_partner():
  attributes = (
    'frontend_attributes={{_xla_host_transfer_rendezvous="all-reduce.{0}_{1}",_xla_megascale_target="{{0,1}}x{{0:0}}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}}'
  )
  entry = "  %x = f32[8]{0} parameter(0)\n  %token = token[] after-all()\n"
  for n in (1, 2):
    entry += f"  %send.{n} = (f32[{n * 8}]{{0}}, u32[], token[]) send(%x, %token), {attributes.format(n, 0)}\n"
  for n in (2, 1):
    entry += f"  %recv.{n} = (f32[{n * 8}]{{0}}, u32[], token[]) recv(%token), {attributes.format(n, 1)}\n"
  for n in (2, 1):
    entry += f"  %recv-done.{n} = (f32[{n * 8}]{{0}}, token[]) recv-done(%recv.{n})\n"
  made = events(entry + "  ROOT %r = f32[8]{0} negate(%x)", places=[(s, 0, 0, 0, 0) for s in range(2)])
  first, second, *dones = made
  assert [e.move.bytes for e in (first, second)] == [32, 64] and first.move.slices == 2
  assert dones == [Done(second.key), Done(first.key)]


def test_of_branches_the_longest_is_taken_its_transfers_counted():
  branch = "%{0} (x: f32[{2}]) -> f32[{2}] {{\n  %x = f32[{2}]{{0}} parameter(0)\n  ROOT %y = f32[{2}]{{0}} {1}\n}}\n"
  entry = """  %x = f32[8]{0} parameter(0)
  %c = pred[] constant(true)
  ROOT %r = f32[8]{0} conditional(%c, %x, %x), true_computation=%a, false_computation=%b"""
  works = branch.format("a", 'negate(%x), backend_config={"estimated_cycles":"100"}', 8)
  for size, taken in ((8, Work), (2**20, Sync)):
    sends = branch.format("b", f"all-reduce(%x), replica_groups={GROUPS}, to_apply=%a", size)
    assert [type(e) for e in events(entry, works + sends)] == [taken]


def test_experts_are_counted_for_the_rows_that_come():
  kernel = """  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %k = bf16[64,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/experts/grouped_product"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"10"}}}"""
  (whole,), (half,) = events(kernel), events(kernel, spare=2.0)
  assert whole.kind == "grouped" and (whole.flops, half.flops) == (1000, 500)


@pytest.mark.parametrize(
  "kind, said, tile", [("TPU v5", "", 128), ("TPU7x", "", 256), ("TPU7x", "tile_m", 512), ("TPU7x", "-tm_", 64)]
)
def test_a_tile_is_visited_again_where_a_group_ends(kind, said, tile):
  """8 groups of 4096 rows: 7 tiles more than there are; of a buffer with twice the rows that come, more of them."""
  name = f"gmm-m_4096-tm_{tile}" if said == "-tm_" else "grouped_product"
  note = f'"xprof_metadata":"{{\\"tiling\\": {{\\"tile_m\\": {tile}}}}}", ' if said == "tile_m" else ""
  kernel = f"""  %x = bf16[4096,128]{{1,0}} parameter(0)
  ROOT %{name}.1 = bf16[4096,256]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={{s32[9]{{0}}, bf16[4096,128]{{1,0}}, bf16[8,128,256]{{2,1,0}}}}, metadata={{op_name="jit(f)/pallas_call"}}, backend_config={{{note}"custom_call_config":{{"cost_estimate":{{"flops":"1000","bytes_accessed":"10"}}}}}}"""
  (whole,), (half,) = events(kernel, kind=kind), events(kernel, kind=kind, spare=2.0)
  assert whole.flops == pytest.approx(1000 * (1 + 7 * tile / 4096)) and whole.useful == 1000
  assert half.flops == pytest.approx(500 * (1 + 7 * tile / 2048)) and half.useful == 500


@pytest.mark.parametrize("kind, head, fill", [("TPU v5", 128, 1), ("TPU v5", 256, 1), ("TPU v5", 192, 0.75),
                                              ("TPU v6 lite", 128, 1), ("TPU v6 lite", 256, 2), ("TPU v6 lite", 64, 0.5)])  # fmt: skip
def test_heads_fill_matrix_units(kind, head, fill):
  """Units of 128 on v5p, of 256 on v6e, where heads of 128 leave half of each idle."""
  entry = TEXT[TEXT.index("  %q = ") : TEXT.index("  %zero = ")].replace("%kernel", "ROOT %kernel")
  (kernel,) = events(entry.replace("1024,128]", f"1024,{head}]"), kind=kind, places=[(0, 0, 0, 0, 0)])
  assert kernel.fill == fill and kernel.flops == 2.0 * 8 * 1024 * 1024 * 2 * head * 6 / 8
  slow = simulate.seconds_of(dataclasses.replace(kernel, fill=1.0), V5P, RATES)
  assert simulate.seconds_of(kernel, V5P, RATES) == pytest.approx(slow / fill)


def test_a_transfer_beside_a_loop_waits_for_those_inside():
  """10 ms of links beside 8 trips of 2 ms, in each of which a gather has them for 1 ms: 8 ms are left to it."""
  loop = Loop(8, (Start(1, gather(1)), work(2), Done(1)))
  made = simulate.run((Start(2, gather(10)), loop, Done(2)), V5P, RATES)
  assert made.seconds == pytest.approx(18e-3) and made.classes()["exposed all-gather ICI"] == pytest.approx(2e-3)
  assert simulate.run((Start(2, gather(7)), loop, Done(2)), V5P, RATES).seconds == pytest.approx(16e-3)


def test_each_doubling_of_slices_adds_its_share():
  rates = simulate.Rates(clock=1e9, attention=0.5, grouped=0.8, links=1.0, host=1e10, slices=0.02)
  one, eight = (
    simulate.run((Loop(2, (Sync(Move("all-reduce", 0.0, slices=n)), work(50))),), V5P, rates) for n in (1, 8)
  )
  assert one.seconds == pytest.approx(0.1) and eight.seconds == pytest.approx(0.1002 * 1.06)
  assert eight.classes()["exposed wait DCN"] == pytest.approx(0.1002 * 0.06)
  assert sum(eight.totals().values()) == pytest.approx(eight.seconds)
