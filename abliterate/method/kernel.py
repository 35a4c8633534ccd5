"""heretic's weight kernel: how much of a direction is taken out of what each block adds, attention and MLP apart.

Formulas and ranges are those of heretic 1.4.0.  Blocks are numbered from 0, as there.  Its directions are numbered by
the block that makes a residual, ours by the block that it enters: its direction index ``z`` is our layer ``z + 1``.  A
block ``l`` with a direction of its own has that of layer ``l + 1``, of what it leaves.  The last block has that of what
enters it, as what it leaves is seen behind the final norm alone (heretic takes it from there).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from abliterate.method.linalg import unit
from abliterate.method.places import IN_BLOCKS, Kind

PER_LAYER, LAYER = "per layer", "layer"
"""Parameters: whether each block has a direction of its own, and else the layer of the one direction, a real number."""
MOST: Mapping[Kind, tuple[float, float]] = {"attention": (0.8, 1.5), "MLP": (-0.25, 1.5)}
"""Highest weights; below 0 stands for 0, so that a share of all trials leaves the MLPs alone."""

Parameters = Mapping[str, float | bool]
"""What a trial is made of: ``PER_LAYER``, and a number for each name of ``ranges``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightKernel:
    """A weight for each block: ``most`` at ``peak``, ``least`` at a distance of ``reach``, and 0 beyond.

    ``peak`` and ``reach`` are in blocks, and need not be whole.  Weights other than 1 take out too little or too much:
    ``r^T W' = (1 - w) r^T W``.

    Raises:
        ValueError: a value is not finite, or ``reach`` is not above 0.
    """

    most: float
    least: float
    peak: float
    reach: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.most, self.least, self.peak, self.reach))) or self.reach <= 0:
            raise ValueError(f"{self} is no weight kernel")

    def weight(self, block: int) -> float:
        """``w(l) = most + (|l - peak| / reach) (least - most)`` for ``|l - peak| <= reach``, else 0."""
        away = abs(block - self.peak)
        return self.most + away / self.reach * (self.least - self.most) if away <= self.reach else 0.0


Kernels = Mapping[Kind, WeightKernel]
"""One for each of ``IN_BLOCKS``."""


def ranges(n_layers: int) -> dict[str, tuple[float, float]]:
    """Where the numbers of ``Parameters`` lie in a model of ``n_layers``; "least" is a share of "most".

    Layer ``0.4 (L - 1) + 1`` to ``0.9 (L - 1) + 1``, peak ``0.6 (L - 1)`` to ``L - 1``, reach 1 to ``0.6 (L - 1)``.
    """
    last = float(n_layers - 1)
    found = {LAYER: (min(0.4 * last + 1, last), min(0.9 * last + 1, last))}
    for kind, most in MOST.items():
        found |= {
            f"{kind} most": most,
            f"{kind} least": (0.0, 1.0),
            f"{kind} peak": (0.6 * last, last),
            f"{kind} reach": (1.0, max(0.6 * last, 1.0)),
        }
    return found


def kernels_of(parameters: Parameters) -> Kernels:
    """The kernels that ``parameters`` stand for."""
    found: dict[Kind, WeightKernel] = {}
    for kind in IN_BLOCKS:
        most = max(0.0, parameters[f"{kind} most"])
        least, peak, reach = (float(parameters[f"{kind} {name}"]) for name in ("least", "peak", "reach"))
        found[kind] = WeightKernel(most=most, least=least * most, peak=peak, reach=reach)
    return found


def middle(n_layers: int) -> Kernels:
    """The kernels in the middle of all ranges: peaks at 80 % of the depth, reaching over 30 % of it to each side."""
    return kernels_of({name: (low + high) / 2 for name, (low, high) in ranges(n_layers).items()})


def kernels_in(provenance: Mapping[str, Any]) -> Kernels | None:
    """The kernels that a candidate came with (``search.candidate``); None where it came with none.

    Raises:
        ValueError: they are no kernels.
    """
    found = provenance.get("kernels")
    if found is None:
        return None
    try:
        return {kind: WeightKernel(**found[kind]) for kind in IN_BLOCKS}
    except (KeyError, TypeError) as error:
        raise ValueError("the candidate came with weight kernels that cannot be read") from error


def between(vectors: Float[Tensor, "layers d"], layer: float) -> Float[Tensor, " d"]:
    """The unit vector at a real ``layer``: the two beside it, each of length 1, are mixed by how near they are.

    Raises:
        ValueError: one of them is zero or not finite, or they cancel.
    """
    below = min(int(layer), len(vectors) - 1)
    share = layer - below
    if not share:
        return unit(vectors[below])
    return unit((1 - share) * unit(vectors[below]) + share * unit(vectors[below + 1]))
