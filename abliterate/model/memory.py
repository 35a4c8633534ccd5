"""Whether a model fits into its memory budget, and if not, whether it can run out of core."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch

from abliterate.arch.model_map import DRAFTS, MatcherCache
from abliterate.arch.packed import Packed, quantisation, text_config
from abliterate.arch.sizes import config_sizes
from abliterate.arch.spec import Family, Matcher
from abliterate.checkpoint.header import DTYPE_BITS
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UnsupportedFormatError, UsageError
from abliterate.model.ranks import least, on_this_machine
from abliterate.model.stored import QUANTISED_DTYPE, Stored, decoding_bytes, is_decodable, stored_tensors

HOST_SHARE = 0.8
"""The share of the free memory that is the budget where none is given."""
WORKING_BYTES = 2**25
WORKING_SHARE = 8
"""One part in so many of the budget, and at least ``WORKING_BYTES``, is for what is no weight: hidden states, masks,
logits, and the pieces that are read."""
ROWS_BYTES = 2**26
ROWS_SHARE = 4
"""Rows of an embedding take at most so many bytes, and at most one part in ``ROWS_SHARE`` of the working bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of the units of a model in the dtype of the computation.

    ``others`` are the modules outside the blocks, without embeddings, which are read by rows.  ``conversion`` is what
    the largest conversion of stored tensors takes beside its result.
    """

    blocks: tuple[int, ...]
    others: tuple[int, ...]
    conversion: int = 0

    def passing_bytes(self, *, prefetch: bool) -> int:
        """Bytes for weights that pass through memory: the largest unit and, with ``prefetch``, the next largest."""
        largest = sorted((*self.blocks, *self.others))[-2 if prefetch else -1 :]
        return sum(largest) + self.conversion


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a checkpoint is run: held, or out of core in lockstep within ``budget_bytes``.

    ``held_bytes`` are all its weights, ``lockstep_bytes`` what lockstep takes with reading ahead.
    """

    mode: Literal["held", "lockstep"]
    budget_bytes: int | None
    held_bytes: int
    lockstep_bytes: int

    @property
    def text(self) -> str:
        """The plan as a sentence."""
        whole = f"the weights take {_amount(self.held_bytes)}"
        if self.mode == "held":
            return f"{whole} and are held in memory"
        return (
            f"{whole}, with room to work more than the {_amount(self.budget_bytes or 0)} given: they stay on disk, "
            "and each block is read once for all batches"
        )


def plan_memory(
    checkpoint: Checkpoint,
    family: Family,
    *,
    dtype: torch.dtype | str,
    memory_bytes: int | None,
    device_bytes: int | None = None,
) -> MemoryPlan:
    """Decide from the headers how to run ``checkpoint``; ``dtype`` "auto" is the stored one.

    ``device_bytes`` is the free memory of the accelerator that computes; it is the budget where it is given, else
    ``memory_bytes`` is.  Without ``memory_bytes`` the model is held, wherever accelerate puts it.
    """
    sizes, embedding = sizes_of(checkpoint, family, dtype=dtype)
    held = whole_bytes(sizes, embedding)
    if device_bytes is not None and is_decodable(checkpoint):
        whole, embedding = sizes_of(checkpoint, family, dtype=dtype, decoded=False)  # as an accelerator holds them
        held = whole_bytes(whole, embedding)
    budget = memory_bytes if device_bytes is None or memory_bytes is None else device_bytes
    fits = budget is None or held + working_bytes(budget) <= budget
    return MemoryPlan(
        mode="held" if fits else "lockstep",
        budget_bytes=budget,
        held_bytes=held,
        lockstep_bytes=sizes.passing_bytes(prefetch=True) + working_bytes(budget),
    )


def sizes_of(
    checkpoint: Checkpoint, family: Family, *, dtype: torch.dtype | str, decoded: bool = True
) -> tuple[Sizes, int]:
    """The sizes of a model's units, and the bytes of its embedding, from the headers.

    Quantised weights count as ``decoded`` or as they are stored.  An encoder of images or sound counts as one module.
    Next-token blocks are left out, as transformers leaves them out.  A tied head counts as a module of its own: all of
    it is needed, but only some rows of the embedding are.  Experts that are stored one by one are assumed to be fused
    one at a time.
    """
    n_layers = config_sizes(text_config(checkpoint.config), family, checkpoint.name)["n_layers"]
    matchers = MatcherCache(family)
    parts: dict[tuple[str, str], int] = defaultdict(int)
    experts: dict[tuple[tuple[str, str], str], int] = defaultdict(int)
    decoding = 0
    tensors = stored_tensors(checkpoint) if decoded and is_decodable(checkpoint) else checkpoint.tensors
    for tensor in tensors.values():
        match, matcher = matchers.role(tensor.name)
        part = _part(tensor.name, match, matcher, n_layers)
        parts[part] += _bytes_in(tensor, dtype)
        decoding = max(decoding, decoding_bytes(tensor))
        if match is not None and match.groupdict().get("expert") is not None:
            experts[part, match["expert"]] += 2 * max(tensor.size_bytes, _bytes_in(tensor, dtype))
    embedding = parts.get(("embedding", ""), 0)
    others = [size for (kind, _), size in parts.items() if kind == "other"]
    if not any(name.endswith(family.head) for name in checkpoint.tensors):
        others.append(embedding)
    blocks = tuple(size for (kind, _), size in parts.items() if kind == "block")
    conversion = decoding + max(experts.values(), default=0)
    return Sizes(blocks=blocks, others=tuple(others), conversion=conversion), embedding


def whole_bytes(sizes: Sizes, embedding: int) -> int:
    """Bytes of all weights; the arguments are what ``sizes_of`` gives."""
    return sum((*sizes.blocks, *sizes.others)) + embedding


def is_beyond_cache(size_bytes: int, memory_bytes: int | None) -> bool:
    """Whether a model of ``size_bytes`` is more than the page cache can keep beside ``memory_bytes`` of a budget."""
    import psutil

    return size_bytes > psutil.virtual_memory().available - (memory_bytes or 0)


def available_bytes() -> int:
    """The memory budget on the host where none is given: of several processes on a machine, each has its part."""
    import psutil

    _, here = on_this_machine()
    return least(int(HOST_SHARE * psutil.virtual_memory().available / here))


def can_prefetch(sizes: Sizes, memory_bytes: int | None) -> bool:
    """Whether a second unit, read while the first one runs, fits into ``memory_bytes``; None is no limit.

    Raises:
        UsageError: not even the largest unit fits.
    """
    if memory_bytes is None:
        return True
    room = memory_bytes - working_bytes(memory_bytes)
    if sizes.passing_bytes(prefetch=False) > room:
        raise UsageError(
            f"one block of this model needs {least_bytes(sizes) / 2**20:,.0f} MiB of memory, "
            f"more than the {memory_bytes / 2**20:,.0f} MiB given",
            "give more memory, or --dtype bfloat16, which halves what is needed",
        )
    return sizes.passing_bytes(prefetch=True) <= room


def least_bytes(sizes: Sizes) -> int:
    """The least memory budget in which a model runs: its largest unit and the working bytes."""
    smallest = sizes.passing_bytes(prefetch=False)
    return max(smallest + WORKING_BYTES, -(-smallest * WORKING_SHARE // (WORKING_SHARE - 1)))


def can_keep(kept_bytes: int, passing: Sizes, memory_bytes: int | None, *, prefetch: bool) -> bool:
    """Whether ``memory_bytes`` hold modules of ``kept_bytes`` beside the units ``passing`` through memory."""
    if memory_bytes is None:
        return False
    return kept_bytes + passing.passing_bytes(prefetch=prefetch) <= memory_bytes - working_bytes(memory_bytes)


def working_bytes(memory_bytes: int | None) -> int:
    """The least part of a memory budget for everything that is no weight."""
    return max(WORKING_BYTES, (memory_bytes or 0) // WORKING_SHARE)


def rows_bytes(memory_bytes: int | None) -> int:
    """The most that the rows of an embedding take of the working bytes."""
    return min(ROWS_BYTES, working_bytes(memory_bytes) // ROWS_SHARE)


def check_runs_offloaded(checkpoint: Checkpoint) -> None:
    """Check that the weights can be run out of core: not quantised, or in a format that is decoded here.

    Raises:
        UnsupportedFormatError: they are quantised in another format.
    """
    if quantisation(checkpoint.config) is not None and not is_decodable(checkpoint):
        raise UnsupportedFormatError(
            f"{checkpoint.name}: its weights are quantised, and such a model is only run whole",
            "give it more memory, or write it as bfloat16 first: abliterate dequantize MODEL --out FOLDER",
        )


def _amount(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:,.0f} MiB"


def _part(name: str, match: re.Match[str] | None, matcher: Matcher | None, n_layers: int) -> tuple[str, str]:
    """The unit that a tensor belongs to: its kind (block, embedding, other, unused) and its name."""
    if match is None or matcher is None:
        return "other", name
    writer = matcher.writer
    if match.groupdict().get("layer") is not None:
        drafts = int(match["layer"]) >= n_layers or (writer is not None and writer.role == DRAFTS)
        return ("unused", "") if drafts else ("block", match["layer"])
    if matcher.tower is not None:
        return "other", matcher.tower
    if writer is not None and writer.role == "embedding":
        return "embedding", ""
    return "other", name


def _bytes_in(tensor: Stored, dtype: torch.dtype | str) -> int:
    """Bytes of a tensor once it is loaded in ``dtype``; "auto" is the stored one, or the one that it is decoded to."""
    if isinstance(dtype, torch.dtype):
        bits = dtype.itemsize * 8
    elif isinstance(tensor, Packed):
        bits = QUANTISED_DTYPE.itemsize * 8
    else:
        bits = DTYPE_BITS[tensor.dtype]
    return tensor.numel * bits // 8
