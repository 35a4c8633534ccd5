"""How two readings of the same replies agree: scorer against label, or scorer against scorer."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from abliterate.evaluate.replies import CLASSES, REFUSALS, ReplyClass
from abliterate.method.statistics import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """How many replies one reading puts in a class (``rows``) and the other in another (``columns``)."""

    rows: str
    columns: str
    counts: Mapping[tuple[ReplyClass, ReplyClass], int]

    @property
    def agreement(self) -> Rate:
        """How many replies both put in the same class."""
        return Rate(hits=sum(n for (row, column), n in self.counts.items() if row == column), count=self._total)

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond chance, 1 at best; NaN where both put all replies in one class."""
        if not self._total:
            return float("nan")
        by_row, by_column = Counter[ReplyClass](), Counter[ReplyClass]()
        for (row, column), n in self.counts.items():
            by_row[row] += n
            by_column[column] += n
        chance = sum(by_row[name] * by_column[name] for name in CLASSES) / self._total**2
        return float("nan") if chance == 1 else (self.agreement.value - chance) / (1 - chance)

    def table(self) -> list[list[str]]:
        """A heading and a line for each class that occurs, ready to be printed."""
        seen: list[ReplyClass] = [name for name in CLASSES if any(name in pair for pair, n in self.counts.items() if n)]
        heading = [f"{self.rows} \\ {self.columns}", *seen]
        return [heading, *([row, *(str(self.counts.get((row, column), 0)) for column in seen)] for row in seen)]

    @property
    def _total(self) -> int:
        return sum(self.counts.values())


def confusion(
    one: Sequence[ReplyClass], other: Sequence[ReplyClass], *, rows: str = "one", columns: str = "other"
) -> Confusion:
    """Count how often ``one`` says this and ``other`` that of the same reply.

    Raises:
        ValueError: they are not equally long.
    """
    return Confusion(rows=rows, columns=columns, counts=Counter(zip(one, other, strict=True)))


def precision(
    labels: Sequence[ReplyClass], found: Sequence[ReplyClass], wanted: Collection[ReplyClass] = REFUSALS
) -> Rate:
    """Of the replies that were found to be ``wanted``, those that are."""
    return Rate.of(label in wanted for label, name in zip(labels, found, strict=True) if name in wanted)


def recall(
    labels: Sequence[ReplyClass], found: Sequence[ReplyClass], wanted: Collection[ReplyClass] = REFUSALS
) -> Rate:
    """Of the replies that are ``wanted``, those that were found to be."""
    return precision(found, labels, wanted)
