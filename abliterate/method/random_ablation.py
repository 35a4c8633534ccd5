"""What is ablated at a training step: differences of means, drawn at random."""

import torch
from jaxtyping import Float
from torch import Tensor


def drawn(
    differences: Float[Tensor, "positions layers d"], most: int, generator: torch.Generator
) -> Float[Tensor, "d k"]:
    """``k`` differences of means, each of a random position and layer, with ``k`` random from 1 to ``most``.

    Those that are zero (template tokens, as they enter the first block) are never drawn.

    Raises:
        ValueError: all of them are zero.
    """
    every = differences.flatten(0, 1)
    every = every[every.ne(0).any(1)]
    if not len(every):
        raise ValueError("harmful and harmless prompts have the same means everywhere")
    k = int(torch.randint(1, most + 1, (), generator=generator))
    return every[torch.randint(len(every), (k,), generator=generator)].T
