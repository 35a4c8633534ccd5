"""A checkpoint written with something added to some of its tensors; everything else is copied byte for byte."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from abliterate.arch.formats import DTYPES
from abliterate.checkpoint.directio import Slab, SourceFile, TargetFile
from abliterate.checkpoint.header import Shard, TensorInfo
from abliterate.checkpoint.output import OutputFolder, copy_file
from abliterate.checkpoint.source import INDEX_NAME, Checkpoint
from abliterate.editing.writing import plain_failures, write_shards
from abliterate.errors import NonFiniteError
from abliterate.events import OnEvent, ignore, working

TASK = "write"
PIECE_BYTES = 8 * 2**20
OWN_FILES = ("README.md", "abliterate.json")
"""What the caller writes anew."""


def write_with(
    checkpoint: Checkpoint, added: Mapping[str, Tensor], output: OutputFolder, *, on_event: OnEvent = ignore
) -> None:
    """Write ``checkpoint`` into ``output`` with ``added`` (by name, in float32) on top of its tensors, but no card.

    Each sum is made in float32 or wider and rounded once to the stored dtype.  Names, shards, order, metadata and all
    other bytes stay.  Shards that an earlier call completed are kept.

    Raises:
        NonFiniteError: a sum is NaN or infinite in the stored dtype.
        NotEnoughDiskError: the disk filled up.
        CheckpointError: the source cannot be read, or changed meanwhile.
    """
    with working(on_event, TASK, checkpoint.size_bytes, "bytes") as advance, plain_failures(output, checkpoint):

        def write(shard: Shard, target: Path) -> None:
            _write_shard(checkpoint.folder, shard, added, target)
            advance(shard.size_bytes)

        write_shards(output, checkpoint, write, task=TASK, on_event=on_event)
        if checkpoint.index is not None:
            copy_file(checkpoint.folder / INDEX_NAME, output.path / INDEX_NAME)
        for name in {"config.json", *checkpoint.other_files} - set(OWN_FILES):
            copy_file(checkpoint.folder / name, output.path / name)


def _write_shard(folder: Path, shard: Shard, added: Mapping[str, Tensor], target: Path) -> None:
    """Write a shard piece by piece, in the order of its bytes."""
    slab = Slab(PIECE_BYTES)
    with SourceFile(folder / shard.name) as source, TargetFile(target) as out:
        place = 0
        for tensor in sorted(shard.tensors, key=lambda its: its.start):
            if tensor.name not in added:
                continue
            for piece in _pieces(source, slab, place, tensor.start):
                out.append(piece)
            for piece in _sums(source, slab, tensor, added[tensor.name]):
                out.append(piece)
            place = tensor.end
        for piece in _pieces(source, slab, place, shard.size_bytes):
            out.append(piece)
        out.finish()


def _pieces(source: SourceFile, slab: Slab, start: int, end: int) -> Iterator[Tensor]:
    for place in range(start, end, PIECE_BYTES):
        yield source.read(slab, place, min(PIECE_BYTES, end - place))


def _sums(source: SourceFile, slab: Slab, tensor: TensorInfo, added: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor with ``added`` on top, a piece at a time."""
    dtype = DTYPES[tensor.dtype]
    values, done = added.reshape(-1), 0
    for piece in _pieces(source, slab, tensor.start, tensor.end):
        stored = piece.clone().view(dtype)  # of an address that the dtype allows
        wide = stored.to(torch.promote_types(dtype, torch.float32))
        made = (wide + values[done : done + len(stored)]).to(dtype)
        if not made.isfinite().all():
            raise NonFiniteError(f"{tensor.shard}: '{tensor.name}' would be NaN or infinite", "give a smaller --rate")
        done += len(stored)
        yield made.view(torch.uint8)
