"""How far apart two classes of prompts lie in the residual stream, layer by layer, on prompts not seen before."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.calibration import calibrate
from abliterate.method.linalg import cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """Two classes in what enters block ``layer``.

    Attributes:
        auc: the probability that a harmful prompt reaches further along the direction than a harmless one.
        cohen_d: the distance of the class means along it, in pooled standard deviations (Cohen 1988); NaN where all
            prompts are in one state.
        stability: the cosine between the directions of two halves of the prompts.
    """

    layer: int
    auc: float
    cohen_d: float
    stability: float


def separations(
    harmful: Float[Tensor, "n layers d"], harmless: Float[Tensor, "m layers d"], *, seed: int
) -> tuple[Separation, ...]:
    """The separation at each layer; the direction is the difference of means of one random half of each class.

    It is held against the other half, and the other way round: in many dimensions a direction separates the prompts it
    was made of whether or not it means anything.

    Raises:
        ValueError: a class has fewer than four prompts.
    """
    if min(len(harmful), len(harmless)) < 4:
        raise ValueError("a class of fewer than four prompts cannot be halved")
    halves = [_halves(its.to(torch.float64), seed) for its in (harmful, harmless)]
    found = []
    for layer in range(harmful.shape[1]):
        ours, theirs = ([half[:, layer] for half in its] for its in halves)
        made = [ours[which].mean(0) - theirs[which].mean(0) for which in (0, 1)]
        held = [_along(made[which], ours[1 - which], theirs[1 - which]) for which in (0, 1)]
        auc, d = (math.fsum(values) / 2 for values in zip(*held, strict=True))
        stability = float(cosine(made[0], made[1]))
        found.append(Separation(layer=layer, auc=auc, cohen_d=d, stability=stability))
    return tuple(found)


def principal(harmful: Float[Tensor, "n d"], harmless: Float[Tensor, " d"], most: int) -> Float[Tensor, "d k"]:
    """Up to ``most`` directions that hold most of ``harmful - harmless``, whose origin is the harmless mean.

    Right singular vectors, those of the largest values first; of a length with the first, that of the difference of
    means along it.
    """
    moved = harmful.to(torch.float64) - harmless.to(torch.float64)
    _, sizes, rows = torch.linalg.svd(moved, full_matrices=False)
    k = min(most, int((sizes > sizes[0] * 1e-6).sum()))
    return rows[:k].T * torch.linalg.vector_norm(moved.mean(0))


def _halves(values: Float[Tensor, "n layers d"], seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return values[order[: len(values) // 2]], values[order[len(values) // 2 :]]


def _along(
    direction: Float[Tensor, " d"], harmful: Float[Tensor, "n d"], harmless: Float[Tensor, "m d"]
) -> tuple[float, float]:
    """AUC and Cohen's d of two classes along a direction."""
    ours, theirs = harmful @ direction, harmless @ direction
    pooled = ((ours.var() * (len(ours) - 1) + theirs.var() * (len(theirs) - 1)) / (len(ours) + len(theirs) - 2)).sqrt()
    d = float((ours.mean() - theirs.mean()) / pooled) if pooled else math.nan
    return calibrate(ours.tolist(), theirs.tolist()).auc, d
