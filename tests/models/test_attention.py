"""Attention of one device against its definition; of several, in processes of their own; and the order of sequences."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.config import ConfigError
from maxscale.models import attention
from maxscale.sharding import sequence
from tests import multidevice
from tests.models import reference as ref

MODULE = "tests.models.attention_cases"
results = multidevice.fixture(MODULE)


@pytest.mark.parametrize("name", multidevice.names(MODULE))
def test_split_sequences(results, name):
  multidevice.check(results, name)


# ---- one device


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(f, *args):
  """The result of f and the gradients of its product with fixed random numbers, by each argument."""
  out, pull = jax.vjp(f, *args)
  return out, *pull(normal(*out.shape, seed=99))


def inputs(b, t, s, n, k, h):
  return normal(b, t, n, h), normal(b, s, k, h, seed=1), normal(b, s, k, h, seed=2)


def compare(actual, expected):
  for a, b, what in zip(actual, expected, ("o", "dq", "dk", "dv")):
    ref.assert_close(a, b, 1e-5, what)


def by_documents(q, k, v, q_segments, k_segments, offset=0):
  """Attention as its definition says: one query and one head at a time."""
  group, rows = q.shape[2] // k.shape[2], []
  for b in range(q.shape[0]):
    for t in range(q.shape[1]):
      seen = [s for s in range(k.shape[1]) if s <= t + offset and k_segments[b, s] == q_segments[b, t]]
      keys, values = k[b, np.array(seen)].repeat(group, 1), v[b, np.array(seen)].repeat(group, 1)
      scores = jnp.einsum("nh,snh->ns", q[b, t], keys) / q.shape[-1] ** 0.5
      rows.append(jnp.einsum("ns,snh->nh", jnp.exp(scores) / jnp.exp(scores).sum(1, keepdims=True), values))
  return jnp.stack(rows).reshape(q.shape)


def test_attention_and_its_gradients():
  q, k, v = inputs(2, 7, 7, 4, 2, 6)
  segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]])
  actual = gradients(lambda *a: attention.attention(*a, segments, segments), q, k, v)
  compare(actual, gradients(jax.jit(lambda *a: by_documents(*a, segments, segments)), q, k, v))


def test_attention_with_an_offset_is_the_end_of_the_whole():
  q, k, v = inputs(1, 9, 9, 4, 1, 4)
  ones = np.ones((1, 9), np.int32)
  whole = attention.attention(q, k, v, ones, ones)
  for offset in (0, 3, 8):
    part = attention.attention(q[:, offset : offset + 1], k, v, ones[:, :1], ones, offset)
    ref.assert_close(part[:, 0], whole[:, offset], 1e-6, f"offset {offset}")


def test_attention_in_causal_blocks_is_attention_whole(monkeypatch):
  q, k, v = inputs(2, 128, 128, 4, 2, 8)
  segments = np.ones((2, 128), np.int32)
  segments[0, 20:90], segments[0, 90:] = 2, 0  # a document over three blocks of 32
  f = lambda: jax.jit(functools.partial(gradients, lambda *a: attention.attention(*a, segments, segments)))  # noqa: E731
  actual = f()(q, k, v)
  monkeypatch.setattr(attention, "CAUSAL_BLOCKS", 1)
  compare(actual, f()(q, k, v))


# one block, three of 128, one; and with a backward kernel for each of dq and dkv
@pytest.mark.parametrize("kv_heads, length, fused", [(1, 256, 8), (2, 384, 8), (4, 256, 8), (2, 384, 0)])
def test_the_kernel_of_a_tpu_is_plain_attention(monkeypatch, kv_heads, length, fused):
  monkeypatch.setattr(attention, "FUSED_BLOCKS", fused)
  q, k, v = inputs(2, length, length, 4, kv_heads, 16)
  segments = np.ones((2, length), np.int32)
  segments[0, 100:230], segments[0, 230:] = 2, 0
  segments[1, 128:] = 2
  actual, expected = (
    jax.jit(functools.partial(gradients, lambda *a: attention.attention(*a, segments, segments, backend=b)))(q, k, v)  # noqa: B023
    for b in ("interpret", "xla")
  )
  compare(actual, expected)


def test_the_mask_of_a_kernel_has_blocks_of_one_element():
  """Which is all that the kernel takes from them, and makes the mask of a long sequence quickly."""
  order = sequence.order(1024, 4, balanced=True)
  mask, blocks = attention.CausalMask(order), [slice(i, i + 128) for i in range(0, 1024, 128)]
  for rows in blocks:
    for columns in blocks:
      block, whole = mask[rows, columns], order[rows, None] >= np.arange(1024)[columns]
      assert (block.any(), block.all()) == (whole.any(), whole.all())
      assert block.size == 1 or np.array_equal(block, whole)


# ---- the order of sequences


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_the_balanced_order_gives_every_device_the_same_work(parts):
  length = 4 * parts
  order = sequence.order(length, parts, balanced=True)
  assert order.dtype == np.int32 and sorted(order) == list(range(length))
  pairs = (order.reshape(parts, -1) + 1).sum(1)  # a query sees its own key and all before it
  assert len(set(pairs)) == 1
  natural = sequence.order(length, parts, balanced=False)
  np.testing.assert_array_equal(natural, np.arange(length))
  assert len(set((natural.reshape(parts, -1) + 1).sum(1))) == parts


def test_the_balanced_order_of_two_devices():
  np.testing.assert_array_equal(sequence.order(8, 2, balanced=True), [0, 1, 6, 7, 2, 3, 4, 5])


def test_the_kernel_of_every_device_has_the_same_number_of_blocks():
  parts, length = 4, 4096
  mask = attention.CausalMask(sequence.order(length, parts, balanced=True))
  kernel = attention._kernel(mask, 2, length // parts // 2, "interpret", parts)
  for info in (kernel.fwd_mask_info, kernel.dkv_mask_info):
    counts = (np.asarray(info.block_mask).reshape(parts, -1) > 0).sum(1)
    assert len(set(counts)) == 1 and 0 < counts[0] < info.block_mask.size // parts, counts


@pytest.mark.parametrize("length, near", [(50, "48 or 56"), (7, "8")])
def test_a_length_that_does_not_divide_is_refused_with_the_nearest(length, near):
  with pytest.raises(ConfigError, match=f"{length} .* 8 chunks for 4 devices.* {near}$"):
    sequence.order(length, 4, balanced=True)


# ---- what the TPU compiler makes of it


def compiled(*arguments):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (pip install 'maxscale[plan]')")
  environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  command = [sys.executable, "-m", MODULE, *arguments]
  done = subprocess.run(
    command, cwd=multidevice.ROOT, env={**os.environ, **environment}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-5000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def programs():
  return compiled("4096", "2", "1", "ring", "gather")


@pytest.mark.parametrize("method", ["ring", "gather"])
def test_on_a_tpu_no_matrix_of_queries_and_keys_exists(programs, method):
  assert not programs[method]["squares"]


def test_on_a_tpu_what_a_policy_keeps_is_not_computed_again(programs):
  # the ring: its first step, and twice two pairs of halves, in the loop and in the last step
  assert programs["ring"]["kernels"] == {"fwd": 5, "dkv": 5}
  assert programs["gather"]["kernels"] == {"fwd": 1, "dkv": 1}


def test_on_a_tpu_keys_and_gradients_are_sent_asynchronously(programs):
  assert programs["ring"]["sends"] == 18  # forward k, v, segments, twice; backward the same, and dk, dv three times
  assert programs["ring"]["overlapped"] == [True, True]  # the loop of each pass


@pytest.mark.slow
def test_on_a_tpu_large_shares_are_sent_while_kernels_run():
  assert compiled("32768", "16", "8", "ring")["ring"]["overlapped"] == [True, True]


def test_on_a_tpu_the_gradient_of_gathered_keys_is_scattered(programs):
  assert programs["gather"]["scattered"] == 2
