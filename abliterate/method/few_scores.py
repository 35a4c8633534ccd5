"""The rule's choice from few scores: what ``selection.choose`` gives when every candidate is scored, exactly.

A score is a mean over prompts, which are asked for in parts.  Three things make most of them unnecessary:

* Late layers are never kept.
* What the other prompts can still give is bounded from below (``Seen.least``).  A candidate is out as soon as its KL
  must end above the bound, or its bypass score behind that of a candidate that is kept.
* The first candidate in order of bypass that passes KL and induces is the answer, so induce is asked of few.  Only
  where most fail to induce it is asked first.

Where nothing is kept, the same is done without the bound on induce, and then without the margin of the KL.  Where
nothing is kept then, the knee of the Pareto front needs the scores of the front alone: in order of bypass, a candidate
is off it as soon as its KL must end above the least so far.

A score that was not asked cannot change the choice by being NaN: NaN only ever discards the candidate itself, what is
chosen has all its scores, and of the others it is proven that they would not be chosen with any.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

from abliterate.method.directions import Candidate, CandidateScore, Choice
from abliterate.method.selection import (
    NOT_ASKED,
    PARETO_FALLBACK,
    WITHOUT_INDUCE,
    WITHOUT_MARGIN,
    SelectionRule,
    choice_of,
    in_order,
    is_late,
    judge,
    nothing_usable,
    pareto_knee,
    place_order,
)

Figure = Literal["bypass", "kl_nats", "induce"]
FIGURES: tuple[Figure, ...] = ("bypass", "kl_nats", "induce")
Question = tuple[Figure, int]
"""A score, and the number of the candidate it is asked of."""
Key = tuple[float, int, bool, int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of one score of one candidate.

    ``mean`` over the prompts that were run, NaN before there are any.  ``least``: no less is possible over all prompts,
    whatever those give that were not run; NaN where the score is sure to be.  ``whole``: all were run, and
    ``least == mean``.  ``error``: the standard error of the mean, once it is whole.
    """

    mean: float
    least: float
    whole: bool
    error: float = 0.0


@runtime_checkable
class Table(Protocol):
    """Scores that are run when they are asked for."""

    def seen(self, figure: Figure, candidate: int) -> Seen:
        """What is known of a score."""
        ...

    def ask(self, questions: Sequence[Question]) -> None:
        """Run each score on the next part of its prompts, all of them together."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many candidates are asked at a time: ``first``, then twice as many, and so on.

    ``together``: KL and induce at once, where asking costs more than what is asked.
    """

    first: int = 2
    together: bool = False


def choose_from_few(
    candidates: Sequence[Candidate], table: Table, n_layers: int, rule: SelectionRule, pace: Pace | None = None
) -> tuple[Choice, tuple[CandidateScore, ...]]:
    """The choice of ``selection.choose`` on the whole table, and what is known of each candidate, best first.

    A score that was not needed is NaN, and so is one of which some prompts are missing; but a KL that was stopped is
    the least that it can be (``kl_stopped``).  Such candidates have the verdict "late layer", "kl", or "not asked".

    Raises:
        PromptError: every candidate has a NaN score or lies in a pruned layer.
    """
    search = _Search(candidates, table, n_layers, rule, pace or Pace())
    choice = None
    for its, name in ((rule, rule.name), (rule.without_induce, WITHOUT_INDUCE), (rule.without_margin, WITHOUT_MARGIN)):
        kept = _Search(candidates, table, n_layers, its, search.pace).kept()
        if kept is not None:
            choice = choice_of(search.score(kept), name)
            break
    choice = choice or choice_of(search.knee(), PARETO_FALLBACK)
    return choice, in_order(search.score(n) for n in range(len(candidates)))


class _Search:
    """Asks ``table`` for what the choice depends on.  Candidates are named by their numbers."""

    def __init__(
        self, candidates: Sequence[Candidate], table: Table, n_layers: int, rule: SelectionRule, pace: Pace
    ) -> None:
        self.candidates, self.table, self.n_layers, self.rule, self.pace = candidates, table, n_layers, rule, pace
        self.induce_first = False
        """Whether most of the last ones failed to induce: then their KL was asked for nothing."""
        self.early = [n for n, one in enumerate(candidates) if not is_late(one.layer, n_layers, rule)]

    def kept(self) -> int | None:
        """The candidate that the rule keeps and takes; None where it keeps none."""
        best, size, left = None, self.pace.first, self.early
        self._ask([n for n in left if not self._begun("bypass", n)], "bypass")
        while left := [n for n in left if n != best and not self._is_out(n, best)]:
            some = left if best is not None else sorted(left, key=self._key)[:size]
            best, size = self._best_of(some, best), 2 * size
        return best

    def knee(self) -> CandidateScore:
        """What is taken where the rule keeps none.

        Raises:
            PromptError: no candidate has all its scores.
        """
        self._finish("bypass", self.early, lambda n: self._is_nan("bypass", n))
        known = sorted((n for n in self.early if not self._is_nan("bypass", n)), key=self._key)
        front = self._front(known, self._induces) or self._front(known, lambda n: not self._is_nan("induce", n))
        if not front:
            raise nothing_usable()
        return pareto_knee([self.score(n) for n in front])

    def score(self, n: int) -> CandidateScore:
        """What is known of a candidate, with its verdict."""
        bypass, kl, induce = (self.table.seen(figure, n) for figure in FIGURES)
        one, stopped = self.candidates[n], not kl.whole and kl.least > self.rule.max_kl_nats
        score = CandidateScore(
            candidate=one.id,
            layer=one.layer,
            position=one.position,
            bypass=bypass.mean if bypass.whole else math.nan,
            induce=induce.mean if induce.whole else math.nan,
            kl_nats=kl.mean if kl.whole else kl.least if stopped else math.nan,
            kl_stopped=stopped,
            kl_error_nats=kl.error,
            verdict=self._verdict(n),
        )
        return judge(score, self.n_layers, self.rule) if bypass.whole and kl.whole and induce.whole else score

    # --- the rule -----------------------------------------------------------------------------------------------------

    def _best_of(self, some: Sequence[int], best: int | None) -> int | None:
        """The first of ``some`` that is kept and before ``best``, or else ``best``.  Afterwards the others are out."""
        self._finish("bypass", some, lambda n: self._is_out(n, best))
        left = [n for n in some if not self._is_out(n, best)]
        if self.pace.together:
            self._ask(left, "kl_nats", "induce")
        if self.induce_first:
            self._finish("induce", left, lambda n: self._is_out(n, best))
        self._finish("kl_nats", left, lambda n: self._is_out(n, best))
        passing = sorted((n for n in left if not self._is_out(n, best)), key=self._key)
        for asked in (passing[:1], passing[1:]):
            self._finish("induce", asked)
            kept = [n for n in asked if not self._is_out(n, best)]
            if kept:
                return kept[0]
        self.induce_first = 2 * sum(self._fails_to_induce(n) for n in left) > len(left)
        return best

    def _is_out(self, n: int, best: int | None) -> bool:
        """Whether a candidate is sure not to be kept, or to come after ``best``, which is."""
        bypass, kl, induce = (self.table.seen(figure, n) for figure in FIGURES)
        if any(math.isnan(one.least) for one in (bypass, kl, induce)) or self._is_over(n):
            return True
        if self._fails_to_induce(n):
            return True
        if best is None or n == best:
            return False
        return self._key(n) > self._key(best) if bypass.whole else bypass.least > self._key(best)[0]

    def _key(self, n: int) -> Key:
        """In which order candidates are taken: by bypass, as far as it is known."""
        one = self.candidates[n]
        return (self.table.seen("bypass", n).mean, *place_order(one.layer, one.position, one.id))

    # --- where it keeps none ------------------------------------------------------------------------------------------

    def _front(self, known: Sequence[int], wanted: Callable[[int], bool]) -> list[int]:
        """Candidates among which is the Pareto front of those of ``known`` that have a KL and whose induce is wanted.

        ``known`` is in order of bypass, so that a candidate is off the front when one before it has no larger KL.
        Until there is one, all of them are asked for induce first: without a bound a KL cannot be stopped.
        """
        found: list[int] = []
        least, size, first = math.inf, self.pace.first, 0
        while first < len(known):
            some, first, size = known[first : first + size], first + size, 2 * size
            if self.pace.together:
                self._ask(some, "kl_nats", "induce")
            if not found:
                self._finish("induce", some)
                some = [n for n in some if wanted(n)]
            off = partial(self._is_off, least if found else math.nan)
            self._finish("kl_nats", some, off)
            near = [n for n in some if not off(n)]
            self._finish("induce", near)
            found += [n for n in near if wanted(n)]
            least = min([least, *(self._kl(n) for n in found)])
        return found

    def _is_off(self, least: float, n: int) -> bool:
        """Whether a KL cannot be below ``least``, where that is not NaN, or is NaN itself."""
        return math.isnan(self._kl(n)) or self._kl(n) >= least

    def _kl(self, n: int) -> float:
        return self.table.seen("kl_nats", n).least

    def _is_over(self, n: int) -> bool:
        kl = self.table.seen("kl_nats", n)
        return self.rule.is_over(kl.least, kl.error)

    def _fails_to_induce(self, n: int) -> bool:
        induce = self.table.seen("induce", n)
        return induce.whole and induce.mean < self.rule.min_induce

    def _induces(self, n: int) -> bool:
        return self.table.seen("induce", n).mean >= self.rule.min_induce

    # --- asking -------------------------------------------------------------------------------------------------------

    def _finish(self, figure: Figure, some: Sequence[int], stop: Callable[[int], bool] = lambda _: False) -> None:
        """Ask for a score, part by part, until it is whole or ``stop`` says that it need not be."""
        while left := [n for n in some if not self.table.seen(figure, n).whole and not stop(n)]:
            self._ask(left, figure)

    def _ask(self, some: Sequence[int], *figures: Figure) -> None:
        """Ask for what is not known yet, if there is anything."""
        missing: list[Question] = [
            (figure, n) for figure in figures for n in some if not self.table.seen(figure, n).whole
        ]
        if missing:
            self.table.ask(missing)

    def _begun(self, figure: Figure, n: int) -> bool:
        seen = self.table.seen(figure, n)
        return seen.whole or not math.isnan(seen.mean) or math.isnan(seen.least)

    def _is_nan(self, figure: Figure, n: int) -> bool:
        return math.isnan(self.table.seen(figure, n).least)

    def _verdict(self, n: int) -> str:
        """Why a candidate is out of which not everything is known."""
        if n not in self.early:
            return "late layer"
        if any(self._is_nan(figure, n) for figure in FIGURES):
            return "nan"
        if self._is_over(n):
            return "kl" if self._kl(n) > self.rule.max_kl_nats else "kl margin"
        return "induce" if self._fails_to_induce(n) else NOT_ASKED
