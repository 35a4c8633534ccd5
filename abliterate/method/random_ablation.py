"""What is ablated at a training step, drawn at random from what separates two classes of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.separation import principal

ROUNDING = 1e-6
"""Means that differ by less than this part of their length are the same."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Separating:
    """Directions that tell harmful from harmless prompts.

    ``differences [n, d]`` are those of means, one of each position and layer, and ``last [m, d]`` those of the last
    position, which decides what is said first.  ``principal`` are, of each layer at the last position, the principal
    directions ``[d, k]`` of harmful residuals around the harmless mean, the first first: a model that is trained with
    its difference of means ablated can hide its refusals in a spread around the mean.
    """

    differences: Float[Tensor, "n d"]
    last: Float[Tensor, "m d"]
    principal: tuple[Float[Tensor, "d k"], ...]

    @classmethod
    def of(
        cls,
        means: Sequence[Float[Tensor, "positions layers d"]],
        samples: Sequence[Float[Tensor, "prompts layers d"]],
        most: int,
    ) -> "Separating":
        """From the means and the samples at the last position, of harmful and of harmless prompts.

        Where the means are the same (template tokens, as they enter the first block) nothing is taken.

        Raises:
            ValueError: they are the same everywhere at the last position.
        """
        harmful, harmless = (its.double() for its in means)
        differences, last = (_differing(*its) for its in ((harmful, harmless), (harmful[-1], harmless[-1])))
        if not len(last):
            raise ValueError("harmful and harmless prompts have the same means everywhere")
        ours, theirs = (its.double() for its in samples)
        found = [
            principal(ours[:, layer], theirs[:, layer].mean(0), most)
            for layer in range(ours.shape[1])
            if len(_differing(*(its[:, layer].mean(0, keepdim=True) for its in (ours, theirs))))
        ]
        return cls(differences=differences, last=last, principal=tuple(found))

    def drawn(self, most: int, generator: torch.Generator) -> Float[Tensor, "d k"]:
        """``k`` directions, ``k`` random from 1 to ``most``, of one of the three kinds; of a layer the first ``k``."""
        k, kind = _below(most, generator) + 1, _below(3, generator)
        if kind == 0 and self.principal:
            return self.principal[_below(len(self.principal), generator)][:, :k]
        differences = self.last if kind == 1 else self.differences
        return differences[torch.randint(len(differences), (k,), generator=generator)].T


def _differing(harmful: Float[Tensor, "*places d"], harmless: Float[Tensor, "*places d"]) -> Float[Tensor, "n d"]:
    """The differences that are more than rounding."""
    ours, theirs = harmful.flatten(0, -2), harmless.flatten(0, -2)
    return (ours - theirs)[(ours - theirs).norm(dim=1) > ROUNDING * theirs.norm(dim=1)]


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))
