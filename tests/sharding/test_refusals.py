"""Layouts that the rules can name and that nothing computes are refused, with what to change."""

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
    ({"vocab": ["tensor", "fsdp"]}, r"sharding.param.vocab=\['tensor'\] does not begin with"),
    ({"experts": "tensor"}, r"sharding.param.experts=\[\] does not begin with sharding.compute.experts=\['tensor'\]"),
    (
      {"length": "tensor"},
      r"residual_length=\['tensor'\] .*no|mesh axis 'tensor' is used by both 'length' and 'heads'",
    ),
    ({"residual_length": []}, None),
    ({"embed": "tensor"}, r"sharding.compute.embed=\['tensor'\]: operations need all of embed|does not begin"),
    ({"kv_heads": None}, "residual_length splits sequences over .*'tensor'.*, but kv_heads is not"),
    ({"kv_heads": None, "residual_length": []}, "sharding.param.kv_heads splits it over .*along which"),
    ({"layers": ["fsdp"]}, "does not begin with|makes stages along .*'fsdp'"),
    ({"mlp": 3}, "sharding.compute.mlp=3 must be a mesh axis or a list of them"),
    ({"batch": ["data"]}, r"sharding.param.embed splits it over \['fsdp'\], along which devices hold the same tokens"),
  ],
)
def test_a_rule_that_nothing_computes_is_refused(compute, message):
  if message is None:
    return program(Sharding(compute=compute), experts=4, fsdp=2, tensor=2).check(8, 64)
  with pytest.raises(ConfigError, match=message):
    program(Sharding(compute=compute), experts=4, fsdp=2, tensor=2).check(8, 64)


def test_roles_that_do_not_fit_together_are_refused():
  sharding = Sharding(param={"mlp": ["tensor", "fsdp"]}, state={"mlp": "tensor"})
  with pytest.raises(ConfigError, match=r"sharding.state.mlp=\['tensor'\] does not begin with sharding.param.mlp"):
    program(sharding, fsdp=2, tensor=2).check(8, 64)
  with pytest.raises(ConfigError, match="in role param: mesh axis 'fsdp' is used by both"):
    program(Sharding(param={"mlp": ["tensor", "fsdp"]}), fsdp=2, tensor=2).check(8, 64)


@pytest.mark.parametrize(
  "options, sizes, message",
  [
    ({}, {"pipeline": 4}, "model.layers=2 is not divisible by mesh.pipeline=4"),
    ({"microbatches": 1}, {"pipeline": 2}, "sharding.microbatches=1 must be at least mesh.pipeline=2.*set it to 2"),
    ({"repeats": 2}, {"fsdp": 2}, "sharding.repeats=2 is for a pipeline"),
    ({}, {"expert": 8}, "mesh.expert=8 is more than model.experts=4"),
    ({}, {"context": 3}, "64 does not divide into 6 chunks.*60 or 66"),
    ({"context": "ulysses"}, {"context": 16}, "sharding.context=ulysses .*8 heads.*mesh.context=16.*8"),
    ({}, {"tensor": 3}, "is not divisible by tensor=3|vocab=256"),
    ({}, {"fsdp": 16}, r"batch=8 is not divisible by .*fsdp=16"),
  ],
)
def test_sizes_that_do_not_divide_are_refused_with_what_would(options, sizes, message):
  with pytest.raises(ConfigError, match=f"(?s){message}"):
    program(Sharding(**options), experts=4, **sizes).check(8, 64)


def test_slices_of_real_tpus_are_not_simulated():
  devices = [types.SimpleNamespace(platform="tpu", slice_index=0)] * 4
  with pytest.raises(ConfigError, match=r"mesh\.slices=2, but these TPU devices are in 1; set mesh\.slices=0"):
    mesh.count_slices(devices, Mesh(slices=2))
  assert mesh.count_slices([types.SimpleNamespace(platform="cpu")] * 4, Mesh(slices=2)) == 2


def test_what_is_gathered_by_nobody_is_refused():
  with pytest.raises(ConfigError, match=r"sharding.param.norm=\['fsdp'\] is not sharding.compute.norm=\[\]"):
    program(Sharding(param={"norm": "fsdp"}), fsdp=2)
  with pytest.raises(ConfigError, match=r"makes stages along .*'data'"):
    program(Sharding(param={"layers": ["data"]}, compute={"layers": ["data"]}), data=2)


def test_a_pipeline_keeps_nothing_on_the_host():
  p = program(Sharding(microbatches=2), pipeline=2)
  remat = dataclasses.replace(p.config.remat, policy="custom", table={"gate": "offload"})
  with pytest.raises(ConfigError, match=r"mesh\.pipeline=1"):
    dataclasses.replace(p, config=dataclasses.replace(p.config, remat=remat)).check(8, 64)
