"""The work of scoring candidates, as values: which of them are run on which prompts, and what is known beforehand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.method.directions import Candidate, Subspace
from abliterate.model.scores import Kind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Prompts of one length.  ``places`` are their numbers among all prompts, where harmful ones come first."""

    places: tuple[int, ...]
    ids: Int[Tensor, "prompts tokens"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Work for some candidates: to ablate each on ``prompts``, or to add each on the harmless ones at ``layer``.

    ``candidates`` are their numbers, by which results are told apart; ``subspaces`` what is ablated or added.  A
    candidate that has another subspace in each layer is ablated by itself: it is ``alone``, and ``subspaces`` is empty.
    ``prompts`` are places among all prompts; none stands for all.
    """

    kind: Kind
    candidates: tuple[int, ...] = ()
    subspaces: tuple[Subspace, ...] = ()
    layer: int = 0
    prompts: tuple[int, ...] = ()
    alone: Candidate | None = None

    def of(self, candidates: tuple[int, ...], subspaces: tuple[Subspace, ...]) -> "Job":
        """The same work for other candidates."""
        return replace(self, candidates=candidates, subspaces=subspaces)

    def split(self, most: int) -> "Iterator[Job]":
        """The same work in jobs of at most ``most`` candidates."""
        for first in range(0, len(self.candidates), most):
            part = slice(first, first + most)
            yield self.of(self.candidates[part], self.subspaces[part])


@dataclass(slots=True, kw_only=True, eq=False)
class Base:
    """The base run: the harmless prompts without intervention.

    ``log_probs`` of the next token.  ``states[g][l]`` is the residual entering block ``l`` for group ``g``; empty where
    it does not fit into memory.  ``apart``: whether the rows of a batch can be told apart at every place of the stream.
    ``cache``: the attention cache of the prefix.  ``starts``: the layers at which a forward pass may begin.
    """

    log_probs: Float[Tensor, "harmless vocab"]
    states: list[list[Tensor]]
    apart: bool
    cache: Any = None
    starts: set[int] = field(default_factory=set)


Figures = Float[Tensor, "candidates prompts"]
"""What a job gives: the KL where a candidate is ablated and the prompt is harmless, else how far it refuses."""


def prompt_groups(encoded: Sequence[list[int]], places: Sequence[int], most: int) -> Iterator[Group]:
    """Groups of at most ``most`` prompts of one length, the longest first."""
    for length in sorted({len(encoded[place]) for place in places}, reverse=True):
        same = [place for place in places if len(encoded[place]) == length]
        for first in range(0, len(same), most):
            some = tuple(same[first : first + most])
            yield Group(places=some, ids=torch.tensor([encoded[place] for place in some]))
