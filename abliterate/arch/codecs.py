"""What stored rows mean: plain floats, FP8 with scales, MXFP4.

A codec turns rows of one tensor into floats and back.  Rows are counted through all matrices of a stack.  Writing keeps
the scales as they are: every value goes to the nearest that its scale allows, and saturates beyond the largest.

- FP8: ``q * s``, with a scale for the tensor, for each row, or for each block of rows and columns (the last blocks may
  reach beyond the matrix).
- MXFP4: ``E2M1[code] * 2^(s - 127)``, two codes a byte, low nibble first, 32 columns sharing ``s``
  (OCP Microscaling Formats 1.0, section 5.3).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from abliterate.arch.formats import DTYPES, FP8, SCALES
from abliterate.arch.model_map import Writer
from abliterate.arch.packed import MX_BLOCK, Packed
from abliterate.checkpoint.directio import read_into, read_stretch
from abliterate.checkpoint.header import TensorInfo

EXPONENT_BIAS = 127
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between neighbours of ``E2M1``: where rounding to nearest changes over."""
SIGN_BIT = 8


Rows = Int[Tensor, " rows"]
Columns = Int[Tensor, " n"] | None


@runtime_checkable
class Codec(Protocol):
    """Rows as they are stored, and as floats.

    ``stored`` is the dtype of a stored element, ``values`` how many values a row holds, ``compute`` the dtype of the
    arithmetic.  ``pulls`` says how many rounds of ``blocks`` its coarse grid needs.  ``largest_scale`` turns the
    spacing of the format's smallest numbers into that of the tensor.
    """

    @property
    def stored(self) -> torch.dtype: ...

    @property
    def values(self) -> int: ...

    @property
    def compute(self) -> torch.dtype: ...

    @property
    def pulls(self) -> int: ...

    @property
    def largest_scale(self) -> float: ...

    def decode(self, rows: Tensor, first: int, dtype: torch.dtype) -> Float[Tensor, "rows n"]:
        """The values of ``rows``, of which the first is row ``first`` of the tensor."""
        ...

    def widen(self, rows: Tensor, first: int, out: Float[Tensor, "rows n"]) -> None:
        """The same, into ``out``."""
        ...

    def encode(self, values: Float[Tensor, "rows n"], rows: Tensor, first: int) -> None:
        """Store ``values``, rounded to nearest, in ``rows``."""
        ...

    def codes(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Tensor:
        """``values`` of some rows (and columns) of the tensor, as they are stored: rounded to nearest."""
        ...

    def nearest(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Float[Tensor, "rows n"]:
        """What ``codes`` stand for."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """A float dtype.  Arithmetic is float32 for half-precision storage and float64 for float32 and wider."""

    stored: torch.dtype
    values: int
    pulls: int = 0
    largest_scale: float = 1.0

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.float32 if self.stored.itemsize == 2 else torch.float64

    def decode(self, rows: Tensor, first: int, dtype: torch.dtype) -> Float[Tensor, "rows n"]:  # noqa: ARG002
        """The rows in another dtype."""
        return rows.to(dtype)

    def widen(self, rows: Tensor, first: int, out: Float[Tensor, "rows n"]) -> None:  # noqa: ARG002
        """Without memory of its own."""
        out.copy_(rows)

    def encode(self, values: Float[Tensor, "rows n"], rows: Tensor, first: int) -> None:  # noqa: ARG002
        """Round to nearest."""
        rows.copy_(values)

    def codes(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Tensor:  # noqa: ARG002
        """In the stored dtype."""
        return values.to(self.stored)

    def nearest(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Float[Tensor, "rows n"]:
        """There and back."""
        return self.codes(values, rows, columns).to(values.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8:
    """FP8 values and their scales ``[scale rows, scale columns]`` in float32, each for a block of ``block`` elements.

    ``matrix_rows`` are the rows of one matrix, ``scale_rows`` those of its scales.
    """

    stored: torch.dtype
    values: int
    scales: Float[Tensor, "rows columns"]
    block: tuple[int, int]
    matrix_rows: int
    scale_rows: int
    pulls: int = 2
    compute: torch.dtype = torch.float32

    @property
    def largest_scale(self) -> float:
        """Of the whole tensor."""
        return float(self.scales.abs().max()) if self.scales.numel() else 0.0

    def decode(self, rows: Tensor, first: int, dtype: torch.dtype) -> Float[Tensor, "rows n"]:
        """Value times scale, in float32 before all else."""
        return _wide(rows).mul_(self._scales(_counted(rows, first))).to(dtype)

    def widen(self, rows: Tensor, first: int, out: Float[Tensor, "rows n"]) -> None:
        """By ``decode``."""
        out.copy_(self.decode(rows, first, out.dtype))

    def encode(self, values: Float[Tensor, "rows n"], rows: Tensor, first: int) -> None:
        """Value by scale, to nearest, saturating."""
        rows.copy_(self.codes(values, _counted(rows, first)))

    def codes(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Tensor:
        """Value by scale, to nearest, saturating."""
        scales = self._scales(rows, columns)
        limit = torch.finfo(self.stored).max
        inverse = torch.where(scales == 0, 0.0, 1 / scales)
        return (values.to(torch.float32) * inverse).clamp_(-limit, limit).to(self.stored)

    def nearest(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Float[Tensor, "rows n"]:
        """There and back."""
        return (_wide(self.codes(values, rows, columns)) * self._scales(rows, columns)).to(values.dtype)

    def _scales(self, rows: Rows, columns: Columns = None) -> Float[Tensor, "rows c"]:
        """The scale of each value, or one for all values of a row."""
        matrix, row = rows // self.matrix_rows, rows % self.matrix_rows
        scales = self.scales[matrix * self.scale_rows + row // self.block[0]]
        if scales.shape[1] == 1:
            return scales
        if columns is not None:
            return scales[:, columns // self.block[1]]
        return scales.repeat_interleave(self.block[1], dim=1)[:, : self.values]


class HeldScales:
    """The scales of the tensor at hand; those of the one before are let go."""

    def __init__(self) -> None:
        self._key: object = None
        self._value = torch.empty(0)

    def get(self, key: object, read: Callable[[], Tensor]) -> Tensor:
        """What ``read`` gives, once for as long as ``key`` stays the same."""
        if key != self._key:
            self._value = torch.empty(0)
            self._value, self._key = read(), key
        return self._value


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4:
    """MXFP4 codes; ``scales`` gives their exponents ``[rows, groups]`` as they are stored.

    Those of a model of experts are too large to be held for all its tensors at once.
    """

    values: int
    scales: Callable[[], UInt8[Tensor, "rows groups"]]
    stored: torch.dtype = torch.uint8
    pulls: int = 4
    compute: torch.dtype = torch.float32

    @property
    def largest_scale(self) -> float:
        """Of the whole tensor."""
        return float(_POWERS[int(self.scales().max())])

    def decode(self, rows: Tensor, first: int, dtype: torch.dtype) -> Float[Tensor, "rows n"]:
        """By a table of all bytes."""
        scales = self._scales(_counted(rows, first))
        pairs = _PAIRS.index_select(0, rows.flatten().int()).view(torch.float32).view(*scales.shape, MX_BLOCK)
        return pairs.mul_(scales[:, :, None]).view(len(rows), self.values).to(dtype)

    def widen(self, rows: Tensor, first: int, out: Float[Tensor, "rows n"]) -> None:
        """By ``decode``."""
        out.copy_(self.decode(rows, first, out.dtype))

    def encode(self, values: Float[Tensor, "rows n"], rows: Tensor, first: int) -> None:
        """To nearest, saturating."""
        rows.copy_(self.codes(values, _counted(rows, first)))

    def codes(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Tensor:
        """Two codes a byte, of whole rows."""
        if columns is not None:
            raise ValueError("two values share a byte")
        codes = self._nibbles(values, self._scales(rows))
        return codes[:, 0::2] | (codes[:, 1::2] << 4)

    def nearest(self, values: Float[Tensor, "rows n"], rows: Rows, columns: Columns = None) -> Float[Tensor, "rows n"]:  # noqa: ARG002
        """There and back, of whole rows."""
        scales = self._scales(rows)
        codes = self._nibbles(values, scales)
        found = _CODES.index_select(0, codes.flatten().int()).view(*scales.shape, MX_BLOCK)
        return (found * scales[:, :, None]).view(values.shape).to(values.dtype)

    def _scales(self, rows: Rows) -> Float[Tensor, "rows groups"]:
        stored = self.scales()[rows]
        return _POWERS.index_select(0, stored.flatten().int()).view(stored.shape)

    def _nibbles(self, values: Float[Tensor, "rows n"], scales: Float[Tensor, "rows groups"]) -> Tensor:
        parts = values.to(torch.float32).view(*scales.shape, MX_BLOCK) / scales[:, :, None]
        codes = torch.bucketize(parts.abs(), _MIDDLES).to(torch.uint8)
        return (codes | torch.signbit(parts).to(torch.uint8) * SIGN_BIT).view(values.shape)


_CODES = torch.tensor([*E2M1, *(-value for value in E2M1)])
_PAIRS = torch.stack((_CODES.repeat(16), _CODES.repeat_interleave(16)), dim=1).view(torch.int64).flatten()
"""Both values of every byte, as one element: looked up four times as fast as two."""
_MIDDLES = torch.tensor(MIDDLES)
_POWERS = torch.exp2(torch.arange(256, dtype=torch.float32) - EXPONENT_BIAS)


_ALL_BYTES = torch.arange(256, dtype=torch.uint8)
_FP8_VALUES = {dtype: _ALL_BYTES.view(dtype).to(torch.float32) for dtype in FP8.values()}


def _wide(rows: Tensor) -> Tensor:
    """FP8 in float32, by a table: four times as fast as torch converts it."""
    found = _FP8_VALUES[rows.dtype].index_select(0, rows.contiguous().view(torch.uint8).flatten().int())
    return found.view(rows.shape)


def plain(tensor_dtype: str, values: int) -> Plain:
    """The codec of a plain tensor whose rows have ``values`` elements."""
    return Plain(DTYPES[tensor_dtype], values)


def packed_codec(root: Path, packed: Packed, held: HeldScales) -> Codec:
    """The codec of a quantised tensor; its scales are read from the checkpoint in ``root``."""
    info = packed.scales

    def read() -> Tensor:
        raw = torch.empty(info.size_bytes, dtype=torch.uint8)
        read_into(root / info.shard, info.start, raw)
        return raw

    if packed.kind == "mxfp4":
        groups = info.shape[-1]
        return Mxfp4(groups * MX_BLOCK, lambda: held.get(info, lambda: read().view(-1, groups)))
    scales = read().view(SCALES[info.dtype]).to(torch.float32)
    return fp8_codec(FP8[packed.values.dtype], packed.shape, scales.reshape(info.shape), packed.block)


def decoded(
    packed: Packed, codec: Codec, read: Callable[[int, int], UInt8[Tensor, " bytes"]], piece_bytes: int | None
) -> Iterator[tuple[int, int, Float[Tensor, "rows n"]]]:
    """All values of a quantised tensor in float32, in pieces ``(matrix, first row, rows)`` of rows as they are stored.

    ``read`` gives the bytes at a place of its shard, so many of them; a piece takes up to ``piece_bytes`` there, or a
    whole matrix where that is None.
    """
    for piece in pieces_of(packed, piece_bytes):
        yield piece.matrix, piece.first, decode_piece(piece, codec, read(piece.start, piece.size_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPiece:
    """Rows of a quantised tensor as they are stored: ``count`` of a ``matrix`` from ``first`` on.

    The first is the ``row``-th of all; ``start`` and ``size_bytes`` are their place in the shard.
    """

    matrix: int
    first: int
    count: int
    row: int
    start: int
    size_bytes: int


def pieces_of(packed: Packed, piece_bytes: int | None) -> Iterator[RowPiece]:
    """All rows of a quantised tensor, up to ``piece_bytes`` at a time, or a whole matrix where that is None."""
    rows, row_bytes = packed.stored_rows, packed.row_bytes
    at_once = rows if piece_bytes is None else max(1, piece_bytes // max(1, row_bytes))
    for matrix in range(math.prod(packed.shape[:-2])):
        for first in range(0, rows, at_once):
            count, row = min(at_once, rows - first), matrix * rows + first
            start = packed.values.start + row * row_bytes
            yield RowPiece(
                matrix=matrix, first=first, count=count, row=row, start=start, size_bytes=count * row_bytes
            )  # fmt: skip


def decode_piece(piece: RowPiece, codec: Codec, raw: UInt8[Tensor, " bytes"]) -> Float[Tensor, "rows n"]:
    """The values of a piece, whose bytes are ``raw``, in float32."""
    return codec.decode(raw.view(codec.stored).view(piece.count, -1), piece.row, torch.float32)


def fp8_codec(
    stored: torch.dtype, shape: tuple[int, ...], scales: Float[Tensor, "..."], block: tuple[int, int] | None
) -> Fp8:
    """The codec of an FP8 tensor of ``shape``: with one scale, one for each row, or (``block``) a grid."""
    rows, n = shape[-2:]
    if scales.numel() == 1:
        return Fp8(stored, n, scales.reshape(1, 1), (rows, n), rows, 0)
    if block is not None:
        return Fp8(stored, n, scales.reshape(-1, scales.shape[-1]), block, rows, scales.shape[-2])
    each = scales.numel() // math.prod(shape[:-2])
    return Fp8(stored, n, scales.reshape(-1, 1), (rows // each, n), rows, each)


def codec_of(root: Path, writer: Writer, held: HeldScales) -> Codec:
    """The codec of a writer of the checkpoint in ``root``; codecs that are used one after the other share ``held``."""
    if writer.packed is not None:
        return packed_codec(root, writer.packed, held)
    return plain(writer.tensor.dtype, writer.row_elements)


def as_rows(raw: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Bytes as rows of ``width`` elements, copied where they lie at an odd address."""
    aligned = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
    return aligned.view(dtype).view(-1, width)


def read_plain(root: Path, info: TensorInfo) -> Tensor:
    """One small plain tensor of the checkpoint in ``root``, whole."""
    raw = read_stretch(root / info.shard, info.start, info.size_bytes)
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def read_rows(root: Path, info: TensorInfo, most: int) -> Tensor:
    """The first rows of a plain matrix of the checkpoint in ``root``, at most ``most`` of them."""
    rows = min(most, info.shape[0])
    raw = read_stretch(root / info.shard, info.start, rows * (info.size_bytes // info.shape[0]))
    return raw.view(DTYPES[info.dtype]).reshape(rows, *info.shape[1:])


def _counted(rows: Tensor, first: int) -> Int[Tensor, " rows"]:
    return torch.arange(first, first + len(rows))
