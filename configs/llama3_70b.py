"""Llama 3 70B, 8,192 tokens a sequence (Grattafiori et al., arXiv 2407.21783, table 3).

For 512 v5p chips: 4 replicas, FSDP over 64, sequences over 2, 4 microbatches so that nothing is computed again, 8.4 M
tokens a step: what `python -m maxscale.plan --config configs/llama3_70b.py --search` chose of FSDP over all chips.

Predicted (v5p:8x8x8, jax 0.10.2, libtpu 0.0.42.1): step 19.42 s (80% 17.72 to 21.28), 844 tokens/s/chip, MFU 82.6%,
HBM 85.4 of 95.0 GiB

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/llama3_70b.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "llama3-70b")
  c.run.steps = 1000000
  c.data.batch_size = 1024
  c.data.length = 8192
  c.optimizer.learning_rate = 1.5e-4
  c.optimizer.warmup_steps = 2000
  c.optimizer.final_fraction = 0.1

  c.remat.policy = "none"
  c.sharding.microbatches = 4
  c.mesh.topology = "v5p:8x8x8"
  c.mesh.data = 4
  c.mesh.context = 2
  c.mesh.fsdp = -1
  return c
