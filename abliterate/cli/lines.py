"""Progress where there is no terminal: a line when long work begins, at least every half minute, and when it ends."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from abliterate.events import Advanced, Event, Finished, Noted, Started, WeightsRead, duration

EVERY_S = 30.0
"""The longest silence: so long after its last line, running work says how far it is."""
SETTLING_S = 2.0
"""Work that takes less says nothing when it begins."""
AT_ONCE_S = 0.1
"""What is reported done so soon after the beginning was done before, and is no pace."""
LOOKING_S = 0.5
"""How often the clock is looked at."""


@dataclass(slots=True)
class _Task:
    start: Started
    begun: float
    said: float
    announced: bool = False
    done: int = 0
    before: int = 0


@dataclass(slots=True)
class Lines:
    """A listener that says what happens, line by line; ``tick`` says what the time asks for, event or none.

    Events may come from any thread.
    """

    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    every_s: float = EVERY_S
    settling_s: float = SETTLING_S
    tasks: dict[str, _Task] = field(default_factory=dict[str, _Task])
    weights: WeightsRead | None = None
    last: str = "the beginning"
    heard: float = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.heard = self.clock()

    def listen(self, event: Event) -> None:
        """Say what ``event`` says."""
        with self.lock:
            now = self.clock()
            if isinstance(event, Started):
                self.tasks[event.task] = _Task(event, begun=now, said=now)
            elif isinstance(event, Advanced):
                self._advance(event, now)
            elif isinstance(event, Finished):
                task = self.tasks.pop(event.task)
                self.say(f"{event.task}: {_amount(task.start)} in {now - task.begun:.1f} s")
                self.last, self.heard = f"the end of {event.task!r}", now
            elif isinstance(event, Noted):
                self.say(f"note: {event.text}")
                self.heard = now
            else:
                self.weights = event

    def tick(self) -> None:
        """Say which tasks go on, as far as it is time to; where none does, that nothing was heard."""
        with self.lock:
            now = self.clock()
            for name, task in self.tasks.items():
                if now - task.said >= self.every_s:
                    self.say(f"{name}: {_state(task, now - task.begun)}{self._weights()}")
                    task.said, task.announced = now, True
                elif not task.announced and now - task.begun >= self.settling_s:
                    self.say(f"{name}: begun, {_amount(task.start)}")
                    task.announced = True
            if self.tasks:
                self.heard = now
            elif now - self.heard >= self.every_s:
                silence = f"nothing was reported for {duration(now - self.heard)}, since {self.last}"
                self.say(f"still at work; {silence}{self._weights()}")
                self.heard = now

    def _advance(self, event: Advanced, now: float) -> None:
        task = self.tasks[event.task]
        task.done += event.amount
        if now - task.begun < AT_ONCE_S:
            task.before = task.done

    def _weights(self) -> str:
        """How far the weights have passed since this was last said."""
        its, self.weights = self.weights, None
        if its is None:
            return ""
        return f"; weights, reading {its.reading}: {its.done / 1e6:,.1f} of {its.total / 1e6:,.1f} MB"


@contextmanager
def ticking(lines: Lines, *, looking_s: float = LOOKING_S) -> Iterator[None]:
    """Look at the clock meanwhile, from a thread of its own: the work may be silent for long."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(looking_s):
            lines.tick()

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _state(task: _Task, elapsed: float) -> str:
    start, new = task.start, task.done - task.before
    if new <= 0:
        return f"running for {duration(elapsed)}, {_part(task)} reported done"
    rate = new / elapsed
    left = max(0, start.total - task.done) / rate
    pace = f"{rate / 1e6:,.1f} MB/s" if start.unit == "bytes" else f"{rate:,.{1 if rate >= 1 else 2}f} {start.unit}/s"
    return f"{_part(task)} after {duration(elapsed)}, {pace}, about {duration(left)} left"


def _part(task: _Task) -> str:
    done = f"{task.done / 1e6:,.1f}" if task.start.unit == "bytes" else f"{task.done:,}"
    return f"{done} of {_amount(task.start)}"


def _amount(start: Started) -> str:
    return f"{start.total / 1e6:,.1f} MB" if start.unit == "bytes" else f"{start.total:,} {start.unit}"
