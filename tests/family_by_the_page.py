"""What docs/adding_a_family.md promises, in a copy of the project in which its steps were followed.

`python -m tests.family_by_the_page` there prints what was compared.
"""

import importlib.util
import pathlib
import tempfile

import ml_collections

from maxscale.interop import links
from maxscale.models import families
from tests.interop import checkpoints
from tests.models import parity
from tests.models import reference as ref

NAME = "starcoder2"


def there_and_back(folder):
  """Converts the folder `theirs` to a checkpoint, and that back: the same names, dtypes, shapes and bytes."""
  assert checkpoints.to_ours(folder / "theirs", folder / "ours") == 0
  assert checkpoints.to_theirs(folder / "ours", folder / "again") == 0
  assert checkpoints.read(folder / "again") == checkpoints.read(folder / "theirs")


def main():
  config = ml_collections.ConfigDict({"model": {}})
  families.preset(config, "starcoder2-3b")
  assert config.model.embed == 3072 and config.model.family == NAME
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    if all(map(importlib.util.find_spec, ("torch", "transformers"))):
      published = parity.Published(NAME, str(folder / "theirs"))
      program = parity.program(published.config)
      batch = parity.batch()
      found = parity.logits(program, parity.parameters(program, published.tensors), batch)
      valid = batch["segments"] > 0
      error = ref.error(found[valid], published.logits(batch)[valid])
      assert error < 1e-5, error
      there_and_back(folder)
      print(f"logits: {error:.1e}; bytes: identical")
    else:
      tiny = parity.MODELS[NAME] | {"architectures": ["Starcoder2ForCausalLM"]}
      program = parity.program(tiny)
      made = links.tensors(families.get(NAME), program.skeleton.specs, program.config.model)
      assert not made.unlinked, made.unlinked
      tensors = {n: parity.weight(n, t.shape) for n, t in made.holders.items()}
      checkpoints.write(folder / "theirs", tiny, tensors)
      there_and_back(folder)
      print("bytes: identical; torch and transformers are not installed: logits were not compared")


if __name__ == "__main__":
  main()
