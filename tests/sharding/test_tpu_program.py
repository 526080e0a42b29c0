"""What the TPU compiler makes of a training step: four v5e chips, none of them here."""

import importlib.util
import json
import subprocess
import sys

import pytest

from maxscale.models import loss
from tests import multidevice

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'maxscale[plan]')"
)
LAYER_MATRICES = 7  # query, key, value, out, gate, up, down; with experts the last three are stacks
TABLES = 2  # embedding and head
VOCAB, TOKENS = 2**17, 2048  # positions of a device


@pytest.fixture(scope="module")
def programs():
  command = [sys.executable, "-m", "tests.sharding.tpu_program"]
  done = subprocess.run(command, cwd=multidevice.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-5000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_weight_gradients_cross_devices_in_float32(programs, name):
  assert programs[name]["reductions"]["f32"] >= LAYER_MATRICES + TABLES


def test_weight_gradients_cross_devices_in_bfloat16_where_the_config_says_so(programs):
  reductions = programs["bfloat16 gradients"]["reductions"]
  assert "f32" not in reductions and reductions["bf16"] >= TABLES


@pytest.mark.parametrize("name", ["dense", "moe", "bfloat16 gradients"])
def test_the_logits_of_a_whole_batch_never_exist(programs, name):
  elements, dims = programs[name]["largest"]
  assert str(VOCAB) in dims.split(","), "the largest array is no longer a chunk of the logits"
  assert elements <= loss.CHUNK_LOGITS < TOKENS * VOCAB


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_attention_is_a_kernel(programs, name):
  assert programs[name]["kernels"] >= 2  # forward and backward


def test_offloaded_activations_are_in_host_memory(programs):
  assert programs["offloaded"]["host_arrays"] and not programs["dense"]["host_arrays"]
