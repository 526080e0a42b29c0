"""Seconds of a trace on a chip: its schedule is walked once, with the links, DCN and the host's bus beside the TensorCore.

What the compiler says (cycles, order) is taken as it is; the few numbers that it does not say are `Rates`, fitted on
public step times (perf/calibration.py). A loop is walked once and counted as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from maxscale.perf import network
from maxscale.perf.compiled.trace import HOST, Done, Event, Loop, Move, Start, Sync, Trace, Work
from maxscale.perf.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Rates:
  """What no compiler says of a generation of chips.

  Attributes:
    clock: cycles a second that turn the compiler's estimates into seconds.
    attention: fraction of the peak that attention kernels with heads of 128 reach on the blocks that they compute.
    grouped: the same of the experts' kernels.
    links: fraction of the usable link rate that collectives reach.
    host: bytes/s one way between a device and its host's memory.
    slices: share of a step that each doubling of slices adds to it, since each waits for the slowest.
  """

  clock: float
  attention: float
  grouped: float
  links: float
  host: float
  slices: float = 0.0


@dataclasses.dataclass(frozen=True)
class Span:
  """Something that takes time, in one walk: seconds from the beginning of its loop's body (or the step).

  Attributes:
    resource: "core", "links", "dcn" or "host".
    what: the work or transfer, or the loop.
    waited: seconds that the core stood still for it.
  """

  start: float
  end: float
  resource: str
  what: Work | Move | Loop
  waited: float = 0.0
  inside: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True)
class Timeline:
  """`seconds` of a step, and its spans in order; those of a loop are inside its span, once."""

  seconds: float
  spans: tuple[Span, ...]

  def totals(self) -> dict[tuple[str, str], float]:
    """(class, part) -> seconds of a step that the core spends on it or waits for it; they add up to the step.

    Classes are those of work, and for what is waited for "exposed KIND" with the mesh axes or "DCN".
    """
    out: dict[tuple[str, str], float] = collections.defaultdict(float)
    for span, times in flat(self.spans):
      if isinstance(span.what, Work):
        out[span.what.kind, span.what.part] += (span.end - span.start) * times
      elif isinstance(span.what, Move) and span.waited:
        out[f"exposed {label(span.what)}", span.what.part] += span.waited * times
    return dict(out)

  def classes(self) -> dict[str, float]:
    """Class -> seconds, largest first."""
    out: dict[str, float] = collections.defaultdict(float)
    for (kind, _), seconds in self.totals().items():
      out[kind] += seconds
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def flat(spans: tuple[Span, ...], times: int = 1):
  """(span, how often it happens in a step) of all spans, those inside loops in their place."""
  for span in spans:
    if isinstance(span.what, Loop):
      yield from flat(span.inside, times * span.what.times)
    else:
      yield span, times


def label(move: Move) -> str:
  """A transfer by kind, and what it goes over."""
  if move.kind in HOST:
    return move.kind
  over = "DCN" if move.slices > 1 else move.axes or "ICI"
  return f"{move.kind} {over}"


def run(trace: Trace, chip: Chip, rates: Rates) -> Timeline:
  """The timeline of a step on a device of the chip."""
  seconds, spans, _ = _walk(trace, chip, rates)
  late = seconds * rates.slices * math.log2(_slices(trace))
  if late:
    spans += (Span(seconds, seconds + late, "dcn", Move("wait", 0.0, slices=_slices(trace)), waited=late),)
  return Timeline(seconds + late, spans)


def _slices(trace: Trace) -> int:
  return max((_slices(e.body) if isinstance(e, Loop) else e.move.slices for e in trace if not isinstance(e, Work | Done)),
             default=1)  # fmt: skip


def seconds_of(what: Work | Move, chip: Chip, rates: Rates) -> float:
  """Seconds of work or of a transfer that has its resource for itself."""
  if isinstance(what, Move):
    if what.kind in HOST:
      return what.bytes / rates.host
    if what.slices > 1:
      return network.dcn_seconds(what.kind, what.bytes, chip, what.slices)
    return network.seconds(what.kind, what.bytes, chip, what.dims, what.share * rates.links, what.hops)
  peak, memory = chip.bf16 / chip.devices, chip.hbm_bytes / chip.devices
  reached = {"attention": rates.attention * what.fill, "grouped": rates.grouped, "kernel": rates.grouped}.get(
    what.kind, 1.0
  )
  return what.cycles / rates.clock + max(what.flops / (peak * reached), what.bytes / memory)


def _resource(move: Move) -> str:
  return "host" if move.kind in HOST else "dcn" if move.slices > 1 else "links"


def _walk(
  trace: tuple[Event, ...], chip: Chip, rates: Rates
) -> tuple[float, tuple[Span, ...], dict[str, float]]:  # fmt: skip
  """Seconds and spans of a body, and the seconds for which it uses each lane of links or buses."""
  now, spans = 0.0, []
  free: dict[str, float] = collections.defaultdict(float)  # when each lane has done what was given to it
  used: dict[str, float] = collections.defaultdict(float)
  ends: dict[int, tuple[str, float, int]] = {}

  def begin(move: Move) -> tuple[str, float, int]:
    resource = _resource(move)
    # Both directions of the host's bus work at once, and of the links for permutations; other collectives have all links,
    # one after another.
    lane = move.kind if resource == "host" else move.lane or resource
    start, seconds = max(now, free[lane]), seconds_of(move, chip, rates)
    free[lane] = start + seconds
    used[lane] += seconds
    spans.append(Span(start, free[lane], resource, move))
    return lane, free[lane], len(spans) - 1

  def wait(_: str, end: float, index: int) -> float:
    if end > now:
      spans[index] = dataclasses.replace(spans[index], waited=end - now)
    return max(now, end)

  for event in trace:
    if isinstance(event, Work):
      spans.append(Span(now, now + seconds_of(event, chip, rates), "core", event))
      now = spans[-1].end
    elif isinstance(event, Loop):
      one, inside, inner = _walk(event.body, chip, rates)
      for lane, seconds in inner.items():  # what goes on beside the loop has the lane when the loop does not use it
        used[lane] += seconds * event.times
        if free[lane] > now:
          free[lane] += seconds * event.times
      for key, (lane, end, index) in ends.items():
        if end > now and lane in inner:
          ends[key] = lane, end + inner[lane] * event.times, index
          spans[index] = dataclasses.replace(spans[index], end=ends[key][1])
      spans.append(Span(now, now + one * event.times, "core", event, inside=inside))
      now = spans[-1].end
    elif isinstance(event, Sync):
      now = wait(*begin(event.move))
    elif isinstance(event, Start):
      ends[event.key] = begin(event.move)
    elif isinstance(event, Done):
      now = wait(*ends.pop(event.key))
  for lane, end, index in ends.values():  # nothing in this body waits for it: it ends with the body
    now = wait(lane, end, index)
  return now, tuple(spans), used
