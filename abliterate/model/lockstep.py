"""Many forward passes side by side, so that one weight pass serves all of them.

Every batch runs as a task.  A task pauses where its model comes to a unit that is not loaded.  The scheduler loads one
unit, lets every task that waits for it run until it needs another unit, and releases it.  The next unit is read
meanwhile.

The model's own code decides the order, so nothing here knows an architecture.  A thunk may make one forward pass,
several, or call ``generate``.  Units are taken in the order in which they were first asked for, again and again; tasks
that are at different units meet in the next pass.  A thunk may also call ``run_together`` itself: its thunks become
tasks beside all others, so that whole stages of work share their weight passes (``share``).
"""

import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit

from abliterate.errors import NotEnoughDiskError
from abliterate.events import Noted
from abliterate.model.load import LoadedModel
from abliterate.model.malloc import give_back
from abliterate.model.offload import Offloaded, Reserved, Values
from abliterate.model.ranks import POLL_S
from abliterate.model.tasks import ELSEWHERE, ROOM, Task, current
from abliterate.model.units import Unit

T = TypeVar("T")
WAITING_SHARE, PROMPTS_SHARE = 4, 8
CAN_MAP = hasattr(os, "posix_fallocate") and hasattr(mmap, "MADV_DONTNEED")
"""Whether keys and values can wait on disk on this system."""


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
    weights, running = loaded.offload, current()
    if weights is None:
        return [thunk() for thunk in thunks]
    if running is not None:
        return running.call(thunks) if len(thunks) > 1 else [thunk() for thunk in thunks]
    with torch.inference_mode():
        tasks = [Task(thunk, weights, number=number) for number, thunk in enumerate(thunks)]
        return _Scheduler(weights, on_pass).run(tasks)


def share(loaded: LoadedModel, stages: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call ``stages``, each of which runs many batches; out of core they share weight passes and memory.

    A stage without room for its batches waits for it (``room_for``).  Where the weights are held stages run one after
    the other.
    """
    return run_together(loaded, stages) if stages else []


@contextmanager
def room_for(weights: Offloaded, sizes: Sequence[int], most: int, *, lasting: bool = False) -> Iterator[int]:
    """Reserve memory for what waits between blocks: gives how many of ``sizes`` fit now, one or more.

    ``most`` bytes are for the pass that runs meanwhile; a part of all (``WAITING_SHARE``) is for what waits in any
    case, because no turns make that pass smaller.  A task in whose way others are waits until one of them is done; one
    that is ``lasting``, with many passes to make, rather waits for those with one, and for prompts, than to take turns
    with itself.
    """
    task = current()

    def left() -> int:
        return _left(weights, most) - sum(its.waits for its in weights.with_prompts)

    def is_in_the_way() -> bool:
        passing = bool(weights.with_prompts) or any(not its.lasting for its in weights.reserved)
        return sizes[0] > left() or (lasting and passing and sum(sizes) > left())

    while task is not None and weights.reserved and is_in_the_way():
        task.wait_for(ROOM)
    fits = next(groups(sizes, left()))
    with reserved(weights, sum(sizes[place] for place in fits), most, lasting=lasting):
        yield len(fits)


@contextmanager
def reserved(weights: Offloaded, waits: int, most: int, *, lasting: bool) -> Iterator[None]:
    """Reserve memory, whether it is there or not."""
    mine = Reserved(waits, most, lasting)
    weights.reserved.append(mine)
    try:
        yield
    finally:
        weights.reserved.remove(mine)


@contextmanager
def room_for_prompts(weights: Offloaded, waits: int, most: int) -> Iterator[None]:
    """Reserve memory for the pass over the prompts of a batch, with wider states than the passes after it.

    ``waits`` bytes wait between two blocks, ``most`` are for the pass itself.  A task in whose way others with prompts
    are waits until one of them has done with its own; those that write on after theirs are in nobody's way.  Several
    take no more than a part of the memory (``PROMPTS_SHARE``).
    """
    task, mine = current(), Reserved(waits, most, lasting=False)

    def is_too_much() -> bool:
        others = sum(its.waits for its in weights.with_prompts)
        share = weights.working_bytes // PROMPTS_SHARE
        return waits + others > min(share, _left(weights, most))

    while task is not None and weights.with_prompts and is_too_much():
        task.wait_for(ROOM)
    weights.with_prompts.append(mine)
    try:
        yield
    finally:
        weights.with_prompts.remove(mine)


def _left(weights: Offloaded, most: int) -> int:
    """Bytes of the working memory that are left for what waits, where a pass takes ``most``."""
    running = max([most, *(its.most for its in weights.reserved)])
    room = max(weights.working_bytes - running, weights.working_bytes // WAITING_SHARE)
    return room - sum(its.waits for its in weights.reserved)


def wait_on_disk(weights: Offloaded, needed_bytes: int, cached_bytes: int) -> bool:
    """Whether ``cached_bytes`` of keys and values wait on disk, as from now on all do that can.

    They do where ``needed_bytes`` with them are too much, and there is a folder whose disk has room for them and as
    much again.  What was promised is counted as ``mapped_bytes``, and is to be taken off in the end.

    Raises:
        NotEnoughDiskError: others wait there, and these have no room.
    """
    if weights.scratch is None or not CAN_MAP or not cached_bytes:
        return False
    free = shutil.disk_usage(weights.scratch).free
    if not weights.caches_on_disk:
        taken = sum(its.waits for its in weights.reserved if its.lasting)  # the others are waited for
        if needed_bytes + taken <= weights.working_bytes or free <= 2 * cached_bytes:
            return False
        weights.caches_on_disk = True
        text = f"keys and values wait on disk, in {weights.scratch}: all replies are written in the same passes"
        weights.on_event(Noted(text=text))
    if free <= weights.mapped_bytes + cached_bytes:
        raise NotEnoughDiskError(
            f"{weights.scratch}: keys and values of replies take {cached_bytes / 1e9:.1f} GB more there, and "
            f"{max(0, free - weights.mapped_bytes) / 1e9:.1f} are free",
            "free some space and run the same command: it continues; or give more --memory",
        )
    weights.mapped_bytes += cached_bytes
    return True


def scratch_of(loaded: LoadedModel) -> Path | None:
    """The folder for what may wait on disk; None where nothing may, or the weights are held."""
    return loaded.offload.scratch if loaded.offload is not None and CAN_MAP else None


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

    ``waiting`` holds the tasks that wait for each unit, ``hungry`` those that wait for memory, ``abroad`` those that
    wait for another process, ``parts`` the parts that others wait for, ``ranks`` the order in which units were first
    asked for, and ``fetched`` the unit that is read ahead.
    """

    def __init__(self, weights: Offloaded, on_pass: Callable[[WeightPass], None]) -> None:
        self.weights = weights
        self.on_pass = on_pass
        self.ranks = weights.ranks
        self.waiting: dict[Unit, list[Task]] = {}
        self.hungry: list[Task] = []
        self.abroad: list[Task] = []
        self.parts: dict[Task, list[Task]] = {}
        self.fetched: tuple[Unit, Future[Values]] | None = None
        self.passed: list[str] = []
        self.read_before = weights.bytes_read

    def run(self, tasks: list[Task]) -> list[Any]:
        try:
            for task in tasks:
                self._resume(task)
            place = -1
            while self.waiting or self.hungry or self.abroad:
                self._feed()
                if not self.waiting:
                    continue  # what was fed has ended, and given its memory back; or another process is waited for
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
            if not task.dead:  # else a part beside it has failed
                self._resume(task, unit)
            self._look_ahead(unit)
        self.weights.release(unit)

    def _resume(self, task: Task, passed: Unit | None = None) -> None:
        """Run ``task`` until it waits or ends; ``passed`` is the unit it waited for.  What it raises is raised here."""
        asked = task.switch()
        if task.dead:
            self._ended(task)
        elif isinstance(asked, list):
            self.parts[task] = asked
            for part in asked:
                if not part.dead:  # else another part has failed
                    self._resume(part)
        elif asked is ROOM:
            self.hungry.append(task)
        elif asked is ELSEWHERE:
            self.abroad.append(task)
        else:
            self.ranks.setdefault(asked, len(self.ranks))
            self.waiting.setdefault(asked, []).append(task)
            if passed is not None and self.ranks[asked] > self.ranks[passed]:
                self.weights.following[passed] = asked

    def _ended(self, task: Task) -> None:
        """Go on with the task that ``task`` is a part of, where it was the last one, or failed and ends the others."""
        whole = task.whole
        if whole is None or whole not in self.parts:
            return
        if task.raised is not None:
            self._end(self.parts[whole])
        if all(part.dead for part in self.parts[whole]):
            del self.parts[whole]
            self._resume(whole)

    def _end(self, tasks: Sequence[Task]) -> None:
        """Stop ``tasks`` and their parts, wherever they wait."""
        for task in tasks:
            self._end(self.parts.pop(task, []))
            while not task.dead:
                task.throw(GreenletExit)
        for unit, waiting in list(self.waiting.items()):
            self.waiting[unit] = [task for task in waiting if not task.dead]
            if not self.waiting[unit]:
                del self.waiting[unit]
        self.hungry = [task for task in self.hungry if not task.dead]
        self.abroad = [task for task in self.abroad if not task.dead]

    def _feed(self) -> None:
        """Let tasks that wait for memory, or for another process, look again."""
        hungry, abroad, self.hungry, self.abroad = self.hungry, self.abroad, [], []
        before = list(self.weights.reserved)
        for task in (*abroad, *hungry):
            if not task.dead:
                self._resume(task)
        nothing_new = not self.waiting and (self.hungry, self.weights.reserved) == (hungry, before)
        if nothing_new and self.abroad:
            time.sleep(POLL_S)
        elif nothing_new and hungry:
            raise AssertionError("tasks wait for memory that nobody gives back")

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
            self._end(tasks)
        finally:
            if self.fetched is not None:
                self.weights.drop(*self.fetched)
            self.weights.release_all()
