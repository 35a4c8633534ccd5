"""Whether bytes are the same: by their SHA-256, or side by side."""

import hashlib
from pathlib import Path

from abliterate.checkpoint.budget import COPY_BYTES
from abliterate.checkpoint.directio import Slab, SourceFile, view_of
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.pairs import same_content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensor(file: SourceFile, tensor: TensorInfo) -> str:
    """SHA-256 of the bytes of one tensor, as hexadecimal."""
    digest, slab = hashlib.sha256(), Slab(COPY_BYTES)
    for start in range(tensor.start, tensor.end, COPY_BYTES):
        digest.update(view_of(file.read(slab, start, min(COPY_BYTES, tensor.end - start))))
    return digest.hexdigest()


def same_bytes(old: Path, tensor: TensorInfo, new: Path, ours: TensorInfo, *, block_bytes: int = COPY_BYTES) -> bool:
    """Whether two tensors, wherever they lie, hold the same bytes."""
    if tensor.size_bytes != ours.size_bytes:
        return False
    slabs = Slab(block_bytes), Slab(block_bytes)
    with SourceFile(old / tensor.shard) as a, SourceFile(new / ours.shard) as b:
        for start in range(0, tensor.size_bytes, block_bytes):
            count = min(block_bytes, tensor.size_bytes - start)
            block = a.read(slabs[0], tensor.start + start, count)
            if not same_content(block, b.read(slabs[1], ours.start + start, count)):
                return False
    return True
