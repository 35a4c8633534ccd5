"""What a stage reports while it works: frozen values, drawn by nobody but the command line.

A stage takes ``on_event`` and calls it with ``Started``, any number of ``Advanced``, and ``Finished``; ``Noted`` is a
sentence the user should read, and ``WeightsRead`` tells how far a weight pass out of core is.  The
default, ``ignore``, makes every stage silent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Long work begins.  ``total`` counts ``unit``: "bytes" is drawn as a rate of bytes."""

    task: str
    total: int
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """``amount`` more units of ``task`` are done."""

    task: str
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """``task`` is complete."""

    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Something the user should know, in one sentence."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRead:
    """In weight pass number ``reading`` of a model, ``done`` of about ``total`` bytes are read, ``part`` the last."""

    reading: int
    part: str
    done: int
    total: int


Event = Started | Advanced | Finished | Noted | WeightsRead
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Drop ``event``: the default listener."""


@contextmanager
def working(on_event: OnEvent, task: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Report a task while it is worked on; what is given tells how much more is done."""
    on_event(Started(task=task, total=total, unit=unit))
    yield lambda amount: on_event(Advanced(task=task, amount=amount))
    on_event(Finished(task=task))


def duration(seconds: float) -> str:
    """Seconds for people, to the minute where there are many."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 2 * 3600:
        return f"{round(whole / 60)} min"
    return f"{round(whole / 3600)} h" if whole >= 10 * 3600 else f"{whole / 3600:.1f} h"
