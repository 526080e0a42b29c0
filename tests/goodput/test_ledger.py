"""The ledger against logs whose truth is counted by hand."""

import itertools
import random

import pytest

from maxscale.goodput import events, ledger
from maxscale.goodput.events import EventLog


class Log:
  """A synthetic log: one attempt after another on one clock of the truth, which `skew` shifts as the hosts see it."""

  def __init__(self):
    self.lines, self.now, self.number = [], 1e9, 0

  def attempt(self, skew=0.0, process=0, number=None):
    self.number = number or self.number + 1
    self.start, self.skew, self.process, self.seq, self.cls = self.now, skew, process, 0, "start"
    self.event("job", host=f"host{process}", processes=1, config_hash="h")
    return self

  def event(self, kind, **fields):
    clock = {"wall": self.now + self.skew, "mono": self.now - self.start}
    envelope = {"v": 1, "run": "r", "attempt": self.number, "process": self.process, "seq": self.seq}
    self.lines.append({**envelope, **clock, "kind": kind, **fields})
    self.seq += 1
    return self

  def spend(self, cls, seconds):
    if cls != self.cls:
      self.event("state", **{"class": cls})
      self.cls = cls
    self.now += seconds
    return self

  def steps(self, first, last, seconds=10.0, tokens=100):
    for step in range(first, last + 1):
      self.spend("step", seconds).event("step", step=step, seconds=seconds, tokens=tokens)
    return self

  def down(self, seconds):
    self.now += seconds
    return self

  def book(self):
    return ledger.ledger(self.lines)


def nonzero(book):
  return {cls: pytest.approx(seconds) for cls, seconds in book.seconds.items() if seconds}


def test_crash_at_20_and_restart_from_10():
  log = Log().attempt().spend("start", 20).steps(1, 20).spend("step", 4)
  log.event("exit", code=1, reason="XlaRuntimeError").down(60)  # 4 s into step 21
  log.attempt().spend("start", 20).spend("restore", 6).event("restore", step=10, seconds=6.0, bytes=1)
  book = log.steps(11, 30).event("exit", code=0, reason="done").book()
  # 10 steps of the first attempt and 20 of the second; steps 11..20 and the 4 s of step 21 were in vain
  assert nonzero(book) == {"step": 300, "lost": 104, "start": 40, "restore": 6, "down": 60}
  assert book.total == pytest.approx(510) and book.goodput == pytest.approx(300 / 510)
  assert (book.steps, book.lost_steps, book.tokens) == (30, 10, 3000)
  first, second = book.attempts
  assert (first.lost_steps, first.first_step, first.last_step, first.exit) == (10, 1, 20, "exit 1 (XlaRuntimeError)")
  assert (second.restored, second.down_before, second.exit) == (10, pytest.approx(60), "exit 0 (done)")
  assert first.seconds["lost"] == pytest.approx(104) and second.seconds["lost"] == 0


def test_restored_and_killed_before_the_first_step():
  log = Log().attempt().steps(1, 20).down(5).attempt().spend("restore", 5).event("eval", step=0, loss=0.0, seconds=0.0)
  assert nonzero(log.book()) == {"step": 200, "down": 5, "restore": 5}  # where it goes on from is not known yet
  book = log.event("restore", step=10, seconds=5.0, bytes=1).book()
  assert nonzero(book) == {"step": 100, "lost": 100, "down": 5, "restore": 5} and book.lost_steps == 10


def test_start_again_from_nothing():
  book = Log().attempt().steps(1, 5).down(10).attempt().spend("init", 10).steps(1, 5).book()
  assert nonzero(book) == {"step": 50, "lost": 50, "down": 10, "init": 10} and book.lost_steps == 5


def test_hang_inside_a_step():
  book = Log().attempt().steps(1, 50).steps(51, 51, seconds=1010.0).steps(52, 100).book()
  assert book.goodput == 1  # the class is step
  assert book.slow == [ledger.SlowStep(attempt=1, step=51, seconds=1010.0, median=10.0)]
  assert book.pace == pytest.approx(0.5)  # 1000 of 2000 seconds
  assert "step 51 of attempt 1 took 1.01e+03 s" in ledger.summary(book)


def test_hang_that_the_watchdog_ends_is_lost():
  log = Log().attempt().steps(1, 10).spend("step", 1000).event("exit", code=43, reason="watchdog").down(50).attempt()
  book = log.event("restore", step=10, seconds=0.0, bytes=1).steps(11, 20).book()
  assert nonzero(book) == {"step": 200, "lost": 1000, "down": 50} and book.lost_steps == 0


def test_sigkill_leaves_no_time_of_death():
  log = Log().attempt().steps(1, 10).spend("step", 1000).down(50).attempt()
  book = log.event("restore", step=8, seconds=0.0, bytes=1).steps(9, 20).book()
  assert nonzero(book) == {"step": 200, "lost": 20, "down": 1050}
  assert book.attempts[0].exit == "killed, or still running"


def test_graceful_preemption_with_a_gap_of_1000_s():
  log = Log().attempt().steps(1, 50).event("exit", code=42, reason="preempted").down(1000)
  book = log.attempt().event("restore", step=50, seconds=0.0, bytes=1).steps(51, 100).book()
  assert nonzero(book) == {"step": 1000, "down": 1000}
  assert book.goodput == pytest.approx(0.5) and book.lost_steps == 0 and not book.slow
  assert book.attempts[0].exit == "exit 42 (preempted)"


def test_steps_that_double_in_time():
  book = Log().attempt().steps(1, 50).steps(51, 100, seconds=20.0).book()
  assert book.goodput == 1 and book.pace == pytest.approx(2 / 3)
  longer = Log().attempt().steps(1, 50).steps(51, 100, seconds=20.0, tokens=200).book()
  assert longer.pace == 1 and longer.tokens == 15000  # longer sequences are not a slowdown


@pytest.mark.parametrize("gap, down, behind", [(60, 0, 240), (400, 100, 0)])
def test_restart_on_a_host_whose_clock_is_300_s_behind(gap, down, behind):
  log = Log().attempt().steps(1, 10).down(gap).attempt(skew=-300.0)
  book = log.event("restore", step=10, seconds=0.0, bytes=1).steps(11, 20).book()
  assert book.seconds["step"] == pytest.approx(200) and book.seconds["down"] == pytest.approx(down)
  assert book.attempts[1].clock_backwards == pytest.approx(behind)
  assert all(seconds >= 0 for seconds in book.seconds.values())
  assert ("at least 240 s behind" in ledger.summary(book)) == (behind > 0)


def test_crash_loop_before_the_first_step():
  log = Log()
  for _ in range(5):
    log.attempt().spend("start", 10).spend("compile", 10).event("exit", code=1, reason="error").down(10)
  book = log.attempt().spend("start", 10).steps(1, 14).book()
  assert nonzero(book) == {"start": 60, "compile": 50, "down": 50, "step": 140} and len(book.attempts) == 6


def test_rollback_inside_an_attempt():
  log = Log().attempt().steps(1, 100).spend("step", 2).spend("restore", 3)
  book = log.event("restore", step=60, seconds=3.0, bytes=1).steps(61, 100).book()
  assert nonzero(book) == {"step": 1000, "lost": 402, "restore": 3}
  assert (book.steps, book.lost_steps) == (100, 40)


def test_other_processes_are_not_counted_twice():
  log = Log().attempt().steps(1, 10)
  end, log.now = log.now, 1e9
  log.attempt(process=1, number=1).spend("data_wait", 40).steps(1, 6)
  log.now = end
  assert nonzero(log.book()) == {"step": 100} and log.book().steps == 10


def test_process_0_may_be_missing():
  book = Log().attempt(process=3).steps(1, 10).down(7).attempt(process=1).steps(11, 12).book()
  assert nonzero(book) == {"step": 120, "down": 7}


def test_every_second_belongs_to_one_class():
  rng, log, enterable = random.Random(0), Log(), [c for c, t in events.CLASSES.items() if not t.derived]
  done = 0
  for _ in range(30):
    log.attempt()
    if done and rng.random() < 0.8:
      done = rng.randint(0, done)
      log.event("restore", step=done, seconds=0.0, bytes=1)
    for _ in range(rng.randint(0, 40)):
      log.spend(rng.choice([*enterable, "step", "step"]), rng.random() * 10)
      if rng.random() < 0.4:
        done += 1
        log.event("step", step=done, seconds=1.0, tokens=1)
    end = log.now
    log.event("eval", step=done, loss=1.0, seconds=0.0).down(rng.random() * 100)
  book = log.book()
  assert book.total == pytest.approx(end - 1e9)
  assert sum(book.seconds.values()) == pytest.approx(book.total) and min(book.seconds.values()) >= -1e-9
  spans = ledger.spans(log.lines)
  assert all(a[3] == b[2] and a[:2] != b[:2] for a, b in itertools.pairwise(spans))
  assert spans[0][2] == 0 and spans[-1][3] == pytest.approx(book.total)
  for cls in enterable[1:]:
    assert sum(s[3] - s[2] for s in spans if s[1] == cls) == pytest.approx(book.seconds[cls])


def test_from_a_real_log(tmp_path):
  log = EventLog(str(tmp_path))
  log.enter("step")
  log.event("step", step=1, seconds=0.1, tokens=10)
  log.close(0, "done")
  lines = events.read(str(tmp_path))
  book = ledger.ledger([*lines, {**lines[-1], "kind": "torn"}])
  assert book.total == pytest.approx(lines[-1]["mono"]) and book.torn == 1
  text = ledger.summary(book)
  assert f"run {book.run}" in text and "1 steps, 10 tokens" in text and "1 lines of the event log are torn" in text


def test_refuses_no_run_and_two_runs():
  with pytest.raises(ValueError, match="0"):
    ledger.ledger([])
  lines = Log().attempt().steps(1, 2).lines
  with pytest.raises(ValueError, match="2"):
    ledger.ledger([*lines, {**lines[0], "run": "other"}])


def test_durations():
  texts = [ledger.duration(s) for s in (0, 59.94, 59.99, 302, 3599.9, 11220)]
  assert texts == ["0.0 s", "59.9 s", "60.0 s", "5 min 02 s", "1 h 00 min", "3 h 07 min"]
