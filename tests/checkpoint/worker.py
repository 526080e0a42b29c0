# ruff: noqa: E402  (JAX is set up before anything that imports it)
"""One process of a test: `python -m tests.checkpoint.worker <what> <run_dir> [index count port]`."""

import asyncio
import os
import sys

what, run_dir, *rest = sys.argv[1:]
index, count, port = map(int, rest or (0, 1, 0))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // count}"

import jax

if count > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", count, index, heartbeat_timeout_seconds=10)

from jax.experimental import multihost_utils

from maxscale.checkpoint import Checkpointer, CheckpointError, Meta, commit, digest, fingerprint, restore, steps
from maxscale.checkpoint import arrays as arrays_lib
from tests.checkpoint.states import FSDP8, LAYOUTS, assert_equal, checkpointer_of, leaves_of, make

LEAVES = leaves_of(FSDP8)


def say(*words: object) -> None:
  """Prints a result on a line of its own: Gloo's threads write pieces of lines to the same stream."""
  print("\n= " + " ".join(map(str, words)), flush=True)


def save(step: int, checkpointer: Checkpointer) -> None:
  checkpointer.save(step, make(LEAVES, step), LEAVES, Meta())


def die() -> None:
  """Saves step 1; says so in the middle of writing step 2, and hangs there until it is killed."""
  checkpointer, original, written = checkpointer_of(run_dir), arrays_lib.write_file, []
  save(1, checkpointer)
  checkpointer.wait()

  async def hang(store, piece):
    written.append(await original(store, piece))
    if len(written) == 5:
      print("writing", flush=True)
      await asyncio.sleep(600)

  arrays_lib.write_file = hang
  save(2, checkpointer)
  checkpointer.wait()


def load(layout: str = "same") -> None:
  leaves = leaves_of(LAYOUTS[layout])
  restored = restore(run_dir, leaves)
  assert_equal(restored.state, leaves, restored.step)
  say("restored", restored.step, digest(fingerprint(restored.state, leaves)), [r.array for r in restored.rejected])


def save_together() -> None:
  """Two saves; the second, when all is compiled, may neither compile nor run anything that all processes take part in."""
  checkpointer = checkpointer_of(run_dir)
  save(1, checkpointer)
  checkpointer.wait()
  states = make(LEAVES, 2)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))

  def refuse(*args, **kwargs):
    raise AssertionError("a collective in a save")

  kept = {
    name: getattr(multihost_utils, name)
    for name in ("broadcast_one_to_all", "process_allgather", "sync_global_devices")
  }
  for name in kept:
    setattr(multihost_utils, name, refuse)
  checkpointer.save(2, states, LEAVES, Meta())
  checkpointer.close()
  assert not [name for name in compiled if "compile" in name], compiled
  for name, function in kept.items():
    setattr(multihost_utils, name, function)
  assert steps(run_dir) == [1, 2]


def fail_together() -> None:
  """Process 1 cannot write: both learn it at once, process 0 with its number."""
  checkpointer = checkpointer_of(run_dir)
  save(1, checkpointer)
  checkpointer.wait()

  async def fail(store, piece):
    raise OSError("injected")

  if index == 1:
    arrays_lib.write_file = fail
  save(2, checkpointer)
  try:
    checkpointer.close()
  except CheckpointError as e:
    say("failed", e)
  assert steps(run_dir) == [1]


def damage_and_load() -> None:
  """A file that only one process reads is gone: both fall back."""
  if index == 0:
    base = commit.folder(run_dir, 2) / "arrays/params/layers/query/c/0"
    (base / "7/0/0").unlink()
  multihost_utils.sync_global_devices("damaged")
  load()


{
  "die": die,
  "load": load,
  "load_other": lambda: load("2x4"),
  "save_together": save_together,
  "fail_together": fail_together,
  "damage_and_load": damage_and_load,
}[what]()
