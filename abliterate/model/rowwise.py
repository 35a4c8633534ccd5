"""Ablation of another subspace in each stretch of the rows of a batch: many candidates in one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.directions import Subspace
from abliterate.method.scope import WHOLE, Scope
from abliterate.model.interventions import ablated_each, where
from abliterate.model.load import LoadedModel


def subspaces_ablated(
    loaded: LoadedModel, subspaces: Sequence[Subspace], scope: Scope = WHOLE
) -> AbstractContextManager[None]:
    """Run with one of ``subspaces`` ablated in each of as many equal stretches of the rows, where ``scope`` holds.

    Raises:
        ValueError: a subspace is empty or not finite.
    """
    if all(subspace.k == 1 for subspace in subspaces):
        return ablated_each(loaded, torch.stack([subspace.vectors[:, 0] for subspace in subspaces]), scope)
    return _ablated(loaded, padded_bases(subspaces), scope)


def padded_bases(subspaces: Sequence[Subspace]) -> Float[Tensor, "n k d"]:
    """Orthonormal bases as rows, in float64; those of lower rank are filled up with zeros, which ablate nothing."""
    bases = [subspace.basis.T for subspace in subspaces]
    padded = torch.zeros(len(bases), max(map(len, bases)), bases[0].shape[1], dtype=torch.float64)
    for row, basis in zip(padded, bases, strict=True):
        row[: len(basis)] = basis
    return padded


@contextmanager
def _ablated(loaded: LoadedModel, bases: Float[Tensor, "n k d"], scope: Scope) -> Iterator[None]:
    """Run with ``x - Q^T Q x`` for ``x``, one ``Q`` of ``bases`` for each of ``n`` equal stretches of the rows."""
    prepared: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def change(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in prepared:
            prepared[key] = bases.to(device=x.device, dtype=dtype)
        q = prepared[key]
        of_each = x.to(dtype).reshape(len(q), -1, q.shape[-1])
        return torch.baddbmm(of_each, of_each @ q.mT, q, alpha=-scope.strength).view(x.shape).to(x.dtype)

    with where(loaded, change, scope):
        yield
