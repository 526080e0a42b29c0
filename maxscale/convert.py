"""Converts Hugging Face checkpoints to checkpoints of MaxScale, and back.

    python -m maxscale.convert --from hf DIR --to CKPT [--preset NAME]
    python -m maxscale.convert --from CKPT --to hf DIR [--step N] [--dtype bfloat16] [--family NAME]

`hf DIR` is a folder with config.json and safetensors files. CKPT is the directory of a run: it holds config.json and
the checkpoint of step 0, for `run.init_from` and `maxscale.generate --run`; the other way it is any run that has a
checkpoint. What is written is a new folder, whole or absent. Tensors are streamed; every one has to be accounted for.
"""

from __future__ import annotations

import argparse
import os
import sys

from maxscale.config import ConfigError
from maxscale.errors import UserError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m maxscale.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--from", dest="source", nargs="+", required=True, metavar=("hf", "DIR"), help="hf DIR, or CKPT")
  parser.add_argument("--to", dest="target", nargs="+", required=True, metavar=("hf", "DIR"), help="CKPT, or hf DIR")
  parser.add_argument("--preset", default="", help="from hf: the model is this public size; config.json is not asked")
  parser.add_argument("--step", type=int, help="to hf: step of the checkpoint; default: the newest")
  parser.add_argument("--dtype", choices=DTYPES, help="to hf: of every tensor; default: the original's, else bfloat16")
  parser.add_argument("--family", default="", help="to hf: model family; default: model.family of the config")
  arguments = parser.parse_args(argv)
  try:
    print(convert(arguments))
    return 0
  except UserError as e:
    print(f"{parser.prog}: {e}", file=sys.stderr)
    return e.exit_code


def convert(arguments: argparse.Namespace) -> str:
  """Converts, and says what it cost."""
  source, target = arguments.source, arguments.target
  to_ours, to_theirs = (len(side) == 2 and side[0] == "hf" for side in (source, target))
  if to_ours == to_theirs or len(source) + len(target) != 3:
    raise ConfigError("give --from hf DIR --to CKPT, or --from CKPT --to hf DIR")
  theirs = {"--step": arguments.step is not None, "--dtype": arguments.dtype, "--family": arguments.family}
  wrong = [name for name, given in (theirs if to_ours else {"--preset": arguments.preset}).items() if given]
  if wrong:
    raise ConfigError(f"{', '.join(wrong)} is for the other direction")
  if "jax" not in sys.modules:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: accelerators stay free for others
  from maxscale.interop import exporting, importing

  if to_ours:
    report = importing.from_hf(source[1], target[0], arguments.preset)
  else:
    report = exporting.to_hf(source[0], target[1], arguments.step, DTYPES.get(arguments.dtype, ""), arguments.family)
  return str(report)


if __name__ == "__main__":
  sys.exit(main())
