"""Vectors and subspaces: the few operations that everything else is made of.

Shapes: ``d`` width of the residual stream, ``k`` number of directions, ``n`` vectors.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Directions whose part outside the span of the others is shorter than this (relative to their length) are dropped."""


def unit(v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Scale ``v`` to length 1, in float64; gradients flow through it.

    Raises:
        ValueError: ``v`` is zero or not finite, so it has no direction.
    """
    v = v.to(torch.float64)
    length = torch.linalg.vector_norm(v)
    size = length.item()
    if not math.isfinite(size) or size == 0:
        raise ValueError(f"a vector of length {size} has no direction")
    return v / length


def orthonormal_basis(directions: Float[Tensor, "d k"]) -> Float[Tensor, "d rank"]:
    """Orthonormal basis of the span of the columns, in float64, by twice-iterated Gram-Schmidt.

    The span, not the order or the length of the columns, decides the subspace: sequential projections along
    correlated directions would leave all but the last one in place.  Columns inside the span of earlier ones are
    dropped (``RANK_TOLERANCE``).

    Raises:
        ValueError: the span is empty (all columns zero) or a column is not finite.
    """
    columns = [unit(column) for column in directions.to(torch.float64).unbind(1) if torch.any(column != 0)]
    basis: list[Tensor] = []
    for column in columns:
        rest = column
        for _ in range(2):  # twice is enough: the second pass removes what rounding left of the first
            for kept in basis:
                rest = rest - kept * (kept @ rest)
        if torch.linalg.vector_norm(rest) > RANK_TOLERANCE:
            basis.append(unit(rest))
    if not basis:
        raise ValueError("no direction is left: all columns are zero")
    return torch.stack(basis, dim=1)


def project_out(x: Float[Tensor, "*batch d"], basis: Float[Tensor, "d k"]) -> Float[Tensor, "*batch d"]:
    """Directional ablation ``x - Q Q^T x`` of the last axis (Arditi et al. 2024, eq. 4), in the dtype of ``x``.

    ``basis`` must be orthonormal; it is cast to the dtype and device of ``x``.
    """
    q = basis.to(device=x.device, dtype=x.dtype)
    return x - (x @ q) @ q.T


def cosine(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Cosine of the angle between ``a`` and ``b`` along the last axis, in float64."""
    return torch.nn.functional.cosine_similarity(a.to(torch.float64), b.to(torch.float64), dim=-1)
