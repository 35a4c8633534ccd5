"""Many forward passes side by side, so that one weight pass serves all of them.

Every batch runs as a task.  A task pauses where its model comes to a unit that is not loaded.  The scheduler loads one
unit, lets every task that waits for it run until it needs another unit, and releases it.  The next unit is read
meanwhile.

The model's own code decides the order, so nothing here knows an architecture.  A thunk may make one forward pass,
several, or call ``generate``.  Units are taken in the order in which they were first asked for, again and again; tasks
that are at different units meet in the next pass.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit

from abliterate.model.load import LoadedModel
from abliterate.model.malloc import give_back
from abliterate.model.offload import Offloaded, Unit, Values
from abliterate.model.tasks import Task, current

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPass:
    """One weight pass: the units that were loaded, in order, and the bytes that were read."""

    units: tuple[str, ...]
    bytes_read: int


def run_together(
    loaded: LoadedModel, thunks: Sequence[Callable[[], T]], *, on_pass: Callable[[WeightPass], None] = lambda _: None
) -> list[T]:
    """Call ``thunks``, which run ``loaded`` in any way, and give their results; out of core they run in lockstep.

    Out of core they run in inference mode.  Hooks that a thunk sets act on its own forward passes only (see
    ``interventions``).  If a thunk raises, the others are stopped, their ``finally`` clauses run, all units are
    released, and the exception is raised here.

    Raises:
        CheckpointError: a shard ends too early.
    """
    weights = loaded.offload
    if weights is None or current() is not None:
        return [thunk() for thunk in thunks]
    with torch.inference_mode():
        return _Scheduler(weights, on_pass).run([Task(thunk, weights) for thunk in thunks])


def groups(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Cut ``sizes`` into ranges of places whose sum is at most ``limit``; a range holds at least one."""
    first = total = 0
    for place, size in enumerate(sizes):
        if place > first and total + size > limit:
            yield range(first, place)
            first, total = place, 0
        total += size
    if first < len(sizes):
        yield range(first, len(sizes))


class _Scheduler:
    """Runs tasks in lockstep.

    ``waiting`` holds the tasks that wait for each unit, ``ranks`` the order in which units were first asked for, and
    ``fetched`` the unit that is read ahead.
    """

    def __init__(self, weights: Offloaded, on_pass: Callable[[WeightPass], None]) -> None:
        self.weights = weights
        self.on_pass = on_pass
        self.ranks = weights.ranks
        self.waiting: dict[Unit, list[Task]] = {}
        self.fetched: tuple[Unit, Future[Values]] | None = None
        self.passed: list[str] = []
        self.read_before = weights.bytes_read

    def run(self, tasks: list[Task]) -> list[Any]:
        try:
            for task in tasks:
                self._resume(task)
            place = -1
            while self.waiting:
                unit = self._next(place, self.waiting)
                if self.ranks[unit] <= place:
                    self._end_pass()
                place = self.ranks[unit]
                self._pass_through(unit)
            self._end_pass()
        finally:
            self._stop(tasks)
        return [task.result for task in tasks]

    def _pass_through(self, unit: Unit) -> None:
        """Load ``unit``, let every task that waits for it run on, and release it; the next unit is read meanwhile."""
        self.passed.append(unit.name)
        self.weights.load(unit, self._take(unit))
        tasks = self.waiting.pop(unit)
        self._look_ahead(unit)
        for task in tasks:
            self._resume(task, unit)
            self._look_ahead(unit)
        self.weights.release(unit)

    def _resume(self, task: Task, passed: Unit | None = None) -> None:
        """Run ``task`` until it waits or ends; ``passed`` is the unit it waited for.  What it raises is raised here."""
        unit = task.switch()
        if not task.dead:
            self.ranks.setdefault(unit, len(self.ranks))
            self.waiting.setdefault(unit, []).append(task)
            if passed is not None and self.ranks[unit] > self.ranks[passed]:
                self.weights.following[passed] = unit

    def _next(self, place: int, expected: Collection[Unit]) -> Unit:
        """The unit of ``expected`` to load next: the first one after rank ``place``, or else the first of all."""
        ranks = {unit: self.ranks.get(unit, math.inf) for unit in expected}
        return min(ranks, key=lambda unit: (ranks[unit] <= place, ranks[unit]))

    def _look_ahead(self, unit: Unit) -> None:
        """Begin to read the unit after ``unit``: one that a task waits for, or the one that came next the last time."""
        if self.fetched is not None or not self.weights.prefetch:
            return
        guess = self.weights.following.get(unit)
        known = guess is not None and not self.weights.is_loaded(guess)
        expected = [*self.waiting, guess] if known else [*self.waiting]
        if expected:
            following = self._next(self.ranks[unit], expected)
            self.fetched = (following, self.weights.fetch(following))

    def _take(self, unit: Unit) -> Future[Values] | None:
        """What was read ahead for ``unit``; if another unit was read ahead, it is dropped."""
        if self.fetched is None:
            return None
        ahead, fetched = self.fetched
        self.fetched = None
        if ahead is unit:
            return fetched
        self.weights.drop(ahead, fetched)
        return None

    def _end_pass(self) -> None:
        bytes_read = self.weights.bytes_read
        give_back()
        if self.passed:
            self.on_pass(WeightPass(units=tuple(self.passed), bytes_read=bytes_read - self.read_before))
        self.passed, self.read_before = [], bytes_read

    def _stop(self, tasks: list[Task]) -> None:
        """Stop the tasks that have not ended, and release all units."""
        try:
            for task in tasks:
                while task:
                    task.throw(GreenletExit)
        finally:
            if self.fetched is not None:
                self.weights.drop(*self.fetched)
            self.weights.release_all()
