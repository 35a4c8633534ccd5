"""Bytes that forward passes hold besides weights: while a batch waits between blocks, while it runs, and in its cache.

All are estimates from the configuration, rather too large than too small.
"""

import math
from collections.abc import Sequence
from typing import Any

from abliterate.model.load import LoadedModel

STATES = 2.5
"""Hidden states per token that a batch holds while it waits: what it began with, what enters the block, and some room;
one more where positions are learned."""
TABLES = 4
"""Numbers for each of a head's, in tables of positions: a sine and a cosine, near and far."""
MASKS = 2
"""Attention masks that a batch holds: near and far."""
TWICE = 2
"""What some models (Gemma 3n, Gemma 4) hold beside it: streams, as a list and as one; an input for each block, and what
it is made of; keys and values that later blocks share."""
SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which a model makes other logits of those that it computed."""
LOGIT_BYTES = 32
"""Of one logit at the last position: as computed, in float64, its log-probability, and what is made of that."""


def waiting_bytes(loaded: LoadedModel, width: int, *, behind: int = 0, changed: bool | None = None) -> int:
    """Bytes that a row of ``width`` tokens takes up while it waits for a block, with ``behind`` tokens cached before.

    Where what enters blocks is ``changed`` (None: where blocks have hooks now) what was there before is held as well.
    Masks are of one byte for each pair of tokens, but where attention is computed step by step ("eager").
    """
    changed = bool(loaded.blocks[-1]._forward_pre_hooks) if changed is None else changed
    config, size = loaded.model.config.get_text_config(), loaded.model.dtype.itemsize
    layers = _layers(config, loaded.n_layers)
    states = STATES + changed + bool(loaded.other_embeddings) + TWICE * (getattr(config, "altup_num_inputs", None) or 0)
    for_blocks = TWICE * loaded.n_layers * (getattr(config, "hidden_size_per_layer_input", None) or 0)
    shared = max(_cached_width(layer, loaded.d_model) for layer in layers)
    shared *= TWICE * bool(getattr(config, "num_kv_shared_layers", None))
    tables = TABLES * max(_head_width(layer, loaded.d_model) for layer in layers)
    numbers = math.ceil(states * loaded.d_model) + tables + for_blocks + shared
    mask = size if getattr(config, "_attn_implementation", None) == "eager" else 1
    return width * (numbers * size + MASKS * (behind + width) * mask)


def running_bytes(loaded: LoadedModel) -> int:
    """Bytes that a token takes up beside that while it is in a block."""
    config = loaded.model.config.get_text_config()
    inner = max(_inner_width(layer) or 4 * loaded.d_model for layer in _layers(config, loaded.n_layers))
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return 4 * (8 * loaded.d_model + 4 * inner * experts)


def logit_bytes(loaded: LoadedModel) -> int:
    """Bytes that a row takes up at the end, where its logits are made."""
    return LOGIT_BYTES * loaded.model.config.get_text_config().vocab_size


def guess_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Bytes that a row takes up where the logits of ``tokens`` tokens are made; thrice where they are scaled."""
    config, width = loaded.model.config.get_text_config(), loaded.model.dtype.itemsize
    copies = 3 if any(getattr(config, name, None) not in (None, 1.0) for name in SCALES) else 1
    return copies * tokens * width * config.vocab_size


def cache_bytes(loaded: LoadedModel) -> int:
    """Bytes that a token takes up in the cache of keys and values, at most."""
    config = loaded.model.config.get_text_config()
    return sum(2 * 4 * _cached_width(layer, loaded.d_model) for layer in _layers(config, loaded.n_layers))


def _layers(config: Any, count: int) -> Sequence[Any]:  # noqa: ANN401 - a configuration of transformers
    """The configuration of each layer; they may differ (Gemma 4)."""
    return list(getattr(config, "per_layer_config", None) or [config] * count)


def _cached_width(config: Any, d_model: int) -> int:  # noqa: ANN401 - a configuration of transformers
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    return _head_width(config, d_model) * heads


def _head_width(config: Any, d_model: int) -> int:  # noqa: ANN401 - a configuration of transformers
    widths = [getattr(config, name, None) or 0 for name in ("head_dim", "global_head_dim")]
    return max(widths) or d_model // (getattr(config, "num_attention_heads", None) or 1)


def _inner_width(config: Any) -> int:  # noqa: ANN401 - a configuration of transformers
    width = getattr(config, "intermediate_size", None) or 0
    return max(width) if isinstance(width, list | tuple) else width
