"""The places of a model where something is added to the residual stream."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

Kind = Literal["embedding", "attention", "MLP", "next-token block"]
"""Kinds of places: the embedding (with all else that enters block 0, and what other modalities put in place of it), the
mixer of tokens of a block (attention, convolution, state space), its MLP or experts and all else, and blocks that only
draft tokens for the model."""

KINDS: tuple[Kind, ...] = get_args(Kind)

IN_BLOCKS: tuple[Kind, Kind] = ("attention", "MLP")
"""The kinds that every layer may have."""

Role = Literal["embedding", "attention", "mlp"]
ROLES: Mapping[Role, Kind] = {"embedding": "embedding", "attention": "attention", "mlp": "MLP"}
"""What recipes call the kinds of places that they can name."""

Place = tuple[int | None, Kind]
"""Layer (None for the embedding and for next-token blocks) and kind."""


def in_words(places: Iterable[Place]) -> str:
    """Where these places are, e.g. "the embedding; blocks 3 to 7, attention and MLP"."""
    places = set(places)
    parts = ["the embedding"] if (None, "embedding") in places else []
    layers = sorted({layer for layer, _ in places if layer is not None})
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for layer in layers:
        kinds = tuple(kind for kind in IN_BLOCKS if (layer, kind) in places)
        if runs and runs[-1][1:] == (layer - 1, kinds):
            runs[-1] = (runs[-1][0], layer, kinds)
        else:
            runs.append((layer, layer, kinds))
    for first, last, kinds in runs:
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        parts.append(f"{blocks}, {' and '.join(kinds)}")
    if (None, "next-token block") in places:
        parts.append("next-token blocks")
    return "; ".join(parts)
