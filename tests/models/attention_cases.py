"""Cases on 8 simulated devices: attention over split sequences is attention (tests/multidevice.py runs them).

`python -m tests.models.attention_cases <length> <heads> <kv heads> <method>...` compiles it for four v5p chips, which
need not be here, and prints what the test looks at, as JSON; in a process of its own, because libtpu reads its
environment once. With `head_sizes [every]` it compiles for heads of several sizes.
"""

import collections
import functools
import itertools
import json
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from maxscale.config import ConfigError, Sharding
from maxscale.models import attention, splash
from maxscale.sharding import context, rules, sequence
from maxscale.sharding import mesh as mesh_lib
from tests.models import reference as ref

PLAIN = attention.Form()
METHODS = ("ring", "gather", "ulysses")
SEGMENTS = ("batch", "length")
Q, K = (*SEGMENTS, "heads", "head_dim"), (*SEGMENTS, "kv_heads", "head_dim")


class Layout:
  """A mesh of the given sizes and the rules on it; `compute` are rules of the role compute."""

  def __init__(self, devices=None, compute=None, **sizes):
    ones = (1,) * len(mesh_lib.MESH_AXES)
    shape = mesh_lib.MeshShape(tuple(sizes.get(a, 1) for a in mesh_lib.MESH_AXES), ones)
    self.mesh = mesh_lib.make(shape, (devices or jax.devices())[: shape.devices])
    self.rules = rules.make(Sharding(compute=compute or {}), shape.sizes)
    self.parts = self.rules.factor("length", "compute")

  def gradients(self, method="ring", wrap=lambda f: f, **options):
    """A function of the shards of q, k, v, segments, do and sinks: those of o, dq, dk and dv, and the gradient of sinks."""

    def local(q, k, v, segments, do, sinks=None):
      with context.use(self.mesh, self.rules):
        f = lambda q, k, v, sinks: attention.attention(q, k, v, segments, segments, sinks, method=method, **options)  # noqa: E731
        out, pull = jax.vjp(wrap(f), q, k, v, sinks)
        *d, dsinks = pull(do)
        return out, *d, None if sinks is None else context.token_sum(dsinks, residual=False)

    q, k, segments, heads = (self.rules.spec(names, "compute") for names in (Q, K, SEGMENTS, ("heads",)))
    in_specs, out_specs = (q, k, k, segments, q, heads), (q, q, k, k, heads)

    def split(*args):
      return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs[: len(args)], out_specs=out_specs, check_vma=False)(
        *args
      )

    return jax.jit(split)

  def max_logits(self, method, form):
    """A function of the shards of q, k and segments."""
    q, k, segments, heads = (self.rules.spec(names, "compute") for names in (Q, K, SEGMENTS, ("heads",)))

    def local(q, k, segments):
      return context.pmax(attention.max_logits(q, k, segments, segments, form, method), "batch")

    return jax.jit(context.on_mesh(local, self.mesh, self.rules, (q, k, segments), heads))


def inputs(b, t, n, kv, h, dtype=jnp.float32, hv=None):
  """q, k, v, segments, do; documents cross the borders of chunks, the first row ends with padding, one is a whole."""
  rng = np.random.default_rng(0)
  sizes = ((n, h), (kv, h), (kv, hv or h), (n, hv or h))
  q, k, v, do = (jnp.asarray(rng.normal(size=(b, t, *size)), dtype) for size in sizes)
  segments = np.ones((b, t), np.int32)
  for row in range(0, b, 2):
    segments[row] = 1 + np.searchsorted(np.sort(rng.choice(t, 5, replace=False)), np.arange(t))
    segments[row, -t // 5 :] = 0
  return q, k, v, segments, do


def sinks_for(n):
  return jnp.asarray(np.random.default_rng(7).normal(size=n) + 1, jnp.float32)


def dense(q, k, v, segments, do, sinks=None, form=PLAIN):
  """o, dq, dk, dv and the gradient of sinks by the definition, with the [T, T] mask."""
  position = np.arange(q.shape[1])
  distance = position[:, None] - position
  mask = (distance >= 0) & (distance < (form.window or len(position)))
  mask = mask & (segments[:, :, None] == segments[:, None, :])

  def f(q, k, v, sinks):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * (1 / np.sqrt(q.shape[3]) if form.scale is None else form.scale)
    logits = form.softcap * jnp.tanh(logits / form.softcap) if form.softcap else logits
    weights = jnp.where(mask[:, None], jnp.exp(logits), 0)
    total = weights.sum(-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks)[:, None, None])
    return jnp.einsum("bnts,bsnh->btnh", weights / total, v)

  out, pull = jax.vjp(f, q, k, v, sinks)
  return out, *pull(do)


def largest(q, k, segments, form):
  """The largest logit of each head by the definition, with the [T, T] mask; padding does not count."""
  distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
  mask = (distance >= 0) & (distance < (form.window or len(distance)))
  mask = mask & (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  logits = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[3] ** -0.5 if form.scale is None else form.scale)
  logits = form.softcap * jnp.tanh(logits / form.softcap) if form.softcap else logits
  return jnp.where(mask[:, None], logits, -jnp.inf).max((0, 2, 3))


def compare(layout, args, methods=METHODS, tolerance=1e-5, form=PLAIN, sinks=None, **options):
  wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args]
  expected = jax.jit(functools.partial(dense, form=form))(*wide, sinks)
  for method in methods:
    order = sequence.order(args[0].shape[1], layout.parts, attention.balanced(method))
    parts = [x[:, order] for x in args] + [sinks] * (sinks is not None)
    *actual, dsinks = layout.gradients(method, form=form, **options)(*parts)
    for a, b, what in zip(actual, expected, ("o", "dq", "dk", "dv")):
      assert a.dtype == args[0].dtype
      ref.assert_close(a[:, np.argsort(order)], b, tolerance, f"{method} {what}")
    if sinks is not None:
      assert dsinks.dtype == jnp.float32
      ref.assert_close(dsinks, expected[4], tolerance, f"{method} dsinks")


def primitives(jaxpr):
  """Name of a primitive -> equations with it, at any depth."""
  out = collections.Counter()
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    out[equation.primitive.name] += 1
    for value in itertools.chain(*(v if isinstance(v, (tuple, list)) else [v] for v in equation.params.values())):
      if hasattr(getattr(value, "jaxpr", value), "eqns"):
        out += primitives(value)
  return out


FORMS = {
  "softcap": {"form": attention.Form(softcap=1.5)},
  "window": {"form": attention.Form(window=5)},
  "scale": {"form": attention.Form(scale=0.7)},
  "sinks": {"sinks": sinks_for(8)},
  "all": {"form": attention.Form(0.7, 2.0, 11), "sinks": sinks_for(8)},
}


def case_two_devices():
  compare(Layout(context=2), inputs(2, 48, 4, 2, 8))


def case_four_devices():
  compare(Layout(context=4), inputs(2, 48, 8, 4, 8))


def case_every_form():
  for options in FORMS.values():
    compare(Layout(context=4), inputs(2, 48, 8, 4, 8, hv=6), **options)


def case_every_form_beside_split_batch_and_heads():
  compare(Layout(data=2, context=2, tensor=2), inputs(4, 48, 8, 4, 8), **FORMS["sinks"])
  compare(Layout(data=2, context=2, tensor=2), inputs(4, 48, 8, 4, 8, hv=12), **FORMS["all"])


def case_a_sequence_over_two_mesh_axes():
  axes = ("fsdp", "context")
  layout = Layout(fsdp=2, context=4, compute={"batch": "data", "length": axes, "residual_length": axes})
  compare(layout, inputs(2, 48, 8, 8, 8))
  compare(layout, inputs(2, 48, 8, 8, 8), ("gather", "ulysses"), **FORMS["all"])


def case_shares_long_enough_for_blocks():
  compare(Layout(context=2), inputs(2, 256, 2, 2, 8))
  compare(Layout(context=2), inputs(1, 512, 2, 2, 8), form=attention.Form(window=40))  # four blocks of each chunk


def case_bfloat16():
  compare(Layout(context=4), inputs(2, 64, 8, 4, 8, jnp.bfloat16, hv=6), tolerance=2e-2)
  compare(Layout(context=4), inputs(2, 64, 8, 4, 8, jnp.bfloat16, hv=6), tolerance=2e-2, **FORMS["all"])


def case_kernels_of_a_tpu():
  layout, args, sinks = Layout(context=2), inputs(1, 512, 4, 2, 24, hv=16), sinks_for(4)
  compare(layout, args, backend="interpret", form=attention.Form(softcap=2.0), sinks=sinks)
  windows = attention.Form(0.7, 2.0, 130)  # ring has gather's keys then
  compare(layout, args, ("ring", "ulysses"), backend="interpret", form=windows, sinks=sinks)


def case_kernels_of_a_tpu_on_four_devices():
  compare(Layout(context=4), inputs(2, 1024, 1, 1, 16), ("ring", "gather"), backend="interpret")


def case_kernels_of_a_tpu_for_many_blocks():
  fused, splash.FUSED_BLOCKS = splash.FUSED_BLOCKS, 0
  try:
    compare(Layout(context=2), inputs(1, 512, 1, 1, 16), ("ring", "gather"), backend="interpret",
            form=attention.Form(softcap=2.0))  # fmt: skip
  finally:
    splash.FUSED_BLOCKS = fused


def case_the_largest_logits():
  q, k, _, segments, _ = inputs(4, 64, 8, 4, 8)
  for form in (attention.Form(), attention.Form(0.7, 2.0, 11)):
    expected = largest(q, k, segments, form)
    for layout in (Layout(context=4), Layout(data=2, context=2, tensor=2)):
      for method in METHODS:
        order = sequence.order(64, layout.parts, attention.balanced(method))
        actual = layout.max_logits(method, form)(*(x[:, order] for x in (q, k, segments)))
        ref.assert_close(actual, expected, 1e-6, f"{method} {form}")


def case_attention_that_a_policy_keeps_is_not_computed_again():
  """Products and sends; for kernels this is seen in what the TPU compiler makes of it, below."""
  layout, args = Layout(context=4), inputs(1, 64, 4, 4, 8)
  wraps = {"none": lambda f: f, "keep": keep, "full": jax.checkpoint}
  for method in METHODS:
    count = {name: primitives(jax.make_jaxpr(layout.gradients(method, wrap))(*args)) for name, wrap in wraps.items()}
    assert count["keep"]["dot_general"] < count["full"]["dot_general"], (method, count)
    # the backward pass makes the weights itself, and needs nothing again
    assert count["keep"]["dot_general"] == count["none"]["dot_general"], (method, count)
    if method == "ring":
      assert count["keep"]["ppermute"] == count["none"]["ppermute"] < count["full"]["ppermute"], count


def case_every_device_of_a_ring_does_the_same_and_its_program_does_not_grow():
  args = inputs(1, 64, 1, 1, 8)
  four, eight = (primitives(jax.make_jaxpr(Layout(context=parts).gradients())(*args)) for parts in (4, 8))
  assert four == eight
  assert four["ppermute"] and not four["cond"], four


def case_refusals():
  layout = Layout(context=4)
  q, *rest = inputs(1, 48, 6, 6, 8)
  for method, queries, message in (("ulysses", 48, "4 devices .*6 of model.heads"), ("ring", 4, "mesh.context=1")):
    try:
      layout.gradients(method)(q[:, :queries], *rest)
    except ConfigError as error:
      assert re.search(message, str(error)), error
    else:
      raise AssertionError(f"{method} is not refused")


# ---- what the TPU compiler makes of it

DEVICES = 4


def keep(f):
  """f with a remat policy that keeps attention."""
  return jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("attention"))


def overlapped(program):
  """Whether each loop with sends of a scheduled program has a kernel between the first start and the first end."""
  out = []
  for computation in re.split(r"\n(?=%|ENTRY)", program):
    found = re.findall(r"collective-permute-(?:start|done)(?=\()|splash_mha(?=\S* = )", computation)
    if not computation.startswith("ENTRY") and "collective-permute-start" in found:
      out.append(
        "splash_mha" in found[found.index("collective-permute-start") : found.index("collective-permute-done")]
      )
  return out


HEAD_SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))


def abstract(t, n, kv, h, hv, dtype=jnp.bfloat16):
  """Shapes of q, k, v, segments and do."""
  q, k, v, do = (jax.ShapeDtypeStruct((1, t, *size), dtype) for size in ((n, h), (kv, h), (kv, hv), (n, hv)))
  return q, k, v, jax.ShapeDtypeStruct((1, t), jnp.int32), do


def kernels(program):
  return collections.Counter(re.findall(r"%splash_mha_([a-z]+)_\S* = .*custom-call\(", program))


def head_sizes(every):
  """Kernels of attention for heads of some sizes, or of all sizes in all forms."""
  jax.config.update("jax_exec_time_optimization_effort", -1.0)  # quicker
  devices = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
  one, split, sinks = Layout(devices), Layout(devices, context=DEVICES), jax.ShapeDtypeStruct((4,), jnp.float32)
  window, both, half = attention.Form(window=600), attention.Form(softcap=50.0, window=600), jnp.bfloat16
  runs = [(one, 64, 64, half, window), (one, 192, 128, half, PLAIN), (one, 256, 256, half, both)]
  if every:
    runs = [(one, *size, half, form) for size in HEAD_SIZES for form in (PLAIN, window, both)]
    runs += [(one, 128, 128, dtype, attention.Form(softcap=50.0)) for dtype in (half, jnp.float32)]
    runs += [(split, 192, 128, half, form) for form in (attention.Form(softcap=50.0), both)]
  out = []
  for layout, h, hv, dtype, form in runs:
    f = layout.gradients(form=form)
    program = f.lower(*abstract(4096 if layout is split else 2048, 4, 2, h, hv, dtype), sinks).compile().as_text()
    out.append([f"{layout.parts} {h}/{hv} {dtype.__name__} {form}", kernels(program)])
  print(json.dumps(out))


def main(length, heads, kv_heads, *methods):
  layout = Layout(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices, context=DEVICES)
  args, out = abstract(int(length), int(heads), int(kv_heads), 128, 128), {}
  chunk = int(length) // DEVICES // 2
  for method in methods:
    program = layout.gradients(method, keep).lower(*args).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", program)}
    out[method] = {
      "kernels": kernels(program),
      "sends": len(re.findall(r" collective-permute-start\(", program)),
      "overlapped": overlapped(program),
      "scattered": len(re.findall(r"^%all-reduce-scatter| reduce-scatter\(", program, re.M)),
      "squares": [dims for dims in shapes if sum(d >= chunk for d in dims) > 1],
    }
  print(json.dumps(out))


if __name__ == "__main__":
  if sys.argv[1] == "head_sizes":
    head_sizes("every" in sys.argv)
  else:
    main(*sys.argv[1:])
