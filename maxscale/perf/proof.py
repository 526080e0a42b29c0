"""Compiles the layouts of a config on chips and compares what the closed form says of each with the compiled programs.

`python -m maxscale.perf.proof --config configs/llama3_8b.py --topology v6e:4x4 --json F`

For each layout: seconds of a step and HBM by the closed form (perf/closed/analytic.py) and compiled (perf/compiled/predict.py), both
predictions. Below: how well the closed form orders those that compile (Spearman's rank correlation), how much longer than
the best of all the step is that `perf/search.py` would choose, and of how many both say alike whether they fit.

  --config.group.option=value  as for train; run.steps=100 leaves out the flags that double the time of a compile
  --json F                     keep what was compiled, written after each layout; it goes on where such a file ends
  --from F                     compare what is in such a file, with the closed form and the calibration of now

tests/perf/golden/ came from these, with 2 sequences of 8,192 or 4 of 4,096 tokens for each chip (3 minutes a layout on
one core of a server; a list of layouts may be a part of all):

  python -m maxscale.perf.proof --config configs/llama3_8b.py --topology v6e:4x4 --config.data.batch_size=32
    --config.run.steps=100 --json tests/perf/golden/proof_llama3_8b.json.gz
  python -m maxscale.perf.proof --config configs/mixtral_8x7b.py --topology v5p:2x2x4 --config.data.batch_size=64
    --config.run.steps=100 --json tests/perf/golden/proof_mixtral_8x7b.json.gz
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from maxscale import config as config_lib
from maxscale.config import Config, ConfigError
from maxscale.errors import UserError
from maxscale.perf import calibration, search
from maxscale.perf.closed import analytic
from maxscale.perf.compiled import simulate, trace
from maxscale.perf.hardware import GIB
from maxscale.perf.search import Candidate, Compiled, Options

PROGRAM = "python -m maxscale.perf.proof"
MOST, BEST, OVER = 24, 6, 1.1
SECONDS = 3600.0  # of one compile


@dataclasses.dataclass(frozen=True)
class Series:
  """What was compiled of a config on a topology: for each layout its options, and what the compiler said."""

  config: Config
  topology: str
  found: list[tuple[Options, dict[str, Any]]]
  versions: dict[str, str]

  def save(self, path: pathlib.Path) -> None:
    tree = {"config": dataclasses.asdict(self.config), "topology": self.topology, "versions": self.versions,
            "layouts": [{"options": options, **said} for options, said in self.found]}  # fmt: skip
    data = json.dumps(tree, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def load(path: pathlib.Path) -> Series:
  """Reads what `Series.save` wrote.

  Raises:
    ConfigError: there is no such file.
  """
  if not path.is_file():
    raise ConfigError(f"there is no series {path}")
  data = path.read_bytes()
  tree = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
  found = [(layout.pop("options"), layout) for layout in tree["layouts"]]
  return Series(config_lib.from_json(json.dumps(tree["config"])), tree["topology"], found, tree["versions"])


def layouts(candidates: Sequence[Candidate], most: int = MOST) -> list[Candidate]:
  """One candidate of each mesh, the best by the closed form, with its remat policy and microbatches; `most` of them.

  Meshes that need more than `OVER` of the memory are left out. Of more than `most` these are taken: the `BEST` best,
  the best of each family (what splits the model: fsdp alone, tensor, tensor and pipeline, ...), and of the others some
  at equal distances in the ranking.
  """
  meshes: dict[tuple[int, ...], Candidate] = {}
  for c in sorted(candidates, key=lambda c: c.order):
    meshes.setdefault(c.mesh, c)
  ranked = [c for c in meshes.values() if c.estimate.bytes < OVER * c.estimate.limit]
  families: dict[tuple[str, ...], Candidate] = {}
  for c in ranked:
    families.setdefault(c.families, c)
  chosen = {c.name for c in [*ranked[:BEST], *families.values()][:most]}
  rest = [c for c in ranked if c.name not in chosen]
  free = min(most - len(chosen), len(rest))
  chosen |= {rest[len(rest) * i // free + len(rest) // (2 * free)].name for i in range(free)}
  return [c for c in ranked if c.name in chosen]


def compile_all(series: Series, options: Sequence[Options], keep: Callable[[Series], None], say: Callable) -> Series:
  """The series with the layouts of these options that it does not have yet; `keep` gets it after each."""
  for o in options:
    if any(o == done for done, _ in series.found):
      continue
    said = search.in_process(search.with_options(series.config, o), series.topology, 1, SECONDS)
    said = {"hbm": said.get("hbm", 0.0), "error": said.get("error", ""), "events": plain(said.get("events", []))}
    series = dataclasses.replace(series, found=[*series.found, (o, said)])
    say(f"{o}: {said['error'] or 'compiled'}")
    keep(series)
  return series


def plain(events: list) -> list:
  """A trace (as JSON) without the parts of the model, which makes it shorter; kinds and seconds stay."""

  def without(e: Any) -> Any:
    if isinstance(e, trace.Loop):
      return dataclasses.replace(e, part="", body=trace.merged(map(without, e.body)))
    if isinstance(e, trace.Start | trace.Sync):
      return dataclasses.replace(e, move=dataclasses.replace(e.move, part=""))
    return dataclasses.replace(e, part="") if isinstance(e, trace.Work) else e

  return trace.to_json(trace.merged(map(without, trace.from_json(events))))


# ---- what is compared


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Of a series: each layout by the closed form and compiled, best first by the closed form.

  Attributes:
    spearman: rank correlation of seconds, over those that compile.
    chosen: whose step is the shortest of those that a search of so many compiles would compile.
    regret: seconds of it over those of the best of all, minus 1.
    agree: layouts of which both say that they fit, or that they do not.
  """

  rows: list[Compiled]
  spearman: float
  chosen: Compiled
  regret: float
  agree: int


def walked(series: Series, said: dict[str, Any]) -> simulate.Timeline:
  """The timeline of a layout of a series, by the calibration of now."""
  chip, _ = analytic.parse(series.topology)
  return simulate.run(trace.from_json(said["events"]), chip, calibration.rates(chip))


def compare(series: Series, efficiency: analytic.Efficiency = analytic.DEFAULT, compiles: int = 4) -> Comparison:
  """By the closed form and the calibration of now.

  Raises:
    ConfigError: fewer than two layouts compile, or a search would find none of them.
  """
  from scipy import stats

  chip, chips = analytic.parse(series.topology)
  ranking = search.Ranking(series.config, chip, chips, 1, efficiency)
  rows = []
  for options, said in series.found:
    candidate = ranking.look(options)
    if candidate is None:
      raise ConfigError(f"a layout of the series is no longer legal: {options}")
    timeline = walked(series, said)
    rows.append(Compiled(candidate, {}, timeline.seconds, classes=timeline.classes(), hbm=said["hbm"],
                         error=said["error"]))  # fmt: skip
  rows.sort(key=lambda c: c.candidate.order)
  good = [c for c in rows if not c.error]
  if len(good) < 2:
    raise ConfigError("fewer than two layouts compile: there is nothing to compare")
  order: Any = stats.spearmanr([c.candidate.estimate.step_seconds for c in good], [c.seconds for c in good])
  by_name, compiled = {c.candidate.name: c for c in rows}, []
  for candidate in search.in_turn([c.candidate for c in rows], compiled, compiles):
    compiled.append(by_name[candidate.name])
  if not (works := [c for c in compiled if not c.error]):
    raise ConfigError(f"none of the {len(compiled)} layouts that a search would compile works")
  chosen = min(works, key=lambda c: c.seconds)
  return Comparison(rows, float(order.statistic), chosen, chosen.seconds / min(c.seconds for c in good) - 1,
                    sum(c.candidate.estimate.fits != bool(c.error) for c in rows))  # fmt: skip


def text(c: Comparison) -> str:
  """A line for each layout and one for the whole."""
  lines = ["closed form      compiled         layout", "      s    GiB        s    GiB"]
  for row in c.rows:
    e = row.candidate.estimate
    compiled = f"{row.seconds:7.3f}" if not row.error else "      -"
    fits = {(True, True): "", (False, False): "  fits neither", (True, False): "  compiles not",
            (False, True): "  fits all the same"}[e.fits, not row.error]  # fmt: skip
    lines.append(
      f"{e.step_seconds:7.3f} {e.bytes / GIB:6.1f}  {compiled} {row.hbm / GIB:6.1f}  {row.candidate.name}{fits}"
    )
  lines.append(f"Spearman {c.spearman:.3f} over the {sum(not r.error for r in c.rows)} that compile; a search chooses "
               f"{c.chosen.candidate.name}: regret {c.regret:.1%}; {c.agree} of {len(c.rows)} fit, or do not, in both")  # fmt: skip
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--config", help="a file with get_config()")
  parser.add_argument("--topology", help="chips of a slice, as v6e:4x4; default: the config's")
  parser.add_argument("--json", metavar="F", type=pathlib.Path, help="keep what was compiled; .gz: compressed")
  parser.add_argument("--from", metavar="F", type=pathlib.Path, dest="source", help="compare what such a file has")
  arguments, rest = parser.parse_known_args(argv)
  say = lambda line: print(line, flush=True)  # noqa: E731
  try:
    if arguments.source:
      say(text(compare(load(arguments.source))))
      return 0
    if not arguments.config:
      raise ConfigError("--config or --from is missing")
    from maxscale import assemble

    config = config_lib.load(arguments.config, config_lib.split_overrides(rest))
    topology = arguments.topology or config.mesh.topology
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=0, topology=topology))
    config = search.with_options(config, {"model.vocab_size": assemble.vocabulary(config)[1]})
    chip, chips = analytic.parse(topology)
    chosen = layouts(search.Ranking(config, chip, chips, 1, analytic.DEFAULT).all())
    say(f"{len(chosen)} layouts of {topology}")
    series, path = Series(config, topology, [], search.versions()), arguments.json
    if path and path.exists():
      series = load(path)
    series = compile_all(series, [c.options for c in chosen], lambda s: s.save(path) if path else None, say)
    say(text(compare(series)))
    return 0
  except UserError as e:
    print(f"{PROGRAM}: {e}", file=sys.stderr)
    return e.exit_code


if __name__ == "__main__":
  sys.exit(main())
