"""Every command of the README is run: those of `make` by name, those of the tour as they stand, one after another."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from maxscale import train

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
  line.split("#")[0].strip()
  for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
  for line in block.splitlines()
  if line.split("#")[0].strip()
]
PYTHON = [c for c in COMMANDS if c.startswith("python ")]
MAKE = [c for c in COMMANDS if c.startswith("make ")]


def test_there_is_no_other_kind_of_command():
  assert len(PYTHON) >= 8 and {"make train", "make test"} <= set(MAKE)
  assert sorted(PYTHON + MAKE) == sorted(COMMANDS)


@pytest.mark.parametrize("command", sorted(set(MAKE)))
def test_a_make_target_exists(command):
  """What the targets do is run elsewhere: train here below, crash, bitflips and bench by the tests of those names."""
  subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in PYTHON if "train --config configs" in c and "--print_config" not in c])
def test_the_options_of_a_command_are_right(command, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  words = shlex.split(command)
  arguments = [a for a in words[words.index("maxscale.train") + 1 :] if a != "--audit"]
  assert train.main([*arguments, "--print_config"]) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A copy of the files that git knows, with this environment as its virtual environment."""
  copy = tmp_path_factory.mktemp("checkout")
  files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
  for name in files:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / name, copy / name)
  (copy / ".venv" / "bin").mkdir(parents=True)
  (copy / ".venv" / "bin" / "python").symlink_to(sys.executable)
  (copy / ".venv" / "installed").touch()  # newer than the requirements: make installs nothing
  return copy


def run(checkout, command):
  return subprocess.run(command, cwd=checkout, shell=True, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_the_tour(checkout):
  for command in PYTHON:
    done = run(checkout, command.replace("python -m ", f"{sys.executable} -m "))
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_make_train(checkout):
  done = run(checkout, f"make train BIN={pathlib.Path(sys.executable).parent}")
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  heldout = [float(x) for x in re.findall(r"held-out loss (\d+\.\d+) nats", done.stdout)]
  assert len(heldout) >= 3 and heldout == sorted(heldout, reverse=True) and heldout[-1] < 2.0
  assert re.search(r"count models, same text: bigram \d.*trigram \d.*4-gram \d", done.stdout)
  assert "report" in done.stdout and (checkout / "runs" / "tiny" / "report.html").exists()
