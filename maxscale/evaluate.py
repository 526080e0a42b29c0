"""Perplexity of a text under a checkpoint: `python -m maxscale.evaluate --run runs/tiny --text README.md`.

The text is cut into pieces of T tokens, each read after a begin token of its own: every token is predicted once. An end
token is not asked for. Only the parameters are read, as for sampling.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator

import numpy as np

from maxscale.config import ConfigError
from maxscale.data.packing import Batch, examples
from maxscale.errors import UserError

TOKENS = 8192  # of a device at once, about


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m maxscale.evaluate", description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--run", required=True, help="directory of a run, e.g. runs/tiny")
  parser.add_argument("--text", required=True, help="a text file")
  parser.add_argument("--length", type=int, help="tokens of a piece (T); default: data.length of the run")
  parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest that verifies")
  arguments = parser.parse_args(argv)
  try:
    print(evaluate(arguments))
    return 0
  except UserError as e:
    print(f"{parser.prog}: {e}", file=sys.stderr)
    return e.exit_code


def evaluate(arguments: argparse.Namespace) -> str:
  """The table that is printed.

  Raises:
    ConfigError: an argument is wrong, or the text is not UTF-8, empty, or has tokens that the model does not know.
  """
  from maxscale import assemble, resume
  from maxscale.data.documents import read_text
  from maxscale.data.feed import place
  from maxscale.generate import on_this_machine, read_config

  config = on_this_machine(read_config(arguments.run))
  length = config.data.length if arguments.length is None else arguments.length
  limit = config.model.max_positions or math.inf
  if not 1 <= length <= limit:
    raise ConfigError(f"--length {length} must be at least 1 and at most {limit}, the positions that the model has")
  if not os.path.isfile(arguments.text):
    raise ConfigError(f"there is no file {arguments.text}; --text takes a text file")
  text = read_text(arguments.text)
  tokenizer, vocab = assemble.vocabulary(config)
  ids = tokenizer.encode(text)
  if not len(ids):
    raise ConfigError(f"{arguments.text} has no text")
  if max(ids.max(), tokenizer.bos) >= vocab:
    raise ConfigError(
      f"{arguments.text} has tokens above model.vocab_size={vocab}: data.tokenizer={config.data.tokenizer!r} of "
      f"{arguments.run}/config.json is not the model's"
    )
  program = assemble.build(config, vocab, sampling=True)
  found = resume.parameters(arguments.run, program, arguments.step)
  parts = program.rules.factor("batch", "compute")
  size = parts * max(1, min(TOKENS // length, -(-len(ids) // (length * parts))))
  program.check(size, length)
  loss, count, run = 0.0, 0, program.evaluate()
  for batch in batches(ids, tokenizer.bos, length, size):
    nll, targets = run(found.state["params"], place(batch, size, program.batch_sharding))
    loss, count = loss + float(nll), count + int(targets)
  nats = loss / count
  rows = {
    "step": found.step,
    "tokens": count,
    "nats a token": f"{nats:.6f}",
    "perplexity": f"{math.exp(nats):.6g}",
    "bits a byte": f"{loss / math.log(2) / len(text.encode()):.6f}",
  }
  return "\n".join(f"{name:<12}  {value}" for name, value in rows.items())


def batches(ids: np.ndarray, bos: int, length: int, size: int) -> Iterator[Batch]:
  """Batches of `size` rows; the targets of a row are the next `length` ids, read after `bos`."""
  rows = -(-len(ids) // (length * size)) * size
  tokens = np.zeros((rows, length + 1), np.int32)
  tokens[:, 0] = bos
  tokens[:, 1:].flat[: len(ids)] = ids
  targets = np.clip(len(ids) - length * np.arange(rows), 0, length)
  count = np.where(targets, targets + 1, 0)  # 0: the row only fills its batch
  for start in range(0, rows, size):
    part = slice(start, start + size)
    first = np.zeros((size, length + 1), bool)
    yield {**examples(tokens[part], first, count[part]), "rows": np.arange(size, dtype=np.int32)}


if __name__ == "__main__":
  sys.exit(main())
