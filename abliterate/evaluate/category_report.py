"""What the directions of categories of prompts do: see ``workflow.trying_categories``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abliterate.evaluate.observing import HARMLESS, LOOK_ALIKE
from abliterate.method.statistics import Rate

Change = Literal["nothing", "removed", "added"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The model under one intervention.

    Attributes:
        change: what is done with directions.
        category: whose direction; None: of none, or of all.
        strength: of what is added, in lengths of the difference of means.
        refused: refusals of harmful prompts, by category.
        over_refused: refusals of harmless prompts, by kind: harmless, and look-alike where there are any.
        broken: empty and degenerate replies, to all prompts.
    """

    change: Change
    category: str | None = None
    strength: float | None = None
    refused: Mapping[str, Rate]
    over_refused: Mapping[str, Rate]
    broken: Rate

    @property
    def name(self) -> str:
        """What it is called in tables."""
        if self.change == "added":
            return f"{self.category} added, {self.strength:+g}"
        return "as it is" if self.change == "nothing" else f"without {self.category or 'all of them'}"

    @property
    def harmful(self) -> Rate:
        """Refusals of harmful prompts of all categories."""
        its = self.refused.values()
        return Rate(hits=sum(one.hits for one in its), count=sum(one.count for one in its))

    @property
    def over(self) -> Rate:
        """Refusals of harmless prompts that look harmful; where there are none, of harmless ones."""
        return self.over_refused.get(LOOK_ALIKE, self.over_refused[HARMLESS])


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryReport:
    """The directions of ``categories`` at one position and layer, their cosines, and what each of them does."""

    candidate: str
    layer: int
    position: int | None
    categories: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    tried: tuple[Tried, ...]

    @property
    def removals(self) -> tuple[Tried, ...]:
        """The model as it is, without each direction, and without all of them."""
        return tuple(one for one in self.tried if one.change != "added")

    def curve(self, category: str) -> tuple[Tried, ...]:
        """The model with more and more of one direction; as it is, in its place."""
        its = [one for one in self.tried if one.change == "nothing" or one.category == category]
        return tuple(sorted((one for one in its if one.change != "removed"), key=lambda one: one.strength or 0.0))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "candidate": self.candidate,
            "layer": self.layer,
            "position": self.position,
            "categories": list(self.categories),
            "cosines": [list(row) for row in self.cosines],
            "tried": [
                {
                    "change": one.change,
                    "category": one.category,
                    "strength": one.strength,
                    "refused": {name: _rate(its) for name, its in one.refused.items()},
                    "over_refused": {kind: _rate(its) for kind, its in one.over_refused.items()},
                    "broken": _rate(one.broken),
                }
                for one in self.tried
            ],
        }


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {"rate": rate.value, "low": low, "high": high, "count": rate.count} if rate.count else {"count": 0}
