"""The page of choices: it is written again in part, what is replaced is there and in use, and no choice is left out."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from maxscale.errors import UserError
from maxscale.models import loss  # noqa: F401  (JAX is there before the rest: this process runs on the CPU)
from maxscale.perf import choices

ROOT = pathlib.Path(__file__).parents[2]
REPLACED = {name: c.replace for name, c in choices.CHOICES.items() if c.replace}
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'maxscale[plan]')"
)


def report(seconds=2.0, peak=2.0, **classes):
  classes = classes or {
    "matmul": seconds / 2,
    "exposed all-gather fsdp": seconds / 4,
    "exposed all-reduce DCN": seconds / 4,
  }
  predicted = {"seconds": seconds, "classes": classes, "unmodelled": 0}
  return {
    "predicted": predicted,
    "peak": peak * 2**30,
    "compile_seconds": 30.0,
    "collectives": [{"bytes": 2**30}, {"bytes": 2**29}],
    "versions": {"jax": "1", "libtpu": "2"},
  }


# ---- the table of a choice


def test_classes_are_the_rows_and_what_is_exposed_is_one():
  found = choices.figures(report(2.0, 3.0))
  assert found[choices.STEP] == 2000 and found[choices.HBM] == 3 and found["exposed transfers, ms"] == 1000
  assert found["collectives, GiB"] == 1.5
  assert choices.figures(report(grouped=0.1))["experts' kernels, ms"] == pytest.approx(100)


def test_a_table_has_both_sides_and_the_difference():
  before, after = choices.figures(report(2.0, 2.0)), choices.figures(report(1.5, 2.0, attention=1.5))
  lines = choices.table(before, after).splitlines()
  assert "| predicted step, ms | 2,000.0 | 1,500.0 | -25.0% |" in lines
  assert "| attention kernels, ms | 0.0 | 1,500.0 |  |" in lines and "| matmul, ms | 1,000.0 | 0.0 | -100.0% |" in lines
  assert not any("count as 0" in line for line in lines)  # none on either side


@pytest.mark.parametrize(
  ("seconds", "peak", "says"),
  [
    (1.8, 2.0, "With it 10.0% less time."),
    (1.8, 2.2, "With it 10.0% less time and 10.0% more HBM."),
    (2.2, 1.8, "With it 10.0% more time and 10.0% less HBM: no faster by prediction."),
    (2.2, 2.0, "With it 10.0% more time: no faster by prediction."),
    (2.001, 2.0, "With it nothing changes: no faster by prediction."),
  ],
)
def test_a_choice_without_gain_says_so(seconds, peak, says):
  assert choices.verdict(choices.figures(report()), choices.figures(report(seconds, peak))) == says


def test_a_step_that_does_not_fit_has_its_size_alone():
  before, after = {choices.HBM: 40.0}, choices.figures(report())
  assert choices.verdict(before, after) == "Without it the step does not fit."
  lines = choices.table(before, after).splitlines()
  assert "| predicted step, ms | does not fit | 2,000.0 |  |" in lines and "| HBM, GiB | 40.0 | 2.0 | -95.0% |" in lines


# ---- measuring


@pytest.fixture
def compiler(monkeypatch):
  """What the process that compiles says; the commands it was called with."""
  said, commands = {"code": 0, "stderr": "", "report": report()}, []

  def run(command, **_):
    commands.append(command)
    pathlib.Path(command[command.index("--json") + 1]).write_text(json.dumps(said["report"]))
    return subprocess.CompletedProcess(command, said["code"], "", said["stderr"])

  monkeypatch.setattr(subprocess, "run", run)
  choices.measure.cache_clear()
  yield said, commands
  choices.measure.cache_clear()


def test_both_sides_are_compiled_by_plan(compiler):
  _, commands = compiler
  assert (
    choices.measure(choices.V6E) == choices.measure(choices.V6E, "dq") == ("jax 1, libtpu 2", choices.figures(report()))
  )
  choices.measure(choices.V6E)
  plain, other = commands  # the side that choices share is compiled once
  start = [sys.executable, "-m", "maxscale.plan", "--config", "configs/llama3_8b.py"]
  assert plain[: len(start)] == start
  assert other[2:5] == ["maxscale.perf.choices", "--without", "dq"]
  assert [a for a in other[5:] if "report" not in a] == [a for a in plain[3:] if "report" not in a]


def test_what_does_not_fit_is_a_result_and_other_failures_are_not(compiler):
  said, _ = compiler
  text = (
    "python -m maxscale.plan: c on v6e:16x16 does not fit by 3.20 GiB: the step needs 35.20 GiB of HBM a device\nmore"
  )
  said.update(code=2, stderr=text)
  assert choices.measure(choices.V6E) == ("", {choices.HBM: 35.2})
  said.update(code=1, stderr="first\nthe compiler failed")
  with pytest.raises(UserError, match="the compiler failed"):
    choices.measure(choices.V5P)


def test_without_a_choice_plan_has_its_options_and_replacements(monkeypatch):
  seen = {}
  monkeypatch.setattr(choices.plan, "compile_step", lambda *args: seen.update(args=args))
  monkeypatch.setattr(
    choices.plan, "main", lambda arguments: seen.update(arguments=arguments) or choices.plan.compile_step(7)
  )
  monkeypatch.setattr(choices, "replace", lambda target, make: seen.setdefault("targets", []).append(target))
  choices.main(["--without", "loss_chunks", "--config", "c.py", "--config.model.layers=2"])
  assert seen["arguments"] == ["--config", "c.py", "--config.model.layers=2", "--config.loss.chunk=16384"]
  assert seen["args"] == (7,) and "targets" not in seen
  choices.main(["--without", "dq"])
  assert seen["targets"] == ["splash:_partials_added"]


# ---- the page


@pytest.fixture
def page(tmp_path, monkeypatch):
  monkeypatch.setattr(choices, "PAGE", tmp_path / "choices.md")
  seconds = {"": 2.0}
  monkeypatch.setattr(
    choices, "measure", lambda case, without="": ("jax 1", choices.figures(report(seconds.get(without, 4.0))))
  )
  return tmp_path / "choices.md", seconds


def test_a_part_of_the_page_is_measured_again(page):
  path, seconds = page
  assert choices.main([]) == 0
  whole = path.read_text()
  assert list(choices.sections(whole)) == list(choices.CHOICES) and whole.startswith(choices.INTRO)
  seconds["loss"] = 5.0
  assert choices.main(["--only", "loss"]) == 0
  before, after = choices.sections(whole), choices.sections(path.read_text())
  assert "-60.0%" in after.pop("loss") and "-50.0%" in before.pop("loss")
  assert before == after and path.read_text().replace("5,000.0", "4,000.0") != whole
  seconds["loss"] = 4.0
  assert choices.main(["--only", "loss"]) == 0 and path.read_text() == whole


def test_a_page_may_be_there_in_part_and_have_sections_of_choices_that_have_gone(page):
  path, _ = page
  path.write_text(
    "# Old\n\nintro\n\n## `loss`: old\n\nolder\n\n## `gone`: x\n\ny\n\n## `attention`: kept\n\nas it is\n"
  )
  choices.main(["--only", "vmem"])
  found = choices.sections(path.read_text())
  assert list(found) == list(choices.CHOICES) and found["loss"] == "## `loss`: old\n\nolder\n"
  missing = [name for name in found if found[name].endswith(f"\n{choices.MISSING}\n")]
  assert missing == [name for name in choices.CHOICES if name not in ("attention", "loss", "vmem")]


def test_a_choice_that_fails_leaves_the_page(page, monkeypatch):
  path, _ = page
  choices.main(["--only", "loss"])
  before = path.read_text()

  def fail(case, without=""):
    raise UserError("no compiler")

  monkeypatch.setattr(choices, "measure", fail)
  with pytest.raises(UserError, match="no compiler"):
    choices.main(["--only", "loss"])
  assert path.read_text() == before


def test_unknown_names_and_arguments_are_refused(page, capsys):
  for arguments in (["--only", "nothing"], ["--config", "c.py"]):
    with pytest.raises(SystemExit):
      choices.main(arguments)


def test_the_committed_page_has_every_choice_and_its_command():
  text = (ROOT / "docs/choices.md").read_text()
  assert text.startswith(choices.INTRO) and choices.PROGRAM in text
  found = choices.sections(text)
  assert list(found) == list(choices.CHOICES)
  for name, section in found.items():
    choice = choices.CHOICES[name]
    assert section.startswith(f"## `{name}`: {choice.what}\n"), f"{choices.PROGRAM} --only {name}"
    measured = section.count("| predicted step, ms |")
    assert measured == len(choice.cases), f"{choices.PROGRAM} --only {name}"


# ---- what takes a choice away


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_is_there(name, monkeypatch):
  put = []
  for target, make in REPLACED[name].items():
    choices.replace(target, make, lambda *args: put.append((*args, getattr(*args[:2]))))
  assert put and all(new is not old for _, _, new, old in put)


def test_what_has_gone_is_an_error():
  with pytest.raises(AttributeError):
    choices.replace("splash:gone", lambda f: f)
  with pytest.raises(ImportError):
    choices.replace("gone:f", lambda f: f)


def test_options_of_the_compiler_are_still_in_its_table():
  for name in ("gathers", "gathers_2d_3d", "scatters", "scatters_nd", "async_gathers", "sparsecore_mode", "vmem"):
    assert choices.CHOICES[name].options, name
  assert len(choices.CHOICES["sparsecore_mode"].options) == 4
  assert "67 instead of 92 M cycles" in choices.CHOICES["vmem"].why  # the reason for its chip, and for dense models


@needs_compiler
def test_every_replacement_changes_the_step():
  """Of small models, as JAX traces them for TPUs."""
  done = subprocess.run([sys.executable, "-m", "tests.perf.test_choices"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(REPLACED, True)


SMALL = {"model.layers": 2, "model.embed": 256, "model.mlp": 256, "model.heads": 2, "model.kv_heads": 1,
         "model.head_dim": 128,
         "model.vocab_size": 1024, "data.batch_size": 16, "data.length": 2048, "mesh.topology": "v5p:2x2x1",
         "mesh.expert": 1}  # fmt: skip


def traced(case):
  from maxscale import config, plan
  from maxscale.perf.compiled import aot

  options = [*(option.split("=") for option in case.options), *((n, str(v)) for n, v in SMALL.items())]
  ready = plan.ready(config.load(f"configs/{case.config}.py", options), SMALL["mesh.topology"], 1)
  step, _ = aot.program_for(ready, SMALL["mesh.topology"])
  return re.sub(r"0x[0-9a-f]+", "", str(step.trace(ready.data.batch_size, ready.data.length).jaxpr))


def main():
  plain, out = {}, {}
  for name, targets in REPLACED.items():
    case, undo = choices.CHOICES[name].cases[0], []
    plain[case] = plain.get(case) or traced(case)

    def put(owner, attribute, value, undo=undo):
      undo.append((owner, attribute, vars(owner)[attribute]))
      setattr(owner, attribute, value)

    for target, make in targets.items():
      choices.replace(target, make, put)
    out[name] = traced(case) != plain[case]
    for args in undo:
      setattr(*args)
    assert traced(case) == plain[case], name
  print(json.dumps(out))


if __name__ == "__main__":
  main()
