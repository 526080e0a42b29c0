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
from jax.extend import core

from maxscale.config import ConfigError
from maxscale.models import attention, splash
from maxscale.perf import flops
from maxscale.sharding import sequence
from tests import multidevice
from tests.models import attention_cases as cases
from tests.models import reference as ref

MODULE = "tests.models.attention_cases"
results = multidevice.fixture(MODULE)


@pytest.mark.slow
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


def equations(jaxpr):
  """Of a jaxpr, at any depth."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from equations(inner)


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
    part = attention.attention(q[:, offset : offset + 1], k, v, ones[:, :1], ones, offset=offset)
    ref.assert_close(part[:, 0], whole[:, offset], 1e-6, f"offset {offset}")


def test_attention_in_causal_blocks_is_attention_whole(monkeypatch):
  q, k, v = inputs(2, 128, 128, 4, 2, 8)
  segments = np.ones((2, 128), np.int32)
  segments[0, 20:90], segments[0, 90:] = 2, 0  # a document over three blocks of 32
  f = lambda: jax.jit(functools.partial(gradients, lambda *a: attention.attention(*a, segments, segments)))  # noqa: E731
  actual = f()(q, k, v)
  monkeypatch.setattr(attention, "CAUSAL_BLOCKS", 1)
  compare(actual, f()(q, k, v))


FORMS = {
  "softcap": (attention.Form(softcap=1.5), False),
  "window": (attention.Form(window=20), False),
  "sinks": (attention.Form(), True),
  "all": (attention.Form(0.7, 2.0, 150), True),
}


def example(length, heads=4, kv_heads=2, h=12, hv=8, dtype=jnp.float32):
  """q, k, v, segments, do and sinks; a document is longer than the windows, one row ends with padding."""
  args = cases.inputs(2, length, heads, kv_heads, h, dtype, hv)
  return args, cases.sinks_for(heads)


def compare_with_the_definition(args, sinks, form, tolerance=1e-5, **options):
  q, k, v, segments, do = args

  @jax.jit
  def actual(q, k, v, do, sinks):
    f = lambda q, k, v, sinks: attention.attention(q, k, v, segments, segments, sinks, form, **options)  # noqa: E731
    out, pull = jax.vjp(f, q, k, v, sinks)
    return out, *pull(do)

  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  expected = jax.jit(functools.partial(cases.dense, form=form))(*wide, segments, do.astype(jnp.float32), sinks)
  for a, b, what in zip(actual(q, k, v, do, sinks), expected, ("o", "dq", "dk", "dv", "dsinks")):
    assert (a is None) == (b is None)
    if a is not None:
      assert a.dtype == (jnp.float32 if what == "dsinks" else q.dtype)
      ref.assert_close(a, b, tolerance, what)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_every_form_of_attention_and_its_gradients(backend, name):
  form, with_sinks = FORMS[name]
  args, sinks = example(512 if backend == "xla" else 384)  # 16 blocks, or three of 128
  compare_with_the_definition(args, sinks if with_sinks else None, form, backend=backend)


@pytest.mark.parametrize("window", [1, 39, 40, 48])
def test_windows_of_one_key_and_of_a_sequence(window):
  compare_with_the_definition(*example(40), attention.Form(window=window))


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_every_form_in_bfloat16(backend):
  args, sinks = example(256, dtype=jnp.bfloat16)
  compare_with_the_definition(args, sinks, FORMS["all"][0], 2e-2, backend=backend)


def test_a_sink_far_above_or_below_all_logits():
  args, _ = example(48)
  compare_with_the_definition(args, jnp.array([-1e30, -80.0, 0.0, 30.0]), attention.Form())
  q, k, v, segments, _ = args
  out = attention.attention(q, k, v, segments, segments, jnp.full(4, 1e4))
  assert not np.asarray(out).any()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["softcap", "all"])
def test_a_form_with_an_offset_is_the_end_of_the_whole(name, traced):
  form, with_sinks = FORMS[name]
  (q, k, v, _, _), sinks = example(160)
  sinks, ones = sinks if with_sinks else None, np.ones((2, 160), np.int32)
  whole = attention.attention(q, k, v, ones, ones, sinks, form)
  part = lambda q, offset: attention.attention(q, k, v, ones[:, : q.shape[1]], ones, sinks, form, offset)  # noqa: E731
  for offset, length in ((0, 1), (156, 3), (32, 128)):
    actual = jax.jit(part, static_argnums=() if traced else 1)(q[:, offset : offset + length], offset)
    ref.assert_close(actual, whole[:, offset : offset + length], 1e-6, f"offset {offset}")


# one block, three of 128, one; and with a backward kernel for each of dq and dkv
@pytest.mark.parametrize("kv_heads, length, fused", [(1, 256, 8), (2, 384, 8), (4, 256, 8), (2, 384, 0)])
def test_the_kernel_of_a_tpu_is_plain_attention(monkeypatch, kv_heads, length, fused):
  monkeypatch.setattr(splash, "FUSED_BLOCKS", fused)
  q, k, v = inputs(2, length, length, 4, kv_heads, 16)
  segments = np.ones((2, length), np.int32)
  segments[0, 100:230], segments[0, 230:] = 2, 0
  segments[1, 128:] = 2
  actual, expected = (
    jax.jit(functools.partial(gradients, lambda *a: attention.attention(*a, segments, segments, backend=b)))(q, k, v)  # noqa: B023
    for b in ("interpret", "xla")
  )
  compare(actual, expected)


@pytest.mark.parametrize("window", [0, 1, 130, 400])
def test_the_mask_of_a_kernel_has_blocks_of_one_element(window):
  """Which is all that the kernel takes from them, and makes the mask of a long sequence quickly."""
  order = sequence.order(1024, 4, balanced=True)
  mask, blocks = splash.CausalMask(order, window), [slice(i, i + 128) for i in range(0, 1024, 128)]
  distance, whole = order[:, None] - np.arange(1024), 0
  every = (distance >= 0) & (distance < (window or 1024))
  for rows in blocks:
    for columns in blocks:
      block, expected = mask[rows, columns], every[rows, columns]
      assert (block.any(), block.all()) == (expected.any(), expected.all())
      assert block.size == 1 or np.array_equal(block, expected)
      whole += block.size == 1
  assert whole >= 64 - 8 * (1 + 2 * (window > 0))


# ---- the work that a window saves


@pytest.mark.parametrize("window, share", [(512, 1 / 3), (64, 1 / 8)])
def test_a_window_saves_the_products_of_xla(window, share):
  q, k, v = (jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32) for _ in range(3))
  segments = jnp.ones((1, 2048), jnp.int32)

  def count(form):
    f = lambda *a: attention.attention(*a, segments, segments, form=form, backend="xla").sum()  # noqa: E731
    return flops.jaxpr_flops(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, v))

  full = 7 * 2 * 2 * 2048**2 * 16  # seven products of two heads
  assert count(attention.Form()) == full * 5 / 8
  assert count(attention.Form(window=window)) < share * full
  assert count(attention.Form(window=4096)) == count(attention.Form())


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("length, window", [(4096, 512), (16384, 2048)])
def test_a_window_saves_the_blocks_of_a_kernel(length, window, parts):
  shapes = jax.ShapeDtypeStruct((1, 2, length, 128), jnp.bfloat16)
  mask = splash.CausalMask(sequence.order(length, parts, balanced=True), window)
  made = splash.kernel(mask, 0.0, window, length // parts // 2, "interpret", parts, shapes, shapes)
  block = made.kwargs["block_sizes"].block_kv
  seen = window // block + 1  # blocks of keys that a block of queries sees
  for info in (made.fwd_mask_info, made.dq_mask_info):
    assert info.block_mask.shape[-1] == seen  # steps of the grid: none for hidden blocks
  assert made.dkv_mask_info.block_mask.shape[-2] == seen * parts
  for info in (made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info):
    assert (np.asarray(info.block_mask) > 0).sum() == seen * length // block - seen * (seen - 1) // 2


# ---- the largest logits


@pytest.mark.parametrize("most", [attention.MAX_LOGITS, 2**14, 1])
@pytest.mark.parametrize("form", [attention.Form(), attention.Form(0.7, 2.0, 50)])
def test_the_largest_logits(monkeypatch, form, most):
  monkeypatch.setattr(attention, "MAX_LOGITS", most)
  q, k, _, segments, _ = cases.inputs(3, 160, 4, 2, 8)
  k = k.at[:, 150].mul(9)  # of padding in two rows, of the last places in one
  actual = jax.jit(lambda q, k: attention.max_logits(q, k, segments, segments, form))(q, k)
  assert actual.dtype == jnp.float32
  ref.assert_close(actual, cases.largest(q, k, segments, form), 1e-6)


def test_the_largest_logits_have_no_gradient_and_no_matrix_of_all_heads(monkeypatch):
  monkeypatch.setattr(attention, "MAX_LOGITS", 2**20)
  q, k = (jax.ShapeDtypeStruct((1, 4096, n, 16), jnp.float32) for n in (4, 2))
  segments = jnp.ones((1, 4096), jnp.int32)
  f = lambda q, k: attention.max_logits(q, k, segments, segments).sum()  # noqa: E731
  sizes = [x.aval.size for e in equations(jax.make_jaxpr(f)(q, k).jaxpr) for x in e.outvars]
  assert 2**20 // 4 <= max(sizes) <= 2**20
  one = jnp.ones((1, 8, 1, 4))
  d = jax.grad(lambda q: attention.max_logits(q, q, *[jnp.ones((1, 8), jnp.int32)] * 2).sum())(one)
  assert not np.asarray(d).any()


def test_padding_alone_has_no_largest_logit():
  q, zeros = jnp.ones((1, 8, 2, 4)), jnp.zeros((1, 8), jnp.int32)
  np.testing.assert_array_equal(attention.max_logits(q, q, zeros, zeros), np.float32([-1e30, -1e30]))


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
  mask, shapes = splash.CausalMask(sequence.order(length, parts, balanced=True)), jnp.zeros((1, 2, 1, 16))
  kernel = splash.kernel(mask, 0.0, 0, length // parts // 2, "interpret", parts, shapes, shapes)
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


def names_of_kernels(*arguments):
  return {name: set(kernels) for name, kernels in compiled("head_sizes", *arguments)}


def test_a_tpu_has_kernels_for_heads_of_any_size():
  found = names_of_kernels()
  assert len(found) == 3 and all(kernels >= {"fwd", "dkv"} for kernels in found.values()), found


@pytest.mark.slow
def test_a_tpu_has_kernels_for_heads_of_every_size_in_every_form():
  found = names_of_kernels("every")
  assert len(found) == 22 and all(kernels >= {"fwd", "dkv"} for kernels in found.values()), found
