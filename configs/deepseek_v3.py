"""DeepSeek-V3 671B, 4,096 tokens a sequence (DeepSeek-AI, arXiv 2412.19437, section 4.2).

For 512 v5p chips: experts over boxes of 8 that gather their tokens, FSDP over 64, 4 sequences a chip, 8.4 M
tokens a step (the paper's batch of 15,360 sequences is 63 M: raise data.batch_size with more chips).

Predicted (v5p:8x8x8, jax 0.10.2, libtpu 0.0.42.1): step 20.19 s (80% 17.00 to 23.87), 811 tokens/s/chip, MFU 46.1%,
HBM 75.5 of 95.0 GiB

The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/deepseek_v3.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "deepseek-v3")
  c.run.steps = 1_000_000
  c.data.batch_size = 2048
  c.data.length = 4096
  c.sharding.experts = "gather"
  c.loss.balance_loss = 1e-4
  c.loss.router_z_loss = 0.0
  c.loss.z_loss = 0.0
  c.loss.mtp = 0.3
  c.model.mtp = 1
  c.optimizer.learning_rate = 2.2e-4
  c.optimizer.warmup_steps = 2000
  c.remat.policy = "custom"
  c.remat.table = {"attention": "offload"}  # its kernel is the dearest thing to run again; 31 GiB of it
  c.mesh.topology = "v5p:8x8x8"
  c.mesh.expert = 8
  c.mesh.fsdp = -1
  return c
