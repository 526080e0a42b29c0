"""A mixture of 1.03 T parameters, 33 B of them active: after Kimi K2 (Kimi Team, arXiv 2507.20534, table 2 and section 2).

For 4,096 v5p chips: experts over boxes of 8 that gather their tokens, FSDP over 128, 4 replicas, 4 sequences of 4,096
tokens a chip, 67 M tokens a step.

Predicted (v5p:16x16x16, jax 0.10.2, libtpu 0.0.42.1): step 16.12 s (80% 13.24 to 19.46), 1,016 tokens/s/chip, MFU
45.5%, HBM 75.5 of 95.0 GiB

Latent attention with 64 heads, 384 experts of which a token uses 8 beside a shared one, a bias that balances them
without a loss, no groups; the first layer is dense. 60 layers with experts divide into 2 to 60 stages of a pipeline.
The data of this file is Python's own source text and its tokens are bytes: give your own,

    python -m maxscale.train --config configs/moe_1t.py --config.data.tokenizer=TOKENIZER.json
      --config.data.sources.mine.kind=parquet --config.data.sources.mine.path='DATA/*.parquet'
      --config.data.mixture="{'mine': 1.0}"

and `--small` for a scaled-down copy on this machine.
"""

from maxscale.config import default
from maxscale.models import families


def get_config():
  c = default()
  families.preset(c, "kimi-k2")
  c.run.steps = 1_000_000
  c.data.batch_size = 16384
  c.data.length = 4096
  c.loss.balance_loss = 1e-4
  c.loss.router_z_loss = 0.0
  c.loss.z_loss = 0.0
  c.optimizer.learning_rate = 2e-4
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 500
  c.remat.policy = "attention"  # its kernel is the dearest thing to run again
  c.sharding.experts = "gather"
  c.mesh.topology = "v5p:16x16x16"
  c.mesh.data = 4  # FSDP over 512 would leave 14 rows of a matrix to a device, less than tiles of memory have
  c.mesh.fsdp = -1
  c.mesh.expert = 8
  return c
