"""What a stage reports while it works: frozen values, drawn by nobody but the command line.

A stage takes ``on_event`` and calls it with ``Started``, any number of ``Advanced``, and ``Finished``; ``Noted`` is a
sentence the user should read, and ``WeightsRead`` tells how far a weight pass out of core is.  The
default, ``ignore``, makes every stage silent.
"""

from collections.abc import Callable
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
