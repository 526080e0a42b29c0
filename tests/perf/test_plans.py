"""Plans as files: what is written is read again, as the options that a run takes; what is no plan is refused."""

import json

import pytest

from maxscale import config as config_lib
from maxscale.config import ConfigError
from maxscale.perf import plans

PLAN = plans.Plan(
  config="configs/tiny.py",
  topology="v5p:2x2x2",
  slices=2,
  options={"mesh.fsdp": 4, "mesh.tensor": 2, "mesh.dcn.data": 2, "sharding.context": "gather", "remat.policy": "custom",
           "remat.table": {"attention": "keep", "gate": "offload"}, "optimizer.offload": True,
           "sharding.expert_buffer": 1.5, "sharding.state.embed": ["fsdp", "data"]},
  flags={"compile": {"xla_tpu_scoped_vmem_limit_kib": "65536"}, "init": {"xla_sc_disable_megacore_partitioning": "true"}},
  predicted={"seconds": 1.25, "hbm": 1 << 33},
  versions={"jax": "0.10.2"},
)  # fmt: skip


def test_round_trip(tmp_path):
  path = str(tmp_path / "plan.json")
  PLAN.save(path)
  assert plans.load(path) == PLAN
  saved = json.loads((tmp_path / "plan.json").read_text())
  assert list(saved) == ["version", "config", "topology", "slices", "overrides", "flags", "predicted", "versions"]


def test_overrides_are_what_a_run_takes():
  plain = config_lib.load(PLAN.config)
  config = config_lib.load(PLAN.config, PLAN.overrides())
  assert (config.mesh.fsdp, config.mesh.tensor, config.mesh.dcn.data) == (4, 2, 2)
  assert config.remat == config_lib.Remat("custom", {"attention": "keep", "gate": "offload"})
  assert config.sharding.context == "gather" and config.sharding.expert_buffer == 1.5 and config.optimizer.offload
  assert config.sharding.state == {"embed": ["fsdp", "data"]}
  assert config.hash == plain.hash  # a plan says where a program runs, not what it computes


def test_what_is_no_plan_is_one_message(tmp_path):
  path = tmp_path / "plan.json"
  with pytest.raises(ConfigError, match="there is no plan"):
    plans.load(str(path))
  whole = json.loads(PLAN.to_json())
  wrong = [
    ("{", "not JSON"), ("[]", "not a plan"), (json.dumps({**whole, "version": 2}), "another version"),
    (json.dumps({k: v for k, v in whole.items() if k != "flags"}), "no flags"),
    (json.dumps({**whole, "more": 1}), "unknown key 'more'"),
    (json.dumps({**whole, "slices": "2"}), "slices='2' must be of type int"),
    (json.dumps({**whole, "flags": {"runtime": {}}}), "flags has 'runtime'"),
  ]  # fmt: skip
  for text, message in wrong:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
      plans.load(str(path))
