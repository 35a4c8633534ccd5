"""Many forward passes side by side, so that each layer's weights are read once for all of them.

Every batch runs as a task that pauses where its model comes to a unit that is not loaded.  The scheduler loads one
unit, lets every task that waits for it run on to the unit it needs next, and releases it; the next unit is read
meanwhile.  The model's own code drives the order, so nothing here knows an architecture, and a thunk may make one
forward pass, several, or call ``generate``: units are taken in the order in which they were first asked for, round and
round, so that tasks which are apart meet again at the next round.
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
class Pass:
    """One round through the model: what was loaded and how many bytes of weights were read for it."""

    units: tuple[str, ...]
    bytes_read: int


def run_together(
    loaded: LoadedModel, thunks: Sequence[Callable[[], T]], *, on_pass: Callable[[Pass], None] = lambda _: None
) -> list[T]:
    """The results of ``thunks``, which run ``loaded`` in any way; out of core, in lockstep.

    Out of core they run in inference mode, and hooks that a thunk sets act on its own passes only (see
    ``interventions``).  If a thunk raises, the others are stopped where they are, their ``finally`` clauses run,
    nothing stays loaded, and the exception goes on.

    Raises:
        CheckpointError: a shard ends too early.
    """
    weights = loaded.offload
    if weights is None or current() is not None:
        return [thunk() for thunk in thunks]
    with torch.inference_mode():
        return _Scheduler(weights, on_pass).run([Task(thunk, weights) for thunk in thunks])


def groups(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Stretches of ``sizes`` whose sum is within ``limit``, each of one at least."""
    first = total = 0
    for place, size in enumerate(sizes):
        if place > first and total + size > limit:
            yield range(first, place)
            first, total = place, 0
        total += size
    if first < len(sizes):
        yield range(first, len(sizes))


class _Scheduler:
    """``ranks`` orders the units by when they were first asked for."""

    def __init__(self, weights: Offloaded, on_pass: Callable[[Pass], None]) -> None:
        self.weights = weights
        self.on_pass = on_pass
        self.ranks = weights.ranks
        self.waiting: dict[Unit, list[Task]] = {}
        self.fetched: tuple[Unit, Future[Values]] | None = None
        self.round: list[str] = []
        self.read_before = weights.bytes_read

    def run(self, tasks: list[Task]) -> list[Any]:
        try:
            for task in tasks:
                self._resume(task)
            place = -1
            while self.waiting:
                unit = self._next(place, self.waiting)
                if self.ranks[unit] <= place:
                    self._end_round()
                place = self.ranks[unit]
                self._pass_through(unit)
            self._end_round()
        finally:
            self._stop(tasks)
        return [task.result for task in tasks]

    def _pass_through(self, unit: Unit) -> None:
        """Let every task that waits for ``unit`` run it, while the next unit is read."""
        self.round.append(unit.name)
        self.weights.load(unit, self._take(unit))
        tasks = self.waiting.pop(unit)
        self._look_ahead(unit)
        for task in tasks:
            self._resume(task, unit)
            self._look_ahead(unit)
        self.weights.release(unit)

    def _resume(self, task: Task, passed: Unit | None = None) -> None:
        """Run ``task``, through ``passed``, until it waits or ends; what it raises is raised here."""
        unit = task.switch()
        if not task.dead:
            self.ranks.setdefault(unit, len(self.ranks))
            self.waiting.setdefault(unit, []).append(task)
            if passed is not None and self.ranks[unit] > self.ranks[passed]:
                self.weights.following[passed] = unit

    def _next(self, place: int, expected: Collection[Unit]) -> Unit:
        """The unit to load: of those expected, the first behind ``place``, or the first of all."""
        ranks = {unit: self.ranks.get(unit, math.inf) for unit in expected}
        return min(ranks, key=lambda unit: (ranks[unit] <= place, ranks[unit]))

    def _look_ahead(self, unit: Unit) -> None:
        """Begin to read what comes after ``unit``: what a task has asked for, or what followed the last time."""
        if self.fetched is not None or not self.weights.prefetch:
            return
        guess = self.weights.following.get(unit)
        known = guess is not None and not self.weights.is_loaded(guess)
        expected = [*self.waiting, guess] if known else [*self.waiting]
        if expected:
            following = self._next(self.ranks[unit], expected)
            self.fetched = (following, self.weights.fetch(following))

    def _take(self, unit: Unit) -> Future[Values] | None:
        """What was read ahead, if it is ``unit``; else it is dropped."""
        if self.fetched is None:
            return None
        ahead, fetched = self.fetched
        self.fetched = None
        if ahead is unit:
            return fetched
        self.weights.drop(ahead, fetched)
        return None

    def _end_round(self) -> None:
        bytes_read = self.weights.bytes_read
        give_back()
        if self.round:
            self.on_pass(Pass(units=tuple(self.round), bytes_read=bytes_read - self.read_before))
        self.round, self.read_before = [], bytes_read

    def _stop(self, tasks: list[Task]) -> None:
        """End the tasks that are in the middle of something, and leave nothing loaded."""
        try:
            for task in tasks:
                while task:
                    task.throw(GreenletExit)
        finally:
            if self.fetched is not None:
                self.weights.drop(*self.fetched)
            self.weights.release_all()
