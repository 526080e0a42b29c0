"""States for the checkpoint tests: the same logical values under any mesh, padding and stacking."""

import dataclasses
import math

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxscale.checkpoint import Checkpointer, Leaf
from maxscale.checkpoint.layout import unflatten

LAYERS, WIDTH, HEADS, HEAD, VOCAB = 6, 24, 8, 4, 100

# parameter -> (logical axes of one layer, sizes, dtype, whether it is in every layer)
PARAMETERS = {
  "params/layers/query": ("dnh", (WIDTH, HEADS, HEAD), np.float32, True),
  "params/layers/norm": ("d", (WIDTH,), ml_dtypes.bfloat16, True),
  "params/table": ("vd", (VOCAB, WIDTH), ml_dtypes.bfloat16, False),
  "optimizer/mu/layers/query": ("dnh", (WIDTH, HEADS, HEAD), np.float32, True),
  "mask": ("d", (WIDTH,), np.bool_, False),
  "step": ("", (), np.int32, False),
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Mesh shape, mesh axis of each logical axis, padding multiple of the vocabulary, stacking."""

  mesh: tuple = (8,)
  axes: tuple = (("d", "a"), ("v", "a"))
  vocab_multiple: int = 128
  stacking: str = "stacked"  # stacked | separate | pipeline (2 stages, interleaved)


FSDP8 = Layout()
LAYOUTS = {
  "same": FSDP8,
  "2x4": Layout((2, 4), (("d", "a"), ("n", "b"), ("v", ("a", "b"))), 128),
  "4x2 transposed": Layout((4, 2), (("n", "a"), ("h", "b"), ("v", "b"), ("d", "a")), 8),
  "one device": Layout((1,), (), 1),
  "other padding": Layout((8,), (("v", "a"),), 64),
  "separate": Layout((2, 4), (("d", "b"),), 1, "separate"),
  "pipeline": Layout((2, 4), (("s", "a"), ("d", "b"), ("v", "b")), 4, "pipeline"),
}


def checkpointer_of(run_dir: str, keep: int = 3, keep_every: int = 0, timeout: float = 1800.0, **more) -> Checkpointer:
  return Checkpointer(run_dir, keep, keep_every, timeout, **more)


def value(parameter: str, layer: int, seed: int = 0) -> np.ndarray:
  """Logical values of one layer."""
  _, shape, dtype, _ = PARAMETERS[parameter]
  rng = np.random.default_rng([seed, layer, *parameter.encode()])
  bits = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
  return rng.random(shape) < 0.5 if dtype is np.bool_ else bits.view(dtype).reshape(shape)


def leaves_of(layout: Layout) -> tuple[Leaf, ...]:
  n, auto = math.prod(layout.mesh), (AxisType.Auto,) * len(layout.mesh)
  mesh = Mesh(np.array(jax.devices()[:n]).reshape(layout.mesh), tuple("ab")[: len(layout.mesh)], auto)
  axes, out = dict(layout.axes), []
  for name, (dims, shape, dtype, layered) in PARAMETERS.items():
    padded = tuple(
      -(-s // layout.vocab_multiple) * layout.vocab_multiple if d == "v" else s for d, s in zip(dims, shape)
    )
    used, spec = set(), []
    for d in dims:  # the first dimension that asks for a mesh axis gets it
      axis = axes.get(d)
      names = {axis} if isinstance(axis, str) else set(axis or ())
      spec.append(None if names & used else axis)
      used |= names
    lead, lead_spec = {"stacked": ((LAYERS,), (None,)), "pipeline": ((2, LAYERS // 2), (axes.get("s"), None))}.get(
      layout.stacking, ((), ())
    )
    if not layered:
      out.append(Leaf(name, shape, padded, dtype, NamedSharding(mesh, P(*spec))))
    elif layout.stacking == "separate":
      head, tail = name.split("layers/")
      sharding = NamedSharding(mesh, P(*spec))
      out += [Leaf(f"{head}layers/{i}/{tail}", shape, padded, dtype, sharding, 0, (i,), name) for i in range(LAYERS)]
    else:
      rows = (0, 2, 4, 1, 3, 5) if layout.stacking == "pipeline" else ()
      sharding = NamedSharding(mesh, P(*lead_spec, *spec))
      out.append(Leaf(name, lead + shape, lead + padded, dtype, sharding, len(lead), rows))
  return tuple(out)


def host_value(leaf: Leaf, seed: int = 0) -> np.ndarray:
  """The padded array of a leaf."""
  rows = np.stack([value(leaf.parameter, layer, seed) for layer in leaf.rows])
  out = np.zeros(leaf.padded_shape, leaf.dtype)
  out[tuple(slice(n) for n in leaf.logical_shape)] = rows.reshape(leaf.logical_shape)
  return out


def make(leaves: tuple[Leaf, ...], seed: int = 0) -> dict:
  def array(leaf):
    host = host_value(leaf, seed)
    return jax.make_array_from_callback(leaf.padded_shape, leaf.sharding, lambda index: host[index])

  return unflatten({leaf.path: array(leaf) for leaf in leaves})


def assert_equal(state: dict, leaves: tuple[Leaf, ...], seed: int = 0) -> None:
  """Bit equality of what this process holds, padding included."""
  from maxscale.checkpoint.layout import arrays_of

  for leaf, x in zip(leaves, arrays_of(state, leaves)):
    host = host_value(leaf, seed)
    for shard in x.addressable_shards:
      assert np.asarray(shard.data).tobytes() == host[shard.index].tobytes(), leaf.path


def reference(leaves: tuple[Leaf, ...], seed: int = 0) -> dict[str, np.ndarray]:
  """Fingerprints by plain numpy, from the definition in fingerprint.py."""
  out = {}
  for name in {leaf.parameter for leaf in leaves}:
    layered = PARAMETERS[name][3]
    out[name] = np.array([words(value(name, i, seed)) for i in range(LAYERS if layered else 1)], np.uint32)
  return out


def words(x: np.ndarray) -> tuple[int, int]:
  unsigned = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u4"}[x.dtype.itemsize]
  b = np.frombuffer(x.tobytes(), unsigned).astype(np.uint32)
  p = np.arange(b.size, dtype=np.uint32)
  h = b + p * np.uint32(0x9E3779B1)
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  h ^= h >> np.uint32(16)
  return int(h.sum(dtype=np.uint32)), int((h * (p * np.uint32(0xC2B2AE3D) | np.uint32(1))).sum(dtype=np.uint32))
