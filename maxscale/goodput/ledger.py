"""What each second of a run was: a pure function of its event log.

The timeline of an attempt is that of its process 0, from the start of the process to its last event; between two
attempts the run is down. The seconds of all classes add up to the time from the first start to the last event. When a
process is killed without an "exit" event, nothing tells when: the time from its last event to the next start is down.

Step time is lost when the run later goes on from before that step: at a "restore" event of an earlier step, or when a
step number is seen again. That includes the step that was running when an attempt ended. Until an attempt goes on from
somewhere, nothing is lost yet.

Goodput here is step time that was not lost, over all time (the runtime goodput of arXiv 2502.06982, with the time
between attempts counted). It does not see slow steps: `pace` does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator

from maxscale.goodput.events import CLASSES

SLOW = 3.0  # a step is slow when it takes more than this many times the median of its like


@dataclasses.dataclass
class Attempt:
  """One start of the run. Times in seconds; `seconds` (class -> seconds) is without the time down before it."""

  number: int
  host: str
  processes: int
  config_hash: str
  start_wall: float
  end_wall: float
  total: float
  seconds: dict[str, float]
  down_before: float = 0.0
  clock_backwards: float = 0.0  # its start lies so far before the end of the attempt before it: clocks disagree
  restored: int | None = None  # step of the last restore
  first_step: int | None = None
  last_step: int | None = None
  lost_steps: int = 0
  exit: str = "killed, or still running"


@dataclasses.dataclass(frozen=True)
class SlowStep:
  """A step of `seconds`, where steps of as many tokens have the median `median`."""

  attempt: int
  step: int
  seconds: float
  median: float


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The account of a run.

  Attributes:
    run: id of the run.
    total: seconds from the start of the first process to the last event; the sum of `seconds`.
    seconds: class of time -> seconds, for every class of `events.CLASSES`.
    goodput: seconds of steps that were not lost / total.
    pace: the time that those steps would have taken, had each been as fast as the fastest tenth of its like (steps of
      as many tokens), over the time that they took; 1 where every step takes as long. NaN without steps.
    steps, tokens: of the steps that were not lost.
    lost_steps: steps that were completed and then lost.
    slow: steps that took more than `SLOW` times the median of their like; their time stays in class "step".
    torn: lines of the log that could not be read.
  """

  run: str
  total: float
  seconds: dict[str, float]
  attempts: list[Attempt]
  goodput: float
  pace: float
  steps: int
  tokens: int
  lost_steps: int
  slow: list[SlowStep]
  torn: int


@dataclasses.dataclass
class _Step:
  number: float  # infinite for the one that was running when its attempt ended or went back: it was never completed
  attempt: Attempt
  in_class: float  # seconds of class "step" since the step before it
  seconds: float = 0.0  # as reported
  tokens: int = 0


def ledger(events: list[dict]) -> Ledger:
  """The account of one run.

  Args:
    events: what `events.read` returned.

  Raises:
    ValueError: there are no events, or they are of several runs.
  """
  whole = [e for e in events if e["kind"] != "torn"]
  runs = {e["run"] for e in whole}
  if len(runs) != 1:
    raise ValueError(f"a ledger is of one run; these events are of {len(runs)}")
  timelines = _timelines(whole)
  attempts, steps, lost = [], [], []
  for lines in timelines:
    attempts.append(_attempt(lines, attempts[-1] if attempts else None))
    _follow(lines, attempts[-1], steps, lost)
  for step in lost:
    step.attempt.seconds["step"] -= step.in_class
    step.attempt.seconds["lost"] += step.in_class
    step.attempt.lost_steps += step.number < math.inf
  seconds = {cls: math.fsum(a.seconds[cls] for a in attempts) for cls in CLASSES}
  seconds["down"] = math.fsum(a.down_before for a in attempts)
  total = math.fsum(seconds.values())
  done = [s for s in steps if s.number < math.inf]
  pace, slow = _speed(done)
  return Ledger(
    run=runs.pop(),
    total=total,
    seconds=seconds,
    attempts=attempts,
    goodput=seconds["step"] / total if total else math.nan,
    pace=pace,
    steps=len(done),
    tokens=sum(s.tokens for s in done),
    lost_steps=sum(a.lost_steps for a in attempts),
    slow=slow,
    torn=len(events) - len(whole),
  )


def spans(events: list[dict]) -> list[tuple[int, str, float, float]]:
  """(attempt, class, start, end) of the timeline, in seconds since the first process started; "down" is the gaps.

  Neighbours of one class are one span. Lost steps are still "step".
  """
  out, now, before = [], 0.0, None
  for lines in _timelines([e for e in events if e["kind"] != "torn"]):
    before = attempt = _attempt(lines, before)
    if attempt.down_before:
      out.append((attempt.number, "down", now, now + attempt.down_before))
    now += attempt.down_before
    for _, cls, passed in _walk(lines):
      if out and out[-1][:2] == (attempt.number, cls):
        out[-1] = (*out[-1][:3], now + passed)
      elif passed:
        out.append((attempt.number, cls, now, now + passed))
      now += passed
  return out


def summary(book: Ledger) -> str:
  """A few lines for the end of a run: where its time went, its attempts, its slow steps."""
  lost = f" and {book.lost_steps} lost" if book.lost_steps else ""
  lines = [
    f"run {book.run}: {duration(book.total)} in {len(book.attempts)} attempt{'s' * (len(book.attempts) > 1)}, "
    f"{book.steps} steps{lost}, {book.tokens:,} tokens",
    f"goodput {book.goodput:.1%}, pace {book.pace:.1%}",
  ]
  for cls, seconds in sorted(book.seconds.items(), key=lambda item: -item[1]):
    if seconds:
      lines.append(f"  {cls:<12}{duration(seconds):>14}{seconds / book.total:>8.1%}  {CLASSES[cls].meaning}")
  for a in book.attempts if len(book.attempts) > 1 else ():
    origin = f"restored step {a.restored}, " if a.restored is not None else ""
    steps = f"steps {a.first_step} to {a.last_step}" if a.first_step is not None else "no step"
    clock = f"; its clock is at least {a.clock_backwards:.0f} s behind" if a.clock_backwards else ""
    lines.append(f"  attempt {a.number}: {origin}{steps}, {a.lost_steps} lost, {a.exit}{clock}")
  for s in book.slow[:5]:
    lines.append(f"  slow: step {s.step} of attempt {s.attempt} took {s.seconds:.3g} s; the median is {s.median:.3g} s")
  if len(book.slow) > 5:
    lines.append(f"  slow: {len(book.slow) - 5} more steps")
  if book.torn:
    lines.append(f"  {book.torn} lines of the event log are torn")
  return "\n".join(lines)


def duration(seconds: float) -> str:
  """Text of a duration: '12.3 s', '5 min 02 s', '3 h 07 min'."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _timelines(events: list[dict]) -> list[list[dict]]:
  """The lines of the first process of each attempt, in the order of attempts."""
  by_process = defaultdict(list)
  for e in events:
    by_process[e["attempt"], e["process"]].append(e)
  keys = sorted(by_process)
  first = [next(group) for _, group in itertools.groupby(keys, key=lambda key: key[0])]
  return [sorted(by_process[key], key=lambda e: e["seq"]) for key in first]


def _walk(lines: list[dict]) -> Iterator[tuple[dict, str, float]]:
  """Each line with the class that the main thread was in until then, and its seconds since the line before."""
  cls, since = "start", 0.0
  for line in lines:
    yield line, cls, line["mono"] - since
    since = line["mono"]
    if line["kind"] == "state":
      cls = line["class"]


def _attempt(lines: list[dict], before: Attempt | None) -> Attempt:
  job, last = lines[0], lines[-1]
  start_wall = job["wall"] - job["mono"]
  gap = start_wall - before.end_wall if before else 0.0
  seconds = dict.fromkeys(CLASSES, 0.0)
  final_class = "start"
  for line, cls, passed in _walk(lines):
    seconds[cls] += passed
    final_class = line["class"] if line["kind"] == "state" else cls
  steps = [line["step"] for line in lines if line["kind"] == "step"]
  restored = [line["step"] for line in lines if line["kind"] == "restore"]
  return Attempt(
    number=job["attempt"],
    host=job.get("host", ""),
    processes=job.get("processes", 1),
    config_hash=job.get("config_hash", ""),
    start_wall=start_wall,
    end_wall=last["wall"],
    total=last["mono"],
    seconds=seconds,
    down_before=max(0.0, gap),
    clock_backwards=max(0.0, -gap),
    restored=restored[-1] if restored else None,
    first_step=steps[0] if steps else None,
    last_step=steps[-1] if steps else None,
    exit=_exit(last, final_class),
  )


def _exit(last: dict, final_class: str) -> str:
  if last["kind"] == "exit":
    return f"exit {last['code']} ({last['reason']})"
  return "finishing" if final_class == "finish" else "killed, or still running"


def _follow(lines: list[dict], attempt: Attempt, steps: list[_Step], lost: list[_Step]) -> None:
  """Appends the steps of an attempt to the stack `steps`; those that it goes back before move to `lost`."""

  def go_back(after: float) -> None:
    while steps and steps[-1].number > after:
      lost.append(steps.pop())

  running = 0.0  # seconds of class "step" that no step event has claimed yet
  for line, cls, passed in _walk(lines):
    running += passed if cls == "step" else 0.0
    if line["kind"] == "step":
      go_back(line["step"] - 1)
      steps.append(_Step(line["step"], attempt, running, line["seconds"], line["tokens"]))
      running = 0.0
    elif line["kind"] == "restore":
      if running:
        steps.append(_Step(math.inf, attempt, running))
      go_back(line["step"])
      running = 0.0
  if running:
    steps.append(_Step(math.inf, attempt, running))


def _speed(steps: list[_Step]) -> tuple[float, list[SlowStep]]:
  """(pace, slow steps): each step is compared with those of as many tokens."""
  alike = defaultdict(list)
  for step in steps:
    alike[step.tokens].append(step)
  ideal, slow = 0.0, []
  for group in alike.values():
    ranked = sorted(s.seconds for s in group)
    ideal += len(ranked) * ranked[len(ranked) // 10]
    median = statistics.median(ranked)
    slow += [SlowStep(s.attempt.number, int(s.number), s.seconds, median) for s in group if s.seconds > SLOW * median]
  took = math.fsum(s.seconds for s in steps)
  return min(1.0, ideal / took) if took else math.nan, sorted(slow, key=lambda s: (s.attempt, s.step))
