"""Mixtral 8x7B, 4,096 tokens a sequence (Jiang et al., arXiv 2401.04088, table 1).

For 64 v5p chips: FSDP, 12 sequences a chip in 4 microbatches so that nothing is computed again, 3.1 M tokens a step.
Optimizer and batch are this project's own: the paper does not publish them.

Predicted (v5p:4x4x4, jax 0.10.2, libtpu 0.0.42.1): step 13.79 s (80% 10.77 to 17.32), 3,565 tokens/s/chip, MFU 61.9%,
HBM 77.0 of 95.0 GiB

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/mixtral_8x7b.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "mixtral-8x7b")
  c.run.steps = 500_000
  c.data.batch_size = 768
  c.data.length = 4096
  c.sharding.microbatches = 4
  c.optimizer.learning_rate = 1.5e-4
  c.optimizer.warmup_steps = 2000
  c.remat.policy = "none"
  c.mesh.topology = "v5p:4x4x4"
  c.mesh.fsdp = -1
  return c
