"""Llama 3.1 405B, 8,192 tokens a sequence (Grattafiori et al., arXiv 2407.21783, table 3 and section 3.4).

For 2,048 v5p chips: FSDP, 1 sequence a chip, 16.8 M tokens a step.

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/llama3_405b.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "llama3.1-405b")
  c.run.steps = 1200000
  c.data.batch_size = 2048
  c.data.length = 8192
  c.optimizer.learning_rate = 8e-5
  c.optimizer.warmup_steps = 8000
  c.optimizer.final_fraction = 0.01

  c.mesh.topology = "v5p:8x16x16"
  c.mesh.fsdp = -1
  return c
