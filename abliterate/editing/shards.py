"""One shard streamed into another: what is not edited is copied, what is edited is changed where it was read.

A shard is cut into ``ByteRange``s in file order, so names, order, offsets, alignment and metadata stay.  Reading,
arithmetic and writing overlap: one thread reads ahead, one writes behind.

Stream vectors that lie in rows (embeddings, biases) can be cut anywhere between rows.  Where they lie in columns
(output projections ``[d, in]``) ``read^T W`` must be known before the first row can be written: a matrix that fits into
a buffer is read once; a larger one once for every pass, and the few rows that absorb its rounding are patched in at the
end.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from abliterate.arch.codecs import Codec
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.budget import COPY_BYTES
from abliterate.checkpoint.directio import PAGE, SourceFile, TargetFile, patch, slab_bytes
from abliterate.checkpoint.header import Shard, TensorInfo, read_header
from abliterate.checkpoint.reflink import SharedFile, share_blocks
from abliterate.checkpoint.transfer import ByteRange, Ring, bytes_of, transfer
from abliterate.events import Advanced, OnEvent

TASK = "edit"

PIECES = 3
"""Pieces of the largest size that the buffer holds: one is read into, one is edited, one is written."""

HELD_BYTES = 320
"""Of the memory budget, for each column of the widest matrix: its feedback rows, held until its last row is known.
The scales of the quantised tensor at hand are counted as well."""


LatePatch = tuple[int, Callable[[], list[tuple[int, Tensor]]]]
"""A place in the source, and what will know, once all has been streamed, which bytes to overwrite relative to it."""


@runtime_checkable
class InBlocks(Protocol):
    """The edit of a matrix that arrives in blocks of rows, once for each of ``passes``: see ``blocks.ColumnEdit``."""

    @property
    def passes(self) -> tuple[Callable[[Tensor, int], None], ...]:
        """What to do with each block; only the last changes it."""
        ...

    def finish(self) -> list[tuple[int, Tensor]]:
        """Rows that are only known at the end."""
        ...


@runtime_checkable
class InPlace(Protocol):
    """The edit of one stored tensor in the buffer it was read into: see ``blocks.TensorEdit``."""

    @property
    def codec(self) -> Codec:
        """What its rows mean."""
        ...

    def block_rows(self) -> int:
        """Blocks begin at multiples of this."""
        ...

    def edit_rows(self, rows: Tensor, first_row: int) -> None:
        """Stream vectors stored as rows."""
        ...

    def edit_columns(self, matrix: Tensor, first_row: int) -> None:
        """Stream vectors stored as columns."""
        ...

    def columns(self, first_row: int) -> InBlocks:
        """The same, block by block."""
        ...


@dataclass(kw_only=True)
class Editor:
    """Writes edited shards with one set of buffers; ``edit_of`` makes the edit of each of ``writers`` in file order."""

    folder: Path
    writers: Mapping[str, Writer]
    edit_of: Callable[[Writer], InPlace]
    piece_bytes: int
    direct: bool
    on_event: OnEvent
    task: str = TASK
    _ring: Ring | None = None

    def write_shard(
        self, shard: Shard, target: Path, *, header: bytes | None = None, copied: TensorInfo | None = None
    ) -> None:
        """Write one edited shard to ``target`` and flush it to disk.

        It gets another ``header`` where one is given, and the tensor ``copied`` at its end.
        """
        patches: list[LatePatch] = []
        byte_ranges = list(self._byte_ranges(shard, patches))
        if copied is not None:
            byte_ranges += self._copies(copied.start, copied.end)
        path = self.folder / shard.name
        with SourceFile(path, direct=self.direct) as source:
            if header is None and share_blocks(path, target):
                moved = 0
                self._overwrite(source, target, byte_ranges)
            else:
                header = read_header(path, shard) if header is None else header
                moved = len(header) - shard.data_start
                self._write(source, target, header, byte_ranges)
        found = [(place + moved + offset, data) for place, late in patches for offset, data in late()]
        if found:
            patch(target, found)

    def _write(self, source: SourceFile, target: Path, header: bytes, byte_ranges: list[ByteRange]) -> None:
        with TargetFile(target, direct=self.direct) as out:
            out.append(bytes_of(header))
            ring = self._ring_for(byte_ranges)
            transfer(source, byte_ranges, ring, write=lambda _, data: out.append(data), advance=self._advance)
            out.finish()

    def _overwrite(self, source: SourceFile, target: Path, byte_ranges: list[ByteRange]) -> None:
        """``target`` is the source already: only what changes is read and written."""
        changing = [byte_range for byte_range in byte_ranges if byte_range.change is not None]
        self._advance(sum(byte_range.size for byte_range in byte_ranges if byte_range.change is None))
        with SharedFile(target, direct=self.direct) as out:
            transfer(source, changing, self._ring_for(changing), write=out.overwrite, advance=self._advance)
            out.finish()

    def _byte_ranges(self, shard: Shard, patches: list[LatePatch]) -> Iterator[ByteRange]:
        """The data of ``shard`` in file order; what can only be known at the end goes to ``patches``."""
        position = shard.data_start
        for tensor in shard.tensors:
            if tensor.name not in self.writers or tensor.numel == 0:
                continue
            yield from self._copies(position, tensor.start)
            writer = self.writers[tensor.name]
            edit = self.edit_of(writer)
            if writer.in_rows:
                yield from self._row_ranges(writer, edit)
            else:
                yield from self._column_ranges(writer, edit, patches)
            position = tensor.end
        yield from self._copies(position, shard.size_bytes)

    def _copies(self, start: int, end: int) -> Iterator[ByteRange]:
        size = min(COPY_BYTES, self.piece_bytes)
        for place in range(start, end, size):
            yield ByteRange(start=place, size=min(size, end - place))

    def _row_ranges(self, writer: Writer, edit: InPlace) -> Iterator[ByteRange]:
        tensor, width = writer.tensor, writer.row_elements
        row_bytes = width * edit.codec.stored.itemsize
        at_once = self._rows(edit, row_bytes)
        for start in range(tensor.start, tensor.end, at_once * row_bytes):
            first = (start - tensor.start) // row_bytes
            yield ByteRange(
                start=start,
                size=min(at_once * row_bytes, tensor.end - start),
                change=lambda raw, first=first: in_place(
                    raw, edit.codec.stored, width, lambda rows: edit_whole(rows, writer, edit, first)
                ),
            )

    def _column_ranges(self, writer: Writer, edit: InPlace, patches: list[LatePatch]) -> Iterator[ByteRange]:
        tensor, width = writer.tensor, writer.row_elements
        d = tensor.shape[writer.axis]
        matrix_bytes = d * width * edit.codec.stored.itemsize
        if matrix_bytes > self.piece_bytes:
            for place, start in enumerate(range(tensor.start, tensor.end, matrix_bytes)):
                yield from self._by_parts(start, writer, edit, place * d, patches)
            return

        at_once = max(matrix_bytes, COPY_BYTES // matrix_bytes * matrix_bytes)
        for start in range(tensor.start, tensor.end, at_once):
            first = (start - tensor.start) // matrix_bytes * d
            yield ByteRange(
                start=start,
                size=min(at_once, tensor.end - start),
                change=lambda raw, first=first: in_place(
                    raw, edit.codec.stored, width, lambda rows: edit_whole(rows, writer, edit, first)
                ),
            )

    def _by_parts(
        self, start: int, writer: Writer, edit: InPlace, first: int, patches: list[LatePatch]
    ) -> Iterator[ByteRange]:
        """A matrix that does not fit into a buffer: read once for every pass, then patched."""
        columns, codec = edit.columns(first), edit.codec
        width, d = writer.row_elements, writer.tensor.shape[writer.axis]
        row_bytes = width * codec.stored.itemsize
        at_once = self._rows(edit, row_bytes)
        for number, step in enumerate(columns.passes, start=1):
            for row in range(0, d, at_once):
                yield ByteRange(
                    start=start + row * row_bytes,
                    size=min(at_once, d - row) * row_bytes,
                    change=lambda raw, row=row, step=step: in_place(
                        raw, codec.stored, width, lambda part: step(part, row)
                    ),
                    written=number == len(columns.passes),
                )
        patches.append((start, lambda: [(row * row_bytes, values) for row, values in columns.finish()]))

    def _rows(self, edit: InPlace, row_bytes: int) -> int:
        """Rows for one byte range: as many as fit, but whole blocks of the arithmetic, and at least one of those."""
        step = edit.block_rows()
        return max(1, min(COPY_BYTES, self.piece_bytes) // (step * row_bytes)) * step

    def _ring_for(self, byte_ranges: list[ByteRange]) -> Ring:
        largest = max((byte_range.size for byte_range in byte_ranges), default=0)
        capacity = PIECES * slab_bytes(max(self.piece_bytes, largest))
        if self._ring is None or self._ring.capacity < capacity:
            self._ring = None  # let go of the small one first
            self._ring = Ring(capacity)
        return self._ring

    def _advance(self, amount: int) -> None:
        self.on_event(Advanced(task=self.task, amount=amount))


def edit_whole(rows: Tensor, writer: Writer, edit: InPlace, first: int = 0) -> None:
    """Edit ``rows`` of ``writer`` as they are stored, from row ``first`` on: any of them, or whole matrices."""
    if writer.in_rows:
        edit.edit_rows(rows, first)
        return
    d = writer.tensor.shape[writer.axis]
    for place in range(0, len(rows), d):
        edit.edit_columns(rows[place : place + d], first + place)


def in_place(raw: Tensor, dtype: torch.dtype, width: int, change: Callable[[Tensor], None]) -> None:
    """Run ``change`` on ``raw`` seen as rows of ``width`` elements; through a copy where it lies at an odd address."""
    if raw.data_ptr() % dtype.itemsize == 0:
        change(raw.view(dtype).view(-1, width))
        return
    aligned = raw.clone()
    change(aligned.view(dtype).view(-1, width))
    raw.copy_(aligned)


def header_with(header: bytes, name: str, like: TensorInfo, data_bytes: int) -> bytes:
    """``header`` with one more entry at its end, for a tensor of the size of ``like`` appended to the data.

    The text of all other entries stays as it is.  The padding (spaces, as the format has it) makes the header grow by
    whole pages, so that all data keeps its offset modulo the page.
    """
    end = data_bytes + like.size_bytes
    entry = json.dumps(
        {name: {"dtype": like.dtype, "shape": list(like.shape), "data_offsets": [data_bytes, end]}},
        separators=(",", ":"),
    )
    text = header[8:].decode("utf-8").rstrip()
    body = (text[:-1] + "," + entry[1:]).encode("utf-8")
    grown = math.ceil((8 + len(body) - len(header)) / PAGE) * PAGE
    body += b" " * (len(header) + max(0, grown) - 8 - len(body))
    return len(body).to_bytes(8, "little") + body
