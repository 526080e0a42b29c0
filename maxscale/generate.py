"""Samples from a checkpoint: `python -m maxscale.generate --run runs/tiny --prompt "def "`.

Only the parameters are read, straight onto this machine's devices, whatever mesh wrote them; what is read is verified.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from typing import Any

import numpy as np

from maxscale import config as config_lib
from maxscale.config import Config, ConfigError, Mesh, Remat, Sharding
from maxscale.errors import UserError


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m maxscale.generate", description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--run", required=True, help="directory of a run, e.g. runs/tiny")
  parser.add_argument("--prompt", default="", help="text to continue")
  parser.add_argument(
    "--ids", help="tokens to continue instead of a text, 1,15,7: prints those that follow, as numbers"
  )
  parser.add_argument("--tokens", type=int, default=200, help="tokens to add")
  parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
  parser.add_argument("--seed", type=int, default=0, help="of the sampling")
  parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest that verifies")
  arguments = parser.parse_args(argv)
  try:
    if arguments.tokens < 1 or arguments.temperature < 0:
      raise ConfigError("--tokens must be at least 1 and --temperature at least 0")
    if arguments.ids and (arguments.prompt or not re.fullmatch(r"\d+(,\d+)*", arguments.ids)):
      raise ConfigError(
        f"--ids {arguments.ids} must be numbers with commas between them, and stands instead of --prompt"
      )
    print(generate(arguments))
    return 0
  except UserError as e:
    print(f"{parser.prog}: {e}", file=sys.stderr)
    return e.exit_code


def generate(arguments: argparse.Namespace) -> str:
  """The prompt and its continuation; of ids, the continuation alone."""
  from maxscale import assemble, finish, resume

  config = on_this_machine(read_config(arguments.run))
  tokenizer, vocab = assemble.vocabulary(config)
  program = assemble.build(config, vocab, sampling=True)
  found = resume.parameters(arguments.run, program, arguments.step)
  _check_length(config, arguments, tokenizer)
  params, rest = found.state["params"], (arguments.tokens, arguments.temperature, arguments.seed)
  if not arguments.ids:
    return finish.sample(program, tokenizer, params, arguments.prompt, *rest)
  ids = np.array(arguments.ids.split(","), np.int32)
  if ids.max() >= vocab:
    raise ConfigError(f"--ids has {ids.max()}, and the vocabulary {vocab} tokens")
  return ",".join(map(str, finish.sample_ids(program, params, ids, *rest)))


def _check_length(config: Config, arguments: argparse.Namespace, tokenizer: Any) -> None:
  limit = config.model.max_positions
  given = len(arguments.ids.split(",")) if arguments.ids else 1 + len(tokenizer.encode(arguments.prompt))
  if limit and given + arguments.tokens > limit:
    raise ConfigError(f"a prompt of {given} tokens and --tokens {arguments.tokens} are more than the {limit} positions that "
                      f"the model has; lower --tokens to {max(0, limit - given)}")  # fmt: skip


def read_config(run_dir: str) -> Config:
  """The config that a run saved.

  Raises:
    ConfigError: the directory holds no run.
  """
  from maxscale import storage

  path = storage.path(run_dir) / "config.json"
  if not path.exists():
    raise ConfigError(f"{run_dir} holds no run (there is no config.json); --run takes the directory that train printed")
  return config_lib.from_json(path.read_text())


def on_this_machine(config: Config) -> Config:
  """The config for sampling on the devices that are here: all along fsdp, the default rules, nothing recomputed."""
  run = dataclasses.replace(config.run, simulated_devices=0)
  return dataclasses.replace(config, run=run, mesh=Mesh(), sharding=Sharding(), remat=Remat(policy="none"))


if __name__ == "__main__":
  sys.exit(main())
