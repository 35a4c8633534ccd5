"""Two files read side by side, in one pass, past the page cache: what a comparison of checkpoints is made of."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoint.directio import Slab, SourceFile, view_of

PAIRS = 2
"""One pair of buffers is looked at while the next is read."""


def same_content(first: Tensor, second: Tensor) -> bool:
    """Whether two runs of bytes are equal, eight bytes at a time where their addresses allow it."""
    if len(first) != len(second):
        return False
    words = len(first) // 8 * 8 if first.data_ptr() % 8 == second.data_ptr() % 8 == 0 else 0
    whole = torch.equal(first[:words].view(torch.int64), second[:words].view(torch.int64)) if words else True
    return whole and torch.equal(first[words:], second[words:])


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRange:
    """The same byte range of both files, at ``start`` in the first one, shown to ``see``; ``hashed`` once only."""

    start: int
    size: int
    see: Callable[[Tensor, Tensor], None]
    hashed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """SHA-256 of both files, as hexadecimal."""

    first: str
    second: str


def read_pairs(
    first: Path,
    second: Path,
    byte_ranges: Sequence[PairedRange],
    *,
    first_header: bytes,
    second_header: bytes,
    advance: Callable[[int], None],
    direct: bool = True,
) -> Digests:
    """Show every byte range of two files to its ``see``, and hash both.

    The second file's data is moved against the first one's by the difference of their headers, which are given, and
    hashed before all else.  The hashed byte ranges must cover both files from there on, in order, or the digests mean
    nothing.

    Raises:
        CheckpointError: a file ends too early.
    """
    digests = (hashlib.sha256(first_header), hashlib.sha256(second_header))
    moved = len(second_header) - len(first_header)
    size = max((byte_range.size for byte_range in byte_ranges), default=0)
    slabs = [(Slab(size), Slab(size)) for _ in range(PAIRS)]
    with (
        SourceFile(first, direct=direct) as a,
        SourceFile(second, direct=direct) as b,
        ThreadPoolExecutor(1, "read") as reader,
        ThreadPoolExecutor(2, "hash") as hasher,
    ):

        def read(place: int) -> tuple[Tensor, Tensor]:
            byte_range, pair = byte_ranges[place], slabs[place % PAIRS]
            return (
                a.read(pair[0], byte_range.start, byte_range.size),
                b.read(pair[1], byte_range.start + moved, byte_range.size),
            )

        ahead: Future[tuple[Tensor, Tensor]] | None = reader.submit(read, 0) if byte_ranges else None
        for place, byte_range in enumerate(byte_ranges):
            pair = ahead.result() if ahead is not None else (torch.empty(0), torch.empty(0))
            ahead = reader.submit(read, place + 1) if place + 1 < len(byte_ranges) else None
            hashing = []
            if byte_range.hashed:
                hashing = [
                    hasher.submit(digest.update, view_of(part)) for digest, part in zip(digests, pair, strict=True)
                ]
            byte_range.see(*pair)
            for done in hashing:
                done.result()
            if byte_range.hashed:
                advance(byte_range.size)
    return Digests(first=digests[0].hexdigest(), second=digests[1].hexdigest())
