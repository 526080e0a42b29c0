"""The values of a layer as a small graph: what computes each, what its backward needs, and what is sent.

`d` is the device that computes them; its letters are those of `Local`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from maxscale.models import experts, splash
from maxscale.perf import traffic
from maxscale.perf.closed.local import Dot, Kernel, Local


@dataclasses.dataclass(frozen=True)
class Node:
  """A value of a layer.

  Attributes:
    out: its name; those of `remat.NAMES` can be kept.
    ins: values that it is made of.
    needs: values that its backward needs.
    size: bytes of it.
    weights: path of each weight in `dots`, in their order.
    moves, back: collectives of forward and of backward.
    vector, vector_back: bytes of elementwise passes.
    others, others_back: products without weights, of forward and of backward.
    beside: values that the same kernel makes: one is not computed again without the other.
  """

  out: str
  ins: tuple[str, ...]
  needs: tuple[str, ...] = ()
  size: float = 0.0
  dots: tuple[Dot, ...] = ()
  weights: tuple[str, ...] = ()
  kernel: tuple[Kernel, Kernel] | None = None
  moves: tuple[traffic.Transfer, ...] = ()
  back: tuple[traffic.Transfer, ...] = ()
  vector: float = 0.0
  vector_back: float = 0.0
  others: tuple[Dot, ...] = ()
  others_back: tuple[Dot, ...] = ()
  beside: tuple[str, ...] = ()


def values(d: Local, stack: str, window: int, dense: bool) -> list[Node]:
  """The values of a layer in the order in which they are computed; "x" goes in."""
  s, m, a = d.shape, d.shape.m, d.a
  residual, tokens = d.b * d.r * s.D * a, d.b * d.t
  attention = _latent(d, stack) if m.mla.kv_rank else _grouped(d, stack)
  post = ("attention_out",) if m.post_norms else ()
  nodes = [Node("n1", ("x",), ("x",), residual, vector=2 * residual, vector_back=4 * residual), *attention,
           *_attend(d, window)]  # fmt: skip
  back = "attention_back" if any(n.out == "attention_back" for n in nodes) else "attention"
  nodes.append(
    Node("attention_out", (back,), (back,), residual, (d.dot(tokens, d.N_l * s.H_v, s.D),),
         (f"{stack}/attention/out",), None, d.reduce(s.D, "heads"), d.gather(s.D))
  )  # fmt: skip
  nodes.append(Node("x1", ("x", "attention_out"), post, residual, vector=3 * residual, vector_back=3 * residual))
  if m.parallel_block:
    entry = "n1"
  else:
    entry = "n2"
    nodes.append(Node("n2", ("x1",), ("x1",), residual, vector=2 * residual, vector_back=4 * residual))
  nodes += _mlp(d, stack, entry) if dense else _moe(d, stack, entry)
  post = ("mlp_out",) if m.post_norms else ()
  nodes.append(Node("out", ("x1", "mlp_out"), post, residual, vector=3 * residual, vector_back=3 * residual))
  return nodes


def _grouped(d: Local, stack: str) -> list[Node]:
  s, tokens, at = d.shape, d.b * d.t, f"{stack}/attention/"
  entry = Node("attention_in", ("n1",), size=tokens * s.D * d.a, moves=d.gather(s.D),
               back=d.reduce(s.D, "heads"))  # fmt: skip
  out = [entry]
  for name, heads, width in (("query", d.N_l, s.H), ("key", d.K_l, s.H), ("value", d.K_l, s.H_v)):
    size, normed = tokens * heads * width * d.a, s.m.qk_norm and name != "value"
    dot = (d.dot(tokens, s.D, heads * width),)
    passes = 0.0 if name == "value" or (s.m.max_positions and not normed) else 2 * size
    turn = () if name == "value" or s.m.max_positions else (d.dot(tokens * heads, width, width),)
    # the norm of a head needs what it normalises
    out.append(Node(f"{name}_raw", ("attention_in",), ("attention_in",), size, dot, (at + name,)))
    out.append(Node(name, (f"{name}_raw",), (f"{name}_raw",) if normed else (), size, vector=passes,
                    vector_back=passes, others=turn, others_back=turn))  # fmt: skip
  return out


def _latent(d: Local, stack: str) -> list[Node]:
  s, mla, at, a = d.shape, d.shape.m.mla, f"{stack}/attention/", d.a
  tokens, own = d.b * d.t, d.b * d.r
  width, wide = mla.kv_rank + mla.rope_dim, s.H + mla.v_dim  # the keys' product leaves room for their rotary part
  turn = lambda heads, n: (d.dot(tokens * heads, n, n),)  # noqa: E731
  in_and_back = lambda n: dict[str, Any](moves=d.gather(n), back=d.reduce(n, "heads"))  # noqa: E731
  out = [
    Node("kv_down", ("n1",), ("n1",), own * width * a, (d.dot(own, s.D, width),), (at + "kv_down",)),
    Node("kv_latent", ("kv_down",), ("kv_down",), tokens * mla.kv_rank * a, vector=2 * own * width * a,
         vector_back=4 * own * width * a, **in_and_back(mla.kv_rank)),
    Node("rope_latent", ("kv_down",), size=tokens * mla.rope_dim * a, others=turn(1, mla.rope_dim),
         others_back=turn(1, mla.rope_dim), **in_and_back(mla.rope_dim)),
  ]  # fmt: skip
  heads = d.N_l * s.H
  if mla.q_rank:
    out += [
      Node("query_down", ("n1",), ("n1",), own * mla.q_rank * a, (d.dot(own, s.D, mla.q_rank),),
           (at + "query_down",)),
      Node("query_latent", ("query_down",), ("query_down",), tokens * mla.q_rank * a,
           vector=2 * own * mla.q_rank * a, vector_back=4 * own * mla.q_rank * a, **in_and_back(mla.q_rank)),
      Node("query_raw", ("query_latent",), ("query_latent",), tokens * heads * a,
           (d.dot(tokens, mla.q_rank, heads),), (at + "query_up",)),
    ]  # fmt: skip
  else:
    out += [
      Node("attention_in", ("n1",), size=tokens * s.D * a, **in_and_back(s.D)),
      Node("query_raw", ("attention_in",), ("attention_in",), tokens * heads * a,
           (d.dot(tokens, s.D, heads),), (at + "query",)),
    ]  # fmt: skip
  size = tokens * heads * a
  out += [
    Node("query", ("query_raw",), size=size, vector=2 * size, vector_back=2 * size, others=turn(d.N_l, s.H),
         others_back=turn(d.N_l, s.H)),
    Node("kv_raw", ("kv_latent",), ("kv_latent",), tokens * d.N_l * wide * a,
         (d.dot(tokens, mla.kv_rank, d.N_l * wide),), (at + "kv_up",)),
    Node("key", ("kv_raw", "rope_latent"), size=size, vector_back=size),
    Node("value", ("kv_raw",), size=tokens * d.N_l * s.H_v * a),
  ]  # fmt: skip
  return out


def _attend(d: Local, window: int) -> list[Node]:
  """From query, key and value to attention, by the method for split sequences."""
  s, b, t, a = d.shape, d.b, d.t, d.a
  parts = d.factor("length", "compute")
  window = window if window < t * parts else 0
  method = s.context if parts > 1 else ""
  method = "gather" if method == "ring" and window else method
  q, k, v = b * t * d.N_l * s.H, b * t * d.K_l * s.H, b * t * d.K_l * s.H_v
  o = b * t * d.N_l * s.H_v
  forward, backward, extra = _kernels(d, window, parts, method)
  ins, out = ("query", "key", "value"), []
  moves: tuple = ()
  back: tuple = ()
  if method == "gather":
    gather = lambda n: d.move("all-gather", d.length, n * parts)  # noqa: E731
    scatter = lambda n: d.move("reduce-scatter", d.length, n * parts)  # noqa: E731
    out.append(Node("keys", ("key", "value"), size=(k + v) * parts * a, moves=gather(k) + gather(v),
                    back=scatter(k) + scatter(v)))  # fmt: skip
    ins = ("query", "keys")
  elif method == "ulysses":
    exchange = lambda *n: tuple(x for size in n for x in d.move("all-to-all", d.length, size))  # noqa: E731
    out.append(Node("exchanged", ins, size=(q + k + v) * a, moves=exchange(q, k, v), back=exchange(q, k, v)))
    ins = ("exchanged",)
  elif method == "ring":
    send = lambda n, dtype="", times=parts - 1: d.move("collective-permute", d.length, n, dtype, times)  # noqa: E731
    moves = send(k) + send(v)
    back = moves + send(k, "float32", parts) + send(v, "float32", parts)
  out.append(
    Node("attention", ins, (*ins, "attention"), o * a + b * t * d.N_l * 4, kernel=(forward, backward),
         moves=moves, back=back, vector=extra[0], vector_back=extra[1])
  )  # fmt: skip
  if method == "ulysses":
    out.append(Node("attention_back", ("attention",), size=o * a, moves=exchange(o), back=exchange(o)))
  return out


def _kernels(d: Local, window: int, parts: int, method: str) -> tuple[Kernel, Kernel, tuple[float, float]]:
  """Forward and backward kernels, and bytes of what they write out beside their results."""
  s, t = d.shape, int(d.t)
  whole = t * parts
  heads, t = (d.N_l / parts, whole) if method == "ulysses" else (d.N_l, t)
  chunk = t // 2 if method in ("ring", "gather") else t
  kernels = d.backend == "tpu" and chunk % 128 == 0
  make = lambda pairs, score, mix: Kernel(d.b * heads, pairs, s.H, s.H_v, score, mix)  # noqa: E731
  if not kernels:
    pairs = _xla_pairs(t, whole, window, method)
    logits = 4 * d.b * heads * pairs  # float32, written and read by softmax and products, forward and backward
    return make(pairs, 1, 1), make(pairs, 3, 2), (4 * logits, 8 * logits)
  small = max(s.H, s.H_v) > 128 or d.a > 2 or s.m.attention_softcap or 0 < window <= 512
  sizes = (512, 256, 128) if small else (1024, 512, 256, 128)
  keys = t if method == "ring" else whole
  block_q, block_kv = (next(n for n in sizes if rows % n == 0) for rows in (chunk, keys))
  if method == "gather":
    # zigzag: of the pairs that all devices see each has an equal share
    pairs = _block_pairs(whole, whole, block_q, block_kv, window) / parts
  else:
    pairs = _block_pairs(t, keys, block_q, block_kv, window)
  fused = keys // block_kv <= splash.FUSED_BLOCKS and not window
  row = d.b * heads * s.H * d.a
  partial = 2 * row * t * (keys // block_kv) if fused else 0.0  # of dq, one for each block of keys, then summed
  extra = (0.0, partial)
  if method == "ring":
    steps, half = parts - 1, t // 2
    pairs += steps * t * t / 2
    out, gradients = 4 * d.b * t * d.N_l * s.H_v, 4 * d.b * t * (d.N_l * s.H + d.K_l * (s.H + s.H_v))
    rest = 2 * row * half * 2 * max(1, half // block_kv)
    # float32 results are cut in halves and put together again, and each step adds two of its own (models/ring.py)
    extra = ((4.5 + 5 * steps) * out, partial + (6 + 4 * steps) * gradients + steps * rest)
  return make(pairs, 1, 1), make(pairs, 3, 2) if fused else make(pairs, 4, 3), extra


def _mlp(d: Local, stack: str, entry: str, inside: str = "") -> list[Node]:
  """A dense MLP. `inside`: name of the partial sum, where the MLP stands beside experts in one region."""
  s, tokens, at = d.shape, d.b * d.t, f"{stack}/mlp/{'shared/' if inside else ''}"
  width = d.parameter(at + "up")[1][1] / d.factor("mlp", "compute")
  size, mark, out = tokens * width * d.a, "shared_" if inside else "", []
  if not inside:
    out.append(Node("mlp_in", (entry,), size=tokens * s.D * d.a, moves=d.gather(s.D),
                    back=d.reduce(s.D, "mlp")))  # fmt: skip
  names = ("gate", "up") if s.m.gated else ("up",)
  for name in names:
    out.append(Node(mark + name, ("mlp_in",), ("mlp_in",), size, (d.dot(tokens, s.D, width),), (at + name,)))
  wide = tuple(mark + name for name in names)
  out.append(Node(f"{mark}hidden", wide, wide, size, vector_back=3 * size))
  out.append(
    Node(inside or "mlp_out", (f"{mark}hidden",), (f"{mark}hidden",), tokens * s.D * d.a if inside else
         d.b * d.r * s.D * d.a, (d.dot(tokens, width, s.D),), (at + "down",),
         moves=() if inside else d.reduce(s.D, "mlp"), back=() if inside else d.gather(s.D))
  )  # fmt: skip
  return out


def _moe(d: Local, stack: str, entry: str) -> list[Node]:
  s, a, tokens, at = d.shape, d.a, d.b * d.t, f"{stack}/mlp/"
  own = d.b * d.r
  residual, whole = own * s.D * a, tokens * s.D * a
  width = s.F / d.factor("mlp", "compute")
  parts = d.factor("experts", "compute")
  axes, groups = d.split("experts", "compute"), s.E_pad // parts
  choices = tokens * s.A
  room = min(math.ceil(s.buffer * choices), parts * choices) if parts > 1 else choices
  dense = s.m.moe.route == "dense"
  worked = tokens * s.E_pad if dense else choices  # rows of products: those that were chosen, however large the room
  rows = worked if dense else room

  def there(n: int, kind: str) -> Any:
    """To the experts' devices or back: n numbers of each choice, however large the room, or of all tokens of all."""
    if s.exchange:
      return d.move("ragged-all-to-all", axes, choices * n, "" if n > 1 else "float32")
    return d.move(kind, axes, parts * tokens * (n if n > 1 else s.A), "" if n > 1 else "float32")

  product = lambda k, n: d.dot(worked, k, n, groups)  # noqa: E731
  sums, others, everyone = 0.0 if dense else 2.0 * choices * s.D * a, (), 0.0
  if not s.exchange and axes:  # rows of all devices' tokens, which are summed by products with ones
    everyone = parts * whole
    others = (Dot(experts.BLOCK, worked, s.D, math.ceil(parts * tokens / experts.BLOCK), d.exact, 4, True),)
    sums = room * (2 * s.D + experts.BLOCK) * a + everyone * (1 + 4 / a)
  small = [(s.A, "float32"), (s.A, "int32"), (1, "bool")]  # gates, ids, valid
  size = rows * width * a
  nodes = [
    Node("router", (entry,), (entry,), own * s.E_pad * 4, (Dot(own, s.D, s.E_pad, 0, True, 4),), (at + "router",),
         vector=residual),
    Node("choice", ("router",), ("router",), moves=sum((d.gather(n, dtype) for n, dtype in small), ()),
         back=d.reduce(s.A, "mlp", "float32"), vector=6 * own * s.E_pad * 4, vector_back=6 * own * s.E_pad * 4),
    Node("mlp_in", (entry,), size=whole, moves=d.gather(s.D), back=d.reduce(s.D, "mlp")),
    Node("rows", ("mlp_in", "choice"), ("choice",), rows * s.D * a + everyone, others_back=others,
         moves=there(s.D, "all-gather"), back=there(s.D, "reduce-scatter"),
         vector=0 if dense else 2 * choices * s.D * a, vector_back=1.5 * sums),
    Node("row_gates", ("choice",), ("choice",), rows * 4, moves=there(1, "all-gather"),
         back=there(1, "reduce-scatter")),
  ]  # fmt: skip
  names = ("gate", "up") if s.m.gated else ("up",)
  fused = d.backend == "tpu" and not dense and not s.m.quantize  # one kernel for both, and for what is done with them
  passes = 0 if fused else size
  for name in names:
    nodes.append(Node(name, ("rows",), ("rows",), size, (product(s.D, width),), (at + name,), vector=2 * passes,
                      beside=names if fused else ()))  # fmt: skip
  nodes += [
    Node("hidden", (*names, "row_gates"), (*names, "row_gates"), size, vector=3 * passes, vector_back=6 * passes),
    Node("experts_out", ("hidden",), ("hidden",), rows * s.D * a, (product(width, s.D),), (at + "down",)),
    Node("combined", ("experts_out", "choice"), ("choice",), whole, others=others, moves=there(s.D, "reduce-scatter"),
         back=there(s.D, "all-gather"), vector=sums, vector_back=0 if dense else 2 * choices * s.D * a),
  ]  # fmt: skip
  ins = ("combined",)
  if s.m.moe.shared:
    nodes += _mlp(d, stack, entry, "shared_out")
    ins = ("combined", "shared_out")
  nodes.append(Node("mlp_out", ins, (), residual, moves=d.reduce(s.D, "mlp"), back=d.gather(s.D),
                    vector=whole))  # fmt: skip
  return nodes


@functools.cache
def _block_pairs(queries: int, keys: int, block_q: int, block_kv: int, window: int) -> float:
  """Pairs in the blocks of a causal mask that are computed: those in which some query sees some key."""
  first = np.arange(0, queries, block_q)
  last_key = np.minimum((first + block_q - 1) // block_kv, keys // block_kv - 1)
  first_key = np.maximum(0, (first - window + 1) // block_kv) if window else np.zeros_like(first)
  return float((last_key - first_key + 1).sum()) * block_q * block_kv


@functools.cache
def _xla_pairs(t: int, whole: int, window: int, method: str) -> float:
  """Pairs that `attention._blocks` computes."""
  from maxscale.models.attention import CAUSAL_BLOCKS, WINDOW_BLOCKS

  def blocks(chunk: int, keys: int, static: bool) -> float:
    counts = (WINDOW_BLOCKS, CAUSAL_BLOCKS) if window else (CAUSAL_BLOCKS,) if static else ()
    rows = chunk // next((n for n in counts if chunk % n == 0 and chunk >= 32 * n), 1)
    total = 0.0
    for start in range(0, chunk, rows):
      if static:
        seen = min(keys, start + rows) - (max(0, start + 1 - window) if window else 0)
      else:
        seen = min(keys, rows + window) if window else keys
      total += rows * seen
    return total

  if method == "gather":
    return 2 * blocks(t // 2, whole, False)
  if method == "ring":
    return blocks(t, t, True) + (whole // t - 1) * t * t / 2
  return blocks(t, t, True)
