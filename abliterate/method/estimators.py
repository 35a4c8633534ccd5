"""Estimators: from what was measured to candidates.  Each is one pure function with its paper's name and equation.

How to add one stands in ``docs/design.md``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from abliterate.errors import UsageError
from abliterate.method.directions import Candidate, Subspace, grid
from abliterate.method.linalg import cosine
from abliterate.method.low_rank import differences
from abliterate.method.moments import ActivationStats, within_classes
from abliterate.method.places import IN_BLOCKS
from abliterate.method.som import batch_map, directions_of

Need = Literal["means", "covariance", "samples", "outputs", "categories"]
DIFFERENCE_OF_MEANS, PROJECTED_DIFFERENCE = "difference-of-means", "projected-difference"
PER_LAYER, BIPROJECTED, SOM = "per-layer", "biprojected-difference", "self-organising-map"
LEACE, CATEGORIES, LOW_RANK = "least-squares-erasure", "category-differences", "low-rank-difference"
SAME = 1e-6
"""A difference of means that is shorter than this share of them is rounding."""
MAP_LEAST, MAP_MOST = 2, 7
"""Directions of a self-organising map, as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """A function that makes candidates, and the statistics it needs (see ``ActivationStats``).

    "means" are at all positions and layers, and so are those of the "categories" of harmful prompts; "covariance" and
    "samples", the residuals themselves, at the last position; "outputs" are what each attention and MLP adds, at all
    positions.
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


def per_layer(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``r[i, l]`` of every layer for what that layer adds: one candidate for each position ``i``, "per-layer/i".

    The practice of Labonne (2024) and of FailSpy's library.  The embedding is left alone.  So are layers where a class
    makes no difference, as at the first, where a token of the template is itself alone (``SAME``).  Addition adds the
    one of layer ``0.6 L``, Labonne's.
    """
    difference = stats.mean("harmful") - stats.mean("harmless")
    differs = difference.norm(dim=-1) > SAME * stats.mean("harmless").norm(dim=-1)
    made = []
    for p, position in enumerate(stats.positions):
        its = {n: Subspace(vectors=vector[:, None]) for n, vector in enumerate(difference[p]) if differs[p, n]}
        layer = min(its, key=lambda n: abs(n - round(0.6 * stats.n_layers)), default=None)
        if layer is not None:
            provenance = {"estimator": PER_LAYER, "position": position}
            made.append(Candidate(id=f"{PER_LAYER}/{position}", subspace=its, layer=layer, provenance=provenance))
    return tuple(made)


def biprojected_difference(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``r[i, m] - (r[i, m] . h_t) h_t`` for what layer ``t`` adds, ``h_t`` the unit harmless mean entering it.

    "Biprojected abliteration" (grimjim 2025): the direction of one layer ``m`` is made orthogonal to the harmless mean
    of each layer that is edited, not of the one it was measured at.  One candidate for each position and layer ``m``,
    "biprojected-difference/i/m".  The embedding is left alone.
    """
    harmless, made = stats.mean("harmless"), []
    difference = stats.mean("harmful") - harmless
    h = harmless / harmless.norm(dim=-1, keepdim=True)
    for p, position in enumerate(stats.positions):
        for layer in range(stats.n_layers):
            r = difference[p, layer].expand_as(h[p])
            for _ in range(2):
                r = r - (r * h[p]).sum(-1, keepdim=True) * h[p]
            subspaces = {target: Subspace(vectors=vector[:, None]) for target, vector in enumerate(r)}
            provenance = {"estimator": BIPROJECTED, "position": position}
            name = f"{BIPROJECTED}/{position}/{layer}"
            made.append(Candidate(id=name, subspace=subspaces, layer=layer, provenance=provenance))
    return tuple(made)


def self_organising_map(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``w_j - mean_harmless`` of the ``k`` neurons that won most prompts, of a map of the harmful residuals (``som``).

    At the last position of every layer, ``k`` from 2 to 7 (Piras et al. 2025): "self-organising-map/k/l".  What is
    removed is their span, whatever their order.
    """
    harmful, harmless = stats.samples["harmful"], stats.samples["harmless"]
    made = []
    for layer in range(stats.n_layers):
        neurons, won = batch_map(harmful[:, layer])
        vectors = directions_of(neurons, won, harmless[:, layer].to(torch.float64).mean(0))
        for k in range(MAP_LEAST, min(MAP_MOST, vectors.shape[1]) + 1):
            provenance = {"estimator": SOM, "position": -1, "k": k}
            subspace = Subspace(vectors=vectors[:, :k].contiguous())
            made.append(Candidate(id=f"{SOM}/{k}/{layer}", subspace=subspace, layer=layer, provenance=provenance))
    return tuple(made)


def least_squares_erasure(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``x - delta (w^T x) / (w^T delta)`` with ``w = S^-1 delta``: LEACE for two classes (Belrose et al. 2023).

    It takes out along the difference of means ``delta`` and reads along ``w``, Fisher's discriminant, so that no linear
    probe tells the classes apart and the stream changes least in the metric of its covariance.  ``S``, the covariance
    within the classes at the last position, gives the ``w`` of the whole covariance but for its length.  It is shrunk
    towards a multiple of the identity (``moments.shrunk``), as there are fewer prompts than dimensions.  The published
    form also keeps the mean, which takes a constant; this is its linear part.
    """
    made, last = [], stats.positions.index(-1)
    delta = (stats.mean("harmful") - stats.mean("harmless"))[last].to(torch.float64)
    for layer, vector in enumerate(delta):
        spread = within_classes(stats, layer)
        if spread is None or not vector.any():
            continue
        read = torch.linalg.solve(spread, vector)
        subspace = Subspace(vectors=vector[:, None], read=read[:, None] / read.norm())
        provenance = {"estimator": LEACE, "position": -1}
        made.append(Candidate(id=f"{LEACE}/-1/{layer}", subspace=subspace, layer=layer, provenance=provenance))
    return tuple(made)


def low_rank_difference(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``W' = W - (I - Pi_u) Pi_s W`` of every attention and MLP (ActSVD, Wei et al. 2024, arXiv 2402.05162, section 3).

    ``Pi_s`` and ``Pi_u`` project on the span of the first singular vectors of what that writer adds on harmful and on
    harmless prompts, at the post-instruction positions (there: at every token of a reply).  The published rank of both
    is 1024 of 4096, a quarter of the width; of ``Pi_s`` a sixteenth and a 64th are tried as well:
    "low-rank-difference/s/u".  What lies in ``Pi_u`` stays.  There are no more directions than samples.
    """
    made, d = [], next(iter(stats.moments.values())).mean.shape[-1]
    utility = max(1, d // 4)
    for safety in sorted({max(1, d // part) for part in (4, 16, 64)}, reverse=True):
        found = differences(stats.outputs, safety_rank=safety, utility_rank=utility)
        of_layers, of_mlps = (
            {layer: its for (layer, kind), its in found.items() if kind == one and layer is not None}
            for one in IN_BLOCKS
        )
        layer = min(of_layers, key=lambda n: abs(n - round(0.6 * stats.n_layers)), default=None)
        if layer is None:
            continue
        provenance = {"estimator": LOW_RANK, "safety_rank": safety, "utility_rank": utility}
        name = f"{LOW_RANK}/{safety}/{utility}"
        made.append(Candidate(id=name, subspace=of_layers, of_mlps=of_mlps, layer=layer, provenance=provenance))
    return tuple(made)


def category_differences(stats: ActivationStats) -> tuple[Candidate, ...]:
    """``mean_c[i, l] - mean_harmless[i, l]`` of each category ``c`` of the harmful prompts, raw.

    One candidate for each position ``i`` and layer ``l``, "category-differences/i/l": its vectors are the directions of
    the categories, in the order of "categories" in its provenance.  What is removed is their span, whatever their
    order; ``DirectionSet.of_category`` takes one of them.  All are held against the mean of all harmless prompts.
    Subtracted in float64, kept in float32 (Joad et al., arXiv 2602.02132).
    """
    harmless, names = stats.mean("harmless"), list(stats.categories)
    vectors = torch.stack([stats.categories[name].mean - harmless for name in names], dim=-1).to(torch.float32)
    return tuple(
        Candidate(
            id=f"{CATEGORIES}/{position}/{layer}",
            subspace=Subspace(vectors=of_layer),
            layer=layer,
            provenance={"estimator": CATEGORIES, "position": position, "categories": names},
        )
        for position, its in zip(stats.positions, vectors, strict=True)
        for layer, of_layer in enumerate(its)
    )


ESTIMATORS: Mapping[str, Estimator] = {
    DIFFERENCE_OF_MEANS: Estimator(needs=frozenset({"means"}), candidates=difference_of_means),
    PROJECTED_DIFFERENCE: Estimator(needs=frozenset({"means"}), candidates=projected_difference),
    PER_LAYER: Estimator(needs=frozenset({"means"}), candidates=per_layer),
    BIPROJECTED: Estimator(needs=frozenset({"means"}), candidates=biprojected_difference),
    LOW_RANK: Estimator(needs=frozenset({"means", "outputs"}), candidates=low_rank_difference),
    LEACE: Estimator(needs=frozenset({"means", "covariance"}), candidates=least_squares_erasure),
    SOM: Estimator(needs=frozenset({"means", "samples"}), candidates=self_organising_map),
    CATEGORIES: Estimator(needs=frozenset({"means", "categories"}), candidates=category_differences),
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
        candidate.id: agreement(candidate, others[candidate.id])
        for candidate in estimate(first, names)
        if candidate.id in others
    }


def agreement(first: Candidate, second: Candidate) -> float:
    """The cosine of two vectors; of subspaces, the mean cosine of their principal angles, over all layers.

    NaN where nothing of them can be compared.
    """
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
