"""What is ablated at a training step, drawn at random from what separates two classes of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from abliterate.method.separation import principal

ROUNDING = 1e-6
"""Means that differ by less than this part of their length are the same."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Separating:
    """Directions that tell harmful from harmless prompts.

    ``differences [n, d]`` are those of means, one of each position and layer.  ``principal`` are, of each layer at the
    last position, the principal directions ``[d, k]`` of harmful residuals around the harmless mean, the first first: a
    model that is trained with its difference of means ablated can hide its refusals in a spread around the mean.
    """

    differences: Float[Tensor, "n d"]
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
            ValueError: they are the same everywhere.
        """
        harmful, harmless = (its.double().flatten(0, 1) for its in means)
        differences = harmful - harmless
        differences = differences[_differ(differences, harmless)]
        if not len(differences):
            raise ValueError("harmful and harmless prompts have the same means everywhere")
        ours, theirs = (its.double() for its in samples)
        layers = _differ(ours.mean(0) - theirs.mean(0), theirs.mean(0)).nonzero().flatten().tolist()
        found = tuple(principal(ours[:, layer], theirs[:, layer].mean(0), most) for layer in layers)
        return cls(differences=differences, principal=found)

    def drawn(self, most: int, generator: torch.Generator) -> Float[Tensor, "d k"]:
        """``k`` directions, ``k`` random from 1 to ``most``: differences of means, or the first ``k`` of a layer."""
        k, kind = _below(most, generator) + 1, _below(2, generator)
        if kind == 0 or not self.principal:
            return self.differences[torch.randint(len(self.differences), (k,), generator=generator)].T
        return self.principal[_below(len(self.principal), generator)][:, :k]


def _differ(differences: Float[Tensor, "n d"], of: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Which differences are more than rounding."""
    return differences.norm(dim=1) > ROUNDING * of.norm(dim=1)


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))
