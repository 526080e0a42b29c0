"""Llama 3 8B, 8,192 tokens a sequence (Grattafiori et al., arXiv 2407.21783, table 3).

For 256 v6e chips: FSDP, 2 sequences a chip, 4.2 M tokens a step.

Predicted (v6e:16x16, jax 0.10.2, libtpu 0.0.42.1): step 1.60 s (80% 1.46 to 1.75), 10,264 tokens/s/chip, MFU 57.5%,
HBM 14.2 of 32.0 GiB

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

  c.remat.policy = "attention"  # its kernel is the dearest thing to run again
  c.mesh.topology = "v6e:16x16"
  c.mesh.fsdp = -1
  return c
