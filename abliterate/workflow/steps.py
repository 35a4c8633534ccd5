"""Results of finished steps, kept in a folder, so that work that was stopped does not do them again."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.checkpoint.locking import Lock
from abliterate.checkpoint.output import write_atomically
from abliterate.errors import AbliterateError
from abliterate.model.ranks import first, is_first, meet

T = TypeVar("T")


class Steps:
    """Results by name, in ``folder``; without a folder nothing is kept.

    The folder belongs to the work that ``fingerprint`` stands for.  Results of other work in it are deleted.  A result
    that cannot be read was cut off while it was written, and is made again.

    As a context, the folder is deleted when the work is done, and when it fails with an ``AbliterateError``: the next
    try would fail the same way or has other options.  After any other exception, as an interrupt, it stays.  ``lock``
    keeps other processes away until then.  Of several processes that work together the first one writes, and the others
    read the same files.
    """

    def __init__(self, folder: Path | None = None, fingerprint: str = "", *, lock: Lock | None = None) -> None:
        self.folder = folder
        self._lock = lock
        if folder is None:
            return
        owner = folder / "fingerprint"
        if is_first() and (not owner.is_file() or owner.read_text("utf-8") != fingerprint):
            self.clear()
            write_atomically(owner, fingerprint.encode())
        meet()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, AbliterateError):
            self.clear()
        if self._lock is not None:
            self._lock.release()

    def document(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The kept document ``name``; the first time, what ``make`` gives, as plain data."""
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{name}.json"
        return _once(
            lambda: dict(json.loads(path.read_bytes())),
            lambda: dict(make()),
            lambda made: write_atomically(path, json.dumps(made).encode()),
        )

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The kept tensors ``name``; the first time, what ``make`` gives.  They are kept as safetensors."""
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{name}.safetensors"

        def write(made: dict[str, Tensor]) -> None:
            temporary = path.with_suffix(".tmp")
            save_file(made, temporary)
            temporary.replace(path)

        return _once(
            lambda: load_file(path), lambda: {key: value.contiguous() for key, value in make().items()}, write
        )  # fmt: skip

    def has(self, name: str) -> bool:
        """Whether tensors ``name`` are kept."""
        folder = self.folder
        return folder is not None and first(lambda: (folder / f"{name}.safetensors").is_file())

    def path(self, name: str) -> Path | None:
        """Where a step may keep a file of its own; None where nothing is kept."""
        return None if self.folder is None else self.folder / name

    def clear(self) -> None:
        """Delete the folder."""
        if self.folder is not None and is_first() and self.folder.exists():
            shutil.rmtree(self.folder)


def _once(read: Callable[[], T], make: Callable[[], T], write: Callable[[T], None]) -> T:
    """What ``read`` finds; where that is nothing, what all processes ``make``.

    The first of them looks, and writes; all go on with what it has, to the bit.
    """
    kept = None
    if is_first():
        try:
            kept = read()
        except (OSError, ValueError, SafetensorError):
            kept = None
    if not first(lambda: kept is not None):
        kept = make()
        if is_first():
            write(kept)
        meet()
    return kept if kept is not None and is_first() else read()
