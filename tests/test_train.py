"""`python -m maxscale.train` from the command line to the report, and what its loop does."""

import collections
import json
import math
import re
import tempfile

import pytest

from maxscale import train
from maxscale.goodput import ledger
from tests import runs

# Of configs/tiny.py nothing but the size is changed: 8 devices, fsdp=4, tensor=2, the standard library's text.
COMPLETE = {
  "run.steps": 10, "model.layers": 2, "model.embed": 64, "model.mlp": 128, "data.batch_size": 8, "data.length": 64,
  "optimizer.schedule": "constant", "optimizer.warmup_steps": 2, "checkpoint.every": 4, "eval.every": 5,
  "eval.batches": 2, "log.every": 1, "log.sample_tokens": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
  """(directory, changes, output) of a complete run, the first on its compile cache."""
  folder = tmp_path_factory.mktemp("complete")
  changes = {**COMPLETE, "run.compile_cache": folder / "xla"}
  return folder / "run", changes, runs.train(folder / "run", changes, base={})


def test_a_run_says_what_it_does(complete):
  run_dir, _, output = complete
  for pattern in (
    r"run tiny in \S+, attempt 1, config [0-9a-f]{12}",
    r"mesh fsdp=4 x tensor=2 \(8 x cpu\), batch 8 x 64 tokens",
    r"[\d,]+ parameters; state [\d.]+ MiB on a device",
    r"predicted memory on a device: [\d.]+ MiB, of it [\d.]+ temporaries",
    r"held-out loss of count models, same text: bigram \d\.\d+, trigram \d\.\d+",
    r"sample of 12 tokens:\ndef .",
    r"goodput [\d.]+%, pace [\d.]+%",
    r"\n  compile +[\d.]+ s +[\d.]+%  tracing and compiling",
  ):
    assert re.search(pattern, output), f"{pattern} is not in\n{output}"
  steps = re.findall(r"step (\d+)/10  loss ([\d.]+)  [\d,]+ tokens/s  MFU [\d.]+%  .*ETA [\d.]+ s", output)
  assert [int(step) for step, _ in steps] == list(range(1, 11))
  assert float(steps[-1][1]) < float(steps[0][1])
  assert re.findall(r"step (\d+)  held-out loss", output) == ["5", "10"]
  for place in ("checkpoints", "metrics", "report.html"):
    assert f"{run_dir}/{place}" in output and (run_dir / place).exists()


def test_a_run_leaves_its_config_metrics_and_report(complete):
  run_dir, _, output = complete
  config = train.config_lib.from_json((run_dir / "config.json").read_text())
  assert (config.model.embed, config.mesh.fsdp, config.run_dir) == (64, 4, str(run_dir))
  assert config.hash in output
  counts = collections.Counter()
  for file in (run_dir / "metrics").glob("*.jsonl"):
    counts.update(row["step"] for row in map(json.loads, file.read_text().splitlines()) if "loss" in row)
  assert counts == dict.fromkeys(range(1, 11), 1)
  assert all(map(math.isfinite, runs.losses(run_dir).values()))
  assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
  page = (run_dir / "report.html").read_text()
  outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.S)
  assert "tiny" in outside_scripts and "<script" in page
  assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", outside_scripts)
  assert not re.search(r"<script[^>]*\ssrc\s*=|<link[^>]*\shref\s*=|@import", page)
  assert runs.committed(run_dir) == [4, 8, 10]


def test_a_complete_run_is_left_alone_and_goes_on_with_more_steps(complete):
  run_dir, changes, _ = complete
  files = {f: f.stat().st_mtime_ns for f in run_dir.rglob("*")}
  output = runs.train(run_dir, changes, base={})
  assert "is complete: 10 steps" in output and "--config.run.steps" in output
  assert {f: f.stat().st_mtime_ns for f in run_dir.rglob("*")} == files
  output = runs.train(run_dir, {**changes, "run.steps": 12}, base={})
  assert "restored and verified step 10" in output and "step 11/12" in output and "step 10/12" not in output
  assert list(runs.losses(run_dir)) == list(range(1, 13))
  assert "schedule: run.steps was 10, is now 12" in output
  # The second attempt finds the step in the compile cache, which the first filled.
  train_step = [e["cache"] for e in runs.events(run_dir, "compile") if "train" in e["program"]]
  assert train_step == ["miss", "hit"]
  changed = [(e["attempt"], e["option"], e["old"], e["new"]) for e in runs.events(run_dir, "config")]
  assert changed == [(2, "run.steps", 10, 12)]


def test_every_second_of_a_run_has_a_class(complete):
  run_dir, _, _ = complete
  first = runs.events(run_dir, attempt=1)
  book = ledger.ledger(first)
  assert math.fsum(book.seconds.values()) == book.total == pytest.approx(first[-1]["mono"], abs=1e-9)
  classes = ["device_init", "data_init", "init", "compile", "step", "save", "eval", "finish"]
  entered = dict.fromkeys(e["class"] for e in first if e["kind"] == "state")
  assert [cls for cls in entered if cls != "data_wait"] == classes  # in this order; whether it waits is chance
  assert all(book.seconds[cls] > 0 for cls in ["start", *classes])
  assert not book.seconds["lost"] and book.steps == 10 and book.tokens == 10 * 8 * 64
  assert first[-1]["kind"] == "exit" and first[-1]["code"] == 0
  whole = ledger.ledger(runs.events(run_dir))  # with the time between attempts, if a test resumed the run
  wall = whole.attempts[-1].end_wall - whole.attempts[0].start_wall
  assert math.fsum(whole.seconds.values()) == whole.total == pytest.approx(wall, abs=0.05)  # of two clocks


# ---- the loop


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
  """What was seen at each dispatch of a run whose steps take far longer than Python does."""
  changes = {"run.simulated_devices": 1, "mesh.fsdp": 1, "run.steps": 14, "checkpoint.every": 100}
  changes |= {"model.embed": 256, "model.mlp": 512, "data.length": 128}
  return runs.watch("loop", tmp_path_factory.mktemp("watched") / "run", changes)


def test_the_next_step_is_dispatched_before_the_last_one_ends_and_never_two(watched):
  ready = watched["ready"]
  assert len(ready) == 14
  assert all(before_last for before_last, _ in ready[2:]), "three steps in flight"
  late = [i + 1 for i, r in enumerate(ready) if r and r[-1]]
  assert len(late) <= 2, f"steps {late} were dispatched after the one before had ended"  # a busy machine may stall one


def test_nothing_slow_is_imported_before_the_first_step(watched):
  slow = {"pyarrow", "tokenizers", "sentencepiece", "plotly", "tensorboardX", "transformers", "tokamax"}
  assert not slow & set(watched["modules"])
  assert "orbax.checkpoint.v1" not in watched["modules"]  # Grain imports some other parts of Orbax
  assert "jax" in watched["modules"]


def test_a_step_that_is_not_finite_is_skipped_and_said_once(tmp_path):
  seen = runs.watch("nan", tmp_path / "run", {"run.steps": 8})
  assert math.isnan(seen["loss"])
  assert seen["changed"] == ["['params']['final_norm']['scale']", "['skipped']", "['step']"]  # the first by us
  assert re.search(r"step 5/8  loss nan .*skipped 1\n", seen["output"])
  assert "skipped" not in seen["output"].split("step 5/8")[0]
  assert [e["step"] for e in runs.events(tmp_path / "run", "skip")] == [5]
  output = runs.train(tmp_path / "run", {"run.steps": 10})
  assert "skipped 1" in output  # the counter is part of the state
  assert [e["step"] for e in runs.events(tmp_path / "run", "skip")] == [5]
  losses = runs.losses(tmp_path / "run")
  assert losses.pop(5) is None and all(map(math.isfinite, losses.values())) and losses[10] < losses[4]


# ---- the command line

# The compile cache is a setting of the whole process, which other tests share.
IN_PROCESS = ["--config.run.simulated_devices=0", "--config.run.compile_cache="]


def test_print_config_imports_no_jax(tmp_path):
  seen = runs.watch("imports", tmp_path / "run", {}, "--print_config")
  assert "jax" not in seen["modules"] and "maxscale.config" in seen["modules"]
  text, _, identity = seen["output"].rpartition("hash ")
  config = train.config_lib.from_json(text)
  assert config.hash == identity.strip() and config.model.embed == 32
  assert not (tmp_path / "run").exists()


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
  """(arguments) -> what train says when it refuses to start, in this process, which has one device."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where event logs are spooled

  def call(*arguments):
    assert train.main([*arguments, *IN_PROCESS]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and not out
    return err

  return call


def test_audit_lists_every_array(tmp_path, capsys):
  assert train.main([*runs.options(tmp_path / "run", {"mesh.fsdp": -1}), *IN_PROCESS, "--audit"]) == 0
  out = capsys.readouterr().out
  for path in ("params/embedding", "params/layers/mlp/up", "optimizer/mu/head", "optimizer/nu/head", "step"):
    assert path in out
  assert not (tmp_path / "run").exists()


def test_a_mesh_that_is_not_the_devices_is_refused_with_what_would_fit(tmp_path, refused):
  changes = {"mesh.fsdp": 3, "mesh.tensor": 1}
  err = refused(*runs.options(tmp_path / "run", changes))
  assert "mesh: fsdp=3 is 3, but there are 1 devices; what would fit: mesh.fsdp=1" in err
  assert "--small" in err


def test_small_trains_a_config_that_needs_a_cluster(tmp_path, refused):
  file = tmp_path / "giant.py"
  file.write_text(
    "from maxscale.config import default\n\n\ndef get_config():\n  c = default()\n  c.model.embed = 8192\n"
    "  c.model.layers = 64\n  c.model.heads = 64\n  c.model.mlp = 32768\n  c.model.vocab_size = 200000\n"
    "  c.data.batch_size = 1024\n  c.data.length = 8192\n  c.mesh.data = 1\n  c.mesh.fsdp = 64\n  return c\n"
  )
  own = [a for a in runs.options(tmp_path / "run", {"eval.every": 0}, {}) if "configs/tiny.py" not in a][1:]
  arguments = ["--config", str(file), *own]
  err = refused(*arguments)
  assert "fsdp=64 is 64, but there are 1 devices" in err and "--small" in err
  with runs.Process([*arguments, "--small", "--config.run.steps=3"], tmp_path) as process:
    output = process.finish()
  assert "mesh fsdp=4 x tensor=2 (8 x cpu)" in output and "step 3/3" in output
