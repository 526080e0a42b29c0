"""gpt-oss 20B, 8,192 tokens a sequence (OpenAI, arXiv 2508.10925; MLPerf Training v6.0 trains it so).

For 64 v6e chips: experts over 4, FSDP over 16, 2 sequences a chip, 1.0 M tokens a step.

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/gpt_oss_20b.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "gpt-oss-20b")
  c.run.steps = 200_000
  c.data.batch_size = 128
  c.data.length = 8192
  c.optimizer.learning_rate = 4e-4
  c.optimizer.warmup_steps = 2000
  c.optimizer.eps = 1e-5
  c.mesh.topology = "v6e:8x8"
  c.mesh.expert = 4
  c.mesh.fsdp = -1
  return c
