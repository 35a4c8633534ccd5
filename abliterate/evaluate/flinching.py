"""Which words an edit moves, which its base avoids, and which were never learnt: see ``model.words``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from abliterate.method.statistics import Difference, paired_difference
from abliterate.model.words import FEWEST_CARRIERS, MADE_UP, WordList, WordScores

NAMED = 8
"""Words that a sentence names at most."""
MUCH = math.log(2)
"""A change of log-probability by a factor of two."""


@dataclass(frozen=True)
class Flinching:
    """How likely models find the words of a list: the base first, then the edited one, then, if any, the third.

    ``models`` are in that order, by the names they have in the report; ``third`` is what the third is really called.
    """

    listed: WordList
    models: Mapping[str, WordScores]
    third: str = ""

    @property
    def base(self) -> str:
        """The name of the model that the others are compared with."""
        return next(iter(self.models))

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the other models."""
        return tuple(self.models)[1:]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words that every model's tokenizer knows."""
        return tuple(word for word in self.listed.words if all(word in its.nats for its in self.models.values()))

    @cached_property
    def changes(self) -> Mapping[str, Mapping[str, Difference]]:
        """By other model and word: its log-probability less the base's, over the carriers, in nats."""
        return {
            name: {
                word: paired_difference(self.models[self.base].nats[word], self.models[name].nats[word])
                for word in self.words
            }
            for name in self.others
        }

    def mean(self, name: str, word: str) -> float:
        """The log-probability that a model gives a word, over the carriers, in nats."""
        return fmean(self.models[name].nats[word])

    def overall(self, name: str) -> Difference | None:
        """The mean change over all words; None where these are too few for an interval."""
        if len(self.words) < FEWEST_CARRIERS:
            return None
        pairs = [(self.mean(self.base, word), self.mean(name, word)) for word in self.words]
        before, after = zip(*pairs, strict=True)
        return paired_difference(before, after)

    def never_learnt(self, name: str) -> list[str]:
        """The words that a model gives no more than words that it cannot know."""
        return [word for word in self.words if self.models[name].learnt(word) is False]

    def in_words(self) -> list[str]:
        """What a person wants to know of it."""
        edited, *rest = self.others
        said = [self._moved(edited), self._unlearnt(rest)]
        said += [self._avoided(edited, third) for third in rest]
        missing: dict[tuple[str, ...], list[str]] = {}
        for name, its in self.models.items():
            missing.setdefault(tuple(word for word in self.listed.words if word not in its.nats), []).append(name)
        said += [f"no token of {', '.join(names)} is for {_named(lost)}" for lost, names in missing.items() if lost]
        said += [
            f"the tokenizer of {name} does not know all words of {its.strange} of {len(self.listed.carriers)} sentences"
            for name, its in self.models.items()
            if its.strange
        ]
        return said

    def _moved(self, edited: str) -> str:
        changes = self.changes[edited].values()
        up, down = (sum(its.verdict == verdict for its in changes) for verdict in ("higher", "lower"))
        much = sum(its.verdict != "tie" and abs(its.value) > MUCH for its in changes)
        said = f"the edit moves {up + down} of {len(self.words)} words ({up} up, {down} down), {much} of them by more "
        said += "than a factor of two"
        overall = self.overall(edited)
        if overall is not None:
            said += f"; on average by {overall.value:+.2f} nats ({overall.low:+.2f} to {overall.high:+.2f})"
        return said

    def _unlearnt(self, rest: Sequence[str]) -> str:
        lost, limit = self.never_learnt(self.base), self.models[self.base].limit
        if limit is None:
            return (
                f"which words were never learnt cannot be told: the tokenizer of {self.base} spells too few made-up "
                f"words; give some that it can spell, as lines “{MADE_UP} WORD”"
            )
        least = f"than made-up words get, {limit:.1f} nats"
        if not lost:
            return f"all {len(self.words)} words were learnt: the base gives each more {least}"
        said = f"{len(lost)} of {len(self.words)} words were never learnt, and no edit brings them: the base gives "
        said += f"them no more {least}: {_named(lost)}"
        for third in rest:
            known = [word for word in lost if self.models[third].learnt(word)]
            if known:
                said += f"; but {self.third or third} knows {_named(known)}: the base has lost them"
        return said

    def _avoided(self, edited: str, third: str) -> str:
        avoided = [word for word, its in self.changes[third].items() if its.verdict == "higher"]
        favoured = sum(its.verdict == "lower" for its in self.changes[third].values())
        nearer = [word for word in avoided if self.changes[edited][word].verdict == "higher"]
        said = f"the base avoids {len(avoided)} of {len(self.words)} words that {self.third or third} finds likelier, "
        said += f"and favours {favoured}"
        return said + (f"; the edit raises {len(nearer)} of those avoided" if avoided else "")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "source": self.listed.source,
            "carriers": list(self.listed.carriers),
            "own_carriers": self.listed.own,
            "third": self.third or None,
            "summary": self.in_words(),
            "models": {name: {"limit_nats": its.limit} for name, its in self.models.items()},
            "words": [
                {
                    "word": word,
                    "nats": {name: self.mean(name, word) for name in self.models},
                    "tokens": {name: its.tokens[word] for name, its in self.models.items()},
                    "learnt": {name: its.learnt(word) for name, its in self.models.items()},
                    "change": {name: asdict(self.changes[name][word]) for name in self.others},
                }
                for word in self.words
            ],
            "overall": {name: asdict(overall) for name in self.others if (overall := self.overall(name)) is not None},
        }


def _named(words: Sequence[str]) -> str:
    """Words in quotes, the first few of many."""
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(f"“{word}”" for word in words[:NAMED]) + more
