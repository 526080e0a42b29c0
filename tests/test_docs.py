"""docs/adding_a_family.md is followed word for word in a copy of the project, and what it promises is true there."""

import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_family.md").read_text()


def insert(file, after, text):
  """Puts text behind the first line that is `after`."""
  head, line, tail = file.read_text().partition(f"\n{after}\n")
  assert line, f"{file} has no line {after!r}"
  file.write_text(head + line + text + tail)


def test_a_family_is_added_by_following_the_page(tmp_path):
  for folder in ("maxscale", "tests"):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
  path = re.search(r"`(maxscale/models/families/\w+\.py)`:", PAGE).group(1)
  file, line, model = re.findall(r"```(?:python)?\n(.*?)```", PAGE, re.DOTALL)
  (tmp_path / path).write_text(file)
  insert(tmp_path / "maxscale/models/families/__init__.py", "NAMES = (", line)
  insert(tmp_path / "tests/models/parity.py", "MODELS = {", model)
  command = [sys.executable, "-m", "tests.family_by_the_page"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "bytes: identical" in done.stdout
