"""The patch as a file: safetensors, never pickle, written piece by piece and read tensor by tensor.

Its metadata holds one JSON document under ``abliterate-patch``: what the base and the edited checkpoint are, with the
hashes of every file and every edited tensor, and of which tensors the corrections are.  The vector that was chosen is
called ``direction``, so that a patch is a direction file as well; where several were, ``chosen`` holds the bytes of a
direction file with them.
"""

import json
import lzma
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.directio import read_stretch, view_of
from abliterate.checkpoint.documents import check_document
from abliterate.checkpoint.file_names import inner_name
from abliterate.checkpoint.format_number import check_format
from abliterate.checkpoint.header import read_shard
from abliterate.checkpoint.output import flush
from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.exports.patches.bitstreams import Intervals, Sparse
from abliterate.exports.patches.document import PatchDocument
from abliterate.exports.patches.replay import Backwards, Forwards, Settle, StoredEdit, TensorReplay

FORMAT, FORMAT_NUMBER = "abliterate-patch-", 2
"""Patches of version 1, whose edits remove directions and do nothing else, are still read."""
KEY = "abliterate-patch"
STORED = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
CHOSEN = "chosen"
LARGEST_TEXT = 2**26
OF_FILES = ("header.", "base.", "edited.")
"""Tensors whose names begin so hold the text of the file whose name follows, or its header."""


class PatchWriter:
    """Collects tensors beside the file, wide ones apart from narrow ones so that all lie aligned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[int, dict[str, tuple[str, list[int], int]]] = {8: {}, 4: {}, 1: {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._spools = {size: path.with_name(f"{path.name}.partial{size}") for size in self._entries}
        for spool in self._spools.values():
            spool.unlink(missing_ok=True)

    def add(self, name: str, data: Tensor | bytes) -> None:
        """One more tensor."""
        if isinstance(data, bytes):
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        size = data.dtype.itemsize
        with self._spools[size].open("ab") as file:
            file.write(view_of(data.contiguous()))
        self._entries[size][name] = (STORED[data.dtype], list(data.shape), data.nbytes)

    def finish(self, document: Mapping[str, Any]) -> Path:
        """Put header and tensors into the file, under its own name only when it is complete and on disk."""
        header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(document, sort_keys=True, allow_nan=False)}}
        end = 0
        for entries in self._entries.values():
            for name, (dtype, shape, size) in entries.items():
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
                end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        partial = self._path.with_name(self._path.name + ".partial")
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spool in self._spools.values():
                if spool.is_file():
                    with spool.open("rb") as part:
                        shutil.copyfileobj(part, file, 2**20)
        flush(partial)
        partial.replace(self._path)
        self.discard()
        return self._path

    def discard(self) -> None:
        """Remove what was collected."""
        for spool in self._spools.values():
            spool.unlink(missing_ok=True)


class PatchFile:
    """A patch opened to be read; only its header is held."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            UsageError: not a patch.
            CheckpointError: it is damaged.
        """
        self.path = path
        if not path.is_file():
            raise UsageError(f"{path}: no such patch", "give a file that `abliterate patch export` wrote")
        shard = read_shard(path.parent, path.name)
        text = (shard.metadata or {}).get(KEY)
        if text is None:
            raise UsageError(f"{path}: not a patch", "give a file that `abliterate patch export` wrote")
        try:
            self.document: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(error) from error
        if not isinstance(self.document, dict):
            raise self.damaged(TypeError("its document is no object"))
        check_format(self.document.get("format"), FORMAT, FORMAT_NUMBER, where=path)
        check_document(self.document, PatchDocument, where=path, hint="do not use it: fetch or export it again")
        self._tensors = {tensor.name: tensor for tensor in shard.tensors}
        for name in self._tensors:
            if name.startswith(OF_FILES):
                inner_name(name.partition(".")[2], where=path)

    def damaged(self, error: Exception) -> AbliterateError:
        """What to raise where the content cannot be right."""
        return CheckpointError(f"{self.path}: the patch is damaged ({error})", "fetch or export it again")

    def has(self, name: str) -> bool:
        """Whether it holds a tensor."""
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            CheckpointError: it is not there.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: holds no '{name}'", "export the patch again")
        info = self._tensors[name]
        dtype = next((dtype for dtype, stored in STORED.items() if stored == info.dtype), None)
        if dtype is None:
            raise self.damaged(TypeError(f"'{name}' is stored as {info.dtype}"))
        return read_stretch(self.path, info.start, info.size_bytes).view(dtype).reshape(info.shape)

    def blob(self, name: str) -> bytes:
        """One tensor of bytes."""
        return bytes(view_of(self.tensor(name)))

    def text(self, name: str) -> bytes:
        """One compressed file.

        Raises:
            CheckpointError: it cannot be read, or is far too large.
        """
        decompressor = lzma.LZMADecompressor()
        try:
            found = decompressor.decompress(self.blob(name), LARGEST_TEXT)
        except lzma.LZMAError as error:
            raise self.damaged(error) from error
        if not decompressor.eof:
            raise self.damaged(ValueError(f"'{name}' has no end"))
        return found

    def size_of(self, *endings: str) -> int:
        """Bytes of all tensors whose names end so."""
        return sum(tensor.size_bytes for name, tensor in self._tensors.items() if name.endswith(endings))

    def edit(self, number: int) -> StoredEdit:
        """One edit.

        Raises:
            CheckpointError: its parts are missing, or do not fit together.
        """
        stem = f"projector.{number}"
        parts = {part: self.tensor(f"{stem}.{part}") for part in EDIT_PARTS}
        constant = self.tensor(f"{stem}.constant") if self.has(f"{stem}.constant") else None
        read, rows = parts["read"], parts["rows"]
        if read.ndim != 2 or not all(read.shape) or rows.ndim != 1:
            raise self.damaged(ValueError(f"'{stem}' has other shapes"))
        self._expect(f"{stem}.read", read, tuple(read.shape), torch.float64)
        self._expect(f"{stem}.write", parts["write"], tuple(read.shape), torch.float64)
        self._expect(f"{stem}.rows", rows, (len(rows),), torch.int64)
        self._expect(f"{stem}.shares", parts["shares"], (len(rows), read.shape[1]), torch.float64)
        if constant is not None:
            self._expect(f"{stem}.constant", constant, (len(read),), torch.float64)
        if len(rows.unique()) < len(rows) or not all(0 <= row < len(read) for row in rows.tolist()):
            raise self.damaged(ValueError(f"'{stem}.rows' are no rows"))
        return StoredEdit(**parts, constant=constant)

    def replay(self, number: int, settle: Callable[[str], Settle], *, width: int, columns: int) -> TensorReplay:
        """What is known of the edited tensor ``number``, whose stream vectors are ``columns`` of ``width`` elements.

        Raises:
            CheckpointError: its parts are missing, or are those of another tensor.
        """
        edit, stem = self.edit(self.document["tensors"][number]["projector"]), f"tensor.{number}"
        coefficients = self.tensor(f"{stem}.c")
        scale = self.tensor(f"{stem}.scale") if self.has(f"{stem}.scale") else None
        if len(edit.read) != width:
            raise self.damaged(ValueError(f"the edit of '{stem}' has another width"))
        self._expect(f"{stem}.c", coefficients, (edit.read.shape[1], columns), torch.float32, torch.float64)
        if scale is not None:
            self._expect(f"{stem}.scale", scale, (columns,), torch.float64)
        return TensorReplay(
            edit=edit, scale=scale, coefficients=coefficients, settle=settle(stem), tail=settle(f"{stem}.tail")
        )

    def _expect(self, name: str, found: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        if tuple(found.shape) != shape or found.dtype not in dtypes:
            raise self.damaged(ValueError(f"'{name}' has another shape or dtype"))

    def forwards(self, stem: str, most: int) -> Settle:
        """The corrections towards the edited values, ``most`` or fewer."""
        return Forwards(self._sparse(f"{stem}.forward", most))

    def backwards(self, stem: str, most: int) -> Settle:
        """The corrections towards the base, of which ``most`` or fewer lie outside of their intervals."""
        outside = self._sparse(f"{stem}.outside", most)
        settle = Backwards(Intervals(self.blob(f"{stem}.bits"), outside))

        def checked(known: Tensor, shift: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
            try:
                return settle(known, shift, scale)
            except ValueError as error:
                raise self.damaged(error) from error

        return checked

    def _sparse(self, name: str, most: int) -> Sparse:
        try:
            return Sparse(self.blob(name), most)
        except (lzma.LZMAError, ValueError) as error:
            raise self.damaged(error) from error


EDIT_PARTS = ("read", "write", "rows", "shares")
