"""Benchmarks: `python -m maxscale.bench [--only cpu|tpu|host|input] [--pairs N] [--json F]`.

Every speed is a ratio to a named baseline measured in the same run: the plain hand-written step of the same model
(maxscale/benchmarks/plain.py). The dense and the mixture-of-experts model are small enough for a laptop.

  cpu    this machine: alternating pairs of our step and the plain one, in float32
  tpu    compiled for a v5p chip by the TPU compiler on this CPU (needs libtpu; nothing runs): FLOPs, estimated cycles
  host   the framework's own Python per step, in a run of a tiny model
  input  tokens a second that one core makes
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from typing import Any

PARTS = ("tpu", "cpu", "host", "input")
MODELS = {"dense": 0, "moe": 8}  # experts
Rows = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m maxscale.bench", description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--only", choices=PARTS, help="one part; default: all")
  parser.add_argument("--pairs", type=int, default=8, help="pairs of the comparison on this machine")
  parser.add_argument("--json", help="also write the figures to this file")
  arguments = parser.parse_args(argv)
  _with_large_pages(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  parts = {"tpu": tpu, "cpu": lambda: cpu(arguments.pairs), "host": host, "input": data}
  rows: Rows = {}
  for name in [arguments.only] if arguments.only else PARTS:
    rows[name] = parts[name]()
  if arguments.json:
    with open(arguments.json, "w") as f:
      json.dump(rows, f, indent=2)
  return 0


def _with_large_pages(argv: list[str] | None) -> None:
  """Starts the command again with large pages for malloc, which is read at the start of a process.

  A step on a CPU takes and returns a GiB of memory; in small pages that is a tenth of its time, and most of its noise.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and argv is None:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, "-m", "maxscale.bench", *sys.argv[1:]])


def tpu() -> Rows:
  """Ours against plain for one v5p chip: the compiler's estimated cycles, which leave kernels and collectives out."""
  try:
    import libtpu  # noqa: F401
  except ImportError:
    print("tpu: libtpu is not installed; pip install 'maxscale[plan]' brings it")
    return {}
  from jax.experimental import topologies

  from maxscale.benchmarks import cases, measure
  from maxscale.perf.compiled import program

  device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
  out: Rows = {}
  for name, experts in MODELS.items():
    case = cases.Case(cases.config(experts, "bfloat16", 8), device)
    ours, plain = (measure.compile_step(traced) for traced in (case.ours(), case.plain()))
    cycles = [program.read(c.executable.as_text()).cycles() for c in (ours, plain)]
    total = [sum(c.values()) for c in cycles]
    out[name] = {
      "flops_ratio": ours.flops / plain.flops, "cycles_ratio": total[0] / total[1],
      "cycles": dict(zip(("ours", "plain"), cycles)),
      "temporaries_mib": [c.temporaries / 2**20 for c in (ours, plain)], "compile_s": [ours.seconds, plain.seconds],
    }  # fmt: skip
    row = out[name]
    print(f"tpu {name}: matmul FLOPs {row['flops_ratio']:.4f} x plain, estimated cycles {row['cycles_ratio']:.4f} x "
          f"plain ({total[0] / 1e6:.2f} M against {total[1] / 1e6:.2f} M); temporaries "
          f"{row['temporaries_mib'][0]:.0f} against {row['temporaries_mib'][1]:.0f} MiB; compiled in {ours.seconds:.1f} "
          f"and {plain.seconds:.1f} s (prediction of the compiler for v5p, not a measurement)", flush=True)  # fmt: skip
  return out


def cpu(pairs: int) -> Rows:
  """Ours against plain on this machine, and both against its matmul rate."""
  import jax

  from maxscale.benchmarks import cases, measure
  from maxscale.perf import hardware

  out: Rows = {}
  for name, experts in MODELS.items():
    case = cases.Case(cases.config(experts, "float32", 2), jax.devices()[0])
    compiled = [measure.compile_step(traced) for traced in (case.ours(), case.plain())]
    peak = hardware.measured_matmul_flops("float32", 2.0)
    ratio = measure.alternate(*_steps(case, compiled), pairs)
    peak = max(peak, hardware.measured_matmul_flops("float32", 2.0), key=lambda p: p.flops)
    useful = [case.flops / s for s in (ratio.a_seconds, ratio.b_seconds)]
    # causal attention is counted half, as in MFU, though this CPU computes all of it
    row = out[name] = {
      "ratio": ratio.median, "interval": [ratio.low, ratio.high], "tokens_per_second": case.tokens / ratio.a_seconds,
      "useful_gflops": [u / 1e9 for u in useful], "share_of_matmul_rate": [u / peak.flops for u in useful],
      "matmul_gflops": peak.flops / 1e9, "compile_s": [c.seconds for c in compiled],
      "temporaries_mib": [c.temporaries / 2**20 for c in compiled],
    }  # fmt: skip
    print(f"cpu {name}: time {ratio} of plain; {row['tokens_per_second']:.0f} tokens/s; useful GFLOP/s "
          f"{useful[0] / 1e9:.1f} against {useful[1] / 1e9:.1f}, which is {useful[0] / peak.flops:.0%} and "
          f"{useful[1] / peak.flops:.0%} of a large matmul's {peak.flops / 1e9:.0f}; temporaries "
          f"{row['temporaries_mib'][0]:.0f} against {row['temporaries_mib'][1]:.0f} MiB; compiled in "
          f"{compiled[0].seconds:.1f} and {compiled[1].seconds:.1f} s", flush=True)  # fmt: skip
    if not experts:  # the experts' products run in loops whose trips are data
      shares = [measure.matmul_seconds(t.jaxpr) / s
                for t, s in ((case.ours(), ratio.a_seconds), (case.plain(), ratio.b_seconds))]  # fmt: skip
      row["own_matmuls_share"] = shares
      print(f"cpu {name}: its own matmuls, each run alone, take {shares[0]:.0%} of the time of our step and "
            f"{shares[1]:.0%} of the plain one's", flush=True)  # fmt: skip
  if len(out) == 2:
    share = out["moe"]["useful_gflops"][0] / out["dense"]["useful_gflops"][0]
    out["moe_share_of_dense"] = share
    print(f"cpu moe: {share:.0%} of the dense model's useful FLOP/s")
  return out


def _steps(case: Any, compiled: Any) -> tuple[Any, Any]:
  """Two functions that run a step of ours and of plain to its end; each keeps its own state."""
  import jax

  batch = {k: jax.device_put(v) for k, v in case.batch().items()}
  plain_batch = {k: v for k, v in batch.items() if k != "rows"}
  state = {"ours": case.program().initialise()(), "plain": case.plain_state()}

  def ours() -> None:
    state["ours"], metrics = compiled[0].executable(state["ours"], batch)
    jax.block_until_ready((state["ours"], metrics))

  def plain() -> None:
    params, moments = state["plain"]
    params, moments, _ = compiled[1].executable(params, moments, plain_batch)
    state["plain"] = jax.block_until_ready((params, moments))

  return ours, plain


def host() -> Rows:
  """CPU time of the loop's own thread per step, everything included: batch, dispatch, metrics, events."""
  from maxscale import config as config_lib
  from maxscale import train
  from maxscale.goodput import events
  from maxscale.resilience.interrupt import Interrupt

  tiny = {"run.steps": "300", "run.compile_cache": "", "model.embed": "32", "model.layers": "1", "model.heads": "2",
          "model.kv_heads": "2", "model.mlp": "32", "data.batch_size": "4", "data.length": "32", "mesh.fsdp": "-1",
          "mesh.tensor": "1", "run.simulated_devices": "0", "eval.every": "0", "log.sample_tokens": "0",
          "log.every": "100", "checkpoint.every": "1000000"}  # fmt: skip
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "tiny.py")
    config = config_lib.load(path, [*tiny.items(), ("run.dir", os.path.join(folder, "run"))])
    log = events.EventLog(config.run_dir)
    run = train.Run(config, log)
    with Interrupt() as interrupt:
      run.train(interrupt)
    log.close(0, "complete")
    milliseconds = 1e3 * run.host_seconds / config.run.steps
  print(f"host: {milliseconds:.3f} ms of the loop's thread a step (1 device)")
  return {"milliseconds": milliseconds}


def data() -> Rows:
  """Tokens a second and core of packed batches of the standard library's text."""
  from maxscale.config import Config
  from maxscale.data.loader import throughput

  rate = throughput(Config(), 3.0)
  print(f"input: {rate / 1e6:.1f} M tokens/s on one core (batch {Config().data.batch_size} x {Config().data.length})")
  return {"tokens_per_second_per_core": rate}


if __name__ == "__main__":
  sys.exit(main())
