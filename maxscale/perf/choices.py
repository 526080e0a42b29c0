"""What each choice of the step gains, by prediction: `python -m maxscale.perf.choices` writes docs/choices.md.

A choice is taken away by options, or, where the code has no switch on purpose, by something else in the place of one of
its functions. Both sides are compiled as `python -m maxscale.plan` does, each in a process of its own. `--only NAME`
leaves the rest of the page as it is. `--without NAME`, before the arguments of plan, is plan without a choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from maxscale import plan
from maxscale.errors import UserError
from maxscale.perf.compiler import OPTIONS, chip_of_topology
from maxscale.perf.gate import GIB, ROOT, Case

PROGRAM = "python -m maxscale.perf.choices"
PAGE = ROOT / "docs/choices.md"
STEP, HBM = "predicted step, ms", "HBM, GiB"
MISSING = "Not measured yet."
SMALLEST = 0.005  # of a step, or of HBM: less is no difference
Figures = dict[str, float]  # row of a table -> value; without STEP it does not fit


# ---- what a simple step does: functions of what they replace. JAX is imported only once plan has set its environment.


def small_blocks(block_sizes: Any) -> Any:
  return lambda **sizes: block_sizes(**{k: v if isinstance(v, bool) else min(v, 512) for k, v in sizes.items()})


def plain_loss(cross_entropy: Any) -> Any:
  """All logits at once, and plain differentiation of the softmax; for a vocabulary that is neither split nor padded."""
  import jax
  import jax.numpy as jnp

  from maxscale.models import kernels, loss

  def made(spec: Any, x: Any, table: Any, targets: Any, scale: Any) -> Any:
    logits = loss.softcapped(kernels.matmul("btd,vd->btv", x, table).astype(jnp.float32), spec.softcap)
    log_z, valid = jax.nn.logsumexp(logits, -1), targets >= 0
    target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    nll, z_loss = (jnp.where(valid, x, 0) for x in (log_z - target, spec.z_loss * log_z**2))
    return scale * (nll + z_loss).sum(), jax.lax.stop_gradient(nll.sum())

  return made


def one_hot(lookup: Any) -> Any:
  import jax

  from maxscale.models import kernels

  return lambda w, tokens: kernels.matmul("btv,vd->btd", jax.nn.one_hot(tokens, len(w.used), dtype=w.used.dtype), w)


def wide_gathers(of: Any) -> Any:
  """Of `Weight.of`: the float32 shards are gathered, then cast."""
  import jax

  from maxscale.sharding import context

  used = lambda w, names, dtype: jax.lax.stop_gradient(context.gather_param(w, names).astype(dtype))  # noqa: E731
  return lambda w, names, dtype, *rest: of.__self__(used(w, names, dtype), w, names, *rest)


def sliced_rotation(rotate: Any) -> Any:
  """Halves of the heads are cut out, turned and joined again; for models whose heads turn whole."""
  import jax.numpy as jnp

  def made(x: Any, positions: Any, frequencies: Any, factor: float = 1.0) -> Any:
    angle = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    (a, b), sin, cos = jnp.split(x.astype(jnp.float32), 2, axis=-1), factor * jnp.sin(angle), factor * jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

  return made


# ---- the choices


_SHORT = ("run.steps=100", "optimizer.warmup_steps=10")  # short runs have no slow compile options
V6E, V5P = Case("llama3_8b", "v6e:16x16", _SHORT), Case("llama3_8b", "v5p:4x4x4", _SHORT)
MOE, MANY = Case("mixtral_8x7b", "v5p:4x4x4", _SHORT), Case("qwen3_moe", "v5p:8x8x8", _SHORT)
TUNED = dataclasses.replace(V6E, options=("run.steps=100000",))


@dataclasses.dataclass(frozen=True)
class Choice:
  """Something that the step does.

  Attributes:
    what, why: a heading, and the reason, with what the prediction does not say of it.
    options: that take it away.
    cases: what it is shown on.
    replace: "module:name" in maxscale/models -> function of what is there, whose result takes its place.
  """

  what: str
  why: str
  options: tuple[str, ...] = ()
  cases: tuple[Case, ...] = (V6E,)
  replace: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)


def _flags(what: str, cases: tuple[Case, ...], *ends: str) -> Choice:
  """Compiler options of dense models whose names end so, with the reasons that their table has."""
  chips = {chip_of_topology(case.topology) for case in cases}
  has = [o for o in OPTIONS if chips & {*o.chips} and {*o.features} <= {"dense", "tuned"}]
  found = {o.name: o.reason for o in has if o.name.endswith(ends)}
  why = " ".join(f"`{name}`: {reason}." for name, reason in found.items())
  return Choice(what, why, tuple(f"run.flags.{name}=" for name in found), cases)


CHOICES = {
  "attention": Choice(
    "Attention is a kernel", "It keeps a block of the logits in VMEM; plain operations write all of them to HBM.",
    replace={"attention:attention": lambda f: functools.partial(f, backend="xla")}),
  "attention_blocks": Choice(
    "Blocks of attention are 1024 queries by 1024 keys, not 512 by 512",
    "Fewer partial sums of dq, fewer steps of the kernel's grid, more products that the mask hides. The prediction has "
    "one rate for blocks of any size: what a step of the grid costs beside its products is not in it.",
    replace={"splash:library.BlockSizes": small_blocks}),
  "fused_backward": Choice(
    "The backward pass of attention is one kernel, not two",
    "It makes the logits once instead of twice; for each of up to 8 blocks of keys it leaves a dq.",
    replace={"splash:FUSED_BLOCKS": lambda blocks: 0}),
  "dq": Choice(
    "The partial sums of dq are added by a chain of additions",
    "The compiler fuses additions into what reads dq; the library's sum over a leading dimension it does not.",
    cases=(V5P,), replace={"splash:_partials_added": lambda added: lambda f: f}),
  "rotary": Choice(
    "Rotary embeddings swap the pairs of a head by a product with zeros and ones",
    "A slice or a concatenation of half of the lanes is a pass through HBM of its own; what follows a product is its "
    "epilogue. The numbers are the same to the bit.", replace={"self_attention:rope.rotate": sliced_rotation}),
  "loss": Choice(
    "The loss makes its gradients in the forward pass, in chunks",
    "For HBM: float32 logits of a chunk are used for the loss, dx and dw while they are there. Without: all logits at "
    "once, rounded to bfloat16, and plain differentiation.", replace={"decoder:cross_entropy": plain_loss}),
  "loss_chunks": Choice(
    "Logits exist for a chunk of positions at a time", "512 MiB of them, to save HBM. Without: one chunk.",
    ("loss.chunk=16384",)),
  "loss_float32": Choice(
    "The gradient of the logits stays in float32 until the products read it",
    "The compiler then computes it inside both products, which round it to bfloat16, and does not write it out.",
    cases=(V5P,), replace={"loss:_dot": lambda dot: lambda a, b, *rest: dot(a.astype(b.dtype), b, *rest)}),
  "lookup": Choice(
    "The embedding is a lookup, its gradient a scatter-add",
    "A product with rows of zeros and ones, which some programs for TPUs have instead, is as much work as the head.",
    replace={"kernels:lookup": one_hot}),
  "narrow_gathers": Choice(
    "Parameters are cast to bfloat16, then gathered", "It halves what the gathers of FSDP move.",
    replace={"kernels:Weight.of": wide_gathers}),
  "float32_gradients": Choice(
    "Gradients of parameters are made, and summed over devices, in float32",
    "For accuracy: bfloat16 rounds each partial sum to 8 bits. It doubles what scatters move.",
    ("optimizer.grad_reduce_dtype=bfloat16",)),
  "gathers": _flags("Gathers run on the SparseCores", (V6E, V5P), "_all_gather"),
  "gathers_2d_3d": _flags("So do those over two and three dimensions of the torus", (V5P,), "d_all_gather"),
  "scatters": _flags("Reduce-scatters run on the SparseCores", (V6E, V5P), "reduce_scatter"),
  "scatters_nd": _flags("So do those over several dimensions of the torus", (V5P,), "_nd_reduce_scatter"),
  "async_gathers": _flags("A gather stays one", (V5P,), "_prefer_async_allgather_to_allreduce"),
  "sparsecore_mode": _flags("How SparseCores run collectives", (V5P,), "_on_sc", "_megacore_partitioning",
                            "_instruction_fusion", "_disjoint_spmem"),
  "vmem": _flags("Runs of 2,000 steps and more give a fusion more VMEM", (TUNED,), "_scoped_vmem_limit_kib"),
  "remat_attention": Choice(
    "The output of attention is kept (`remat.policy=attention`)",
    "Of a layer it takes longest to compute again. Without: `full`, which keeps the residual stream alone.",
    ("remat.policy=full",)),
  "remat": Choice("The rest of a layer is computed again", "To save HBM. Without: `none`.", ("remat.policy=none",)),
  "fsdp": Choice(
    "A dense model of this size: FSDP, no tensor parallelism", "Gathers of parameters hide behind products; a product "
    "waits for the activations that tensor parallelism moves. Without: `mesh.tensor=4`.", ("mesh.tensor=4",)),
  "experts_kernels": Choice(
    "Experts' products are kernels of our own", "XLA's `ragged_dot` has none for the gradient of the matrices.",
    cases=(MOE,), replace={"expert_mlp:expert_mlp": lambda f: functools.partial(f, backend="xla")}),
  "experts_layout": Choice(
    "Many experts are split over devices, and tokens go to them",
    "Tokens move, not the parameters of experts. Without: `mesh.expert=1`, all FSDP.", ("mesh.expert=1",), (MANY,)),
  "experts_gather": Choice(
    "Devices that share experts gather all of their tokens",
    "From five choices a token on a gather moves less than the ragged exchange of the chosen rows, runs beside other "
    "work, and leaves rows where they are. Without: `sharding.experts=exchange`.", ("sharding.experts=exchange",), (MANY,)),
  "microbatches": Choice(
    "A mixture's batch in four parts", "A quarter of it is in HBM at once, so that nothing is computed again; parameters "
    "are gathered four times, beside other work. Without: two parts and the attention alone kept.",
    ("sharding.microbatches=2", "remat.policy=attention"), (MOE,)),
}  # fmt: skip


# ---- measuring


@functools.cache
def measure(case: Case, without: str = "") -> tuple[str, Figures]:
  """(versions, figures) of a case with every choice, or without one. UserError: it fails, and not for its size."""
  with tempfile.TemporaryDirectory() as folder:
    way = ["maxscale.perf.choices", "--without", without] if without else ["maxscale.plan"]
    command = [sys.executable, "-m", *way, "--config", f"configs/{case.config}.py", "--topology", case.topology,
               "--json", f"{folder}/report.json", *(f"--config.{option}" for option in case.options)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if too_large := re.search(r"does not fit by .* needs ([\d.]+) GiB", done.stderr):
      return "", {HBM: float(too_large.group(1))}
    if done.returncode:
      raise UserError(f"without {without or 'nothing'}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    report = json.loads(pathlib.Path(folder, "report.json").read_text())
  return ", ".join(f"{name} {version}" for name, version in report["versions"].items()), figures(report)


def figures(report: Mapping[str, Any]) -> Figures:
  """The rows of a table, of a report as JSON."""
  p = report["predicted"]
  names = {"attention": "attention kernels", "grouped": "experts' kernels", "kernel": "other kernels"}
  out = {STEP: 1e3 * p["seconds"]}
  for cls, seconds in p["classes"].items():
    row = f"{names.get(cls, 'exposed transfers' if cls.startswith('exposed') else cls)}, ms"
    out[row] = out.get(row, 0.0) + 1e3 * seconds
  out |= {"kernels that count as 0 s": p["unmodelled"], HBM: report["peak"] / GIB}
  out["collectives, GiB"] = sum(row["bytes"] for row in report["collectives"]) / GIB
  return out | {"compile, s": report["compile_seconds"]}


def without(name: str, arguments: list[str]) -> int:
  """plan, without a choice. The exit code."""
  compile_step = plan.compile_step

  def replaced(*args: Any) -> Any:
    for target, make in CHOICES[name].replace.items():
      replace(target, make)
    return compile_step(*args)

  plan.compile_step = replaced
  return plan.main([*arguments, *(f"--config.{option}" for option in CHOICES[name].options)])


def replace(target: str, make: Callable[[Any], Any], put: Callable[[Any, str, Any], Any] = setattr) -> None:
  """Puts make(it) in the place of what "module:name" names: ImportError or AttributeError if it has gone."""
  module, *path = re.split("[:.]", target)
  owner = functools.reduce(getattr, path[:-1], importlib.import_module(f"maxscale.models.{module}"))
  put(owner, path[-1], make(getattr(owner, path[-1])))


# ---- the page

INTRO = f"""# Choices of the step

What each choice gains: the same step without it and with it, compiled for chips that are not here. `{PROGRAM}`
writes this page, `--only NAME` a part of it. Seconds are predictions, not measurements: how far they are from public
step times is what `python -m maxscale.plan --calibration` says. Compile seconds are those of the machine that wrote it.
"""


def section(name: str, found: Mapping[Case, tuple[tuple[str, Figures], tuple[str, Figures]]]) -> str:
  """A choice's part of the page, of what was measured for each case without it and with it (nothing: it is missing)."""
  out = [f"## `{name}`: {CHOICES[name].what}", CHOICES[name].why]
  for case, ((_, before), (versions, after)) in found.items():
    options = "".join(f", `{option}`" for option in case.options if option not in _SHORT)
    out += [f"`{case.config}` on {case.topology}{options} ({versions}). {verdict(before, after)}", table(before, after)]
  return "\n\n".join(out if found else [*out, MISSING]) + "\n"


def verdict(before: Figures, after: Figures) -> str:
  """What the choice does to the step, in a sentence."""
  if STEP not in before:
    return "Without it the step does not fit."
  changes = {what: (after[row] - before[row]) / before[row] for what, row in (("time", STEP), ("HBM", HBM))}
  words = [f"{abs(d):.1%} {'less' if d < 0 else 'more'} {what}" for what, d in changes.items() if abs(d) >= SMALLEST]
  gain = "" if changes["time"] <= -SMALLEST else ": no faster by prediction"
  return f"With it {' and '.join(words) or 'nothing changes'}{gain}."


def table(before: Figures, after: Figures) -> str:
  lines = ["| | without | with | difference |", "|---|--:|--:|--:|"]
  for row in dict.fromkeys([*after, *before]):
    a, b = before.get(row, 0.0 if STEP in before else None), after.get(row, 0.0)
    if a or b:
      shown = f"{a:,.1f}" if a is not None else "does not fit" if row == STEP else ""
      lines.append(f"| {row} | {shown} | {b:,.1f} | {f'{(b - a) / a:+.1%}' if a else ''} |")
  return "\n".join(lines)


def sections(page: str) -> dict[str, str]:
  """Name of a choice -> its part of a page."""
  parts = re.split(r"^(?=## `)", page, flags=re.MULTILINE)[1:]
  return {part.split("`")[1]: part.rstrip("\n") + "\n" for part in parts}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--only", nargs="+", metavar="NAME", choices=CHOICES, help=f"of {', '.join(CHOICES)}")
  parser.add_argument("--without", metavar="NAME", choices=CHOICES, help="run plan, whose arguments follow, without it")
  arguments, rest = parser.parse_known_args(argv)
  if arguments.without:
    return without(arguments.without, rest)
  if rest:
    parser.error(f"unknown: {' '.join(rest)}")
  for name in arguments.only or CHOICES:
    found = {case: (measure(case, name), measure(case)) for case in CHOICES[name].cases}
    parts = sections(PAGE.read_text() if PAGE.exists() else "") | {name: section(name, found)}
    PAGE.write_text("\n".join([INTRO, *(parts.get(n) or section(n, {}) for n in CHOICES)]))
    print(parts[name], flush=True)
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main())
  except UserError as e:
    sys.exit(f"{PROGRAM}: {e}")
