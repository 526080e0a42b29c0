"""Layouts that the rules can name and that nothing computes yet are refused, with what to change."""

import dataclasses
import types

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from maxscale.config import MESH_AXES, Config, ConfigError, Mesh, Sharding, check
from maxscale.sharding import mesh, rules
from maxscale.step import Program


def program(sharding: Sharding, experts: int = 0, kv_heads: int = 8, **sizes: int) -> Program:
  config = Config()
  model = dataclasses.replace(config.model, embed=64, layers=2, heads=8, kv_heads=kv_heads, mlp=128, experts=experts)
  config = dataclasses.replace(config, model=model, sharding=sharding)
  check(config)
  shape = mesh.resolve(Mesh(**{"fsdp": 1, **sizes}), jax.numpy.prod(jax.numpy.array(list(sizes.values()))).item())
  abstract = AbstractMesh(tuple(shape.sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
  return Program(config, 256, abstract, rules.make(sharding, shape.sizes))


def test_the_default_rules_are_accepted():
  program(Sharding(), experts=4, data=2, fsdp=2, tensor=2).check(8, 64)


@pytest.mark.parametrize(
  "compute, message",
  [
    ({"vocab": ["tensor", "fsdp"]}, "mesh axis 'fsdp' is used by both 'batch' and 'vocab'"),
    ({"mlp": "fsdp"}, "mesh axis 'fsdp' is used by both 'batch' and 'mlp'"),
    ({"experts": "tensor", "mlp": None}, "sharding.compute.experts splits it over tensor"),
    ({"length": "tensor", "heads": None, "kv_heads": None, "mlp": None, "vocab": None}, "compute.length splits it"),
    ({"embed": "tensor", "heads": None, "kv_heads": None, "mlp": None, "vocab": None}, "compute.embed splits it"),
    ({"kv_heads": None}, "splits heads over 2 devices and kv_heads over 1"),
  ],
)
def test_a_rule_that_nothing_computes_is_refused(compute, message):
  with pytest.raises(ConfigError, match=message):
    program(Sharding(compute=compute), experts=4, fsdp=2, tensor=2).check(8, 64)


def test_role_param_is_checked_where_state_overrides_it():
  sharding = Sharding(param={"mlp": ["tensor", "fsdp"]}, state={"mlp": "tensor"})
  with pytest.raises(ConfigError, match="in role param: mesh axis 'fsdp' is used by both"):
    program(sharding, fsdp=2, tensor=2).check(8, 64)


def test_slices_of_real_tpus_are_not_simulated():
  devices = [types.SimpleNamespace(platform="tpu", slice_index=0)] * 4
  with pytest.raises(ConfigError, match=r"mesh\.slices=2, but these TPU devices are in 1; set mesh\.slices=0"):
    mesh.count_slices(devices, Mesh(slices=2))
  assert mesh.count_slices([types.SimpleNamespace(platform="cpu")] * 4, Mesh(slices=2)) == 2
