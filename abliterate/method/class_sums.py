"""What is summed up over the prompts of one class, batch by batch and layer by layer."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.estimators import Need
from abliterate.method.moments import RunningCovariance, RunningMoments


class ClassSums:
    """Sums of the residuals that enter each of ``layers`` blocks at ``positions``, over the prompts of one class.

    ``needs`` names what is summed besides means.  ``rows`` is how many prompts there may be; where ``halved``, some of
    them are counted once more by themselves.  ``categories`` are those of the prompts, by their numbers.
    """

    def __init__(
        self,
        layers: int,
        positions: int,
        d: int,
        needs: Collection[Need],
        *,
        rows: int,
        halved: bool,
        categories: Sequence[str] = (),
    ) -> None:
        self._means = [RunningMoments((positions, d)) for _ in range(layers)]
        self._halves = [RunningMoments((positions, d)) for _ in range(layers)] if halved else []
        self._spread = [RunningCovariance((d,)) for _ in range(layers)] if "covariance" in needs else []
        self._samples = torch.empty(rows, layers, d, dtype=torch.float32) if "samples" in needs else None
        self._rows: set[int] = set()
        self._category_of = categories
        self._categories = {
            name: [RunningMoments((positions, d)) for _ in range(layers)] for name in sorted(set(categories))
        }

    @property
    def count(self) -> int:
        """Prompts that were added, at the first layer."""
        return self._means[0].count

    @property
    def needs_two(self) -> bool:
        """Whether one prompt is too few."""
        return bool(self._spread)

    @property
    def half(self) -> int:
        """Prompts of the half that were added."""
        return self._halves[0].count if self._halves else 0

    def add(
        self, layer: int, rows: Sequence[int], values: Float[Tensor, "rows positions d"], half: Sequence[bool]
    ) -> None:
        """Add the residuals of the prompts with the numbers ``rows`` at one layer; ``half`` marks those of the half."""
        self._means[layer].update(values)
        if self._halves:
            self._halves[layer].update(values[torch.tensor(half, dtype=torch.bool)])
        for name, sums in self._categories.items():
            its = [self._category_of[row] == name for row in rows]
            sums[layer].update(values[torch.tensor(its, dtype=torch.bool)])
        if self._spread:
            self._spread[layer].update(values[:, -1])
        if self._samples is not None:
            self._samples[list(rows), layer] = values[:, -1].to(device="cpu", dtype=torch.float32)
            self._rows.update(rows)

    def finish(self) -> dict[str, Tensor]:
        """The sums as tensors; nothing can be added afterwards.

        "mean" ``[positions, layers, d]`` in float64, and "half", the same over the half, if it has any prompts and is
        not all; at the last position "covariance" ``[layers, d, d]`` and "samples" ``[prompts, layers, d]`` in float32,
        where they are needed; "counts": how many prompts there were, and how many of the half.  Of the categories, in
        alphabetical order, "category_counts", and of those with any prompts "category_means"
        ``[categories, positions, layers, d]``.
        """
        found = {"counts": torch.tensor([self.count, self.half])}
        found["mean"] = torch.stack([layer.finish().mean for layer in self._means], dim=1)
        if 0 < self.half < self.count:
            found["half"] = torch.stack([layer.finish().mean for layer in self._halves], dim=1)
        if self._spread:
            found["covariance"] = self._covariances()
        if self._categories:
            found["category_counts"] = torch.tensor([its[0].count for its in self._categories.values()])
            seen = [its for its in self._categories.values() if its[0].count]
            means = [torch.stack([layer.finish().mean for layer in its], dim=1) for its in seen]
            found["category_means"] = torch.stack(means)
        if self._samples is not None:
            found["samples"] = self._samples if self.count == len(self._samples) else self._samples[sorted(self._rows)]
        return found

    def _covariances(self) -> Float[Tensor, "layers d d"]:
        """The covariance of each layer in float32.  They are dropped on the way: the sums take twice as much."""
        covariances = []
        while self._spread:
            covariance = self._spread.pop(0).finish().covariance
            if covariance is None:
                raise AssertionError("a covariance was measured")
            covariances.append(covariance.to(torch.float32))
        return torch.stack(covariances)
