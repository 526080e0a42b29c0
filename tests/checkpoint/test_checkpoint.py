"""Checkpoints. Each test runs in processes of its own, which choose how many devices they simulate."""

import json
import pathlib
import re
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CASES = re.findall(r"^def (case_\w+)", (ROOT / "tests/checkpoint/cases.py").read_text(), re.M)


def start(module, *args):
  command = [sys.executable, "-m", f"tests.checkpoint.{module}", *map(str, args)]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, out + err
  return out


def results_of(process):
  """What a worker said, without what Gloo writes between."""
  return "".join(line[2:] for line in finish(process).splitlines(keepends=True) if line.startswith("= "))


def together(what, run_dir, count=2):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  return [results_of(p) for p in [start("worker", what, run_dir, i, count, port) for i in range(count)]]


@pytest.fixture(scope="module")
def results():
  return json.loads(finish(start("cases")))


@pytest.mark.parametrize("name", CASES)
def test_case(results, name):
  if (results[name] or "").startswith("skipped: "):
    pytest.skip(results[name])
  assert results[name] is None, results[name]


def test_every_flipped_bit_is_found():
  assert "60 of 60" in finish(start("bitflips", "--flips", 60))


def test_killed_in_the_middle_of_a_save(tmp_path):
  process = start("worker", "die", tmp_path)
  assert process.stdout.readline() == "writing\n"
  process.kill()
  process.communicate()
  assert (tmp_path / "checkpoints/0000000002/arrays").exists()
  assert results_of(start("worker", "load", tmp_path)).startswith("restored 1 ")


def test_two_processes_save_without_collectives_and_any_number_restores(tmp_path):
  together("save_together", tmp_path)
  two = together("load_other", tmp_path)
  assert two[0] == two[1] == results_of(start("worker", "load", tmp_path))
  assert two[0].startswith("restored 2 ") and two[0].endswith("[]\n")
  for out in together("damage_and_load", tmp_path):
    assert out.startswith("restored 1 ") and "params/layers/query" in out


def test_two_processes_one_of_which_cannot_write(tmp_path):
  zero, one = together("fail_together", tmp_path)
  assert "processes [1] did not write their part" in zero and "injected" in one
