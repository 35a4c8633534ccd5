"""The header of one safetensors file, with the byte range of every tensor.

The safetensors library reads tensors but does not say where they lie; copying everything else byte for byte needs
that, so the header (8 bytes of length, then JSON) is read here and distrusted: a header that does not describe the
file it stands in is refused before any byte is written.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor as a header describes it; ``start`` and ``end`` are absolute byte offsets in the file."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file: its tensors in file order, its metadata, its size."""

    name: str
    data_start: int
    size_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] | None


def read_shard(root: Path, name: str) -> Shard:
    """Read and check the header of ``root / name``.

    Raises:
        CheckpointError: the file is missing or truncated, or its header lies.
    """
    path = root / name
    try:
        size = size_of_file(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            check_no_pointer(prefix, where=path)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: truncated or not a safetensors file", _FETCH_AGAIN)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", _FETCH_AGAIN) from error
    return parse_header(raw, shard=name, file_size=size, where=str(path))


def size_of_file(path: Path) -> int:
    """Size of a file in bytes.

    Raises:
        OSError: it is not there.
        CheckpointError: it is a folder, or a pipe, of which reading would wait for the other end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{path}: cannot be read (it is no file)", "put the file there; the folder must hold a complete checkpoint"
        )
    return found.st_size


def check_no_pointer(begin: bytes, *, where: Path) -> None:
    """Check that a file that begins so, 8 bytes or more, is not what Git LFS puts in the place of a large one.

    Raises:
        CheckpointError: it is.
    """
    if begin.startswith(b"version ") and (len(begin) == 8 or begin.startswith(LFS_POINTER)):
        raise CheckpointError(
            f"{where}: a Git LFS pointer, not the file itself", "get the files: git lfs pull, or hf download"
        )


def read_header(path: Path, shard: Shard) -> bytes:
    """The first bytes of a shard: the length of its header and the header, as they are."""
    with path.open("rb") as file:
        return file.read(shard.data_start)


def parse_header(raw: bytes, *, shard: str, file_size: int, where: str) -> Shard:
    """Parse the JSON of a header and check it against the size of its file.

    Raises:
        CheckpointError: not JSON, an unknown dtype, a range that does not fit its shape, overlapping ranges, or data
            beyond the end of the file.
    """
    try:
        document = json.loads(raw, object_pairs_hook=_no_duplicates)
        metadata = _metadata(document.pop("__metadata__", None))
        entries = sorted(
            (_tensor(name, entry, shard, 8 + len(raw)) for name, entry in document.items()),
            key=lambda tensor: (tensor.start, tensor.end),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: the header is malformed ({error})", _FETCH_AGAIN) from error
    end = 8 + len(raw)
    for tensor in entries:
        if tensor.start < end:
            raise CheckpointError(f"{where}: tensor '{tensor.name}' overlaps the one before it", _FETCH_AGAIN)
        end = tensor.end
    if end > file_size:
        raise CheckpointError(
            f"{where}: truncated: the header describes {end:,} bytes, the file has {file_size:,}", _FETCH_AGAIN
        )
    return Shard(name=shard, data_start=8 + len(raw), size_bytes=file_size, tensors=tuple(entries), metadata=metadata)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FETCH_AGAIN = "fetch this file again; the download was probably cut short"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice")
    return document


def _metadata(value: Any) -> dict[str, str] | None:  # noqa: ANN401 - parsed JSON
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ must hold text by name")
    return value


def _tensor(name: str, entry: dict[str, Any], shard: str, data_start: int) -> TensorInfo:
    dtype = entry["dtype"]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"tensor '{name}' has the unknown dtype {dtype!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor '{name}' has a negative or fractional size")
    tensor = TensorInfo(
        name=name, shard=shard, dtype=dtype, shape=shape, start=data_start + begin, end=data_start + end
    )
    if tensor.size_bytes * 8 != tensor.numel * DTYPE_BITS[dtype]:
        raise ValueError(f"tensor '{name}' of shape {list(shape)} {dtype} does not fill its {end - begin} bytes")
    return tensor
