"""How much of a forward pass fits into the memory that is free, and what it looks like when it does not."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from abliterate.errors import UsageError
from abliterate.model.footprint import cache_bytes, guess_bytes, logit_bytes, running_bytes
from abliterate.model.guessing import LEAST_GUESSES, MOST_GUESSES, PASS_TOKENS
from abliterate.model.load import LoadedModel, free_on_gpu
from abliterate.model.ranks import agreed, least

MOST_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 8192}
"""More tokens in a pass make it no faster: a processor's caches are full, a card is busy."""

REPLY_BATCHES = 4
PROMPTS_PART = 2
"""The part of the working memory, one in so many, for a pass over prompts to which replies are written."""


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or of the host; of processes that run one model together, that of the poorest."""
    if device.type == "cuda":
        return agreed(free_on_gpu(device.index or 0))
    return agreed(int(psutil.virtual_memory().available))


def pass_tokens(loaded: LoadedModel, cached: int, shortest: int, *, share: float = 0.5) -> int:
    """Tokens that a forward pass may have: ``share`` of the free memory, or of a budget's working share, holds them.

    There are ``cached`` tokens before each row, and a row has ``shortest`` tokens or more.
    """
    row = logit_bytes(loaded) + 2 * cached * cache_bytes(loaded)
    token = running_bytes(loaded) + row // max(1, shortest - cached) + cache_bytes(loaded)
    free = free_bytes(loaded.device)
    room = loaded.room_bytes if loaded.offload is None else loaded.offload.working_bytes
    if room is not None:
        free = min(free, room)
    return max(1, min(MOST_TOKENS[loaded.device.type], int(free * share) // token))


def reply_rows(loaded: LoadedModel, batch_size: int, tokens: int) -> int:
    """Rows of a batch of replies of ``tokens`` tokens each, prompt and all.

    Each new token reads all weights, whatever the number of rows: ``REPLY_BATCHES`` batches are written together where
    the weights are held and half of the free memory has room for them.
    """
    if loaded.offload is not None:
        return batch_size
    free = free_bytes(loaded.device)
    free = free if loaded.room_bytes is None else min(free, loaded.room_bytes)
    row = tokens * (cache_bytes(loaded) + running_bytes(loaded)) + logit_bytes(loaded)
    return max(batch_size, min(REPLY_BATCHES * batch_size, free // 2 // row))


def logits_room(loaded: LoadedModel, most_bytes: int) -> int:
    """Bytes for the logits of a batch: ``most_bytes``, and out of core no more than half of the working memory."""
    return most_bytes if loaded.offload is None else min(most_bytes, loaded.offload.working_bytes // 2)


def prompt_tokens(loaded: LoadedModel) -> int | None:
    """The most tokens of a batch of prompts to which replies are written; None: any. Processes agree on it.

    Out of core a pass over them is to take a part of the working memory (``PROMPTS_PART``): it is left free all the
    while that the others write.
    """
    if loaded.offload is None:
        return None
    return least(loaded.offload.working_bytes // PROMPTS_PART // running_bytes(loaded))


def most_guesses(rows: int) -> int:
    """How many guesses a pass may check in each of ``rows``."""
    return min(MOST_GUESSES, max(LEAST_GUESSES, PASS_TOKENS // max(1, rows) - 1))


def least_guesses(loaded: LoadedModel, rows: int) -> int:
    """How many of them have room for their logits whatever waits: they are counted in before anything else is."""
    each = max(1, rows * guess_bytes(loaded, 1))
    return max(0, min(LEAST_GUESSES, logits_room(loaded, each * (LEAST_GUESSES + 1)) // each - 1))


def guesses_that_fit(loaded: LoadedModel, rows: int) -> int:
    """How many guesses have room for their logits now: in half of what is left, for others may come."""
    if loaded.offload is None:
        return most_guesses(rows)
    weights = loaded.offload
    taken = sum(its.waits for its in (*weights.reserved, *weights.with_prompts))
    fit = (weights.working_bytes - taken) // 2 // max(1, rows * guess_bytes(loaded, 1)) - 1
    return max(least_guesses(loaded, rows), min(most_guesses(rows), fit))


def gradient_rows(loaded: LoadedModel, most: int, tokens: int, kept: int) -> int:
    """Rows of ``tokens`` tokens, with logits of ``kept`` of them, of a pass with gradients: ``most`` or less.

    What every block made is held until its gradient is there; half of the free memory holds it.
    """
    free = free_bytes(loaded.device)
    free = free if loaded.room_bytes is None else min(free, loaded.room_bytes)
    row = tokens * loaded.n_layers * running_bytes(loaded) + kept * logit_bytes(loaded)
    return max(1, min(most, free // 2 // row))


def check_held(loaded: LoadedModel, what: str, hint: str) -> None:
    """Check that the weights are held in memory, as gradients need them; ``what`` is to be done with such a model.

    Raises:
        UsageError: they pass through it; ``hint`` says what to do.
    """
    if loaded.offload is not None:
        raise UsageError(f"{loaded.name} is run out of core, and {what} a model that is held in memory", hint)


@contextmanager
def out_of_memory_is(error: UsageError) -> Iterator[None]:
    """Raise ``error`` in place of whatever says that memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as raised:
        if not is_out_of_memory(raised):
            raise
        raise error from raised


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: on an accelerator, or in the allocator of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "DefaultCPUAllocator" in text)
