"""The places of a model where something is added to the residual stream."""

from typing import Literal, get_args

Kind = Literal["embedding", "attention", "MLP", "next-token block"]
"""Kinds of places: the embedding (with all else that enters block 0, and what other modalities put in place of it), the
mixer of tokens of a block (attention, convolution, state space), its MLP or experts and all else, and blocks that only
draft tokens for the model."""

KINDS: tuple[Kind, ...] = get_args(Kind)

IN_BLOCKS: tuple[Kind, Kind] = ("attention", "MLP")
"""The kinds that every layer may have."""

Place = tuple[int | None, Kind]
"""Layer (None for the embedding and for next-token blocks) and kind."""
