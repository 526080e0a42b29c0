"""What a program's text becomes as a trace, beside what tests/perf/test_simulate.py has of it."""

import pytest

from maxscale.perf.compiled.trace import Work
from tests.perf.test_simulate import events

KERNEL = """%into (p0: f32[8,64,128], p1: bf16[64,128]) -> f32[8,64,128] {
  %p0 = f32[8,64,128]{2,1,0} parameter(0)
  %p1 = bf16[64,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %k = f32[1,64,128]{2,1,0} custom-call(%p1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/experts/grouped_outer"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"10"}}}
  ROOT %stack = f32[8,64,128]{2,1,0} dynamic-update-slice(%p0, %k, %zero, %zero, %zero)
}
"""


@pytest.mark.parametrize("spare", [1.0, 2.0])
def test_a_kernel_that_writes_into_a_part_of_an_array_is_that_kernel(spare):
  fusion = """  %stack = f32[8,64,128]{2,1,0} parameter(0)
  %x = bf16[64,128]{1,0} parameter(1)
  ROOT %f = f32[8,64,128]{2,1,0} fusion(%stack, %x), kind=kCustom, calls=%into, metadata={op_name="jit(f)/transpose(jvp(experts))/dynamic_update_slice"}, backend_config={"estimated_cycles":"70"}"""
  flops = 1000 / spare
  assert events(fusion, KERNEL, spare=spare) == (Work("grouped", "experts backward", 0, flops, 10.0, flops),)
