"""Estimators: from what was measured to candidates.  Each is one pure function with its paper's name and equation.

How to add one stands in ``docs/design.md``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from abliterate.errors import UsageError
from abliterate.method.directions import Candidate, grid
from abliterate.method.linalg import cosine
from abliterate.method.moments import ActivationStats

Need = Literal["means", "covariance", "samples"]
DIFFERENCE_OF_MEANS, PROJECTED_DIFFERENCE = "difference-of-means", "projected-difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """A function that makes candidates, and the statistics it needs (see ``ActivationStats``).

    "means" are at all positions and layers; "covariance" and "samples", the residuals themselves, at the last position.
    """

    needs: frozenset[Need]
    candidates: Callable[[ActivationStats], tuple[Candidate, ...]]


def difference_of_means(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``r[i, l] = mean_harmful[i, l] - mean_harmless[i, l]``, raw (Arditi et al. 2024, eq. 1 and 2).

    One candidate for each post-instruction position ``i`` and layer ``l``: "difference-of-means/i/l".  Subtracted in
    float64, kept in float32.
    """
    difference = stats.mean("harmful") - stats.mean("harmless")
    return grid(DIFFERENCE_OF_MEANS, difference.to(torch.float32), stats.positions)


def projected_difference(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``r - (r . h) h``: ``r = mean_harmful - mean_harmless``, ``h`` the unit harmless mean at the same place.

    "Projected abliteration" (grimjim 2025).  As it has nothing along the harmless mean, removing it leaves that mean as
    it is, and changes harmless prompts less.  Computed in float64, kept in float32.
    """
    harmless = stats.mean("harmless")
    h = harmless / harmless.norm(dim=-1, keepdim=True)
    r = stats.mean("harmful") - harmless
    for _ in range(2):  # once leaves the rounding of two nearly parallel means
        r = r - (r * h).sum(-1, keepdim=True) * h
    return grid(PROJECTED_DIFFERENCE, r.to(torch.float32), stats.positions)


ESTIMATORS: Mapping[str, Estimator] = {
    DIFFERENCE_OF_MEANS: Estimator(needs=frozenset({"means"}), candidates=difference_of_means),
    PROJECTED_DIFFERENCE: Estimator(needs=frozenset({"means"}), candidates=projected_difference),
}
DEFAULT = (DIFFERENCE_OF_MEANS,)


def needs_of(names: Sequence[str]) -> frozenset[Need]:
    """All that the estimators of these names need.

    Raises:
        UsageError: there is no such estimator, or none is named, or one more than once.
    """
    hint = f"estimators are: {', '.join(ESTIMATORS)}"
    if not names:
        raise UsageError("no estimator is named, so there would be no candidates", hint)
    for name in names:
        if name not in ESTIMATORS:
            raise UsageError(f"there is no estimator {name!r}", hint)
        if names.count(name) > 1:
            raise UsageError(f"estimator {name!r} is named more than once", "name each estimator once")
    return frozenset[Need]().union(*(ESTIMATORS[name].needs for name in names))


def stability(stats: ActivationStats, names: Sequence[str] = DEFAULT) -> dict[str, float]:
    """How far two random halves of the prompts agree on each candidate, by its id.

    It is the cosine of the two directions; of several, the mean cosine of the principal angles of the two subspaces.
    Candidates of estimators that need more than means are left out, as are all where a class could not be halved.
    """
    first, second = stats.half(0), stats.half(1)
    if first is None or second is None:
        return {}
    names = [name for name in names if ESTIMATORS[name].needs <= {"means"}]
    others = {candidate.id: candidate for candidate in estimate(second, names)}
    return {
        candidate.id: _agreement(candidate, others[candidate.id])
        for candidate in estimate(first, names)
        if candidate.id in others
    }


def _agreement(first: Candidate, second: Candidate) -> float:
    if first.is_vector and second.is_vector:
        return float(cosine(first.vector, second.vector))
    angles = [
        torch.linalg.svdvals(a.basis.T @ b.basis).mean()
        for a, b in zip(first.subspaces, second.subspaces, strict=True)
        if a.usable and b.usable
    ]
    return float(torch.stack(angles).mean()) if angles else math.nan


def estimate(stats: ActivationStats, names: Sequence[str] = DEFAULT) -> tuple[Candidate, ...]:
    """The candidates of the estimators of these names, one after the other, their vectors in float32.

    That is what a file of them keeps, so that what is made of them is the same before and after it.
    """
    return tuple(
        candidate.with_subspaces(lambda its: its.to(torch.float32))
        for name in names
        for candidate in ESTIMATORS[name].candidates(stats)
    )
