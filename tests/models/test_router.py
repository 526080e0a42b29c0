"""Routers against Hugging Face's, against NumPy, and what they count and correct."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxscale.config import Moe
from maxscale.models import router
from tests.models import reference as ref

TOKENS, E, PAD, A = 64, 12, 16, 3
CASES = {
  "mixtral": Moe(),
  "qwen2": Moe(normalise=False),
  "v2": Moe(normalise=False, scale=2.5, groups=4, groups_per_token=2),
  "v3": Moe(score="sigmoid", scale=2.5, groups=4, groups_per_token=2, group_score="top2"),
  "one group": Moe(score="sigmoid", groups=3, groups_per_token=1, group_score="top2"),
  "sigmoid": Moe(score="sigmoid", normalise=False),
}


def logits(rows=TOKENS, seed=0):
  """[rows, E_pad]; the padding is larger than all else."""
  x = np.random.default_rng(seed).normal(size=(rows, PAD))
  x[:, E:] = 100
  return jnp.asarray(x, jnp.float32)


def corrections(name):
  """None, corrections that change the choice, and such that every corrected score is negative."""
  bias = jnp.asarray(np.random.default_rng(1).normal(size=PAD) / 4, jnp.float32).at[E:].set(100)
  return [None, bias, bias - 3] if CASES[name].score == "sigmoid" else [None]


def plain_scores(moe, x):
  e = jnp.exp(x[:, :E])
  return e / e.sum(1, keepdims=True) if moe.score == "softmax" else e / (1 + e)


def plain_choice(moe, scores, bias):
  """(ids, gap) token by token, experts in the order of Python's sort."""
  ids, gaps = [], []
  for row in np.asarray(scores) if bias is None else np.asarray(scores) + bias[:E]:
    size, gap = E // moe.groups, np.inf
    value = {
      g: sorted(row[g * size : (g + 1) * size])[-1 if moe.group_score == "max" else -2 :] for g in range(moe.groups)
    }
    groups = sorted(value, key=lambda g: -sum(value[g]))
    keep, rest = groups[: moe.groups_per_token], groups[moe.groups_per_token :]
    if rest:
      gap = sum(value[keep[-1]]) - sum(value[rest[0]])
    experts = sorted((e for e in range(E) if e // size in keep), key=lambda e: -row[e])
    if len(experts) > A:
      gap = min(gap, row[experts[A - 1]] - row[experts[A]])
    ids.append(experts[:A])
    gaps.append(gap)
  return np.array(ids), np.array(gaps)


def plain_gates(moe, x, ids):
  gates = plain_scores(moe, x)[np.arange(len(ids))[:, None], ids]
  return (gates / gates.sum(1, keepdims=True) if moe.normalise else gates) * moe.scale


@pytest.mark.parametrize("name", CASES)
def test_choice_gates_and_their_gradient_are_the_plain_ones(name):
  moe, x = CASES[name], logits()
  weights = np.random.default_rng(2).normal(size=(TOKENS, A)).astype(np.float32)
  scores = plain_scores(moe, x)
  for bias in corrections(name):
    ids, gaps = plain_choice(moe, scores, bias)
    choice = router.choose(moe, A, E, x, bias)
    assert choice.gates.dtype == choice.scores.dtype == jnp.float32 and choice.ids.dtype == jnp.int32
    np.testing.assert_array_equal(choice.ids, ids)
    ref.assert_close(choice.scores, scores)
    ref.assert_close(choice.gap, gaps, 1e-4)
    ref.assert_close(choice.gates, plain_gates(moe, x, ids))
    gradient = jax.grad(lambda x: jnp.sum(weights * router.choose(moe, A, E, x, bias).gates))(x)  # noqa: B023
    expected = jax.grad(lambda x: jnp.sum(weights * plain_gates(moe, x, ids)))(x)  # noqa: B023
    ref.assert_close(gradient, expected)
    assert not np.asarray(gradient)[:, E:].any()


def test_the_correction_changes_the_choice_alone():
  moe, x = CASES["v3"], logits()
  bias = corrections("v3")[1]
  plain, moved = router.choose(moe, A, E, x, None), router.choose(moe, A, E, x, bias)
  assert (np.asarray(plain.ids) != np.asarray(moved.ids)).any()
  np.testing.assert_array_equal(plain.scores, moved.scores)
  assert not jax.grad(lambda b: router.choose(moe, A, E, x, b).gates.sum())(bias).any()
  assert not jax.grad(lambda x: router.choose(moe, A, E, x, bias).gap.sum())(x).any()


def test_all_experts_chosen_leave_no_gap():
  choice = router.choose(Moe(), E, E, logits(), None)
  np.testing.assert_array_equal(np.sort(choice.ids), np.tile(np.arange(E), (TOKENS, 1)))
  assert (np.asarray(choice.gap) == np.inf).all()
  groups = router.choose(Moe(groups=4, groups_per_token=1), E // 4, E, logits(), None)
  assert np.isfinite(groups.gap).all(), "the next group is at a finite distance"


def test_bfloat16_logits_are_routed_in_float32():
  x = jnp.asarray(logits(), jnp.bfloat16)
  for a, b in zip(router.choose(Moe(), A, E, x, None), router.choose(Moe(), A, E, x.astype(jnp.float32), None)):
    np.testing.assert_array_equal(a, b)


# ---- Hugging Face


def hugging_face(name):
  """Its router for a family, its configuration's class, and what differs in its configuration."""
  pytest.importorskip("torch", reason="torch is not installed (pip install 'maxscale[hf]')")
  models = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'maxscale[hf]')"
  ).models
  group = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_routed_experts": E}
  return {
    "mixtral": lambda: models.mixtral.modeling_mixtral.MixtralTopKRouter(
      models.mixtral.MixtralConfig(hidden_size=E, num_local_experts=E, num_experts_per_tok=A)),
    "gpt_oss": lambda: models.gpt_oss.modeling_gpt_oss.GptOssTopKRouter(
      models.gpt_oss.GptOssConfig(hidden_size=E, num_local_experts=E, num_experts_per_tok=A)),
    "v2": lambda: models.deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter(
      models.deepseek_v2.DeepseekV2Config(
        hidden_size=E, num_attention_heads=E, num_experts_per_tok=A, topk_method="group_limited_greedy", **group)),
    "v3": lambda: models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(
      models.deepseek_v3.DeepseekV3Config(hidden_size=E, num_experts_per_tok=A, norm_topk_prob=True, **group)),
  }[name]()  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "v2", "v3"])
def test_the_routers_of_hugging_face(name):
  """Their weight is the identity here, so that their input is the logits."""
  other = hugging_face(name)
  import torch

  x, bias, added = logits(), None, jnp.zeros(PAD)
  with torch.no_grad():
    other.weight.copy_(torch.eye(E))
    if name == "v3":
      bias = corrections("v3")[1]
      other.e_score_correction_bias.copy_(torch.tensor(np.asarray(bias)[:E]))
    if name == "gpt_oss":
      added = jnp.linspace(-1, 1, PAD)
      other.bias.copy_(torch.tensor(np.asarray(added)[:E]))
  inputs = torch.tensor(np.asarray(x)[:, :E], requires_grad=True)
  _, gates, ids = other(inputs)
  weights = np.random.default_rng(2).normal(size=(TOKENS, E)).astype(np.float32)  # of experts: an order-free sum
  (gates * torch.tensor(weights).gather(1, ids)).sum().backward()
  moe = CASES.get(name, Moe())
  share = lambda choice: jnp.einsum("ta,tae->te", choice.gates, jax.nn.one_hot(choice.ids, E))  # noqa: E731
  f = lambda x: share(router.choose(moe, A, E, x + added, bias))  # noqa: E731
  ref.assert_close(f(x), torch.zeros(TOKENS, E).scatter(1, ids, gates.detach()).numpy())
  gradient = jax.grad(lambda x: jnp.sum(weights * f(x)))(x)
  assert inputs.grad is not None
  ref.assert_close(gradient[:, :E], inputs.grad.numpy())


# ---- losses and counts


def plain_balance(moe, x, ids, valid):
  """The sequences one by one, in the words of arXiv 2412.19437: T f_i P_i, summed over experts and sequences."""
  loss = z = entropy = jnp.float32(0)
  for row in range(len(x)):
    places = np.flatnonzero(valid[row])
    if not len(places):
      continue
    scores = plain_scores(moe, x[row, places])
    probs = scores / scores.sum(1, keepdims=True)
    f = np.array([E / (A * len(places)) * (ids[row, places] == i).sum() for i in range(E)])
    loss += len(places) * jnp.sum(f * probs.mean(0))
    z += jnp.sum(jnp.log(jnp.exp(x[row, places, :E]).sum(1)) ** 2)
    entropy -= jnp.sum(probs * jnp.log(probs))
  return loss, z, entropy


@pytest.mark.parametrize("name", ["mixtral", "v3", "sigmoid"])
def test_losses_and_their_gradients_are_the_plain_ones(name):
  moe, x = CASES[name], logits().reshape(4, 16, PAD)
  valid = jnp.arange(16) < jnp.array([16, 11, 1, 0])[:, None]

  def losses(x):
    choice = router.choose(moe, A, E, x, None)
    out = router.balance(moe, choice, x, valid)
    return out["balance_loss"] + 0.1 * out["router_z_loss"], (choice, out)

  gradient, (choice, out) = jax.grad(losses, has_aux=True)(x)
  ids = np.asarray(choice.ids)
  balance, z, entropy = plain_balance(moe, x, ids, valid)
  ref.assert_close({k: out[k] for k in ("balance_loss", "router_z_loss", "entropy")},
                   {"balance_loss": balance, "router_z_loss": z, "entropy": entropy})  # fmt: skip
  np.testing.assert_array_equal(out["expert_tokens"], [(ids[np.asarray(valid)] == e).sum() for e in range(E)])
  assert out["margin"] == np.asarray(choice.gap)[valid].min() and np.isfinite(out["margin"])
  expected = jax.grad(lambda x: (lambda b, z, _: b + 0.1 * z)(*plain_balance(moe, x, ids, valid)))(x)
  ref.assert_close(gradient, expected)
  assert (np.asarray(gradient)[valid][:, :E] != 0).any() and not np.asarray(gradient)[~valid].any()


def test_padding_alone_counts_nothing():
  moe, x = CASES["v3"], logits().reshape(4, 16, PAD)
  out = router.balance(moe, router.choose(moe, A, E, x, None), x, jnp.zeros((4, 16), bool))
  assert out["margin"] == np.inf and not any(np.any(v) for k, v in out.items() if k != "margin")


def test_extreme_scores_stay_finite():
  x = jnp.full((1, 2, E), -200.0).at[0, 1, 0].set(0)  # all sigmoids are zero; all of a softmax but one
  for moe in (CASES["v3"], CASES["mixtral"]):

    def f(x, moe=moe):
      choice = router.choose(moe, A, E, x, None)
      out = router.balance(moe, choice, x, jnp.ones((1, 2), bool))
      return choice.gates.sum() + out["balance_loss"] + out["entropy"]

    assert np.isfinite(f(x)) and np.isfinite(jax.grad(f)(x)).all()


# ---- correction and capacity


def test_the_correction_steps_towards_the_mean():
  before = jnp.array([[0.5, 0.5, 0.5, 9], [0, 0, 0, 9]])
  after = router.corrected(before, jnp.array([[4, 1, 1], [2, 2, 2]]), 0.125)
  np.testing.assert_array_equal(after, [[0.375, 0.625, 0.625, 9], [0, 0, 0, 9]])
  np.testing.assert_array_equal(router.corrected(before, jnp.array([[4, 1, 1], [2, 2, 2]]), 0.0), before)


def test_corrections_balance_a_skewed_router():
  moe = dataclasses.replace(CASES["sigmoid"], correction=True)
  x = logits(512) + jnp.pad(jnp.linspace(-1, 1, E), (0, PAD - E))
  valid = jnp.ones((1, 512), bool)

  @jax.jit
  def step(correction):
    tokens = router.balance(moe, router.choose(moe, A, E, x[None], correction[0]), x[None], valid)["expert_tokens"]
    return router.corrected(correction, tokens[None], 0.01), tokens

  correction = jnp.zeros((1, PAD))
  loads = []
  for _ in range(100):
    correction, tokens = step(correction)
    loads.append(float(tokens.max() / tokens.mean()))
  assert loads[0] > 2 and loads[-1] < 1.2, loads


def test_capacity_keeps_the_first_choices_of_each_sequence():
  ids = jnp.array([[[0, 1], [0, 2], [1, 0], [0, 1]], [[3, 0], [2, 1], [0, 1], [1, 0]]])
  valid = jnp.array([[True] * 4, [False, True, True, True]])
  kept, dropped = router.capacity(1.0, 4, ids, valid)  # room for 4 * 2 / 4 = 2 choices of each expert
  np.testing.assert_array_equal(kept, [[[0, 1], [0, 2], [1, -1], [-1, -1]], [[-1, -1], [2, 1], [0, 1], [-1, 0]]])
  assert dropped == 4 and dropped.dtype == jnp.int32
  kept, dropped = router.capacity(0.1, 4, ids, valid)  # room for one
  np.testing.assert_array_equal(kept, [[[0, 1], [-1, 2], [-1, -1], [-1, -1]], [[-1, -1], [2, 1], [0, -1], [-1, -1]]])
  assert dropped == 8
  kept, dropped = router.capacity(2.0, 4, ids, valid)  # room for four: only padding goes
  np.testing.assert_array_equal(kept, np.where(valid[..., None], ids, -1))
  assert dropped == 0


def test_capacity_against_counting():
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(E)[:A] for _ in range(6 * 40)]).reshape(6, 40, A)
  valid = np.arange(40) < np.array([40, 40, 30, 5, 1, 0])[:, None]
  expected, room = np.full(ids.shape, -1), int(np.ceil(0.7 * 40 * A / E))
  for row in range(6):
    used = [0] * E
    for place, rank in np.ndindex(40, A):
      e = ids[row, place, rank]
      if valid[row, place] and used[e] < room:
        used[e], expected[row, place, rank] = used[e] + 1, e
  kept, dropped = router.capacity(0.7, E, jnp.asarray(ids), jnp.asarray(valid))
  np.testing.assert_array_equal(kept, expected)
  assert dropped == valid.sum() * A - (expected >= 0).sum() > 0
