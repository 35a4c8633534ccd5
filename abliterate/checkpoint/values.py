"""The stored values of a checkpoint, looked at for NaN and infinity."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from abliterate.checkpoint.budget import COPY_BYTES
from abliterate.checkpoint.directio import Slab, SourceFile
from abliterate.checkpoint.source import Checkpoint
from abliterate.events import OnEvent, ignore, working

TASK = "look for NaN and infinity"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""Dtypes of safetensors that hold NaN and infinity, and are looked at for them."""


def is_finite(raw: Tensor, dtype: torch.dtype) -> bool:
    """Whether no value of these bytes is NaN or infinite: the extremes hold either, and take no memory beside them."""
    aligned = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
    return all(bool(extreme.isfinite()) for extreme in aligned.view(dtype).aminmax())


def not_finite(checkpoint: Checkpoint, on_event: OnEvent = ignore) -> tuple[str, ...]:
    """The tensors that hold NaN or infinity, in file order; every weight is read once.

    Raises:
        CheckpointError: a file ends too early.
    """
    total = sum(shard.size_bytes for shard in checkpoint.shards)
    with working(on_event, TASK, total, "bytes") as advance:
        return tuple(_not_finite(checkpoint, advance))


def _not_finite(checkpoint: Checkpoint, advance: Callable[[int], None]) -> Iterator[str]:
    slab = Slab(COPY_BYTES)
    for shard in checkpoint.shards:
        advance(shard.data_start)
        with SourceFile(checkpoint.folder / shard.name) as source:
            for tensor in shard.tensors:
                dtype = FLOATS.get(tensor.dtype)
                starts = range(tensor.start, tensor.end, COPY_BYTES)
                parts = (source.read(slab, start, min(COPY_BYTES, tensor.end - start)) for start in starts)
                if dtype is not None and not all(is_finite(part, dtype) for part in parts):
                    yield tensor.name
                advance(tensor.size_bytes)
