"""Experts on one device, split over simulated devices, and in the program of a TPU."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests import multidevice

CASES = "tests.models.experts_cases"
results = multidevice.fixture(CASES)


@pytest.mark.parametrize("name", multidevice.names(CASES))
def test_case(results, name):
  multidevice.check(results, name)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'maxscale[plan]')"
)
def test_a_tpu_exchanges_only_the_rows_that_another_device_computes():
  environment = multidevice.environment(1, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  command = [sys.executable, "-m", CASES]
  done = subprocess.run(command, cwd=multidevice.ROOT, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-5000:]
  program = json.loads(done.stdout.splitlines()[-1])
  room, choices = "1280", "1024"
  # Rows and gates go to the experts, their results come back; backward each of the three goes the other way.
  expected = [["bf16", room], ["f32", room], ["bf16", choices], ["bf16", room], ["bf16", choices], ["f32", choices]]
  assert sorted(program["exchanges"]) == sorted(expected)
  assert set(program["others"]) == {"s32"}, "only counts go to all devices"
