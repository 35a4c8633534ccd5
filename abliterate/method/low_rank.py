"""The low-rank difference of Wei et al. 2024 (ActSVD): what writers add on safety prompts and on no others."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.directions import Subspace
from abliterate.method.places import Place

ROUNDING = 1e-6
"""Singular values below this share of the largest are the rounding of float32."""
UTILITY = 1e-4
"""A direction of the safety subspace of which a smaller part than this lies outside the utility subspace is left."""


def principal(samples: Float[Tensor, "n d"], rank: int) -> Float[Tensor, "d k"]:
    """The ``rank`` first right-singular vectors of ``samples``, not centred, or as many as there are; in float64."""
    _, sizes, rows = torch.linalg.svd(samples.to(torch.float64), full_matrices=False)
    return rows[:rank][sizes[:rank] > ROUNDING * sizes[0]].T


def difference(safety: Float[Tensor, "d s"], utility: Float[Tensor, "d u"]) -> Subspace | None:
    """``(I - U U^T) S S^T`` for the orthonormal columns of ``safety = S`` and ``utility = U``, as ``vectors read^T``.

    It is written in the principal directions of the two: with ``(I - U U^T) S = A diag(s) B^T``, ``read = S B`` and
    ``vectors = A diag(s)``, where ``s`` are the sines of the angles between them.  None where ``S`` lies in ``U``.
    """
    outside = safety - utility @ (utility.T @ safety)
    left, sines, right = torch.linalg.svd(outside, full_matrices=False)
    kept = sines > UTILITY
    if not kept.any():
        return None
    return Subspace(vectors=(left * sines)[:, kept], read=(safety @ right.T)[:, kept], as_it_is=True)


def differences(
    outputs: Mapping[str, Mapping[Place, Float[Tensor, "n d"]]], *, safety_rank: int, utility_rank: int
) -> dict[Place, Subspace]:
    """``difference`` for every place of ``outputs``, "harmful" (safety) against "harmless" (utility)."""
    found = {}
    for place, samples in outputs["harmful"].items():
        subspace = difference(principal(samples, safety_rank), principal(outputs["harmless"][place], utility_rank))
        if subspace is not None:
            found[place] = subspace
    return found
