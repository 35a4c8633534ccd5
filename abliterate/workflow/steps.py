"""Finished steps of long work, kept in a folder, so that a stopped run does not do them again."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import AbliterateError


class Steps:
    """Results by name, in a folder that belongs to one piece of work (``fingerprint``); None keeps nothing.

    What another piece of work left in the folder is dropped.  A result that was cut off while it was written is made
    again.  As a context, everything is let go of at the end, and where the work fails for a reason that would still be
    there (another try may have other options); what was interrupted stays.
    """

    def __init__(self, folder: Path | None = None, fingerprint: str = "") -> None:
        self.folder = folder
        if folder is None:
            return
        owner = folder / "fingerprint"
        if not owner.is_file() or owner.read_text("utf-8") != fingerprint:
            self.clear()
            write_atomically(owner, fingerprint.encode())

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, AbliterateError):
            self.clear()

    def document(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What ``make`` gives, as plain data."""
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{name}.json"
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            made = dict(make())
            write_atomically(path, json.dumps(made).encode())
            return made

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, as tensors: safetensors, never pickle."""
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            made = {key: value.contiguous() for key, value in make().items()}
            temporary = path.with_suffix(".tmp")
            save_file(made, temporary)
            temporary.replace(path)
            return made

    def path(self, name: str) -> Path | None:
        """Where a step may keep what it has finished so far; None nowhere."""
        return None if self.folder is None else self.folder / name

    def clear(self) -> None:
        """Let go of everything."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)
