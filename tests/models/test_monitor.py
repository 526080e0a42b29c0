"""What is looked at layer by layer, and what is mended there: norms, largest logits, QK-clip, the experts' correction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.models import monitor
from tests.models import reference as ref

MLA = {"model.mla.kv_rank": 16, "model.mla.q_rank": 24, "model.mla.nope_dim": 8, "model.mla.rope_dim": 4,
       "model.mla.v_dim": 8, "model.kv_heads": 0}  # fmt: skip
WATCHED = {"dense": ref.DENSE, "latent": {**ref.DENSE, **MLA},
           "first layer dense": {**ref.MOE, **MLA, "model.moe.dense_layers": 1, "model.layers": 3}}  # fmt: skip


def logits_of(program, params, batch):
  """The largest masked logit of each layer and head, [L, N], by forward passes with plain operations."""
  found = []

  class Spy:
    def __init__(self, original):
      self.original = original

    def __call__(self, q, k, v, q_segments, k_segments, sinks, form, offset, method, backend=None):
      logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, q.shape[2] // k.shape[2], 2)) * form.scale
      seen = (q_segments[:, :, None] == k_segments[:, None]) & np.tril(np.ones(logits.shape[2:], bool))
      found.append(np.where(seen[:, None], logits, -np.inf).max((0, 2, 3)))
      return self.original(q, k, v, q_segments, k_segments, sinks, form, offset, method, backend)

  from maxscale.models import attention

  original = attention.attention
  attention.attention = Spy(original)
  try:
    with jax.disable_jit():
      model = program.skeleton.merge(params)
      x, _, _ = model.embed(batch)
      model.run_layers(x, jnp.arange(model.shape.L - model.shape.L_dense), batch)
  finally:
    attention.attention = original
  return np.stack(found)


@pytest.mark.parametrize("name", WATCHED)
def test_the_largest_logits_of_each_layer_and_what_clipping_leaves_of_them(name):
  program = ref.program(WATCHED[name], log__monitor_every=1, optimizer__qk_clip=3.0)
  state, batch = ref.initial(program), ref.batch()
  wanted = logits_of(program, state["params"], batch)
  assert (wanted > 3).any() and (wanted < 3).any()  # both kinds of heads
  before = ref.host(state["params"])
  clipped, seen = program.watch()(state, ref.place(program, batch))
  np.testing.assert_allclose(seen["max_logit"], wanted.max(1), rtol=1e-4)
  after = ref.host(clipped["params"])
  changed = {path.split("/")[-1] for path in before if (before[path] != after[path]).any()}
  assert changed == ({"query"} if name == "dense" else {"query_up", "kv_up"})
  first = logits_of(program, clipped["params"], batch)[0]  # the input of later layers is another one now
  np.testing.assert_allclose(first, np.minimum(wanted[0], 3), rtol=1e-4)


def test_a_limit_of_zero_leaves_all_as_it_is():
  program = ref.program(ref.DENSE)
  params = ref.initial(program)["params"]
  assert monitor.qk_clip(program.shape, 0.0, params, {"layers": jnp.ones((2, 4))}) is params


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_change_nothing(bad):
  program = ref.program(ref.DENSE)
  params = ref.initial(program)["params"]
  found = monitor.qk_clip(program.shape, 3.0, params, {"layers": jnp.full((2, 4), bad).at[0, 0].set(6.0)})
  before, after = np.asarray(params["layers"]["attention"]["query"]), found["layers"]["attention"]["query"]
  np.testing.assert_allclose(after[0, :, 0], before[0, :, 0] / 2)
  np.testing.assert_array_equal(after[:, :, 1:], before[:, :, 1:])


def test_norms_of_layers_by_hand():
  program = ref.program(ref.DENSE, log__monitor_every=1, optimizer__clip_norm=0.0)
  state, batch = ref.initial(program), ref.batch()
  before = ref.host(state["params"])
  _, _, grads = ref.loss_and_gradients(program, state["params"], batch)
  new, metrics = program.train()(state, ref.place(program, batch))
  after = ref.host(new["params"])
  norm = lambda tree, i: np.sqrt(sum((x[i] ** 2).sum() for p, x in tree.items() if p.startswith("layers/")))  # noqa: E731
  update = {path: after[path] - before[path] for path in before}
  np.testing.assert_allclose(metrics["layer_grad_norm"], [norm(grads, i) for i in (0, 1)], rtol=1e-4)
  np.testing.assert_allclose(
    metrics["layer_update_ratio"], [norm(update, i) / norm(before, i) for i in (0, 1)], rtol=1e-3
  )


def test_the_correction_moves_towards_balance_and_nothing_else_moves_it():
  options = {**ref.MOE, "model.moe.score": "sigmoid", "model.moe.correction": True, "model.moe.correction_rate": 0.01,
             "model.mtp": 1}  # fmt: skip
  program = ref.program(options)
  state, batch = ref.initial(program), ref.batch()
  _, sums, grads = ref.loss_and_gradients(program, state["params"], batch)
  assert not [path for path in grads if "correction" in path]
  assert not [path for path in program.optimizer.specs if "correction" in path]
  new, metrics = program.train()(state, ref.place(program, batch))
  for stack, path in (("layers", "layers/mlp/correction"), ("mtp", "mtp/layer/mlp/correction")):
    tokens = np.asarray(sums[stack]["expert_tokens"])
    wanted = 0.01 * np.sign(tokens.mean(-1, keepdims=True) - tokens)
    assert (wanted > 0).any() and (wanted < 0).any()
    np.testing.assert_allclose(ref.host(new["params"])[path], wanted, atol=1e-7)
  assert metrics["mtp_loss"] > 0 and 0 < metrics["router_entropy"] <= np.log(4) + 1e-5
