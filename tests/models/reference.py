"""A plain decoder to compare with, and small configs, batches and programs for the tests.

The reference has no scan, no remat, no NNX, no chunks and no custom gradient: attention goes document by document with
Python loops, each layer is a dict of arrays, each expert is computed for every token, and the loss holds all logits.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from maxscale import config as config_lib
from maxscale.models import module
from maxscale.sharding import mesh, rules
from maxscale.step import Program

VOCAB = 61
DENSE = {
  "model.embed": 32, "model.layers": 2, "model.heads": 4, "model.kv_heads": 2, "model.mlp": 48,
  "model.vocab_multiple": 1, "model.compute_dtype": "float32", "loss.z_loss": 0.1, "remat.policy": "none",
  "data.batch_size": 8, "data.length": 32, "run.steps": 10, "optimizer.warmup_steps": 2,
}  # fmt: skip
MOE = {
  **DENSE, "model.experts": 4, "model.experts_per_token": 2, "model.mlp": 24, "loss.balance_loss": 0.3,
  "loss.router_z_loss": 0.2,
}  # fmt: skip
FAMILIES = {"dense": DENSE, "moe": MOE}


def config(options, **more):
  """A checked Config from dotted options (`a__b` is a.b in keywords); what is missing has its default."""
  options = {**options, **{key.replace("__", "."): value for key, value in more.items()}}
  tree = {}
  for path, value in options.items():
    group, *middle, name = path.split(".")
    node = tree.setdefault(group, {})
    for key in middle:
      node = node.setdefault(key, {})
    node[name] = value
  out = config_lib.from_json(json.dumps(tree))
  config_lib.check(out)
  return out


def program(options, devices=1, vocab=VOCAB, **more):
  """The program of a config on the first devices."""
  c = config(options, **more)
  shape, device_mesh = mesh.for_config(c, jax.devices()[:devices])
  out = Program(c, vocab, device_mesh, rules.make(c.sharding, shape.sizes, shape.slices))
  out.check(c.data.batch_size, c.data.length)
  return out


def batch(rows=8, length=32, vocab=VOCAB, seed=0, full=False):
  """A packed batch: each row has one to four documents, then padding (none if `full`); numpy int32."""
  rng = np.random.default_rng(seed)
  out = {key: np.zeros((rows, length), np.int32) for key in ("tokens", "targets", "segments", "positions")}
  out["targets"] -= 1
  for row in range(rows):
    used = length if full else int(rng.integers(3, length + 1))
    cuts = np.sort(rng.choice(np.arange(1, used), min(int(rng.integers(0, 4)), used - 1), replace=False))
    for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, used])):
      tokens = rng.integers(0, vocab, stop - start)
      out["tokens"][row, start:stop] = tokens
      out["targets"][row, start : stop - 1] = tokens[1:]
      out["segments"][row, start:stop] = i + 1
      out["positions"][row, start:stop] = np.arange(stop - start)
  return {**out, "rows": np.arange(rows, dtype=np.int32)}


def place(program, batch):
  return {key: jax.device_put(value, program.batch_sharding(key)) for key, value in batch.items()}


def initial(program):
  """The whole state at step 0."""
  return program.initialise()()


def host(tree):
  """Path -> numpy array of a nested dict."""
  return {path: np.asarray(value) for path, value in module.flatten(tree).items()}


def logical(program, flat):
  """Path -> the part without padding."""
  specs = program.skeleton.specs
  return {path: value[tuple(slice(n) for n in specs[path].logical)] for path, value in flat.items()}


def loss_and_gradients(program, params, batch, step=None):
  """Loss, metrics sums, gradients by path (numpy) of a batch with the scale that a step gives it."""
  scale = np.float32(1 / max(1, (batch["targets"] >= 0).sum()))
  grads, loss, sums = jax.jit(program.on_mesh)(params, batch, step, scale)
  return float(loss), sums, host(grads)


def error(a, b):
  """Largest difference of two arrays, relative to the largest value of the second."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
  return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) if np.isfinite(a).all() else np.inf


def assert_close(a, b, tolerance=1e-5, what=""):
  """Every leaf of path -> array, or two arrays, to a relative error."""
  if not isinstance(b, dict):
    a, b = {what: a}, {what: b}
  assert a.keys() == b.keys(), a.keys() ^ b.keys()
  wrong = {path: e for path in b if not (e := error(a[path], b[path])) <= tolerance}
  assert not wrong, f"{what}: relative errors above {tolerance}: {wrong}"


def different(a, b, at_least=1e-3):
  """Whether two arrays differ by more than that, relative to the second."""
  return error(a, b) > at_least


# ---- the decoder


@dataclasses.dataclass
class Reference:
  """The decoder of a config for the parameters of a `Program` without padding."""

  config: config_lib.Config

  def loss(self, params, batch):
    """The objective of a batch (a mean over its targets), its plain part, as in a training step without dropout."""
    c = self.config
    hidden, auxiliary = self.hidden(params, batch)
    head = params["embedding"] if c.model.tied_embeddings else params["head"]
    logits = hidden @ head.T
    log_z = jax.nn.logsumexp(logits, -1)
    targets = np.asarray(batch["targets"])
    rows, columns = np.nonzero(targets >= 0)
    z = log_z[rows, columns]
    nll = (z - logits[rows, columns, targets[rows, columns]]).sum()
    total = nll + c.loss.z_loss * (z**2).sum() + auxiliary
    return total / max(1, len(rows)), nll / max(1, len(rows))

  def hidden(self, params, batch):
    """Final hidden states [B, T, D] (zero-attention in padding), and the sum of the auxiliary losses."""
    c = self.config
    x = params["embedding"][batch["tokens"]] * c.model.embed**0.5
    auxiliary = 0.0
    for i in range(c.model.layers):
      p = jax.tree.map(lambda a: a[i], params["layers"])  # noqa: B023
      x = x + self.attention(p["attention"], self.norm(x, p["attention_norm"]["scale"]), batch)
      y = self.norm(x, p["mlp_norm"]["scale"])
      if c.model.experts:
        y, losses = self.experts(p["mlp"], y, np.asarray(batch["segments"]) > 0)
        auxiliary += losses
      else:
        y = gated(y, p["mlp"]["gate"], p["mlp"]["up"], p["mlp"]["down"])
      x = x + y
    return self.norm(x, params["final_norm"]["scale"]), auxiliary

  def norm(self, x, scale):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + self.config.model.norm_eps) * scale

  def attention(self, p, x, batch):
    heads, kv_heads = self.config.model.heads, self.config.kv_heads
    shared = np.arange(heads) * kv_heads // heads  # the key and value head of each query head
    segments, rows = np.asarray(batch["segments"]), []
    for row in range(x.shape[0]):
      parts, at = [], 0
      while at < x.shape[1]:
        stop = at + 1
        while stop < x.shape[1] and segments[row, stop] == segments[row, at]:
          stop += 1
        document = x[row, at:stop]
        if segments[row, at] == 0:
          parts.append(jnp.zeros_like(document))
        else:
          q, k = (self.rotate(jnp.einsum("td,dnh->nth", document, p[name])) for name in ("query", "key"))
          k, v = k[shared], jnp.einsum("td,dkh->kth", document, p["value"])[shared]
          parts.append(jnp.einsum("nth,nhd->td", causal(q, k, v), p["out"]))
        at = stop
      rows.append(jnp.concatenate(parts))
    return jnp.stack(rows)

  def rotate(self, x_nth):
    """Pair (i, i + H/2) of position t as a complex number times exp(i t theta**(-2i/H)); documents start at 0."""
    half = x_nth.shape[-1] // 2
    t, i = np.arange(x_nth.shape[1])[:, None], np.arange(half)[None]
    turn = np.exp(1j * t * self.config.model.rope_theta ** (-2 * i / x_nth.shape[-1]))
    real, imaginary = jnp.float32(turn.real), jnp.float32(turn.imag)
    a, b = x_nth[..., :half], x_nth[..., half:]
    return jnp.concatenate([a * real - b * imaginary, a * imaginary + b * real], -1)

  def experts(self, p, x, valid):
    """Every expert for every token, weighted by zero where it was not chosen; and the two losses, summed."""
    m, weights = self.config.model, self.config.loss
    logits = x @ p["router"]
    probs = jax.nn.softmax(logits, -1)
    rank = (probs[..., None, :] > probs[..., :, None]).sum(-1)  # how many experts are more probable
    chosen = (rank < m.experts_per_token).astype(jnp.float32)
    gates = probs * chosen
    gates = gates / gates.sum(-1, keepdims=True)
    y = 0.0
    for e in range(m.experts):
      y = y + gates[..., e : e + 1] * gated(x, p["gate"][e], p["up"][e], p["down"][e])
    balance = router_z = 0.0
    for row in range(x.shape[0]):
      places = np.flatnonzero(valid[row])
      if len(places):
        share = chosen[row, places].sum(0) / (len(places) * m.experts_per_token)
        balance += m.experts * (share * probs[row, places].mean(0)).sum() * len(places)
        router_z += (jax.nn.logsumexp(logits[row, places], -1) ** 2).sum()
    return y, weights.balance_loss * balance + weights.router_z_loss * router_z


def gated(x, gate, up, down):
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def causal(q, k, v):
  """Attention of each head over one document: [N, T, H] each."""
  scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
  scores = jnp.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -jnp.inf)
  weights = jnp.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True) @ v


def reference(config, params, batch):
  """Loss, plain loss and gradients by path (numpy) of the reference, for logical parameters by path."""
  params = module.nest({path: jnp.asarray(value) for path, value in params.items()})
  f = jax.jit(jax.value_and_grad(lambda p: Reference(config).loss(p, batch), has_aux=True))
  (loss, nll), grads = f(params)
  return float(loss), float(nll), host(grads)
