"""`python -m tests.launch.failing <arguments of train>`: train, in which the last process cannot make the batch of step 4.

It says when it tokenises.
"""

import os
import sys

from maxscale import train
from maxscale.data import store
from maxscale.data.batches import Batches

make, write = Batches.batch, store._write


def batch(self, step, rows=None):
  if step == 3 and os.environ["MAXSCALE_PROCESS"] == str(int(os.environ["MAXSCALE_PROCESSES"]) - 1):
    raise OSError("injected: the disk went away")
  return make(self, step, rows)


def say_and_write(directory, *rest):
  print(f"tokenising {directory}", flush=True)
  write(directory, *rest)


if __name__ == "__main__":
  store._write = say_and_write
  Batches.batch = batch
  sys.exit(train.main(sys.argv[1:]))
