"""Corrections as bytes: what a prediction did not get right, in as few bits as that takes.

A stored float is seen as an *ordinal*: the number of its place among all values of its dtype, so that neighbours differ
by one and every pattern of bits, -0 included, has a place of its own.

Where the prediction is nearly always right (base -> edited), the few misses are stored as places and differences.
Where it is not (edited -> base), the prediction gives an interval: its ends are known to both sides, so only which of
its values it was needs to be stored, in ``log2`` of their number of bits.
"""

import lzma

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

PATTERNS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PRESET = 1
PLACE_BYTES = 16
"""Bytes of a place and its difference, before they are compressed."""


def ordinal(values: Tensor) -> Int[Tensor, "..."]:
    """The place of each value among all of its dtype."""
    pattern = values.contiguous().view(PATTERNS[values.dtype.itemsize])
    wide = pattern.to(torch.int64 if values.dtype.itemsize > 2 else torch.int32)
    return torch.where(wide < 0, -1 - (wide - torch.iinfo(pattern.dtype).min), wide)


def value(ordinals: Int[Tensor, "..."], dtype: torch.dtype) -> Tensor:
    """The value at each place."""
    pattern = PATTERNS[dtype.itemsize]
    signed = torch.where(ordinals < 0, -1 - ordinals + torch.iinfo(pattern).min, ordinals)
    return signed.to(pattern).view(dtype)


class Sparse:
    """Few places of a long sequence, each with a difference; written or read in order."""

    def __init__(self, data: bytes | None = None, most: int = 2**31) -> None:
        """Read ``data``, of ``most`` places or fewer, or begin to write.

        Raises:
            ValueError: the places are in no order, or more.
        """
        self._end = 0
        self._places: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.int64]] = []
        if data is not None:
            decompressor = lzma.LZMADecompressor()
            numbers = decompressor.decompress(data, PLACE_BYTES * most + 1)  # a few bytes could stand for all memory
            if not decompressor.eof or len(numbers) > PLACE_BYTES * most:
                raise ValueError(f"more than {most} places, or no end")
            parts = np.frombuffer(numbers, dtype="<i8").reshape(2, -1)
            self._places, self._values = [np.cumsum(parts[0])], [parts[1]]
            if (np.diff(self._places[0], prepend=0) < 0).any():
                raise ValueError("places that are in no order")

    @property
    def count(self) -> int:
        """How many places there are."""
        return sum(map(len, self._places))

    def write(self, differences: Int[Tensor, "..."]) -> None:
        """The next part of the sequence; what is 0 costs nothing."""
        flat = differences.reshape(-1)
        places = flat.nonzero()[:, 0]
        if len(places):
            self._places.append(places.numpy().astype(np.int64) + self._end)
            self._values.append(flat[places].numpy().astype(np.int64))
        self._end += flat.numel()

    def read_onto(self, ordinals: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Add the next part of the sequence to ``ordinals``."""
        first, last = np.searchsorted(self._places[0], (self._end, self._end + ordinals.numel()))
        self._end += ordinals.numel()
        if first == last:
            return ordinals
        flat = ordinals.reshape(-1).clone()
        places = torch.from_numpy(self._places[0][first:last] - (self._end - ordinals.numel()))
        flat[places] += torch.from_numpy(self._values[0][first:last].copy()).to(flat.dtype)
        return flat.view(ordinals.shape)

    def to_bytes(self) -> bytes:
        """Distances between the places, then the differences, compressed."""
        places = np.concatenate([np.zeros(1, np.int64), *self._places])
        values = np.concatenate([np.zeros(0, np.int64), *self._values])
        return lzma.compress(np.stack([np.diff(places), values]).astype("<i8").tobytes(), preset=PRESET)


class BitWriter:
    """Numbers of known widths, one after the other without gaps."""

    def __init__(self) -> None:
        self._whole: list[bytes] = []
        self._rest = np.zeros(0, np.uint8)

    def write(self, numbers: NDArray[np.int64], width: int) -> None:
        """``numbers`` below ``2^width``."""
        planes = (numbers[None, :] >> np.arange(width)[:, None]) & 1
        bits = np.concatenate([self._rest, planes.reshape(-1).astype(np.uint8)])
        whole = len(bits) // 8 * 8
        self._whole.append(np.packbits(bits[:whole]).tobytes())
        self._rest = bits[whole:]

    def to_bytes(self) -> bytes:
        """All of it, the last byte filled up with zeros."""
        return b"".join(self._whole) + np.packbits(self._rest).tobytes()


class BitReader:
    """The same numbers, given their widths again."""

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._place = 0

    def read(self, count: int, width: int) -> NDArray[np.int64]:
        """The next ``count`` numbers.

        Raises:
            ValueError: there are not that many.
        """
        first, end = self._place, self._place + count * width
        if end > 8 * len(self._data):
            raise ValueError("the corrections end too early")
        bits = np.unpackbits(self._data[first // 8 : -(-end // 8)])[first % 8 :][: count * width]
        self._place = end
        planes = bits.reshape(width, count).astype(np.int64)
        return (planes << np.arange(width)[:, None]).sum(0)


def widths(counts: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Bits needed to tell ``counts`` values from each other: 0 for one, 1 for two, 2 for up to four."""
    return torch.frexp((counts - 1).clamp_min(0).to(torch.float64)).exponent


class Intervals:
    """Which value of an interval it was, for intervals known to both sides; what lies outside is sparse."""

    def __init__(self, bits: bytes = b"", outside: Sparse | None = None) -> None:
        self._writer, self._reader = BitWriter(), BitReader(bits)
        self.outside = outside or Sparse()
        self.ambiguous = 0

    def write(self, ordinals: Tensor, low: Tensor, counts: Tensor) -> None:
        """The next part of the sequence, and the ``counts`` values from ``low`` on that were to be expected."""
        index = ordinals - low
        misses = (index < 0) | (index >= counts)
        self.outside.write(torch.where(misses, index, torch.zeros_like(index)))
        index = torch.where(misses, torch.zeros_like(index), index).reshape(-1)
        for width, places in _by_width(counts):
            self._writer.write(index[places].numpy().astype(np.int64), width)
            self.ambiguous += len(places)

    def read(self, low: Tensor, counts: Tensor) -> Int[Tensor, "..."]:
        """The ordinals."""
        found = low.reshape(-1).clone()
        for width, places in _by_width(counts):
            found[places] += torch.from_numpy(self._reader.read(len(places), width)).to(found.dtype)
        return self.outside.read_onto(found.view(low.shape))

    def to_bytes(self) -> tuple[bytes, bytes]:
        """The bits, and what lay outside."""
        return self._writer.to_bytes(), self.outside.to_bytes()


def _by_width(counts: Tensor) -> list[tuple[int, Tensor]]:
    flat = counts.reshape(-1)
    places = (flat > 1).nonzero()[:, 0]
    needed = widths(flat[places])
    return [(int(width), places[needed == width]) for width in needed.unique()]
