"""The benchmark's two models, for the framework and for the plain step beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from maxscale import config as config_lib
from maxscale.benchmarks import plain
from maxscale.config import Config
from maxscale.models.parts import Shape
from maxscale.perf import flops
from maxscale.sharding import mesh, rules
from maxscale.step import Program

VOCAB = 32768


def config(experts: int, dtype: str, batch: int) -> Config:
  """embed 512, 8 layers, 8 heads of 64, mlp 2048, vocabulary 32k, sequence 512; experts 0, or top-2 of them."""
  options: dict[str, dict[str, Any]] = {
    "model": {"embed": 512, "layers": 8, "heads": 8, "head_dim": 64, "mlp": 2048, "vocab_size": VOCAB,
              "experts": experts, "experts_per_token": 2, "compute_dtype": dtype},
    "data": {"batch_size": batch, "length": 512},
    "remat": {"policy": "none"},
  }  # fmt: skip
  out = Config()
  changed = {group: dataclasses.replace(getattr(out, group), **values) for group, values in options.items()}
  out = dataclasses.replace(out, **changed)
  config_lib.check(out)
  return out


@dataclasses.dataclass(frozen=True)
class Case:
  """A model with its two steps on one device; the device may be one of a topology that is not here."""

  config: Config
  device: Any

  def program(self) -> Program:
    shape, device_mesh = mesh.for_config(self.config, [self.device])
    return Program(self.config, VOCAB, device_mesh, rules.make(self.config.sharding, shape.sizes, shape.slices))

  @property
  def tokens(self) -> int:
    return self.config.data.batch_size * self.config.data.length

  @property
  def flops(self) -> float:
    """Model FLOPs of a step."""
    model = flops.from_config(self.config, VOCAB)
    return self.tokens * flops.flops_per_token(model, self.config.data.length)

  def ours(self) -> jax.stages.Traced:
    program = self.program()
    batch = program.abstract_batch(self.config.data.batch_size, self.config.data.length)
    return program.train().trace(program.abstract_state(), batch)

  def plain(self) -> jax.stages.Traced:
    """The plain step, traced; its arguments are (params, optimizer state, batch)."""
    sharding = jax.sharding.SingleDeviceSharding(self.device)
    shape = Shape.of(self.config, VOCAB)
    init, train = plain.step(shape, plain.attention_for(self.device.platform), self.config.loss.z_loss)
    params = jax.eval_shape(lambda: plain.init(shape, jax.random.key(0)))
    state = jax.eval_shape(init, params)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.batch().items() if k != "rows"}
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.jit(train, donate_argnums=(0, 1)).trace(*jax.tree.map(place, (params, state, batch)))

  def plain_state(self) -> tuple[Any, Any]:
    shape = Shape.of(self.config, VOCAB)
    params = jax.jit(lambda: plain.init(shape, jax.random.key(0)))()
    return params, plain.step(shape, lambda *a: a[0], 0.0)[0](params)

  def batch(self) -> dict[str, np.ndarray]:
    """Random tokens in one segment a row; the last position has no target."""
    b, t = self.config.data.batch_size, self.config.data.length
    tokens = np.random.default_rng(0).integers(0, VOCAB, (b, t), dtype=np.int32)
    targets = np.concatenate([tokens[:, 1:], np.full((b, 1), -1, np.int32)], axis=1)
    positions = np.tile(np.arange(t, dtype=np.int32), (b, 1))
    return {"tokens": tokens, "targets": targets, "segments": np.ones((b, t), np.int32), "positions": positions,
            "rows": np.arange(b, dtype=np.int32)}  # fmt: skip
