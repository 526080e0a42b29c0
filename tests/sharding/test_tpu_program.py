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
VOCAB, TOKENS = 2**17, 2048  # positions of a device
# Parameters: two tables; two layers of query and out, key and value (half as wide), and an MLP or four and a router.
SHARED = 2 * VOCAB * 256 + 2 * (2 * 256 * 256 + 2 * 256 * 128)
MATRICES = {"dense": SHARED + 2 * 3 * 256 * 512, "moe": SHARED + 2 * 4 * 3 * 256 * 512}


@pytest.fixture(scope="module")
def programs():
  command = [sys.executable, "-m", "tests.sharding.tpu_program"]
  done = subprocess.run(command, cwd=multidevice.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-5000:]
  return json.loads(done.stdout.splitlines()[-1])


def assert_sums(program, dtype, size):
  """All sums are of one dtype and of that many bytes; those of norms and routers may be among them."""
  assert program["reductions"].keys() == {dtype}
  assert 0 <= program["reductions"][dtype] - size < 2**16


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_weight_gradients_cross_devices_in_float32(programs, name):
  assert_sums(programs[name], "f32", 4 * MATRICES[name])


def test_weight_gradients_cross_devices_in_bfloat16_where_the_config_says_so(programs):
  assert_sums(programs["bfloat16 gradients"], "bf16", 2 * MATRICES["dense"])


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
