"""From scored candidates to one direction: the rule of Arditi et al. 2024, and what happens when nothing survives.

The constants are the paper's code's: discard a candidate when a score is NaN, ``layer >= int(0.8 L)``,
``KL > 0.1`` or ``induce < 0``; then take the lowest bypass score.

A KL is the mean over a few prompts, and the one chosen is the most fortunate of many: what it is on other prompts is
more.  ``kl_margin`` standard errors of it are added before it is compared with the bound (the paper: none).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from abliterate.errors import PromptError
from abliterate.method.directions import CandidateScore, Choice

RULE, WITHOUT_INDUCE, WITHOUT_MARGIN, PARETO_FALLBACK = (
    "arditi-2024",
    "without-induce",
    "without-margin",
    "pareto-fallback",
)
"""What a choice is named after, in the order in which they are tried."""
COSMIC = "cosmic"
"""The same of the first rule, where the scores are those of COSMIC."""
WHY: Mapping[str, str] = {
    WITHOUT_INDUCE: "no candidate within the bound on KL brings harmless prompts to be refused when it is added: "
    "of those within it the one with the lowest bypass score was taken, whatever it induces",
    WITHOUT_MARGIN: "no candidate is within the bound on KL by its margin: of those within it without the margin the "
    "one with the lowest bypass score was taken, whatever it induces",
    PARETO_FALLBACK: "no candidate stays within the bound on KL: the knee of the Pareto front of bypass score and KL "
    "was taken",
}
"""Why another rule than the first was needed, for people."""
NOT_ASKED = "not asked"
"""The verdict on a candidate of which not enough is known for another one, nor need be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRule:
    """Thresholds of the paper's selection.  ``max_kl_nats = inf`` and so on switch a rule off.

    ``kl_margin``: how many standard errors of its mean a KL must stay below the bound.  ``name``: what a choice by all
    of it is named after.
    """

    max_kl_nats: float = 0.1
    kl_margin: float = 0.0
    min_induce: float = 0.0
    prune_layers: float = 0.2
    name: str = RULE

    @property
    def without_induce(self) -> "SelectionRule":
        """The same without a bound on induce."""
        return replace(self, min_induce=-math.inf)

    @property
    def without_margin(self) -> "SelectionRule":
        """The bound on the mean KL alone."""
        return replace(self, min_induce=-math.inf, kl_margin=0.0)

    def is_over(self, kl_nats: float, error_nats: float) -> bool:
        """Whether a KL, with its margin, is above the bound."""
        return kl_nats + self.kl_margin * error_nats > self.max_kl_nats


def judge(score: CandidateScore, n_layers: int, rule: SelectionRule) -> CandidateScore:
    """``score`` with its verdict: "kept", or the first rule that discards it."""
    if any(math.isnan(value) for value in (score.bypass, score.induce, score.kl_nats)):
        verdict = "nan"
    elif is_late(score.layer, n_layers, rule):
        verdict = "late layer"
    elif rule.is_over(score.kl_nats, score.kl_error_nats):
        verdict = "kl" if score.kl_nats > rule.max_kl_nats else "kl margin"
    elif score.induce < rule.min_induce:
        verdict = "induce"
    else:
        verdict = "kept"
    return replace(score, verdict=verdict)


def is_late(layer: int, n_layers: int, rule: SelectionRule) -> bool:
    """Whether ``layer`` is one of those that give no candidates."""
    return layer >= int((1 - rule.prune_layers) * n_layers + 1e-9)


def choose(
    scores: Sequence[CandidateScore], n_layers: int, rule: SelectionRule
) -> tuple[Choice, tuple[CandidateScore, ...]]:
    """The chosen candidate and all scores with their verdicts, best first.

    Candidates may come from any estimators.  Survivors are sorted by bypass score; ties fall to the earlier layer, then
    the later position (none comes last), then the id, so the result does not depend on the order of ``scores``.
    When nothing survives, the bound on induce is dropped ("without-induce"), then the margin of the KL
    ("without-margin").  When nothing survives that, the knee of the Pareto front of bypass and KL over candidates in
    early enough layers is taken (``pareto_knee``): of those that induce, if any do ("pareto-fallback").

    Raises:
        PromptError: every candidate has a NaN score or lies in a pruned layer.
    """
    judged = in_order(judge(score, n_layers, rule) for score in scores)
    survivors = [score for score in judged if score.verdict == "kept"]
    if survivors:
        return choice_of(survivors[0], rule.name), judged
    for verdict, name in (("induce", WITHOUT_INDUCE), ("kl margin", WITHOUT_MARGIN)):
        within = in_order(score for score in judged if score.verdict == verdict)
        if within:
            return choice_of(within[0], name), judged
    usable = [score for score in judged if score.verdict == "kl"]
    inducing = [score for score in usable if score.induce >= rule.min_induce]
    if not usable:
        raise nothing_usable()
    return choice_of(pareto_knee(inducing or usable), PARETO_FALLBACK), judged


def pareto_front(scores: Sequence[CandidateScore]) -> list[CandidateScore]:
    """Candidates that no other beats in both bypass score and KL, by rising bypass score."""
    front: list[CandidateScore] = []
    for score in sorted(scores, key=lambda s: (s.bypass, s.kl_nats, *_place(s))):
        if not front or score.kl_nats < front[-1].kl_nats:
            front.append(score)
    return front


def pareto_knee(scores: Sequence[CandidateScore]) -> CandidateScore:
    """The candidate of the Pareto front nearest to the ideal corner, both scores scaled to [0, 1] over the front."""
    front = pareto_front(scores)
    low_b, high_b = front[0].bypass, front[-1].bypass
    low_k, high_k = front[-1].kl_nats, front[0].kl_nats

    def distance(score: CandidateScore) -> float:
        bypass = (score.bypass - low_b) / (high_b - low_b) if high_b > low_b else 0.0
        kl = (score.kl_nats - low_k) / (high_k - low_k) if high_k > low_k else 0.0
        return math.hypot(bypass, kl)

    return min(front, key=distance)


def nothing_usable() -> PromptError:
    """What is raised where there is nothing to choose from."""
    return PromptError(
        "no candidate direction has finite scores in the allowed layers",
        "use more prompts, or allow later layers with prune_layers in the recipe",
    )


def choice_of(score: CandidateScore, rule: str) -> Choice:
    """The candidate of ``score`` as what was taken by ``rule``."""
    return Choice(candidate=score.candidate, layer=score.layer, position=score.position, rule=rule)


def in_order(scores: Iterable[CandidateScore]) -> tuple[CandidateScore, ...]:
    """Scores with their verdicts, best first."""
    return tuple(sorted(scores, key=_order))


def place_order(layer: int, position: int | None, candidate: str) -> tuple[int, bool, int, str]:
    """Sorts by layer, then the later position, none last, then the id."""
    return (layer, position is None, -(position or 0), candidate)


def _order(score: CandidateScore) -> tuple[bool, bool, float, int, bool, int, str]:
    unusable = math.isnan(score.bypass)
    return (score.verdict != "kept", unusable, 0.0 if unusable else score.bypass, *_place(score))


def _place(score: CandidateScore) -> tuple[int, bool, int, str]:
    return place_order(score.layer, score.position, score.candidate)
