"""Configs of public models: their size is the published one, and their step lowers for the chips they are for."""

import json
import pathlib
import subprocess
import sys

import pytest

from maxscale import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
# config -> devices, parameters in 1e9, those of the products that a token passes in 1e9 (published, or from the paper's
# table by hand; DeepSeek-V3 with its module for a further token: 671.03 and 11.5 + 0.1).
CONFIGS = {
  "llama3_8b": (256, 8.03, 7.5),
  "llama3_70b": (512, 70.6, 69.5),
  "llama3_405b": (2048, 405.9, 403.8),
  "mixtral_8x7b": (64, 46.7, 12.7),
  "qwen3_moe": (512, 235.1, 21.6),
  "gpt_oss_20b": (64, 20.9, 3.6),
  "deepseek_v3": (512, 682.6, 38.2),
  "moe_1t": (4096, 1026.4, 31.7),
}
DEFAULT = ("llama3_8b", "moe_1t")


@pytest.fixture(scope="module")
def lowered():
  def run(names):
    command = [sys.executable, "-m", "tests.lowering", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

  return run


def check(found):
  for name, seen in found.items():
    devices, parameters, active = CONFIGS[name]
    assert seen["devices"] == devices and seen["text"] > 10_000
    assert seen["parameters"] / 1e9 == pytest.approx(parameters, rel=2e-3), name
    assert seen["matmul_parameters"] / 1e9 == pytest.approx(active, rel=1e-2), name


def test_steps_lower_for_chips_that_are_not_here(lowered):
  found = lowered(DEFAULT)
  check(found)
  assert found["moe_1t"]["parameters"] >= 0.95e12 and found["moe_1t"]["tokens"] >= 16_000_000


@pytest.mark.slow
def test_the_steps_of_the_other_configs_lower(lowered):
  check(lowered([name for name in CONFIGS if name not in DEFAULT]))


def test_each_config_is_in_the_table():
  assert set(CONFIGS) == {path.stem for path in (ROOT / "configs").glob("*.py") if "tiny" not in path.stem}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_small_copy_of_each_is_a_config(name):
  small = config_lib.load(f"{ROOT}/configs/{name}.py", small=True)
  big = config_lib.load(f"{ROOT}/configs/{name}.py")
  assert small.model.embed < 256 and small.model.layers <= 4 < big.model.layers
  kept = ("norm", "activation", "gated", "qkv_bias", "qk_norm", "post_norms", "attention_sinks")
  assert all(getattr(small.model, option) == getattr(big.model, option) for option in kept)
  assert bool(small.model.experts) == bool(big.model.experts)
  assert bool(small.model.mla.kv_rank) == bool(big.model.mla.kv_rank)
