"""Flips random bits of saved files, each in an otherwise intact checkpoint, and demands that each one is found:
`python -m tests.checkpoint.bitflips --flips 60`. The array must be named and the previous checkpoint restored."""

import argparse
import os
import tempfile
import time

import numpy as np

from tests.checkpoint.cases import LEAVES, commit, data_files, restore, save  # sets up 8 simulated devices
from tests.checkpoint.states import assert_equal


def flip(file: str, bit: int) -> None:
  with open(file, "r+b") as f:
    f.seek(bit // 8)
    byte = f.read(1)[0]
    f.seek(bit // 8)
    f.write(bytes([byte ^ 1 << bit % 8]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--flips", type=int, default=60)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  rng, start = np.random.default_rng(args.seed), time.time()
  with tempfile.TemporaryDirectory() as run_dir:
    save(run_dir, 1, 2)
    assert restore(run_dir, LEAVES).step == 2
    base = commit.folder(run_dir, 2)
    files = data_files(run_dir, 2)
    sizes = np.array([os.path.getsize(f) for f in files])
    named = set()
    for file in rng.choice(files, args.flips, p=sizes / sizes.sum()):
      bit = int(rng.integers(8 * os.path.getsize(file)))
      flip(file, bit)
      restored = restore(run_dir, LEAVES)
      array = os.path.relpath(file, base / "arrays").split("/c")[0]
      found = [(r.step, r.array) for r in restored.rejected]
      assert restored.step == 1 and found == [(2, array)], f"bit {bit} of {file}: {restored.step} {restored.rejected}"
      assert_equal(restored.state, LEAVES, 1)
      named.add(array)
      flip(file, bit)  # back again
      os.remove(base / commit.BAD)
    assert restore(run_dir, LEAVES).step == 2
  print(f"{args.flips} of {args.flips} flipped bits found, in {sorted(named)}, {time.time() - start:.1f} s")


if __name__ == "__main__":
  main()
