"""The tokens that all prompts begin with, and caches that hold their keys and values."""

import copy
from collections.abc import Sequence
from typing import Any

from abliterate.model.load import LoadedModel


def empty_cache(loaded: LoadedModel) -> Any:  # noqa: ANN401 - a cache of transformers
    """A cache for ``loaded`` that holds nothing yet."""
    from transformers import DynamicCache

    return DynamicCache(config=loaded.model.config)


def shared_tokens(encoded: Sequence[list[int]]) -> int:
    """With how many tokens all begin; one of each stays behind."""
    shared = 0
    while all(len(ids) > shared + 1 and ids[shared] == encoded[0][shared] for ids in encoded):
        shared += 1
    return shared


def is_plain(past: Any) -> bool:  # noqa: ANN401 - a cache of transformers
    """Whether a cache holds keys and values of attention only."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return bool(past.layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers)


def can_take_back(past: Any, tokens: int) -> bool:  # noqa: ANN401 - a cache of transformers
    """Whether tokens can be taken back from a cache whose rows get ``tokens`` of them: no window fills up."""
    return is_plain(past) and all(not layer.is_sliding or tokens < layer.sliding_window for layer in past.layers)


def repeated(past: Any, times: int) -> Any:  # noqa: ANN401 - a cache of transformers
    """A copy of a cache with each row ``times`` times."""
    again = copy.copy(past)
    again.layers = [copy.copy(layer) for layer in past.layers]
    for layer in again.layers:
        layer.batch_repeat_interleave(times)
    return again
