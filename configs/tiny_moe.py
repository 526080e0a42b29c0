"""A small mixture of experts on the source text of Python's own standard library, on this machine.

    python -m maxscale.train --config configs/tiny_moe.py

8 simulated CPU devices (expert=2, fsdp=2, tensor=2); a few minutes on 2 cores, to a held-out loss of 1.53 nats a token.
The same run, to rounding, as a pipeline, and then with its stages on two simulated slices:

    ... --config.mesh.expert=2 --config.mesh.pipeline=2 --config.mesh.fsdp=2
    ... and with these also --config.mesh.slices=2
"""

from maxscale.config import default


def get_config():
  c = default()
  c.run.steps = 300
  c.run.simulated_devices = 8
  c.model.embed = 128
  c.model.layers = 4
  c.model.heads = 4
  c.model.kv_heads = 2
  c.model.mlp = 192
  c.model.experts = 8
  c.model.experts_per_token = 2
  c.model.compute_dtype = "float32"  # bfloat16 is slow on a CPU
  c.data.batch_size = 16
  c.data.length = 128
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 30
  c.mesh.expert = 2
  c.mesh.fsdp = 2
  c.mesh.tensor = -1  # what the others leave: 2 here
  c.sharding.microbatches = 2  # enough for two pipeline stages
  c.checkpoint.every = 100
  c.eval.every = 100
  c.log.sample_prompt = "def "
  c.log.sample_tokens = 200
  return c
