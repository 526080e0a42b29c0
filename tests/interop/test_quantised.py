"""Quantised checkpoints are read as the bfloat16 that they stand for, and written back in it."""

import json

import ml_dtypes
import numpy as np
import pytest

from maxscale.interop import quantised, safetensors
from tests.interop import checkpoints as hf

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def plain_mxfp4(blocks, scales):
  """One number at a time, by the specification: sign, two bits of exponent with bias 1, one of mantissa."""
  lead, (rows, groups, _) = blocks.shape[:-3], blocks.shape[-3:]
  out = np.zeros((*lead, groups * 32, rows))
  for index in np.ndindex(*lead, rows, groups, 16):
    *where, row, group, byte = index
    for half in range(2):
      bits = int(blocks[index]) >> (4 * half) & 15
      exponent, mantissa = bits >> 1 & 3, bits & 1
      value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
      value *= (-1) ** (bits >> 3) * 2.0 ** (int(scales[tuple(index[:-1])]) - 127)
      out[(*where, group * 32 + byte * 2 + half, row)] = value
  return out


def test_mxfp4_is_the_specification(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  monkeypatch.setattr(quantised, "ROWS", 7)  # several pieces, the last one smaller
  for shape in ((5, 3, 16), (2, 3, 2, 16)):
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = rng.integers(90, 160, shape[:-1], dtype=np.uint8)
    hf.write_file(tmp_path / "a.safetensors", {"b": blocks, "s": scales})
    stored = safetensors.read_header(str(tmp_path / "a.safetensors"))
    found = quantised.mxfp4(stored["b"], stored["s"])
    assert found.dtype == BF16
    np.testing.assert_array_equal(found.astype(np.float64), plain_mxfp4(blocks, scales))


def test_fp8_is_plain_math(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  monkeypatch.setattr(quantised, "ROWS", 100)
  weight = (rng.standard_normal((300, 200)) * 30).astype(FP8)
  scale = (rng.random((3, 2)) / 100).astype(np.float32)
  hf.write_file(tmp_path / "a.safetensors", {"w": weight, "s": scale})
  stored = safetensors.read_header(str(tmp_path / "a.safetensors"))
  found = quantised.fp8(stored["w"], stored["s"], (128, 128))
  want = np.zeros((300, 200), np.float32)
  for i, j in np.ndindex(3, 2):
    block = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
    want[block] = weight[block].astype(np.float32) * scale[i, j]
  np.testing.assert_array_equal(found, want.astype(BF16))


@pytest.fixture
def fp8(tmp_path):
  """Writes a Llama whose matrices are quantised, after `spoil(tensors)`; returns the tensors it stands for."""

  def write(spoil=lambda tensors: None):
    rng, tensors, plain = np.random.default_rng(1), {}, {}
    config = {**hf.TINY, "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    for name, x in hf.tensors(config).items():
      tensors[name] = plain[name] = x
      if "proj" in name:
        tensors[name] = x.astype(FP8)
        scale = rng.random([-(-n // 16) for n in x.shape]).astype(np.float32)
        tensors[f"{name}_scale_inv"] = scale
        whole = scale.repeat(16, 0).repeat(16, 1)[: x.shape[0], : x.shape[1]]
        plain[name] = (tensors[name].astype(np.float32) * whole).astype(BF16)
    spoil(tensors)
    return hf.write(tmp_path / "hf", config, tensors), config, plain

  return write


def test_fp8_there_and_bfloat16_back(fp8, tmp_path):
  source, config, plain = fp8()
  assert hf.to_ours(source, tmp_path / "ours") == 0
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "back") == 0
  assert hf.read(tmp_path / "back") == {n: ("BF16", x.shape, x.tobytes()) for n, x in plain.items()}
  del config["quantization_config"]
  assert json.loads((tmp_path / "back/config.json").read_text()) == config


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
  "spoil, message",
  [
    (lambda t: t.pop(SCALE), "up_proj.weight is float8_e4m3fn; weights are"),
    (lambda t: t.update({SCALE: np.ones((2, 2), np.float32)}), f"{SCALE} is float32[2, 2]; "),
    (lambda t: t.update({SCALE: np.ones((3, 2), np.int32)}), f"{SCALE} is int32[3, 2]; "),
    (lambda t: t.update({SCALE[: -len("_scale_inv")]: np.ones((40, 24), BF16)}), "has scales, but is bfloat16[40, 24]"),
  ],
)
def test_scales_that_do_not_fit_are_refused(spoil, message, fp8, tmp_path, capsys):
  source, _, _ = fp8(spoil)
  assert hf.to_ours(source, tmp_path / "ours") == 1
  assert message in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.fixture
def gpt_oss():
  """config.json and tensors of a gpt-oss with MXFP4 experts, and the tensors that they stand for."""
  config, plain = hf.family("gpt_oss")
  config["intermediate_size"] = 64
  rng, tensors = np.random.default_rng(2), {}
  for name, x in plain.items():
    tensors[name] = x.astype(BF16)
    if name.endswith("gate_up_proj_bias"):
      tensors[name] = np.tile(x, (1, 2))[:, :128].astype(BF16)
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
      rows = 128 if "gate_up" in name else 32
      del tensors[name]
      tensors[f"{name}_blocks"] = rng.integers(0, 256, (8, rows, 1 if rows == 128 else 2, 16), dtype=np.uint8)
      tensors[f"{name}_scales"] = rng.integers(120, 130, tensors[f"{name}_blocks"].shape[:-1], dtype=np.uint8)
  want = {n: x for n, x in tensors.items() if not n.endswith(("_blocks", "_scales"))}
  for name, x in tensors.items():
    if name.endswith("_blocks"):
      base = name.removesuffix("_blocks")
      want[base] = plain_mxfp4(x, tensors[f"{base}_scales"]).astype(BF16)
  return {**config, "quantization_config": {"quant_method": "mxfp4"}}, tensors, want


def test_mxfp4_there_and_bfloat16_back(gpt_oss, tmp_path):
  config, tensors, want = gpt_oss
  assert hf.to_ours(hf.write(tmp_path / "hf", config, tensors), tmp_path / "ours") == 0
  params = hf.parameters(tmp_path / "ours")
  both = want["model.layers.1.mlp.experts.gate_up_proj"].astype(np.float32)
  np.testing.assert_array_equal(params["layers/mlp/gate"][1], both[..., 0::2])
  np.testing.assert_array_equal(params["layers/mlp/up"][1], both[..., 1::2])
  assert hf.to_theirs(tmp_path / "ours", tmp_path / "back") == 0
  assert hf.read(tmp_path / "back") == {n: ("BF16", x.shape, x.tobytes()) for n, x in want.items()}


def test_blocks_that_do_not_fit_their_scales_are_refused(gpt_oss, tmp_path, capsys):
  config, tensors, _ = gpt_oss
  name = "model.layers.0.mlp.experts.down_proj"
  tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1]
  assert hf.to_ours(hf.write(tmp_path / "hf", config, tensors), tmp_path / "ours") == 1
  assert f"{name}_blocks [8, 32, 2, 16] must have the shape of {name}_scales, [8, 31, 2]" in capsys.readouterr().err
