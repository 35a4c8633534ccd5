"""Statistics of activations, summed up in float64.

Harmful and harmless means of real chat models share nearly all of their length (cosine .92 to 1.0), so their
difference cancels most digits: sums are kept in float64 whatever the model computes in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.places import Place


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean of ``count`` observations of any fixed shape and, where asked for, their covariance along the last axis.

    A ``count`` of 0 was not recorded.
    """

    count: int
    mean: Float[Tensor, "*shape"]
    covariance: Float[Tensor, "*rest d d"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationStats:
    """What was measured of the residual stream, for each class of prompts ("harmful", "harmless").

    ``moments``: of each class the mean ``[positions, layers, d]`` and, where it was asked for, the covariance
    ``[layers, d, d]`` at the last position.  ``samples``: of each class, where asked for, the residuals at the last
    position, ``[prompts, layers, d]``.  ``positions`` are negative token offsets; layer ``l`` is what enters block
    ``l``.  ``halves``: of each class the means over a random half of its prompts and over the other half, where there
    are at least two.  ``outputs``: of each class, where asked for, what each attention and MLP adds to the stream at
    all positions of all prompts.  ``categories``: of each category of harmful prompts, where asked for, the mean.
    """

    positions: tuple[int, ...]
    moments: Mapping[str, Moments]
    samples: Mapping[str, Float[Tensor, "n layers d"]] = field(default_factory=dict)
    halves: Mapping[str, tuple[Moments, Moments]] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[Place, Float[Tensor, "n d"]]] = field(default_factory=dict)
    categories: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return next(iter(self.moments.values())).mean.shape[1]

    def means_alone(self) -> "ActivationStats":
        """As a file keeps them: the means in float32, without what only estimators need."""
        moments = {kind: Moments(count=its.count, mean=its.mean.float()) for kind, its in self.moments.items()}
        return ActivationStats(positions=self.positions, moments=moments)

    def half(self, which: Literal[0, 1]) -> "ActivationStats | None":
        """The means over one half of the prompts of every class; None where a class was too small to be halved."""
        if self.halves.keys() != self.moments.keys():
            return None
        return ActivationStats(
            positions=self.positions, moments={kind: its[which] for kind, its in self.halves.items()}
        )

    def mean(self, kind: str) -> Float[Tensor, "positions layers d"]:
        """The mean of one class."""
        return self.moments[kind].mean


def shrunk(covariance: Float[Tensor, "d d"], count: int) -> Float[Tensor, "d d"]:
    """``a S + b I`` of a covariance ``S`` of ``count`` observations, with the ``a`` and ``b`` of least expected error.

    Optimal linear shrinkage to a multiple of the identity (Bodnar, Gupta and Parolya 2014, arXiv 1308.2608), as LEACE
    uses it: ``a = 1 - (tr^2 / n) / (|S|^2 - tr^2 / d)``, ``b = (1 - a) tr / d``, in float64.
    """
    s = covariance.to(torch.float64)
    d, trace = len(s), float(s.trace())
    spread = float(s.square().sum()) - trace**2 / d
    a = min(1.0, max(0.0, 1 - trace**2 / count / spread)) if spread > 0 else 0.0
    return a * s + (1 - a) * trace / d * torch.eye(d, dtype=torch.float64)


def within_classes(stats: ActivationStats, layer: int) -> Float[Tensor, "d d"] | None:
    """The covariance around the mean of each class at the last position, shrunk; None where all prompts are the same.

    Raises:
        ValueError: no covariance was measured.
    """
    total, degrees = None, 0
    for moments in stats.moments.values():
        if moments.covariance is None:
            raise ValueError("no covariance was measured")
        its = moments.covariance[layer].to(torch.float64) * (moments.count - 1)
        total, degrees = its if total is None else total + its, degrees + moments.count - 1
    if total is None or degrees < 1 or not float(total.trace()) > 0:
        return None
    return shrunk(total / degrees, degrees)


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
        """Add the observations stacked along the first axis of ``batch``, of any float dtype and device.

        Raises:
            ValueError: they have another shape, which adding would stretch.
        """
        if batch.shape[1:] != self._sum.shape:
            raise ValueError(f"observations of shape {tuple(batch.shape[1:])} for {tuple(self._sum.shape)}")
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


class RunningCovariance:
    """Means and covariances of vectors ``[*rest, d]``, batch by batch, without ever subtracting large numbers.

    The sum of squared deviations from the mean so far is kept and moved with the mean (Welford 1962; for batches, Chan,
    Golub and LeVeque 1979, equation 1.5b).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = 0
        self._mean = torch.zeros(shape, dtype=torch.float64)
        self._squares = torch.zeros(*shape, shape[-1], dtype=torch.float64)

    def update(self, batch: Float[Tensor, "n *rest d"]) -> None:
        """Add the observations stacked along the first axis of ``batch``, of any float dtype and device."""
        if not len(batch):
            return
        values = batch.detach().to(device="cpu", dtype=torch.float64)
        mean = values.mean(0)
        deviations = (values - mean).movedim(0, -2).reshape(-1, *batch.shape[:1], *batch.shape[-1:])
        self._flat.baddbmm_(deviations.mT, deviations)
        self._move(len(values), mean)

    def merge(self, other: "RunningCovariance") -> None:
        """Add everything that ``other`` saw: the same as having seen it here."""
        if other._count:
            self._squares += other._squares
            self._move(other._count, other._mean)

    def finish(self) -> Moments:
        """Mean, and unbiased covariance (divided by ``count - 1``).

        Raises:
            ValueError: fewer than two were observed.
        """
        if self._count < 2:
            raise ValueError("the covariance of fewer than two is undefined")
        return Moments(count=self._count, mean=self._mean.clone(), covariance=self._squares / (self._count - 1))

    @property
    def _flat(self) -> Float[Tensor, "rest d d"]:
        return self._squares.view(-1, *self._squares.shape[-2:])

    def _move(self, count: int, mean: Float[Tensor, "*rest d"]) -> None:
        """Take in ``count`` observations around ``mean``, whose squared deviations are in the sum already."""
        total = self._count + count
        step = mean - self._mean
        rows = step.view(-1, step.shape[-1])
        self._flat.baddbmm_(rows[:, :, None], rows[:, None, :], alpha=self._count * count / total)
        self._mean += step * (count / total)
        self._count = total
