"""Rules, what they refuse, and the audit. No device is needed: a mesh is its sizes."""

import json
import subprocess
import sys

import pytest
from jax.sharding import PartitionSpec as P

from maxscale.config import MESH_AXES, ConfigError, Sharding
from maxscale.sharding import audit, rules
from tests import multidevice
from tests.models import reference as ref


def make(param=None, state=None, compute=None, **sizes):
  return rules.make(Sharding(param or {}, state or {}, compute or {}), dict.fromkeys(MESH_AXES, 1) | sizes)


def refused(*texts):
  return pytest.raises(ConfigError, match="(?s)" + "".join(f"(?=.*{text})" for text in texts))


# ---- rules


def test_the_three_roles_of_a_weight():
  r = make(state={"embed": ["fsdp", "data"]}, data=2, fsdp=4, tensor=2)
  names = ("embed", "heads", "head_dim")
  assert r.spec(names, "param") == P("fsdp", "tensor", None)
  assert r.spec(names, "state") == P(("fsdp", "data"), "tensor", None)
  assert r.spec(names, "compute") == P(None, "tensor", None)
  assert r.spec(("batch", "length", None), "compute") == P(("data", "fsdp"), None, None)


def test_state_defaults_to_param():
  r = make(param={"head_dim": "fsdp", "embed": None}, fsdp=2)
  for role in ("param", "state"):
    assert r.spec(("embed", "head_dim"), role) == P(None, "fsdp")
  assert r.spec(("embed", "head_dim"), "compute") == P(None, None)


def test_axes_of_one_device_are_left_out():
  assert make(fsdp=8).spec(("embed", "mlp"), "param") == P("fsdp", None)
  assert make().spec(("batch", "embed"), "compute") == P(None, None)


def test_a_name_without_a_rule_is_refused():
  with refused("'embedd'", "role param", "embed, experts"):
    make().spec(("embedd",), "param")
  with refused("sharding.param.embedd", "known: embed"):
    make(param={"embedd": "fsdp"})
  with refused("sharding.state.embed='fsdpp'", "mesh axis", "fsdp"):
    make(state={"embed": ["fsdpp"]})
  with refused("batch", "role param"):  # activations have no rule among parameters
    make().spec(("batch",), "param")


def test_a_mesh_axis_used_twice_is_refused():
  r = make(param={"mlp": ["tensor", "fsdp"]}, fsdp=4, tensor=2)
  with refused("layers/mlp/gate", r"\(2, 64, 128\)", "role param", "mesh axis 'fsdp'", "'embed' and 'mlp'"):
    r.check("layers/mlp/gate", ("layers", "embed", "mlp"), (2, 64, 128), "param")
  one_device = make(param={"mlp": ["tensor", "fsdp"]}, fsdp=1)
  one_device.check("w", ("embed", "mlp"), (64, 128), "param")  # no conflict


def test_an_indivisible_dimension_is_refused_with_its_numbers():
  with refused("params/w", r"\(60, 128\)", "embed=60", "fsdp=8", "sharding.param.embed", "multiple of 8"):
    make(fsdp=8).check("params/w", ("embed", "mlp"), (60, 128), "param")
  with refused("kv_heads=2", "tensor=4", "model.kv_head_multiple"):
    make(tensor=4).check("k", ("embed", "kv_heads", "head_dim"), (64, 2, 16), "param")
  with refused("vocab=61", "tensor=2", "model.vocab_multiple"):
    make(tensor=2).check("table", ("vocab", "embed"), (61, 64), "param")
  with refused("batch=6", r"data=2 \* fsdp=2", "data.batch_size"):
    make(data=2, fsdp=2).check("the batch", ("batch", "length"), (6, 64), "compute")


def test_the_advice_about_padding_is_followed():
  """What the message says to raise makes the config fit."""
  for tensor, option in ((4, {"model__kv_head_multiple": 4}), (2, {"model__vocab_multiple": 2})):
    options = {"model__vocab_multiple": 4} if tensor == 4 else {}
    with refused(next(iter(option)).replace("__", ".")):
      check(tensor, **options)
    check(tensor, **{**options, **option})


def check(tensor, **options):
  from maxscale.step import Program

  c = ref.config(ref.DENSE, **options)
  Program(c, ref.VOCAB, None, rules.make(c.sharding, dict.fromkeys(MESH_AXES, 1) | {"tensor": tensor})).check(8, 32)


# ---- the audit

BIG = audit.ArrayInfo("params/big", (1024, 1024), (None, "head_dim"), 4, "state")  # 4 MiB that no rule splits


def test_a_large_replicated_array_is_refused():
  with refused("params/big", r"\(1024, 1024\)", "4 MiB", "fsdp", "sharding.state", "sharding.replicated_limit"):
    audit.check([BIG], make(fsdp=8), 3.9)
  audit.check([BIG], make(fsdp=8), 4.1)  # under the limit
  audit.check([BIG], make(state={"head_dim": "fsdp"}, fsdp=8), 3.9)  # the rule that the message asks for
  audit.check([BIG], make(), 3.9)  # one device
  audit.check([BIG], make(data=8), 3.9)  # replicas are what `data` is for


def test_the_audit_checks_every_role():
  info = audit.ArrayInfo("w", (12, 16), ("embed", "mlp"), 4, "state")
  with refused("embed=12", "role param"):
    audit.check([info], make(fsdp=8), 64)
  with refused("mlp=16", "role state"):
    audit.check([info], make(state={"mlp": ["tensor", "data"]}, data=3, tensor=2), 64)


def test_the_table_has_each_array_its_shardings_and_the_reason_of_a_replica():
  r = make(state={"embed": ["fsdp", "data"]}, data=2, fsdp=2, tensor=2)
  program = ref.program(ref.DENSE)
  text = audit.table(program.infos(), r)
  lines = {line.split()[0]: line for line in text.splitlines()}
  assert set(program.specs) <= set(lines)
  gate = lines["params/layers/mlp/gate"].split()
  assert gate[1:] == ["2x32x48", "layers,embed,mlp", "-,fsdp,tensor", "-,fsdp*data,tensor", "-,-,tensor", "0.001"]
  assert "no rule splits layers, norm" in lines["params/layers/mlp_norm/scale"]
  assert "a scalar" in lines["step"]
  assert text.splitlines()[-1].startswith("state: ")


def test_bytes_by_hand():
  r = make(data=2, fsdp=4, tensor=2)
  infos = [
    audit.ArrayInfo("a", (8, 6), ("embed", "mlp"), 4, "state"),
    audit.ArrayInfo("n", (8,), ("norm",), 2, "state"),
  ]
  assert audit.bytes_per_device(infos, r) == 8 * 6 * 4 // 8 + 16


# ---- a large mesh

LARGE = """
import json, sys
from maxscale.config import MESH_AXES
from maxscale.sharding import audit, mesh, rules
from maxscale.step import Program
from tests.models import reference as ref

calls = 0
def count(frame, event, argument):
  global calls
  calls += event == "call"

def validate(devices):
  c = ref.config({"model.embed": 16384, "model.layers": 100, "model.heads": 128, "model.kv_heads": 8, "model.mlp": 53248,
                  "mesh.tensor": 8, "data.batch_size": 2048, "data.length": 8192})
  shape = mesh.resolve(c.mesh, devices, 4)
  program = Program(c, 128256, None, rules.make(c.sharding, shape.sizes))
  program.check(c.data.batch_size, c.data.length)
  return audit.bytes_per_device(program.infos(), program.rules)

validate(64)  # what is imported and cached on the first use
out = {}
for devices in (64, 8192):
  calls = 0
  sys.setprofile(count)
  size = validate(devices)
  sys.setprofile(None)
  out[devices] = (calls, size)
from jax._src import xla_bridge
print(json.dumps([out[64], out[8192], xla_bridge.backends_are_initialized()]))
"""


def test_validation_costs_the_same_for_any_number_of_devices_and_touches_none():
  done = subprocess.run([sys.executable, "-c", LARGE], cwd=multidevice.ROOT, capture_output=True, text=True, check=True)
  (few, large), (many, small), initialised = json.loads(done.stdout.splitlines()[-1])
  assert not initialised, "a device was touched"
  assert many <= 1.01 * few, f"{few} calls for 64 devices, {many} for 8192"
  assert 120 < large / small < 128  # fsdp grows from 2 to 256; norms stay whole


def test_a_dimension_may_have_the_mesh_axes_of_two_names():
  sizes = {"pipeline": 1, "data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
  made = rules.make(Sharding(state={"embed": ["fsdp", "data"]}), sizes)
  split = {role: made.split("mlp+embed", role) for role in rules.ROLES}
  assert split == {"compute": ("tensor",), "param": ("tensor", "fsdp"), "state": ("tensor", "fsdp", "data")}
  made.check("down", ("mlp+embed", None), (32, 5), "state")
  with pytest.raises(ConfigError, match=r"sharding\.state\.mlp or sharding\.state\.embed"):
    made.check("down", ("mlp+embed", None), (24, 5), "state")
  other = rules.make(Sharding(state={"mlp": ["tensor", "data"]}), sizes)
  with pytest.raises(ConfigError, match="give mlp the same rule in both roles"):
    other.check("down", ("mlp+embed", None), (32, 5), "state")
