"""`python -m tests.launch.counting`: a process that does nothing but ask `Interrupt` after each of its steps.

No step waits for another process, so that they are far apart when they are asked to stop.
"""

import os
import random
import sys
import time

from maxscale import distributed
from maxscale.resilience.interrupt import INTERRUPTED, Interrupt


def main() -> int:
  os.environ["JAX_PLATFORMS"] = "cpu"
  with Interrupt() as interrupt:
    distributed.join()
    interrupt.agree(lambda e: distributed.leave("counting", e))
    rng = random.Random(distributed.index)
    print(f"counting, pid {os.getpid()}", flush=True)
    for step in range(1, 100_000):
      time.sleep(0.001 * rng.random() * (1 + distributed.index))
      if interrupt.stops_after(step):
        print(f"stopped by {interrupt.requested} after {step}", flush=True)
        return INTERRUPTED
  return 1


if __name__ == "__main__":
  sys.exit(main())
