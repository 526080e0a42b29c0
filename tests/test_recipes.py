"""Recipes from a published checkpoint on: convert it, train it further or on conversations, with or without adapters."""

import json

import pytest

from maxscale import convert, generate, resume
from maxscale.config import ConfigError
from tests import runs
from tests.interop import checkpoints

MESH = {"run.simulated_devices": 8, "mesh.fsdp": 4, "mesh.tensor": 2}
TRAINING = {
  **MESH, "run.steps": 25, "data.batch_size": 8, "data.length": 64, "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 2, "optimizer.learning_rate": 1e-2, "checkpoint.every": 100, "eval.every": 0, "log.every": 1,
  "log.tensorboard": False, "log.peak_tflops": 1, "model.compute_dtype": "float32",
}  # fmt: skip
PUBLISHED = {
  **checkpoints.LLAMA,
  "vocab_size": 300,
  "hidden_size": 32,
  "num_attention_heads": 4,
  "intermediate_size": 64,
}
CHAT = [{"messages": [{"role": "user", "content": f"{n} and one?"}, {"role": "assistant", "content": f"It is {n + 1}."}]}
        for n in range(200)]  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """A checkpoint of MaxScale made of a small random one of Hugging Face's form."""
  folder = tmp_path_factory.mktemp("recipes")
  tensors = {name: 0.2 * x for name, x in checkpoints.tensors(PUBLISHED).items()}
  theirs = checkpoints.write(folder / "hf", PUBLISHED, tensors)
  assert convert.main(["--from", "hf", str(theirs), "--to", str(folder / "ckpt")]) == 0
  return folder / "ckpt"


def train(converted, run_dir, **changes):
  """A run that starts from the converted parameters; returns its losses, and what it printed."""
  own = {"run.dir": run_dir, "run.init_from": converted, "run.compile_cache": runs.session() / "xla",
         "data.cache": runs.session() / "data"}  # fmt: skip
  options = {**TRAINING, **own, **{key.replace("__", "."): value for key, value in changes.items()}}
  arguments = ["--config", str(converted / "config.json"), *(f"--config.{k}={v}" for k, v in options.items())]
  with runs.Process(arguments, run_dir.parent) as process:
    output = process.finish()
  return list(runs.losses(run_dir).values()), output


def test_training_further_lowers_the_loss_on_a_mesh(converted, tmp_path):
  losses, output = train(converted, tmp_path / "run")
  assert f"parameters from step 0 of {converted}" in output and "mesh fsdp=4 x tensor=2" in output
  assert losses[0] > 5.0 and losses[-1] < losses[0] - 1.0, losses


def test_adapters_on_conversations_leave_the_base_as_it_was(converted, tmp_path):
  (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, CHAT)))
  source = {"chat": {"kind": "chat", "path": str(tmp_path / "chat.jsonl")}}
  losses, _ = train(converted, tmp_path / "run", data__sources=source, lora__rank=8, lora__targets=".*",
                    optimizer__learning_rate=3e-2)  # fmt: skip
  assert losses[-1] < losses[0] - 0.5, losses
  before, after = runs.fingerprint(converted, 0), runs.fingerprint(tmp_path / "run", TRAINING["run.steps"])
  assert all(after[path] == before[path] for path in before)
  adapters = {path for path in after if path.endswith(("_a", "_b")) and path.startswith("params/")}
  with pytest.raises(ConfigError, match=r"holds adapters \(lora.rank=8\)"):
    resume._check_source(str(tmp_path / "run"), generate.read_config(str(tmp_path / "run")))
  assert len(adapters) == 14 and adapters | before.keys() == {path for path in after if path.startswith("params/")}


def test_a_model_of_another_shape_is_refused(converted, tmp_path):
  own = {"run.dir": tmp_path / "run", "run.init_from": converted, "model.mlp": 96}
  arguments = ["--config", str(converted / "config.json"), *(f"--config.{k}={v}" for k, v in (TRAINING | own).items())]
  with runs.Process(arguments, tmp_path) as process:
    output = process.finish(2)
  assert f"run.init_from={converted} holds another model: model.mlp is 64 there, 96 here" in output
  assert "Traceback" not in output
