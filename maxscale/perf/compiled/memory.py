"""Where the HBM of a device goes at the peak of a compiled step, by what the bytes are for.

The compiler says how much the peak is, not what it is made of. `peak_memory_in_bytes` is the arguments, those on the
host among them, and the temporaries that live at the worst point of the schedule. Without the host's it is what the
compiler holds against the chip's limit: with libtpu 0.0.42 and v6e's 31.25 GiB a program was accepted at 30.95 GiB and
refused at 31.55 GiB, the number in the message; arguments and `temp_size_in_bytes` were 33.6 GiB in one that was
accepted, and so were 24 GiB on the host beside 15.9 GiB. The program's code comes on top.

What lives there follows from the scheduled program: each result is alive from its instruction to its last use, loops
carry their state in place, and instructions write over operands where their `aliasing_operands` say so. The sum over
what is alive has been the compiler's own peak to 0.1 MiB wherever the two were compared.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maxscale.models import remat
from maxscale.perf import flops
from maxscale.perf.compiled import aot, collectives
from maxscale.perf.compiled.program import Instruction, Program
from maxscale.perf.hardware import chip_of
from maxscale.sharding.rules import ROLES

HBM, HOST = 0, 5  # memory spaces of a layout
_SMALL = 4096  # bytes up to which an array says nothing of what a result is made of

_TOKEN = re.compile(r"[()]|([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"\d+")
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_PARAMETER = re.compile(r"\bparameter\((\d+)\)")
_ELEMENT = re.compile(r"\bindex=(\d+)")
_IN_PLACE = re.compile(r'"aliasing_operands":\{"lists":\[((?:\{[^}]*\},?)*)\]')
_INDICES = re.compile(r'"indices":\[([^\]]*)\]')
_OUTPUT = re.compile(r"\{(\d*)\}: \((\d+), \{\}")

Tree = Any


# ---- types


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a program: its logical dimensions, the memory it is in, and its bytes there, with padding."""

  dtype: str
  dims: tuple[int, ...]
  space: int
  bytes: int


def arrays(type: str) -> Tree:
  """The type of an instruction as an `Array`, or as a tuple of such for a tuple."""
  stack: list[list[Tree]] = [[]]
  for token in _TOKEN.finditer(type):
    if token.group() == "(":
      stack.append([])
    elif token.group() == ")":
      inner = tuple(stack.pop())
      stack[-1].append(inner)
    else:
      stack[-1].append(_array(token.group(1), token.group(2), token.group(3) or ""))
  return stack[0][0]


@functools.cache
def _array(dtype: str, dims: str, layout: str) -> Array:
  """Layout `1,0:T(8,128)(2,1)S(1)`: dimensions from the minor one, the tile whose multiples the minor ones are padded
  to, how elements are packed inside it, the memory."""
  logical = tuple(int(d) for d in _BITS.findall(dims))
  order, _, rest = layout.partition(":")
  physical = [logical[int(d)] for d in reversed(order.split(","))] if order else list(logical)
  if tile := _TILE.search(rest):
    sizes = [int(t) for t in tile.group(1).split(",")]
    physical = [1] * (len(sizes) - len(physical)) + physical
    for k, size in enumerate(reversed(sizes), 1):
      physical[-k] = -(-physical[-k] // size) * size
  bits = _BITS.search(dtype)
  space = _SPACE.search(rest)
  width = 8 if dtype == "pred" else int(bits.group()) if bits else 0  # token and opaque have no bytes
  return Array(dtype, logical, int(space.group(1)) if space else HBM, math.prod(physical) * width // 8)


# ---- what lives when


@dataclasses.dataclass
class Value:
  """A result, or one array of it, and when it lives: from its instruction to its last use, as positions in the schedule.

  Attributes:
    instruction: what made it; for the state of a loop, what made it before the loop.
    argument: number of the entry's parameter that it is.
    origin: class of the arguments that it is made of alone: cast, gathered, cut, moved; "" if it is made of others, too.
  """

  array: Array
  instruction: Instruction
  start: int
  end: int
  argument: int | None = None
  origin: str = ""


class Schedule:
  """The values of a program, which of them share memory, and what lives at the peak.

  Args:
    classes: of the entry's parameters, by their numbers.
  """

  def __init__(self, program: Program, classes: Sequence[str] = ()):
    self.program = program
    self.values: list[Value] = []
    self._joined: list[int] = []  # value -> another in the same memory, or itself
    self._shared: list[tuple[int, int]] = []
    self._classes = classes
    self._time = 0
    result = self._computation(program.entry, None)
    self._use(result)
    for operand, output in self._shared:
      self._join(operand, output)
    parameters = {v.argument: k for k, v in reversed(list(enumerate(self.values))) if v.argument is not None}
    results = _flat(result)
    for element, parameter in program.donated.items():
      self._join(parameters[parameter], results[element])
    self.arguments = [self.values[k] for k in parameters.values()]

  def peak(self, space: int = HBM) -> tuple[int, list[Value]]:
    """Bytes of the temporaries at their peak in a memory, and those that live there, one for each buffer."""
    given = {self._memory(k) for k, v in enumerate(self.values) if v.argument is not None}
    buffers: dict[int, list[Value]] = {}
    for k, v in enumerate(self.values):
      memory = self._memory(k)
      if v.array.space == space and v.array.bytes and memory not in given and v.instruction.opcode != "constant":
        buffers.setdefault(memory, []).append(v)
    changes: dict[int, int] = {}
    for values in buffers.values():
      size = max(v.array.bytes for v in values)
      for start, end in _merged([(v.start, v.end) for v in values]):
        changes[start] = changes.get(start, 0) + size
        changes[end + 1] = changes.get(end + 1, 0) - size
    total, most, when = 0, 0, 0
    for time in sorted(changes):
      total += changes[time]
      if total > most:
        most, when = total, time
    alive = ([v for v in values if v.start <= when <= v.end] for values in buffers.values())
    return most, [max(values, key=lambda v: v.array.bytes) for values in alive if values]

  def _new(self, array: Array, i: Instruction, argument: int | None = None, origin: str = "") -> int:
    self.values.append(Value(array, i, self._time, self._time, argument, origin))
    self._joined.append(len(self.values) - 1)
    return len(self.values) - 1

  def _again(self, tree: Tree) -> Tree:
    """The same memory as a new value: its life inside a loop, or after one, is another than before."""

    def again(k: int) -> int:
      old = self.values[k]
      new = self._new(old.array, old.instruction, old.argument, old.origin)
      self._join(k, new)
      return new

    return _map(again, tree)

  def _memory(self, k: int) -> int:
    while self._joined[k] != k:
      self._joined[k] = k = self._joined[self._joined[k]]
    return k

  def _join(self, a: int, b: int) -> None:
    self._joined[self._memory(b)] = self._memory(a)

  def _use(self, tree: Tree) -> None:
    for k in _flat(tree):
      self.values[k].end = self._time

  def _computation(self, name: str, operands: Sequence[Tree] | None) -> Tree:
    """Places of the values that a computation results in. `operands`: None for the entry."""
    env: dict[str, Tree] = {}
    body = self.program.computations[name]
    for i in body:
      if i.opcode != "parameter":
        env[i.name] = self._instruction(i, [env[o] for o in i.operands if o in env])
      elif operands is None:
        env[i.name] = self._argument(i)
      else:
        env[i.name] = self._again(operands[i.number(_PARAMETER) or 0])
      self._time += 1
    return env[next((i.name for i in body if i.root), body[-1].name)]

  def _argument(self, i: Instruction) -> int:
    number = i.number(_PARAMETER) or 0
    return self._new(arrays(i.type), i, number, self._classes[number] if self._classes else "")

  def _instruction(self, i: Instruction, operands: list[Tree]) -> Tree:
    op = i.opcode
    if op == "tuple":
      return tuple(operands)
    if op == "get-tuple-element":
      return operands[0][i.number(_ELEMENT)]
    if op in ("bitcast", "opt-barrier", "optimization-barrier", "dynamic-update-slice"):
      self._use(operands[1:])
      return operands[0]
    self._use(operands)
    if op == "while":
      return self._loop(i, operands[0])
    if op == "call":
      return self._computation((i.called.get("to_apply") or i.called["calls"])[0], operands)
    if op == "conditional":
      return self._branches(i, operands)
    if op.endswith("-done"):
      return _ended(op, operands[0])
    type_ = arrays(i.type)
    origins = {self.values[k].origin for k in _flat(operands) if self.values[k].array.bytes > _SMALL}
    origin = origins.pop() if len(origins) == 1 else ""
    new = functools.partial(_map, lambda array: self._new(array, i, origin=origin))
    if op == "copy-start":
      return new(type_[0]), operands[0], new(type_[2])
    if op == "dynamic-update-slice-start":  # of an array in host memory
      return tuple(operands), operands[0], *new(type_[2:])
    if op == "send" or (op.endswith("-start") and op != "all-reduce-start" and isinstance(type_, tuple)):
      return operands[0] if len(operands) == 1 else tuple(operands), *new(type_[1:])
    out = new(type_)
    self._in_place(i, operands, out)
    return out

  def _loop(self, i: Instruction, state: Tree) -> Tree:
    self._time += 1
    self._computation(i.called["condition"][0], [state])
    left = self._computation(i.called["body"][0], [state])
    self._use(left)
    for before, after in zip(_flat(state), _flat(left)):
      self._join(before, after)
    self._time += 1
    return self._again(state)

  def _branches(self, i: Instruction, operands: list[Tree]) -> Tree:
    names = i.called.get("branch_computations") or (*i.called["true_computation"], *i.called["false_computation"])
    results = []
    for name, operand in zip(names, operands[1:]):
      results.append(self._computation(name, [operand]))
      self._use(results[-1])
    for result in results[1:]:
      for one, other in zip(_flat(results[0]), _flat(result)):
        self._join(one, other)
    return self._again(results[0])

  def _in_place(self, i: Instruction, operands: list[Tree], out: Tree) -> None:
    """Notes which outputs are written over which operands. They are numbered in one row, the operands before."""
    places = [*operands, *([out] if isinstance(out, int) else out)]
    lists = _IN_PLACE.search(i.text)
    for indices in _INDICES.findall(lists.group(1)) if lists else ():
      first, *others = (places[int(n)] for n in _BITS.findall(indices))
      self._shared += [(a, b) for other in others for a, b in zip(_flat(first), _flat(other))]
    if "output_to_operand_aliasing=" in i.text:
      aliases = i.text.partition("output_to_operand_aliasing=")[2]
      for output, operand in _OUTPUT.findall(aliases[: aliases.find(")}") + 2]):
        target = out if isinstance(out, int) else out[int(output or 0)]
        self._shared += list(zip(_flat(operands[int(operand)]), _flat(target)))


def _ended(op: str, started: Tree) -> Tree:
  """The result of what was started: mostly (operand, result, context), or the result itself."""
  if not isinstance(started, tuple):
    return started
  if op in ("send-done", "recv-done"):  # (data, context, token)
    return started[2] if op == "send-done" else (started[0], started[2])
  return started[0 if op == "copy-done" else 1]


def _flat(tree: Tree) -> list:
  return [x for t in tree for x in _flat(t)] if isinstance(tree, (tuple, list)) else [tree]


def _map(f: Callable, tree: Tree) -> Tree:
  return tuple(_map(f, t) for t in tree) if isinstance(tree, tuple) else f(tree)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
  """Spans, both ends in them, of which none meets another."""
  out: list[tuple[int, int]] = []
  for start, end in sorted(spans):
    if out and start <= out[-1][1]:
      out[-1] = (out[-1][0], max(end, out[-1][1]))
    else:
      out.append((start, end))
  return out


# ---- what it is for

FIXED = ("parameters", "optimizer", "batch", "gradients")
WORKING = ("weights_in_use", "logits", "collectives", "temporaries", "program")
RESIDUAL, OTHER = "residual", "other"  # what backward keeps, beside what has a name
_IN_USE = {"parameters": "weights_in_use", "optimizer": "optimizer"}


@dataclasses.dataclass(frozen=True)
class Known:
  """What a step says of its arrays, as they are on one device.

  Attributes:
    arguments: the class of each of the entry's parameters.
    kept: (name, dtype, shape) of what backward may keep of a layer, in order of computation.
    gradients: sorted dimensions, without those of 1, of every gradient, of all layers and of one.
    gradient_dtypes: of a gradient at any time.
    vocab: sizes of a dimension of the logits.
    layers: trips of the loops over layers.
  """

  arguments: tuple[str, ...] = ()
  kept: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
  gradients: frozenset[tuple[int, ...]] = frozenset()
  gradient_dtypes: frozenset[str] = frozenset({"f32"})
  vocab: frozenset[int] = frozenset()
  layers: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Memory:
  """HBM of one JAX device at the peak of a step, in bytes.

  Attributes:
    capacity: of the chip, divided among its devices. The compiler's limit is less: 31.25 of 32 GiB on v6e, 94.74 of 95
      on v5p.
    peak: what the compiler says that the step needs at once, and its code.
    parts: class -> bytes: parameters; optimizer (moments, and what its step has in flight); batch; gradients;
      "activations/<name>" for what the layers keep for their backward, "activations/residual" for their inputs,
      "activations/other" for what has no name;
      weights_in_use (cast or gathered parameters); logits (of a chunk); collectives (results of communication that are
      none of those); temporaries (all others); program.
    host: class -> bytes of host memory that a device keeps there.
  """

  capacity: float
  peak: int
  parts: dict[str, int]
  host: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def unattributed(self) -> int:
    """Of the peak, what is in no class; below 0 if the classes hold more."""
    return self.peak - sum(self.parts.values())

  @property
  def headroom(self) -> float:
    return self.capacity - self.peak

  @property
  def fits(self) -> bool:
    return self.headroom >= 0

  def text(self) -> str:
    """A table, a class a line."""
    rows = [*self.parts.items(), ("unattributed", self.unattributed), ("peak", self.peak)]
    lines = [("HBM of a device", "GiB", "of peak"), *((n, _gib(size), f"{size / self.peak:.1%}") for n, size in rows)]
    lines += [("capacity", _gib(self.capacity), "")]
    if self.host:
      lines += [("on the host", "GiB", ""), *((name, _gib(size), "") for name, size in self.host.items())]
    width = max(len(line[0]) for line in lines)
    table = "\n".join(f"{name:<{width}}  {size:>9}  {share:>7}".rstrip() for name, size, share in lines)
    size = f"{abs(self.headroom) / 2**30:.2f} GiB"
    return f"{table}\n" + (f"fits: {size} are free" if self.fits else f"does not fit by {size}")


def _gib(size: float) -> str:
  return f"{size / 2**30:.3f}"


def peak(analysis: Any) -> int:
  """Bytes of a device's HBM that a program needs at once with its code, of `jax.stages.Compiled.memory_analysis`."""
  return analysis.peak_memory_in_bytes - analysis.host_argument_size_in_bytes + analysis.generated_code_size_in_bytes


def classes(compiled: aot.Compiled) -> Memory:
  """HBM by class of a compiled step.

  Raises:
    ValueError: the device is in no table, or the compiler says nothing of memory.
  """
  device = compiled.step.mesh.devices.flat[0].device_kind
  chip, analysis = chip_of(device), compiled.executable.memory_analysis()
  if chip is None or analysis is None:
    raise ValueError(f"the memory of {device!r} is in no table" if chip is None else "the compiler reports no memory")
  parts, host = attribute(compiled.program, known(compiled))
  parts["program"] = analysis.generated_code_size_in_bytes
  return Memory(chip.hbm / chip.devices, peak(analysis), _ordered(parts), _ordered(host))


def attribute(program: Program, known: Known) -> tuple[dict[str, int], dict[str, int]]:
  """Class -> bytes of what lives at the peak of HBM, and at that of host memory."""
  schedule = Schedule(program, known.arguments)
  out: list[dict[str, int]] = []
  for space in (HBM, HOST):
    sizes: dict[str, int] = {}
    for value in schedule.arguments:
      if value.array.space == space:
        _add(sizes, known.arguments[value.argument or 0], value.array.bytes)
    names = _Names(program, known)
    for value in sorted(schedule.peak(space)[1], key=lambda v: v.start):
      _add(sizes, names.of(value), value.array.bytes)
    out.append(sizes)
  return out[0], out[1]


def known(compiled: aot.Compiled) -> Known:
  """What is known of the arrays of a step."""
  step, config = compiled.step, compiled.step.config
  paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(step.abstract_state())[0]]
  state = ("parameters" if path[0].key == "params" else "optimizer" for path in paths)
  batch = ("batch" for i in compiled.program.computations[compiled.program.entry] if i.opcode == "parameter")
  local = lambda sizes, names, role: tuple(n // step.rules.factor(name, role) for n, name in zip(sizes, names))  # noqa: E731
  gradients: set[tuple[int, ...]] = set()
  layers: set[int] = set()
  for spec in step.trained.values():
    for role in ROLES:
      dims = local(spec.shape, spec.names, role)
      gradients |= {_nontrivial(dims), _nontrivial(dims[1:])} if spec.rows else {_nontrivial(dims)}
      layers |= {dims[0], dims[0] // max(1, len(config.model.windows))} if spec.rows else set()
  rows = config.data.batch_size // config.sharding.microbatches
  stream = local((rows, config.data.length, step.shape.D), ("batch", "residual_length", "embed"), "compute")
  actions = remat.table(config.remat)
  kept = [(RESIDUAL, _hlo_dtype(config.model.compute_dtype), stream)]
  kept += [n for n in named(compiled.traced.jaxpr) if actions is None or actions[n[0]] != "recompute"]
  return Known(
    (*state, *batch), tuple(dict.fromkeys(kept)), frozenset(gradients),
    frozenset({"f32", _hlo_dtype(config.optimizer.grad_reduce_dtype)}),
    frozenset({step.shape.V_pad, step.shape.V_pad // step.rules.factor("vocab", "compute")}), frozenset(layers),
  )  # fmt: skip


def named(jaxpr: Any) -> Iterable[tuple[str, str, tuple[int, ...]]]:
  """(name, dtype, shape) of each activation that has a name, in order."""
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if eqn.primitive.name == "name":
      aval = eqn.outvars[0].aval
      yield eqn.params["name"], _hlo_dtype(aval.dtype), aval.shape
    for inner in flops.inner_jaxprs(eqn.params.values()):
      yield from named(inner)


class _Names:
  """The class of each buffer at a peak. Several of one shape get the names of that shape in order."""

  def __init__(self, program: Program, known: Known):
    self.program, self.known = program, known
    self._met: dict[tuple[str, tuple[int, ...]], Iterator[int]] = {}

  def of(self, value: Value) -> str:
    array, i = value.array, value.instruction
    if value.origin in _IN_USE:
      return _IN_USE[value.origin]
    if kept := self._kept(array):
      return f"activations/{kept}"
    if _nontrivial(array.dims) in self.known.gradients and array.dtype in self.known.gradient_dtypes:
      updated = i.op_name and "shard_map" not in i.op_name  # gradients are made in one, the optimizer's step is not
      return "optimizer" if updated else "gradients"
    if "AllocateBuffer" in i.text and self.known.layers.intersection(array.dims[:1]):
      return f"activations/{OTHER}"
    if self.known.vocab.intersection(array.dims):
      return "logits"
    return "collectives" if self._communicated(i) else "temporaries"

  def _kept(self, array: Array) -> str:
    """The name of what a stack holds: the shape of one layer's, behind dimensions that count layers."""
    for _, dtype, shape in self.known.kept:
      one = _squeezed(shape)
      lead = math.prod(array.dims) // max(1, math.prod(one))
      if dtype == array.dtype and lead > 1 and _squeezed(array.dims)[-len(one) :] == one:
        names = [name for name, other, dims in self.known.kept if (other, _squeezed(dims)) == (dtype, one)]
        met = self._met.setdefault((dtype, array.dims), itertools.count())
        return names[next(met) % len(names)]
    return ""

  def _communicated(self, i: Instruction) -> bool:
    inner = [j for names in i.called.values() for name in names for j in self.program.computations.get(name, ())]
    return any(j.opcode.removesuffix("-start").removesuffix("-done") in collectives.KINDS for j in (i, *inner))


def _squeezed(dims: Sequence[int]) -> tuple[int, ...]:
  return tuple(d for d in dims if d > 1)


def _nontrivial(dims: Sequence[int]) -> tuple[int, ...]:
  return tuple(sorted(_squeezed(dims)))


def _hlo_dtype(dtype: Any) -> str:
  """JAX's name of a dtype -> the compiler's: bfloat16 -> bf16."""
  name = jnp.dtype(dtype).name
  for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "s"), ("bool", "pred"), ("_", "")):
    name = name.replace(long, short)
  return name


def _add(sizes: dict[str, int], name: str, size: int) -> None:
  sizes[name] = sizes.get(name, 0) + size


def _ordered(sizes: dict[str, int]) -> dict[str, int]:
  order = (*FIXED, *(f"activations/{name}" for name in (RESIDUAL, *remat.NAMES, OTHER)), *WORKING)
  return {name: sizes[name] for name in order if name in sizes}


# ---- what the compiler says of a program that is too large

_SIZE = r"([\d.]+)([BKMGT]?)"
_NEEDS = (
  re.compile(rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
  re.compile(rf"memory space hbm\. Used {_SIZE} of {_SIZE} hbm"),
)
_LARGEST = re.compile(rf"^\s*\d+\. Size: {_SIZE}\s*$(.*?)(?=={{5,}}|\Z)", re.MULTILINE | re.DOTALL)
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Oom:
  """A program that the compiler refused.

  Attributes:
    used, limit: bytes of HBM that it needs and that it could have.
    largest: (bytes, op_name or "", shape) of the largest buffers, where the message lists them.
  """

  used: int
  limit: int
  largest: tuple[tuple[int, str, str], ...] = ()

  @property
  def excess(self) -> int:
    return self.used - self.limit

  def text(self) -> str:
    lines = [f"does not fit by {self.excess / 2**30:.2f} GiB: the step needs {self.used / 2**30:.2f} GiB of HBM a device, "
             f"{self.limit / 2**30:.2f} GiB are there"]  # fmt: skip
    return "\n".join(
      lines + [f"  {size / 2**30:.2f} GiB  {shape}  {name}".rstrip() for size, name, shape in self.largest]
    )


def out_of_memory(error: Exception) -> Oom | None:
  """What the compiler's error says of HBM that is too small; None if it is another error.

  Seen of libtpu 0.0.42: one line with the two sums. The longer report, with the largest buffers, is in it as well.
  """
  message = str(error)
  found = next((f for f in (pattern.search(message) for pattern in _NEEDS) if f), None)
  if "RESOURCE_EXHAUSTED" not in message or not found:
    return None
  largest = (
    (_size(*entry.group(1, 2)), _field("op_name=", entry.group(3)), _field("Shape: ", entry.group(3)))
    for entry in _LARGEST.finditer(message)
  )
  return Oom(_size(*found.group(1, 2)), _size(*found.group(3, 4)), tuple(largest))


def _size(number: str, unit: str) -> int:
  return round(float(number) * _UNITS[unit])


def _field(name: str, text: str) -> str:
  """What stands behind a name, in quotes or up to a space."""
  found = re.search(rf'{name}(?:"((?:[^"\\]|\\.)*)"|(\S+))', text)
  return (found.group(1) or found.group(2)) if found else ""
