"""Whether a model fits into the memory it is given, and if not, how its weights can pass through."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch

from abliterate.arch.model_map import DRAFTS, MatcherCache, config_sizes, quantisation, text_config
from abliterate.arch.packed import Packed
from abliterate.arch.spec import Family, Matcher
from abliterate.checkpoint.header import DTYPE_BITS
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UnsupportedFormatError, UsageError
from abliterate.model.stored import QUANTISED_DTYPE, Stored, decoding_bytes, is_decodable, stored_tensors

HOST_SHARE = 0.8
"""Of the memory that is free, this much is used where none is given."""
WORKING_BYTES = 2**25
WORKING_SHARE = 8
"""At least one part in so many is left for what is no weight: hidden states, masks, logits, and the pieces that are
read."""
ROWS_BYTES = 2**26
ROWS_SHARE = 4
"""Rows of an embedding take up so many bytes at most, or one part of the working bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes that the parts of a model take up in the dtype of the computation.

    ``others`` are the modules outside the blocks, without embeddings, which are read by rows.  ``conversion`` is what
    the largest conversion of stored tensors needs beside its result.
    """

    blocks: tuple[int, ...]
    others: tuple[int, ...]
    conversion: int = 0

    def passing_bytes(self, *, prefetch: bool) -> int:
        """What weights need that pass through: the largest unit, and the largest that is read beside it."""
        largest = sorted((*self.blocks, *self.others))[-2 if prefetch else -1 :]
        return sum(largest) + self.conversion


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a checkpoint is run.  ``resident_bytes`` are its weights whole, ``lockstep_bytes`` what lockstep needs."""

    mode: Literal["resident", "lockstep"]
    budget_bytes: int | None
    resident_bytes: int
    lockstep_bytes: int

    @property
    def text(self) -> str:
        """The plan in a sentence."""
        whole = f"the weights take {_amount(self.resident_bytes)}"
        if self.mode == "resident":
            return f"{whole} and are held in memory"
        return (
            f"{whole}, with room to work more than the {_amount(self.budget_bytes or 0)} given: they stay on disk, "
            "and each layer is read once for all batches"
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

    ``device_bytes`` is the free memory of the accelerator that computes, where there is one; else the host computes,
    within ``memory_bytes``.  Without ``memory_bytes`` everything is resident, wherever accelerate puts it.
    """
    sizes, embedding = sizes_of(checkpoint, family, dtype=dtype)
    resident = whole_bytes(sizes, embedding)
    if device_bytes is not None and is_decodable(checkpoint):
        whole, embedding = sizes_of(checkpoint, family, dtype=dtype, decoded=False)  # as an accelerator holds them
        resident = whole_bytes(whole, embedding)
    budget = memory_bytes if device_bytes is None or memory_bytes is None else device_bytes
    fits = budget is None or resident + working_bytes(budget) <= budget
    return MemoryPlan(
        mode="resident" if fits else "lockstep",
        budget_bytes=budget,
        resident_bytes=resident,
        lockstep_bytes=sizes.passing_bytes(prefetch=True) + working_bytes(budget),
    )


def sizes_of(
    checkpoint: Checkpoint, family: Family, *, dtype: torch.dtype | str, decoded: bool = True
) -> tuple[Sizes, int]:
    """The sizes of a model as far as headers tell, and of its embedding alone; quantised weights ``decoded`` or not.

    Encoders of images or sound count as one module; blocks that only draft are left out, as transformers does.  A head
    that is tied to the embedding is counted, since it is needed whole where the embedding is not.  Experts that are
    stored one by one are taken to be fused when they are loaded, one after the other.
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
    """What all weights take, of what ``sizes_of`` gives."""
    return sum((*sizes.blocks, *sizes.others)) + embedding


def available_bytes() -> int:
    """What a model may take of the host's memory when nobody said how much."""
    import psutil

    return int(HOST_SHARE * psutil.virtual_memory().available)


def can_prefetch(sizes: Sizes, memory_bytes: int | None) -> bool:
    """Whether ``memory_bytes`` (None: as many as it takes) hold a second unit, read while the first one runs.

    Raises:
        UsageError: they do not even hold the largest unit.
    """
    if memory_bytes is None:
        return True
    room = memory_bytes - working_bytes(memory_bytes)
    if sizes.passing_bytes(prefetch=False) > room:
        raise UsageError(
            f"one layer of this model needs {least_bytes(sizes) / 2**20:,.0f} MiB of memory, "
            f"more than the {memory_bytes / 2**20:,.0f} MiB given",
            "give more memory, or --dtype bfloat16, which halves what is needed",
        )
    return sizes.passing_bytes(prefetch=True) <= room


def least_bytes(sizes: Sizes) -> int:
    """The smallest memory in which a model runs: its largest unit and the working bytes."""
    smallest = sizes.passing_bytes(prefetch=False)
    return max(smallest + WORKING_BYTES, -(-smallest * WORKING_SHARE // (WORKING_SHARE - 1)))


def can_keep(kept_bytes: int, passing: Sizes, memory_bytes: int | None, *, prefetch: bool) -> bool:
    """Whether modules of ``kept_bytes`` can stay while the others, ``passing``, go through ``memory_bytes``."""
    if memory_bytes is None:
        return False
    return kept_bytes + passing.passing_bytes(prefetch=prefetch) <= memory_bytes - working_bytes(memory_bytes)


def working_bytes(memory_bytes: int | None) -> int:
    """What is left at least for everything that is no weight."""
    return max(WORKING_BYTES, (memory_bytes or 0) // WORKING_SHARE)


def rows_bytes(memory_bytes: int | None) -> int:
    """What the rows of an embedding may take up, of the working bytes."""
    return min(ROWS_BYTES, working_bytes(memory_bytes) // ROWS_SHARE)


def check_runs_offloaded(checkpoint: Checkpoint) -> None:
    """Check that the weights are stored as numbers, or quantised so that they can be decoded as they are read.

    Raises:
        UnsupportedFormatError: they are quantised in another way.
    """
    if quantisation(checkpoint.config) is not None and not is_decodable(checkpoint):
        raise UnsupportedFormatError(
            f"{checkpoint.name}: its weights are quantised, and such a model is only run whole",
            "give it more memory, or write it as bfloat16 first: abliterate dequantize MODEL --out FOLDER",
        )


def _amount(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:,.0f} MiB"


def _part(name: str, match: re.Match[str] | None, matcher: Matcher | None, n_layers: int) -> tuple[str, str]:
    """The kind of the part of a model that a tensor belongs to, and the name of the part."""
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
