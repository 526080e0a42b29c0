"""Qwen3 235B-A22B, 4,096 tokens a sequence (Qwen Team, arXiv 2505.09388, table 2).

For 512 v5p chips: experts over boxes of 8 that gather their tokens, FSDP over 64, 4 sequences a chip in 4 microbatches so
that nothing is computed again, 8.4 M tokens a step.
Optimizer and batch are this project's own: the report does not publish them.

Predicted (v5p:8x8x8, jax 0.10.2, libtpu 0.0.42.1): step 12.62 s (80% 10.67 to 14.86), 1,298 tokens/s/chip, MFU 42.0%,
HBM 68.8 of 95.0 GiB

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/qwen3_moe.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "qwen3-235b-a22b")
  c.run.steps = 1_000_000
  c.data.batch_size = 2048
  c.data.length = 4096
  c.sharding.microbatches = 4
  c.sharding.experts = "gather"
  c.optimizer.learning_rate = 2e-4
  c.optimizer.warmup_steps = 2000
  c.remat.policy = "none"
  c.mesh.topology = "v5p:8x8x8"
  c.mesh.expert = 8
  c.mesh.fsdp = -1
  return c
