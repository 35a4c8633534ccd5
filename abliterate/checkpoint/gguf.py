"""The header of a GGUF file: what it states of a model, and which tensors it holds.

The ``gguf`` library and transformers read such files without asking whether the bytes are there, so the header is read
here first and distrusted, as that of a safetensors file is (``header``): what passes is whole and describes its file.
"""

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from abliterate.errors import CheckpointError, UnsupportedFormatError, UsageError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
ROPE_FACTORS = "rope_freqs.weight"
"""No weight: what rotation frequencies are divided by."""

MOST_DIMENSIONS = 8
ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of numbers in a header, as ``struct`` calls them."""

_FETCH_AGAIN = "fetch this file again; the download was probably cut short"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor, its shape as in torch; ``kind`` names its type, ``start`` and ``end`` are offsets in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A GGUF file seen from outside.  Of lists of text (tokens, merges) ``metadata`` has the length only."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls this kind of model."""
        return str(self.metadata["general.architecture"])

    @property
    def weights(self) -> tuple[GgufTensor, ...]:
        """The tensors that are weights."""
        return tuple(tensor for tensor in self.tensors if tensor.name != ROPE_FACTORS)

    def numbers(self, name: str) -> tuple[float, ...]:
        """The values of a tensor stored as F32; none where there is no such tensor."""
        found = next((tensor for tensor in self.tensors if tensor.name == name and tensor.kind == "F32"), None)
        if found is None:
            return ()
        with self.path.open("rb") as file:
            file.seek(found.start)
            return struct.unpack(f"<{found.numel}f", file.read(found.end - found.start))


def check_gguf_installed() -> None:
    """Check that the ``gguf`` library is there.

    Raises:
        UsageError: it is not.
    """
    if find_spec("gguf") is None:
        raise UsageError(
            "reading GGUF needs the gguf library, which is not installed", "pip install 'abliterate[gguf]'"
        )


def find_gguf(path: Path) -> Path | None:
    """The file ``path`` if it is called like a GGUF, or the first such file in a folder that is no checkpoint."""
    if path.is_dir():
        return None if (path / "config.json").exists() else next(iter(sorted(path.glob(f"*{SUFFIX}"))), None)
    return path if path.suffix.lower() == SUFFIX and path.is_file() else None


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of ``path``.

    Raises:
        CheckpointError: the file is missing, truncated or no GGUF, or its header lies.
        UnsupportedFormatError: it is a part of a split file, of a version or kind that is not read, or no model.
        UsageError: the ``gguf`` library is not installed.
    """
    check_gguf_installed()
    _check_whole(path, PART.search(path.name))
    with _mapped(path) as data:
        found = _parsed(data, path)
    count = found.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise UnsupportedFormatError(f"{path}: one of {count} parts of a split GGUF", _merge(path.name))
    kind = found.metadata.get("general.type", "model")
    if kind != "model" or found.architecture == "clip":
        raise UnsupportedFormatError(
            f"{path}: holds no language model (type {kind!r}, architecture {found.architecture!r})",
            "give the file with the weights of the language model",
        )
    return found


def _merge(name: str) -> str:
    return f"join its parts with llama.cpp first: llama-gguf-split --merge {name} WHOLE.gguf"


def _check_whole(path: Path, part: re.Match[str] | None) -> None:
    """Raises: UnsupportedFormatError: the name is that of a part."""
    if part is not None and int(part[2]) > 1:
        first = PART.sub(f"-00001-of-{part[2]}.gguf", path.name)
        raise UnsupportedFormatError(f"{path}: part {int(part[1])} of {int(part[2])} of a split GGUF", _merge(first))


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """Raises: CheckpointError: it cannot be read, or does not begin as a GGUF file does."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file (it does not begin with GGUF)", "check the file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", "give the path of a .gguf file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", "check the file and its rights") from error


def _parsed(data: mmap.mmap, path: Path) -> GgufFile:
    """Raises: CheckpointError, UnsupportedFormatError: as ``read_gguf``."""
    cursor = _Cursor(data)
    try:
        version, n_tensors, n_values = cursor.take("IQQ")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is stored big-endian" if swapped else f"is GGUF version {version}"
            raise UnsupportedFormatError(f"{path}: {what}, which is not read", "convert it anew with llama.cpp")
        metadata = dict(cursor.entry() for _ in range(cursor.count(n_values, least_bytes=13)))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or not isinstance(metadata.get("general.architecture"), str):
            raise ValueError("no architecture, or an alignment that is none")
        stated = [cursor.tensor() for _ in range(cursor.count(n_tensors, least_bytes=24))]
    except (struct.error, ValueError, OverflowError, IndexError) as error:
        raise CheckpointError(f"{path}: truncated, or its header is malformed ({error})", _FETCH_AGAIN) from error
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(_placed(path, start, *entry) for entry in stated)
    if not tensors or len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"{path}: holds no tensors, or two of the same name", _FETCH_AGAIN)
    end = max(tensor.end for tensor in tensors)
    if end > len(data):
        raise CheckpointError(
            f"{path}: truncated: the header describes {end:,} bytes, the file has {len(data):,}", _FETCH_AGAIN
        )
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _placed(path: Path, start: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
    """Raises: CheckpointError, UnsupportedFormatError: rows that do not fill blocks; a type that is not known."""
    library = import_module("gguf")
    known = {int(kind): (kind.name, size) for kind, size in library.GGML_QUANT_SIZES.items()}
    if number not in known:
        raise UnsupportedFormatError(
            f"{path}: '{name}' is of GGML type {number}, which the gguf library does not know",
            "install a newer one: pip install --upgrade gguf",
        )
    kind, (block, block_bytes) = known[number]
    if (shape[-1] if shape else 1) % block:
        raise CheckpointError(f"{path}: '{name}' of shape {list(shape)} does not fill blocks of {kind}", _FETCH_AGAIN)
    begin = start + offset
    return GgufTensor(name=name, kind=kind, shape=shape, start=begin, end=begin + prod(shape) // block * block_bytes)


class _Cursor:
    """Reads a header from front to back, and never beyond the end of its file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = len(MAGIC)

    def take(self, form: str) -> tuple[Any, ...]:
        """The next numbers."""
        values = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def count(self, number: int, *, least_bytes: int) -> int:
        """``number``, if so many things of ``least_bytes`` or more can follow."""
        if number * least_bytes > len(self._data) - self.at:
            raise ValueError(f"{number:,} entries are announced and cannot follow")
        return number

    def text(self) -> str:
        """The next string."""
        (length,) = self.take("Q")
        start = self.at
        self.at += self.count(length, least_bytes=1)
        return self._data[start : self.at].decode()

    def entry(self) -> tuple[str, Any]:
        """The next key with its value."""
        key = self.text()
        (kind,) = self.take("I")
        return key, self.value(kind)

    def value(self, kind: int) -> Any:  # noqa: ANN401 - whatever the header says
        """The next value; of a list of strings its length."""
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        of, length = self.take("IQ")
        if of in SCALARS:
            width = struct.calcsize(f"<{SCALARS[of]}")
            return self.take(f"{self.count(length, least_bytes=width)}{SCALARS[of]}")
        if of != STRING:
            raise ValueError(f"a list of type {of}")
        for _ in range(self.count(length, least_bytes=8)):
            (size,) = self.take("Q")
            self.at += self.count(size, least_bytes=1)
        return length

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (slowest axis first), type and offset of the next tensor."""
        name = self.text()
        (dimensions,) = self.take("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"'{name}' has {dimensions} dimensions")
        shape = tuple(reversed(self.take(f"{dimensions}Q")))
        kind, offset = self.take("IQ")
        return name, shape, kind, offset
