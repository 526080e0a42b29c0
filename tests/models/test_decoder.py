"""The decoder, its loss and every gradient against the plain reference; what must not change them does not."""

import functools

import jax
import numpy as np
import pytest

from maxscale.models import module, sample
from tests.models import reference as ref

TIED = {**ref.DENSE, "model.tied_embeddings": True, "model.kv_heads": 4}
FAMILIES = {"dense": ref.DENSE, "tied": TIED, "moe": ref.MOE}
BATCH = ref.batch(2, 24, seed=4)


@functools.cache
def plain(family):
  """The program of a family without remat, chunks and padding; its initial parameters, loss, sums and gradients."""
  program = ref.program(FAMILIES[family], data__batch_size=2)
  params = ref.initial(program)["params"]
  return program, params, *ref.loss_and_gradients(program, params, BATCH)


@functools.cache
def initial(**options):
  """Path -> logical initial value for options beside the default family."""
  program = ref.program(ref.DENSE, **options)
  return ref.logical(program, ref.host(ref.initial(program)["params"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_reference(family):
  program, params, loss, sums, grads = plain(family)
  expected, nll, expected_grads = ref.reference(program.config, ref.host(params), BATCH)
  assert loss == pytest.approx(expected, rel=1e-5)
  assert float(sums["nll"]) / (BATCH["targets"] >= 0).sum() == pytest.approx(nll, rel=1e-5)
  ref.assert_close(grads, expected_grads, 1e-5, family)
  assert all(np.abs(g).max() > 1e-6 for g in grads.values()), "a gradient is zero: nothing was compared"


def test_the_count_of_expert_tokens_is_the_number_of_choices():
  _, _, _, sums, _ = plain("moe")
  counts = np.asarray(sums["layers"]["expert_tokens"])
  assert counts.shape == (2, 4)
  np.testing.assert_array_equal(counts.sum(1), 2 * (BATCH["segments"] > 0).sum())


@pytest.mark.parametrize("family, policy", [("dense", "full"), ("dense", "attention"), ("dense", "projections"),
                                            ("dense", "custom"), ("moe", "full"), ("moe", "projections")])  # fmt: skip
def test_remat_changes_nothing(family, policy):
  table = {"attention": "keep", "up": "keep", "query": "recompute"} if policy == "custom" else {}
  _, params, loss, _, grads = plain(family)
  program = ref.program(FAMILIES[family], data__batch_size=2, remat__policy=policy, remat__table=table)
  again, _, grads_again = ref.loss_and_gradients(program, params, BATCH)
  assert again == pytest.approx(loss, rel=1e-6)
  ref.assert_close(grads_again, grads, 1e-5, policy)


def products(**options):
  """Matrix products in the gradient's program, the scan of layers counted once."""
  program = ref.program(ref.DENSE, data__batch_size=2, **options)
  params = module.map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), program.skeleton.specs)
  return str(jax.make_jaxpr(program.on_mesh)(params, BATCH, None, np.float32(1))).count("dot_general")


def test_remat_recomputes_what_its_table_says():
  none = products()
  # A layer has eleven products: q k v, the turns of q and k, scores, values, out, gate up down; backward never needs
  # the result of the last.
  assert products(remat__policy="full") == none + 10
  assert products(remat__policy="custom", remat__table=dict.fromkeys(["gate", "up"], "keep")) == none + 8
  # Keeping attention saves the scores and their product with the values: backward makes the scores itself, whatever is
  # kept. `out`, which feeds a norm, is made again.
  assert products(remat__policy="attention") == none + 8
  assert products(remat__policy="projections") == none + 1
  assert products(remat__policy="projections", remat__table={"attention_out": "keep"}) == none
  assert products(remat__policy="projections", remat__table={"gate": "recompute"}) == none + 2


@pytest.mark.parametrize("family, chunk", [("dense", 1), ("dense", 7), ("tied", 16)])
def test_a_chunked_loss_is_the_whole_loss(family, chunk):
  _, params, loss, sums, grads = plain(family)
  program = ref.program(FAMILIES[family], data__batch_size=2, loss__chunk=chunk)
  again, sums_again, grads_again = ref.loss_and_gradients(program, params, BATCH)
  assert again == pytest.approx(loss, rel=1e-6)
  assert float(sums_again["nll"]) == pytest.approx(float(sums["nll"]), rel=1e-6)
  ref.assert_close(grads_again, grads, 1e-5, f"chunk {chunk}")


def test_the_gradient_of_a_loss_that_is_multiplied():
  program, params, _, _, grads = plain("dense")
  again, _, _ = jax.jit(program.on_mesh)(params, BATCH, None, np.float32(3 / (BATCH["targets"] >= 0).sum()))
  ref.assert_close(ref.host(again), {p: 3 * g for p, g in grads.items()}, 1e-5)


def inside(spec):
  """Where an array has no padding."""
  out = np.zeros(spec.shape, bool)
  out[tuple(slice(n) for n in spec.logical)] = True
  return out


PADDED = {"model__vocab_multiple": 16, "model__kv_head_multiple": 3, "model__expert_multiple": 6}


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_padding_changes_nothing_and_stays_zero(family):
  _, params, loss, _, grads = plain(family)
  padded = ref.program(FAMILIES[family], data__batch_size=2, optimizer__weight_decay=0.5, **PADDED)
  specs = padded.skeleton.specs
  assert specs["embedding"].shape == (64, 32) and specs["layers/attention/key"].shape[2] in (3, 6)
  assert specs["layers/attention/query"].shape[2] in (6,)
  state = ref.initial(padded)
  values = ref.host(state["params"])
  for path, value in ref.host(params).items():
    np.testing.assert_array_equal(ref.logical(padded, values)[path], value, path)
  # what is in the padding is never read: other numbers there change nothing
  rng = np.random.default_rng(0)
  dirty = {p: np.where(inside(specs[p]), v, np.float32(rng.normal(size=v.shape))) for p, v in values.items()}
  padded_loss, _, padded_grads = ref.loss_and_gradients(padded, module.nest(dirty), BATCH)
  assert padded_loss == pytest.approx(loss, rel=1e-6)
  ref.assert_close(ref.logical(padded, padded_grads), grads, 1e-5, "padded")
  for path, g in padded_grads.items():
    assert not g[~inside(specs[path])].any(), f"the gradient of {path} is not zero in its padding"
  train = padded.train()
  for step in range(3):
    state, _ = train(state, {**ref.batch(2, 24, seed=step)})
  after = ref.host(state["params"])
  for kind, tree in (("params", after), *((m, ref.host(state["optimizer"][m])) for m in ("mu", "nu"))):
    for path, value in tree.items():
      assert not value[~inside(specs[path])].any(), f"padding of {kind}/{path} is not zero"
  assert ref.different(after["embedding"], values["embedding"]), "the steps changed nothing"


# ---- initial values


def test_initial_values_depend_on_the_layer_not_on_the_number_of_layers():
  two, four = initial(model__layers=2), initial(model__layers=4)
  for path in two:
    if path.startswith("layers/"):
      # `out` and `down` are scaled by the depth, by design: their draws are the same
      ratio = (4 / 2) ** 0.5 if path.endswith(("/out", "/down")) else 1
      np.testing.assert_allclose(four[path][:2] * ratio, two[path], rtol=1e-6, err_msg=path)
      if not path.endswith("scale"):
        assert ref.different(two[path][0], two[path][1], 0.1), f"layers of {path} start equal"
    else:
      np.testing.assert_array_equal(four[path], two[path], path)


def test_initial_values_depend_on_the_seed_and_the_path():
  zero, one = initial(), initial(run__seed=1)
  for path, value in zero.items():
    assert path.endswith("scale") or ref.different(value, one[path], 0.1), path
  assert ref.different(zero["embedding"], zero["head"], 0.1)
  assert ref.different(zero["layers/mlp/gate"], zero["layers/mlp/up"], 0.1)


def test_initial_values_have_the_deviation_that_is_declared():
  program = ref.program(ref.DENSE, model__embed=64, model__mlp=256)
  values = ref.host(ref.initial(program)["params"])
  expected = {"layers/mlp/gate": 64**-0.5, "layers/mlp/down": (2 * 2 * 256) ** -0.5, "embedding": 64**-0.5,
              "layers/attention/out": (2 * 2 * 64) ** -0.5}  # fmt: skip
  for path, std in expected.items():
    assert values[path].std() == pytest.approx(std, rel=0.05), path
    assert abs(values[path].mean()) < 0.1 * std
  assert (values["final_norm/scale"] == 1).all()


# ---- dropout


def dropped(*steps, **options):
  """Loss and gradients with dropout at each of the steps (None: as in an evaluation)."""
  program, params = ref.program(ref.DENSE, model__dropout=0.3, data__batch_size=2, **options), plain("dense")[1]
  f = functools.partial(ref.loss_and_gradients, program, params, BATCH)
  return [f(step) for step in steps]


def test_dropout_masks_depend_on_the_step_and_not_on_remat():
  (loss, _, grads), (other, _, _), (evaluated, _, _) = dropped(np.int32(5), np.int32(6), None)
  ((with_remat, _, grads_with_remat),) = dropped(np.int32(5), remat__policy="full")
  assert with_remat == pytest.approx(loss, rel=1e-6)
  ref.assert_close(grads_with_remat, grads, 1e-5)
  assert abs(other - loss) > 1e-3 and abs(evaluated - loss) > 1e-3
  assert evaluated == pytest.approx(plain("dense")[2], rel=1e-6)  # an evaluation drops nothing


def test_a_dropout_mask_is_a_function_of_row_and_position():
  from maxscale.models.parts import Dropout

  key, x = jax.random.key(3), np.ones((4, 8, 512), np.float32)
  ids = np.arange(32).reshape(4, 8)
  whole = np.asarray(Dropout(key, ids, 0.25)(x, 1, 0))
  assert np.unique(whole).tolist() == [0, pytest.approx(1 / 0.75)]
  assert (whole == 0).mean() == pytest.approx(0.25, abs=0.02)
  np.testing.assert_array_equal(Dropout(key, ids[2:3, 4:], 0.25)(x[2:3, 4:], 1, 0), whole[2:3, 4:])
  for layer, place in ((0, 0), (1, 1), (2, 0)):
    other = np.asarray(Dropout(key, ids, 0.25)(x, layer, place))
    assert 0.3 < ((other == 0) != (whole == 0)).mean() < 0.45  # independent masks differ in 2 * 0.25 * 0.75
  assert ((whole[0, 0] == 0) != (whole[0, 1] == 0)).mean() > 0.25


# ---- sampling


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_greedy_sampling_with_a_cache_is_the_argmax_of_the_whole_text(family):
  program, params, *_ = plain(family)
  prompt = np.array([3, 1, 4, 1, 5], np.int32)
  new = sample.sample(program.for_sampling(), params, prompt, 8, 0.0, 0)
  text = np.concatenate([prompt, new])[None]
  whole = {"tokens": text, "segments": np.ones_like(text), "positions": np.arange(text.shape[1])[None]}
  hidden, _ = ref.Reference(program.config).hidden(params, whole)
  expected = np.asarray(hidden[0] @ params["head"].T).argmax(-1)[len(prompt) - 1 : -1]
  np.testing.assert_array_equal(new, expected)
  assert len(set(new.tolist())) > 1, "a constant would pass"
