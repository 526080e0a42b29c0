"""Llama 3 8B, 8,192 tokens a sequence (Grattafiori et al., arXiv 2407.21783, table 3).

For 256 v6e chips: FSDP, 2 sequences a chip, 4.2 M tokens a step.

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/llama3_8b.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "llama3-8b")
  c.run.steps = 1000000
  c.data.batch_size = 512
  c.data.length = 8192
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 2000
  c.optimizer.final_fraction = 0.1

  c.mesh.topology = "v6e:16x16"
  c.mesh.fsdp = -1
  return c
