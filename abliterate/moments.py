"""Running statistics of activations, in float64.

Harmful and harmless means of real chat models share nearly all of their length (cosine .92 to 1.0), so their
difference cancels most digits: sums are kept in float64 whatever the model computes in.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean of ``count`` observations of any fixed shape."""

    count: int
    mean: Float[Tensor, "*shape"]


class RunningMoments:
    """Accumulates observations batch by batch; ``finish`` gives the frozen value."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = 0
        self._sum = torch.zeros(shape, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Observations seen so far."""
        return self._count

    def update(self, batch: Float[Tensor, "n *shape"]) -> None:
        """Add the observations stacked along the first axis of ``batch``, of any float dtype and device."""
        self._sum += batch.detach().to(device="cpu", dtype=torch.float64).sum(0)
        self._count += batch.shape[0]

    def merge(self, other: "RunningMoments") -> None:
        """Add everything that ``other`` saw: the same as having seen it here."""
        self._sum += other._sum
        self._count += other._count

    def finish(self) -> Moments:
        """The mean so far.

        Raises:
            ValueError: nothing was observed.
        """
        if self._count == 0:
            raise ValueError("the mean of nothing is undefined")
        return Moments(count=self._count, mean=self._sum / self._count)
