"""Checkpoint cases on 8 simulated devices: `python -m tests.checkpoint.cases [name ...]` prints one JSON object, case ->
null or its traceback. They share one process of their own, for pytest's has as many devices as it happens to have."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import contextlib
import dataclasses
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxscale import storage
from maxscale.checkpoint import CheckpointError, Leaf, Meta, commit, digest, fingerprint, restore, steps
from maxscale.checkpoint import arrays as arrays_lib
from maxscale.checkpoint.fingerprint import program
from maxscale.checkpoint.layout import flatten, unflatten
from tests.checkpoint.states import FSDP8, LAYOUTS, assert_equal, checkpointer_of, leaves_of, make, reference, words

META = Meta("0123456789ab", '{"run": {}}', "data")
LEAVES = leaves_of(FSDP8)


@contextlib.contextmanager
def raises(*parts: str):
  try:
    yield
  except CheckpointError as e:
    assert all(p in str(e) for p in parts), f"{parts} not all in: {e}"
    return
  raise AssertionError(f"no CheckpointError with {parts}")


def save(run_dir: str, *saved: int, leaves=LEAVES, **options) -> None:
  """Saves the states of some steps; the seed of a state's values is its step."""
  checkpointer = checkpointer_of(run_dir, **options)
  for step in saved:
    checkpointer.save(step, make(leaves, step), leaves, META)
  checkpointer.close()


def data_files(run_dir: str, step: int, array: str = "") -> list[str]:
  base = str(commit.folder(run_dir, step) / "arrays" / array)
  return sorted(os.path.join(d, f) for d, _, names in os.walk(base) for f in names if not f.endswith(".json"))


def case_every_layout_to_every_layout(run_dir):
  want = digest(reference(LEAVES, 1))
  for source in ("same", "4x2 transposed", "separate", "pipeline", "one device"):
    where = f"{run_dir}/{source}"
    save(where, 1, leaves=leaves_of(LAYOUTS[source]))
    for target, layout in LAYOUTS.items():
      leaves = leaves_of(layout)
      restored = restore(where, leaves)
      assert_equal(restored.state, leaves, 1)
      assert digest(fingerprint(restored.state, leaves)) == want, (source, target)
      assert (restored.step, restored.rejected) == (1, [])
      assert (
        dataclasses.replace(restored.meta, versions={}) == META and restored.meta.versions["jax"] == jax.__version__
      )


def case_disk_is_logical_and_chunked_by_layer(run_dir):
  save(run_dir, 1)
  base = commit.folder(run_dir, 1) / "arrays"
  table = json.loads((base / "params/table/zarr.json").read_text())
  assert table["shape"] == [100, 24] and len(data_files(run_dir, 1, "params/table")) == 7  # the eighth is all padding
  query = json.loads((base / "params/layers/query/zarr.json").read_text())
  assert query["chunk_grid"]["configuration"]["chunk_shape"] == [6, 3, 8, 4]
  assert query["codecs"][0]["configuration"]["chunk_shape"] == [1, 3, 8, 4]


def case_fingerprint_is_the_definition(run_dir):
  for layout in LAYOUTS.values():
    leaves = leaves_of(layout)
    got, want = fingerprint(make(leaves), leaves), reference(leaves)
    assert got.keys() == want.keys() and all((got[k] == want[k]).all() for k in want)


def case_fingerprint_sees_flips_and_swaps(run_dir):
  rng, clean = np.random.default_rng(0), fingerprint(make(LEAVES), LEAVES)
  state = flatten(make(LEAVES))

  def changed(path, edit):
    leaf = next(leaf for leaf in LEAVES if leaf.path == path)
    host = np.array(state[path])
    edit(host.reshape(-1).view(np.uint8), host.itemsize)
    got = fingerprint(unflatten(state | {path: jax.device_put(host, leaf.sharding)}), LEAVES)
    return {k: (got[k] != clean[k]) for k in clean}

  def flip(element, bit):
    return lambda b, size: np.bitwise_xor.at(b, np.asarray(element) * size + bit // 8, np.uint8(1 << bit % 8))

  for path, n in (
    ("params/layers/query", 768 * 6),
    ("params/table", 2400),
    ("params/layers/norm", 24 * 6),
    ("step", 1),
  ):
    bits = 8 * state[path].dtype.itemsize
    for _ in range(20):
      diff = changed(path, flip(int(rng.integers(n)), int(rng.integers(bits))))
      # Both words of the one layer, and nothing else.
      assert diff[path].sum() == 2 and sum(d.sum() for d in diff.values()) == 2, path
  # Two flipped signs, which weights alone would not see, and exchanged neighbours.
  assert changed("params/layers/query", flip([5, 70], 31))["params/layers/query"].sum() == 2
  assert changed("params/layers/query", lambda b, _: b[:8].__setitem__(slice(None), np.roll(b[:8], 4)))[
    "params/layers/query"
  ].any()


def case_fingerprint_program_is_local_and_small(run_dir):
  mesh = LEAVES[0].sharding.mesh
  leaves = tuple(
    Leaf(f"w{i}", (4, 1000, 512), (4, 1024, 512), dtype, NamedSharding(mesh, P(*spec)), layer_dims=1)
    for i, (dtype, spec) in enumerate([("float32", (None, "a")), ("bfloat16", (None, None, "a")), ("float32", ())])
  )
  compiled = program(leaves)
  found = re.findall(r"all-\w+|reduce-scatter|collective-\w+|send|recv", compiled.as_text())
  assert not found, found
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.05 * memory.argument_size_in_bytes, memory


def case_save_returns_before_the_write_and_survives_donation(run_dir):
  gate, original = threading.Event(), arrays_lib.write_file

  async def held(store, piece):
    gate.wait(30)
    await original(store, piece)

  arrays_lib.write_file = held
  events = []
  checkpointer = checkpointer_of(run_dir, on_event=lambda kind, **fields: events.append((kind, fields)))
  try:
    state = make(LEAVES, 1)
    blocking = checkpointer.save(1, state, LEAVES, META)
    assert not checkpointer.steps() and [kind for kind, _ in events] == ["save"]
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    jax.block_until_ready(overwrite(state))
    gate.set()
    checkpointer.wait()
  finally:
    arrays_lib.write_file = original
  assert checkpointer.steps() == [1] and events[0] == ("save", {"step": 1, "seconds": blocking})
  assert events[1][0] == "commit" and events[1][1]["bytes"] == sum(x.nbytes for x in _logical(LEAVES))
  checkpointer.close()
  assert_equal(restore(run_dir, LEAVES).state, LEAVES, 1)


def _logical(leaves):
  return [np.empty(leaf.logical_shape, leaf.dtype) for leaf in leaves]


def _expect_fallback(run_dir, array, reason, damage):
  save(run_dir, 1, 2)
  damage()
  restored = restore(run_dir, LEAVES)
  assert restored.step == 1 and [r.step for r in restored.rejected] == [2], restored.rejected
  assert array in restored.rejected[0].array and reason in restored.rejected[0].reason, restored.rejected
  assert_equal(restored.state, LEAVES, 1)
  again = restore(run_dir, LEAVES)
  assert again.step == 1
  return again


def case_truncated_file(run_dir):
  def damage():
    f = data_files(run_dir, 2, "params/table")[3]
    os.truncate(f, os.path.getsize(f) - 1)

  again = _expect_fallback(run_dir, "params/table", "cannot be read", damage)
  assert not again.rejected and steps(run_dir) == [1]  # marked by the first restore
  assert storage.read_sealed(commit.folder(run_dir, 2) / commit.BAD)["array"] == "params/table"
  with raises("step 2", "params/table"):
    restore(run_dir, LEAVES, step=2)


def case_deleted_file(run_dir):
  _expect_fallback(
    run_dir, "params/layers/norm", "missing", lambda: os.remove(data_files(run_dir, 2, "params/layers/norm")[0])
  )


def case_exchanged_files(run_dir):
  def damage():  # both valid by themselves: only the fingerprint can tell
    a, b = data_files(run_dir, 2, "params/layers/query")[:2]
    one, two = storage.path(a).read_bytes(), storage.path(b).read_bytes()
    storage.write(a, two), storage.write(b, one)

  _expect_fallback(run_dir, "params/layers/query", "fingerprint differs in layers [0, 1, 2, 3, 4, 5]", damage)


def case_changed_metadata(run_dir):
  def damage():
    f = commit.folder(run_dir, 2) / "arrays/params/table/zarr.json"
    f.write_text(f.read_text().replace('"fill_value"', '"fill_value" '))

  _expect_fallback(run_dir, "params/table/zarr.json", "was changed", damage)


def case_torn_marker(run_dir):
  f = commit.folder(run_dir, 2) / commit.MARKER
  _expect_fallback(run_dir, commit.MARKER, "torn", lambda: os.truncate(f, 500))
  save(run_dir, 3)  # it goes as garbage
  assert commit.folders(run_dir) == [1, 3]


def case_deleted_marker(run_dir):
  save(run_dir, 1, 2)
  os.remove(commit.folder(run_dir, 2) / commit.MARKER)
  restored = restore(run_dir, LEAVES)
  assert (restored.step, restored.rejected, steps(run_dir)) == (1, [], [1])


def case_all_damaged(run_dir):
  with raises("there is none"):
    restore(run_dir, LEAVES)
  save(run_dir, 1, 2)
  for step in (1, 2):
    os.remove(data_files(run_dir, step, "params/table")[0])
  for _ in range(2):  # the second time from the marks
    with raises("step 1", "step 2"):
      restore(run_dir, LEAVES)


def case_an_outage_condemns_no_checkpoint(run_dir):
  """A store that does not answer proves no damage: the restore stops and says so, and later finds all as it was."""
  save(run_dir, 1, 2)
  original, fired = commit.sha256, []

  def outage(path):
    fired.append(path)
    raise TimeoutError("the store does not answer")

  commit.sha256 = outage
  try:
    with raises("cannot be read now", "the store does not answer", "run it again"):
      restore(run_dir, LEAVES)
  finally:
    commit.sha256 = original
  assert fired and steps(run_dir) == [1, 2] and commit.damaged(run_dir) == []
  assert restore(run_dir, LEAVES).step == 2


def case_partial_restore(run_dir):
  save(run_dir, 1)
  os.remove(data_files(run_dir, 1, "optimizer")[0])
  leaves = tuple(leaf for leaf in LEAVES if leaf.path.startswith("params/"))
  restored = restore(run_dir, leaves)
  assert restored.state.keys() == {"params"}
  assert_equal(restored.state, leaves, 1)
  with raises("optimizer/mu/layers/query"):
    restore(run_dir, LEAVES)


def case_wrong_leaves(run_dir):
  save(run_dir, 1)
  table = next(leaf for leaf in LEAVES if leaf.path == "params/table")
  with raises("params/extra", "nothing of it", "COMMIT.json"):
    restore(run_dir, (dataclasses.replace(table, path="params/extra", parameter=""),))
  with raises("params/table", "bfloat16[104, 24]", "bfloat16[100, 24]", "model config"):
    restore(run_dir, (dataclasses.replace(table, logical_shape=(104, 24)),))
  with raises("params/table", "float32[100, 24]", "bfloat16[100, 24]"):
    restore(run_dir, (dataclasses.replace(table, dtype=np.dtype("float32")),))
  query = LEAVES[0]
  with raises("params/layers/query", "[6]"):
    restore(run_dir, (dataclasses.replace(query, logical_shape=(7, *query.layer_shape), rows=(0, 1, 2, 3, 4, 5, 6)),))
  with raises("only in the state ['step']"):
    checkpointer_of(run_dir).save(2, make(LEAVES), LEAVES[:-1], META)
  assert steps(run_dir) == [1]


def case_retention(run_dir):
  os.makedirs(commit.folder(run_dir, 4) / "arrays")  # left by a crash
  save(run_dir, 5, 10, 15, 20, 25, 30, keep=2, keep_every=10)
  assert commit.folders(run_dir) == steps(run_dir) == [10, 20, 25, 30]


def case_step_saved_again(run_dir):
  save(run_dir, 1, 2)
  state = make(LEAVES, 7)
  checkpointer = checkpointer_of(run_dir)
  checkpointer.save(2, state, LEAVES, META)
  checkpointer.close()
  assert_equal(restore(run_dir, LEAVES, step=2).state, LEAVES, 7)


def case_directory_that_cannot_be(run_dir):
  storage.write(f"{run_dir}/file", "")
  checkpointer = checkpointer_of(f"{run_dir}/file/run")
  with raises("saving step 1", "file/run"):
    checkpointer.save(1, make(LEAVES), LEAVES, META)
    checkpointer.wait()
  checkpointer.close()


def case_write_fails(run_dir):
  """The kernel refuses to write (the limit on a file's size stands for a full disk, which needs no mount)."""
  save(run_dir, 1)
  checkpointer = checkpointer_of(run_dir)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
  try:
    with raises("saving step 2", "too large", "Earlier checkpoints are untouched"):
      checkpointer.save(2, make(LEAVES, 2), LEAVES, META)
      checkpointer.save(3, make(LEAVES, 3), LEAVES, META)  # tells of the failure of step 2
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert steps(run_dir) == [1] and restore(run_dir, LEAVES).step == 1
  checkpointer.save(3, make(LEAVES, 3), LEAVES, META)
  checkpointer.close()
  assert commit.folders(run_dir) == [1, 3]


def case_disk_full(run_dir):
  os.makedirs(f"{run_dir}/disk")
  mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", f"{run_dir}/disk"]
  if subprocess.run(mount, capture_output=True).returncode:
    return "skipped: this user may not mount a small disk"
  try:
    save(f"{run_dir}/disk", 1)
    checkpointer = checkpointer_of(f"{run_dir}/disk", keep=10)
    with raises("the disk is full", "checkpoint.keep"):
      for step in range(2, 8):
        checkpointer.save(step, make(LEAVES, step), LEAVES, META)
      checkpointer.close()
    done = steps(f"{run_dir}/disk")
    assert done and restore(f"{run_dir}/disk", LEAVES).step == done[-1]
  finally:
    subprocess.run(["umount", f"{run_dir}/disk"], check=True)


def case_late_save(run_dir):
  gate, original = threading.Event(), arrays_lib.write_file

  async def held(store, piece):
    gate.wait(30)
    await original(store, piece)

  arrays_lib.write_file = held
  checkpointer = checkpointer_of(run_dir, timeout=1.0)
  try:
    checkpointer.save(1, make(LEAVES), LEAVES, META)
    with raises("checkpoint.timeout=1"):
      checkpointer.wait()
  finally:
    arrays_lib.write_file = original
    gate.set()
    checkpointer.close()
  assert steps(run_dir) == []


def case_64_bits(run_dir):
  jax.config.update("jax_enable_x64", True)
  try:
    host = np.arange(24, dtype=np.int64) * 12345678901
    leaf = Leaf("w", (24,), (24,), np.int64, NamedSharding(LEAVES[0].sharding.mesh, P("a")))
    state = {"w": jax.device_put(host, leaf.sharding)}
    b = np.frombuffer(host.tobytes(), np.uint32)
    assert fingerprint(state, (leaf,))["w"].tolist() == [list(words(b))]
    checkpointer = checkpointer_of(run_dir)
    checkpointer.save(1, state, (leaf,), META)
    checkpointer.close()
    assert np.asarray(restore(run_dir, (leaf,)).state["w"]).tolist() == host.tolist()
  finally:
    jax.config.update("jax_enable_x64", False)


def main(names: list[str]) -> None:
  cases = {k: v for k, v in globals().items() if k.startswith("case_") and (not names or k in names)}
  out = {}
  for name, case in cases.items():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as run_dir:
      try:
        out[name] = case(run_dir)
      except Exception:
        out[name] = traceback.format_exc()
  print(json.dumps(out, indent=2))


if __name__ == "__main__":
  main(sys.argv[1:])
