"""One loss and gradient under every layout: `python -m maxscale.check --config configs/tiny.py [--mesh data=2,tensor=4]`.

A scaled-down copy of any config runs on 16 simulated CPU devices. Under each mesh, the loss and every gradient are
compared with those of the same model as plain math on one device (models/plain.py), for a packed batch (several
documents a row, padding) and one of whole documents. A mesh that differs is reduced to its smallest part that does.

Exit codes: 0 every mesh is equal; 1 one is not, or the framework refuses it; 2 the config is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxscale import assemble
from maxscale import config as config_lib
from maxscale.config import Config, ConfigError, Mesh
from maxscale.errors import UserError
from maxscale.sharding import layouts
from maxscale.sharding.layouts import Layout

BATCH, LENGTH, VOCAB, LAYERS = 16, 64, 125, 4  # of the copy: every factor of 2 in a mesh of 16 devices divides them
LOSS, GRADIENT = 1e-5, 1e-4  # largest errors that are equal; they are relative
FLOOR = 1e-3  # a gradient smaller than this fraction of all gradients is compared with that fraction
MARGIN = 1e-4  # of the router: rounding must not change what a token chooses


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m maxscale.check", description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--config", required=True, help="a file with get_config(), e.g. configs/tiny.py")
  parser.add_argument("--mesh", action="append", default=[], metavar="AXIS=SIZE,...",
                      help="compare this mesh only (repeatable), e.g. fsdp=2,context=4,sharding.context=gather")  # fmt: skip
  arguments, rest = parser.parse_known_args(argv)
  try:
    config = config_lib.load(arguments.config, config_lib.split_overrides(rest))
    assemble.check(config)
    small = shrink(config)
    wanted = [layouts.fitted(small, layouts.parse(text)) for text in arguments.mesh] or layouts.every(config, small)
    for layout in wanted:
      if layouts.devices(layout) > layouts.DEVICES:
        raise ConfigError(f"--mesh {layouts.name(layout)} needs {layouts.devices(layout)} devices; {layouts.DEVICES} are "
                          "simulated, and a factor of 2 shows what a larger one would")  # fmt: skip
    from maxscale import environment

    environment.quick_compile()
    environment.prepare(small)
    environment.devices(small)
    return run(small, wanted, say(config, small))
  except UserError as e:
    print(f"{parser.prog}: {e}", file=sys.stderr)
    return e.exit_code


# ---- the copy


def shrink(config: Config) -> Config:
  """The config with small sizes and every choice kept; what a CPU or an exact comparison cannot have is replaced."""
  m, s = config.model, config.sharding
  options = {
    **config_lib.scaled_down(config, 1, LAYERS, LENGTH),
    "run.simulated_devices": layouts.DEVICES, "model.vocab_size": VOCAB, "model.vocab_multiple": 8,
    # logits of the copy are small and its positions few: what is left out must show
    "model.attention_softcap": min(m.attention_softcap, 0.5), "model.logit_softcap": min(m.logit_softcap, 1.0),
    "model.rope_scaling": {key: min(value, LENGTH // 2) if key.startswith("original") else value
                           for key, value in m.rope_scaling.items()},
    "model.dropout": 0.0, "model.quantize": {}, "lora.rank": 0, "optimizer.grad_reduce_dtype": "float32",
    "loss.chunk": min(config.loss.chunk, 16), "data.batch_size": BATCH, "data.length": LENGTH, "data.phases": [],
    "sharding.microbatches": min(s.microbatches, 2), "sharding.repeats": 1,
    "sharding.expert_buffer": float(layouts.DEVICES),  # nothing is dropped
    "remat.table": {name: "keep" if action == "offload" else action for name, action in config.remat.table.items()},
  }  # fmt: skip
  return layouts.apply(dataclasses.replace(config, mesh=Mesh(fsdp=1)), options)


def say(config: Config, small: Config) -> str:
  """What the copy is, in a line."""
  m = small.model
  family = f"{m.experts} experts, {m.experts_per_token} a token" if m.experts else "dense"
  offload = "; what is offloaded is kept, as a CPU has one memory" if "offload" in config.remat.table.values() else ""
  return (f"{config.run.name} scaled down: {family}, {m.layers} layers, {m.embed} wide, {m.heads} heads on {m.kv_heads}, "
          f"{BATCH} x {LENGTH} tokens, float32, remat {config.remat.policy}{offload}")  # fmt: skip


# ---- what is expected


@dataclasses.dataclass(frozen=True)
class Expected:
  """Logical parameters by path, batches, and for each the loss, its plain part and the gradients as plain math has them.

  `margin`: how clear the least clear choice of a router is, 1 where there is none.
  """

  params: dict[str, np.ndarray]
  batches: list[dict[str, np.ndarray]]
  losses: list[tuple[float, float]]
  gradients: list[dict[str, np.ndarray]]
  margin: float


def expect(config: Config) -> Expected:
  """A packed and an unpacked batch with clear choices of the routers, and what plain math gives for them."""
  import jax

  from maxscale.models import module, plain

  params = parameters(config)
  f = jax.jit(jax.value_and_grad(lambda p, b: plain.loss(config, p, b), has_aux=True))
  out = Expected(params, [], [], [], 1.0)
  for packed in (True, False):
    batch = make_batch(config, 0, packed)
    for seed in range(1, 100):
      (loss, (nll, margins)), gradients = f(module.nest(params), batch)
      unclear = np.asarray(margins) <= MARGIN
      if not unclear.any():
        break
      for key, value in make_batch(config, seed, packed).items():
        batch[key][unclear] = value[unclear]
    assert min(margins) > MARGIN, "no batch has clear choices of the routers"
    out.batches.append(batch)
    out.losses.append((float(loss), float(nll)))
    out.gradients.append({path: np.asarray(g) for path, g in module.flatten(gradients).items()})
    out = dataclasses.replace(out, margin=min(out.margin, float(min(margins))))
  return out


def parameters(config: Config) -> dict[str, np.ndarray]:
  """Without padding, layers in their order. Nothing starts as ones or zeros here: what is left out must show."""
  from maxscale.models import decoder, parts

  shape, rng, out = parts.Shape.of(config, config.model.vocab_size), np.random.default_rng(0), {}
  for path, spec in decoder.skeleton(shape, tuple(range(shape.L - shape.L_dense))).specs.items():
    mean, std = (1, 0.1) if spec.std is None else (0, spec.std or 0.1)
    out[path] = (mean + std * rng.standard_normal(spec.logical)).astype(np.float32)
  return out


def make_batch(config: Config, seed: int, packed: bool) -> dict[str, np.ndarray]:
  """Documents of random tokens. Packed: about four a row, then padding; one row is full and one has nothing at all."""
  from maxscale.data import packing

  rng, rows, length = np.random.default_rng(seed), config.data.batch_size, config.data.length
  first, count = np.zeros((rows, length + 1), bool), np.full(rows, length + 1)
  if packed:
    first[:] = rng.random(first.shape) < 4 / length
    count[2:] = rng.integers(1, length + 1, rows - 2)
    count[1] = 0
  tokens = rng.integers(0, config.model.vocab_size, first.shape, dtype=np.int32)
  return {**packing.examples(tokens, first, count), "rows": np.arange(rows, dtype=np.int32)}


# ---- the comparison


def build(config: Config, layout: Layout) -> Any:
  """The program of a scaled-down config under a layout, on the first devices.

  Raises:
    ConfigError: the layout is not possible.
  """
  import jax

  from maxscale.sharding import mesh, rules
  from maxscale.step import Program

  config = layouts.apply(config, layout)
  shape, device_mesh = mesh.for_config(config, jax.devices()[: layouts.devices(layout)])
  program = Program(
    config, config.model.vocab_size, device_mesh, rules.make(config.sharding, shape.sizes, shape.slices)
  )
  program.check(config.data.batch_size, config.data.length)
  return program


@dataclasses.dataclass(frozen=True)
class Result:
  """What a layout gave: relative errors of the loss and of the gradient of each path, the worst of the batches.

  `error`: why there are none: the layout is `refused`, or it raised.
  """

  layout: Layout
  seconds: float
  loss: float = 0.0
  gradients: dict[str, float] = dataclasses.field(default_factory=dict)
  error: str = ""
  refused: bool = False

  @property
  def equal(self) -> bool:
    return not self.error and self.loss < LOSS and max(self.gradients.values()) < GRADIENT

  @property
  def verdict(self) -> str:
    return "equal" if self.equal else "refused" if self.refused else "DIFFERENT"

  def worst(self, count: int) -> str:
    """The paths with the largest errors, with them."""
    paths = sorted(self.gradients, key=lambda path: -self.gradients[path])[:count]
    return ", ".join(f"{path} {self.gradients[path]:.1e}" for path in paths)

  def __str__(self) -> str:
    name, count = layouts.name(self.layout), layouts.devices(self.layout)
    what = self.error or f"loss {self.loss:.1e}  {self.worst(1)}"
    return f"{name:<58} {count:>2} device{'s' if count > 1 else ' '}  {what}  {self.seconds:.1f} s  {self.verdict}"


class Check:
  """Compares layouts of a scaled-down config with plain math, each layout once."""

  def __init__(self, config: Config, expected: Expected | None = None):
    self.config, self.expected = config, expected or expect(config)
    self._results: dict[str, Result] = {}

  def compare(self, layout: Layout) -> Result:
    name = layouts.name(layout)
    if name not in self._results:
      self._results[name] = self._compare(layout)
    return self._results[name]

  def smallest(self, layout: Layout) -> Result:
    """The part of a differing layout with the fewest options that differs, too."""
    parts = (self.compare(part) for part in layouts.subsets(layout))
    return next(r for r in parts if not r.equal and not r.refused)

  def _compare(self, layout: Layout) -> Result:
    start = time.perf_counter()
    seconds = lambda: time.perf_counter() - start  # noqa: E731
    try:
      loss, gradients = self._errors(build(self.config, layout))
    except ConfigError as e:
      return Result(layout, seconds(), error=str(e), refused=True)
    except Exception as e:  # one mesh that fails must not hide what the others do
      return Result(layout, seconds(), error=f"{type(e).__name__}: {str(e).strip()[:300]}")
    return Result(layout, seconds(), loss, gradients)

  def _errors(self, program: Any) -> tuple[float, dict[str, float]]:
    """Errors of the loss (the objective or its plain part) and of each gradient: the worst of the batches."""
    import jax

    from maxscale.models import module

    specs, e = program.skeleton.specs, self.expected
    params = module.map_specs(lambda s: jax.device_put(physical(s, e.params[s.path]), program.sharding(s)), specs)
    f = jax.jit(lambda params, batch, scale: program.on_mesh(params, batch, None, scale))
    loss, errors = 0.0, dict.fromkeys(specs, 0.0)
    for batch, losses, gradients in zip(e.batches, e.losses, e.gradients):
      count = np.maximum((batch["targets"] >= 0).sum(), 1)
      placed = {key: jax.device_put(value, program.batch_sharding(key)) for key, value in batch.items()}
      found, total, sums = f(params, placed, np.float32(1 / count))
      pairs = zip((float(total), float(sums["nll"]) / count), losses)
      loss = max(loss, *(_finite(abs(a - b) / abs(b)) for a, b in pairs))
      floor = FLOOR * _norm(gradients.values())
      for path, g in module.flatten(found).items():
        g, wanted = logical(specs[path], np.asarray(g)), gradients[path]
        errors[path] = max(errors[path], _finite(_norm([g - wanted]) / max(_norm([wanted]), floor)))
    return loss, errors


def physical(spec: Any, value: np.ndarray) -> np.ndarray:
  """A logical parameter as a layout has it: rows in its order, padded with zeros."""
  out = np.zeros(spec.shape, value.dtype)
  out[tuple(slice(n) for n in spec.logical)] = value[list(spec.rows)] if spec.rows else value
  return out


def logical(spec: Any, gradient: np.ndarray) -> np.ndarray:
  """The inverse, for a gradient; one that is not zero in the padding is infinitely wrong."""
  inside = gradient[tuple(slice(n) for n in spec.logical)]
  if np.count_nonzero(gradient) > np.count_nonzero(inside):
    return np.full(spec.logical, np.inf, np.float32)
  return inside[np.argsort(spec.rows)] if spec.rows else inside


def _norm(arrays: Any) -> float:
  return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays)))


def _finite(error: float) -> float:
  return error if np.isfinite(error) else np.inf


# ---- the report


def run(config: Config, wanted: Sequence[Layout], title: str) -> int:
  """Compares the layouts, a line each, and returns the exit code."""
  print(title, flush=True)
  start, check = time.perf_counter(), Check(config)
  if config.model.experts:
    print(f"the least clear choice of a router has a margin of {check.expected.margin:.1e}")
  verdicts = []
  for layout in wanted:
    result = check.compare(layout)
    print(result, flush=True)
    verdicts.append(result.verdict)
    if result.verdict == "DIFFERENT":
      print(
        f"  smallest part that differs: {report(check.smallest(layout))}\n  the mesh itself: {report(result)}",
        flush=True,
      )
  counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("equal", "DIFFERENT", "refused") if v in verdicts)
  print(f"{len(verdicts)} meshes in {time.perf_counter() - start:.0f} s: {counts}")
  return int(verdicts.count("equal") < len(verdicts))


def report(result: Result) -> str:
  return f"{layouts.name(result.layout)}: {result.error or f'loss {result.loss:.1e}; {result.worst(4)}'}"


if __name__ == "__main__":
  sys.exit(main())
