"""Trains a model: `python -m maxscale.train --config configs/tiny.py [--config.group.option=value ...]`.

Exit codes: 0 the run is complete; 2 the config is wrong (no state was touched); 75 stopped by Ctrl-C or SIGTERM, saved,
the same command goes on; 130 a second Ctrl-C, left at once; 1 anything else.

Several processes train one model when a launcher starts them (launch/). Each runs all of this file: process 0 alone prints
and writes what a run has once, and whatever computes on the devices is done by all, in the same order.

The loop keeps one order, and everything depends on it:
  1. the batch of step N is there before it is needed (made by threads while N-1 runs);
  2. step N is dispatched while N-1 runs: the devices never wait for Python;
  3. the metrics of N-1 are read, which waits until it ends: two steps are in flight at most;
  4. before a save or an evaluation the step in flight is completed: a save takes a state that will not change.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from typing import Any

from maxscale import assemble
from maxscale import config as config_lib
from maxscale.config import Config
from maxscale.errors import UserError
from maxscale.perf.plans import Plan

PROGRAM = "python -m maxscale.train"


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--config", required=True, help="a file with get_config(), e.g. configs/tiny.py")
  parser.add_argument("--print_config", action="store_true", help="print the resolved config and its hash, and stop")
  parser.add_argument("--audit", action="store_true", help="print each array with its shardings and bytes, and stop")
  parser.add_argument("--small", action="store_true", help="a scaled-down copy on 8 simulated CPU devices")
  parser.add_argument("--plan", help="what `maxscale.plan` found best: its options and flags, below those given here")
  arguments, rest = parser.parse_known_args(argv)
  try:
    overrides = config_lib.split_overrides(rest)
    plan = assemble.plan(arguments.plan, arguments.config, arguments.small) if arguments.plan else None
    config = config_lib.load(arguments.config, assemble.planned(plan) + overrides, arguments.small)
    if arguments.print_config:
      print(config_lib.to_json(config))
      print(f"hash {config.hash}", file=sys.stderr)
      return 0
    assemble.check(config)
    from maxscale import environment

    environment.prepare(config)
    if arguments.audit:
      print(assemble.audit(config))
      return 0
    return run(config, plan)
  except Exception as e:
    from maxscale import distributed

    distributed.leave(PROGRAM, e)
    if not isinstance(e, UserError):
      raise
    print(f"{PROGRAM}: {e}", file=sys.stderr)
    return e.exit_code


def run(config: Config, plan: Plan | None = None) -> int:
  """Starts or resumes the run of a config and trains to its end; returns the exit code."""
  from maxscale import distributed, environment, resume, storage
  from maxscale.goodput import report
  from maxscale.goodput.telemetry import line
  from maxscale.resilience.interrupt import Interrupt

  with Interrupt() as interrupt:  # from here on: a signal while compiling, too, ends in a save
    done = resume.check(config)
    if done is not None and done >= config.run.steps:
      if environment.place()[0] <= 0:
        line(f"{config.run_dir} is complete: {done} steps are in its checkpoint. To go on, raise --config.run.steps; to "
             f"start anew, give another --config.run.dir; to sample: python -m maxscale.generate --run {config.run_dir}")  # fmt: skip
        if not storage.path(f"{config.run_dir}/report.html").exists():  # it was stopped after its last checkpoint
          line(f"report {report.write_report(config.run_dir)}")
      return 0
    log = resume.attempt(config)
    interrupt.agree(lambda e: (log.failed(e), distributed.leave(PROGRAM, e)))
    try:
      code, reason = Run(config, log, plan).train(interrupt)
    except BaseException as e:
      log.failed(e)
      raise
    log.close(code, reason)
    return code


class Run:
  """One attempt at a run: what is opened once, and the loop."""

  def __init__(self, config: Config, log: Any, plan: Plan | None = None):
    from maxscale.goodput import events
    from maxscale.goodput.metrics import MetricsWriter
    from maxscale.goodput.telemetry import line

    self.config, self.log = config, log
    self._profiling = False
    self.tokenizer, vocab = assemble.vocabulary(config)
    log.enter("device_init")
    self.program = assemble.build(config, vocab, plan=plan)
    import jax

    events.watch_jax(log)
    first = jax.devices()[0]
    log.event("devices", devices=jax.device_count(), device_kind=first.device_kind)
    self._announce(line)
    log.enter("data_init")
    from maxscale.data.batches import Batches

    self.batches = Batches(config, self.tokenizer)
    self.heldout = Batches(config, self.tokenizer, "heldout") if config.eval.every else None
    self.writer = MetricsWriter(config.run_dir, config.log.tensorboard) if jax.process_index() == 0 else None

  def _announce(self, line: Any) -> None:
    from maxscale.models import module
    from maxscale.sharding import audit as audits

    program, c = self.program, self.config
    parameters = module.count(program.skeleton.specs)
    state = audits.bytes_per_device(program.infos(), program.rules)
    sizes = {axis: n for axis, n in program.rules.sizes.items() if n > 1}
    devices = program.mesh.devices.size
    line(f"run {c.run.name} in {c.run_dir}, attempt {self.log.attempt}, config {c.hash}")
    mesh = " x ".join(f"{axis}={n}" for axis, n in sizes.items()) or "one device"
    slices = f" over {math.prod(program.rules.slices.values())} slices" if program.rules.slices else ""
    line(f"mesh {mesh}{slices} ({devices} x {program.mesh.devices.flat[0].device_kind}), "
         f"batch {c.data.batch_size} x {c.data.length} tokens")  # fmt: skip
    line(f"{parameters:,} parameters; state {state / 2**20:.1f} MiB on a device")

  def train(self, interrupt: Any) -> tuple[int, str]:
    """Restores or initialises, compiles, loops, ends; returns (exit code, reason)."""
    from maxscale import resume, storage
    from maxscale.checkpoint.manager import Checkpointer
    from maxscale.goodput.telemetry import line
    from maxscale.resilience.interrupt import INTERRUPTED

    c = self.config
    state, start = resume.restore_or_initialise(self)
    if self.writer:  # only now: a resume that is refused leaves the config of the run as it was
      storage.write(f"{c.run_dir}/config.json", config_lib.to_json(c))
    self.compiled = {shape: self._compile(*shape) for shape in assemble.batch_shapes(c)}
    if c.log.monitor_every:
      with self.log.state("compile"):
        watch = self.program.watch()
        self.watch = {s: self.program.compile(watch.trace(*self.program.abstract(*s))) for s in self.compiled}
    saver = Checkpointer(c.run_dir, c.checkpoint.keep, c.checkpoint.keep_every, c.checkpoint.timeout, self.log.event)
    try:
      state, step = self._loop(state, start, saver, interrupt)
    except BaseException:
      self._abandon(saver)
      raise
    self.log.enter("finish")
    saver.close()
    if step < c.run.steps:
      line(f"stopped by {interrupt.requested} after step {step}; the checkpoint is complete, the same command goes on")
      self.close()
      return INTERRUPTED, interrupt.requested
    from maxscale import finish

    finish.finish(self, state)
    return 0, "complete"

  def _abandon(self, saver: Any) -> None:
    """After an error in the loop: the save in flight still ends, and what it says does not hide the error."""
    from maxscale.goodput.telemetry import line

    try:
      saver.close()
      self.close()
    except (UserError, OSError) as e:
      line(f"while stopping: {e}")

  def close(self) -> None:
    if self.writer:
      self.writer.close()

  def _compile(self, batch: int, length: int) -> tuple[Any, float]:
    """The compiled step for a batch [B, T], and the matmul FLOPs that it executes (NaN where they cannot be counted)."""
    from maxscale.goodput.telemetry import line
    from maxscale.perf import flops

    with self.log.state("compile"):
      start = time.perf_counter()
      traced = self.program.trace(batch, length)
      compiled = self.program.compile(traced)
      memory = compiled.memory_analysis()
      line(f"compiled the step for {batch} x {length} in {time.perf_counter() - start:.1f} s; predicted memory on a "
           f"device: {(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20:.1f} MiB, of it "
           f"{memory.temp_size_in_bytes / 2**20:.1f} temporaries")  # fmt: skip
      notes: list[str] = []
      executed = flops.jaxpr_flops(traced.jaxpr, notes)
      for note in dict.fromkeys(notes):
        line(f"hfu is n/a: {note}")
      return compiled, math.nan if notes else executed

  def _loop(self, state: Any, start: int, saver: Any, interrupt: Any) -> tuple[Any, int]:
    """Steps from `start` (steps done) to the end or an interrupt; returns the saved state and its step."""
    from maxscale.data.feed import Feed
    from maxscale.goodput.telemetry import Pending, Telemetry, rates

    c, log = self.config, self.log
    telemetry = Telemetry(log, self.writer, rates(c, self.program), c.run.steps, c.log.every, c.log.monitor_every,
                          int(state["skipped"]))  # fmt: skip
    feed = Feed(c, self.batches, start, c.run.steps, self.program.batch_sharding)
    pending: Pending | None = None
    gc.collect()
    gc.freeze()  # what exists now lives to the end; from here the collector runs at saves and evaluations only
    gc.disable()
    log.enter("step")
    busy = time.thread_time()
    try:
      for step in range(start + 1, c.run.steps + 1):
        self._profile(step)
        if feed.waiting:
          with log.state("data_wait"):
            batch = next(feed)
        else:
          batch = next(feed)
        shape = self.batches.shape(step - 1)
        program, executed = self.compiled[shape]
        dispatched = time.perf_counter()
        state, metrics = program(state, batch)  # step N; N-1 is still running
        if c.log.monitor_every and step % c.log.monitor_every == 0:
          state, seen = self.watch[shape](state, batch)
          metrics = {**metrics, **seen}
        previous, pending = pending, Pending(step, metrics, shape[0] * shape[1], shape[1], executed, dispatched)
        if previous:
          telemetry.complete(previous)
        stop = interrupt.stops_after(step) or step == c.run.steps
        save, evaluate = stop or step % c.checkpoint.every == 0, c.eval.every and step % c.eval.every == 0
        if save or evaluate:
          telemetry.complete(pending)
          pending = None
          if save:
            self._save(saver, state, step)
          if evaluate and not interrupt.stops_after(step):
            self.evaluate(state, step)
          gc.collect()
        if stop:
          return state, step
    finally:
      self._profile(math.inf)
      self.host_seconds = time.thread_time() - busy  # CPU time of this thread: waiting for a device costs none
      feed.close()
      gc.enable()
    return state, start

  def _save(self, saver: Any, state: Any, step: int) -> None:
    from maxscale.checkpoint.commit import Meta
    from maxscale.resume import leaves

    data = json.dumps(self.batches.fingerprint, sort_keys=True)
    meta = Meta(self.config.hash, config_lib.to_json(self.config), data)
    with self.log.state("save"):
      saver.save(step, state, leaves(self.program), meta)

  def evaluate(self, state: Any, step: int) -> float:
    """Held-out loss in nats per token over eval.batches fixed batches."""
    from maxscale.data.feed import place
    from maxscale.goodput.telemetry import line

    heldout = self.heldout
    assert heldout is not None, "an evaluation needs eval.every > 0"
    with self.log.state("eval"):
      start = time.perf_counter()
      sums = []
      program = self.__dict__.setdefault("_evaluate", self.program.evaluate())
      for i in range(self.config.eval.batches):
        batch = place(heldout.batch(i), heldout.shape(i)[0], self.program.batch_sharding)
        sums.append([float(x) for x in program(state["params"], batch)])
      loss = sum(s[0] for s in sums) / max(1, sum(s[1] for s in sums))
      seconds = time.perf_counter() - start
      self.log.event("eval", step=step, loss=loss, seconds=seconds)
      if self.writer:
        self.writer.write(step, {"heldout_loss": loss})
        line(f"step {step}  held-out loss {loss:.4f} nats per token ({seconds:.1f} s)")
    return loss

  def _profile(self, step: float) -> None:
    import jax

    first, path = self.config.log.profile_start, f"{self.config.run_dir}/profile"
    if first and step == first and self.writer:
      jax.profiler.start_trace(path)
      self._profiling = True
    elif self._profiling and step >= first + self.config.log.profile_steps:
      jax.profiler.stop_trace()
      self._profiling = False
      self.log.event("profile", step=first, path=path)


if __name__ == "__main__":
  sys.exit(main())
