"""Opening a checkpoint by what the user typed: a local folder, or a repository on the Hub."""

import shlex
from pathlib import Path

from abliterate.checkpoint.file_names import at_home
from abliterate.checkpoint.gguf import find_gguf
from abliterate.checkpoint.hub import open_remote
from abliterate.checkpoint.source import Checkpoint, looks_like_path, open_folder
from abliterate.errors import CheckpointError, UnsupportedFormatError


def open_checkpoint(name: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a local folder or, when no such folder exists, a Hub repository (headers only).

    Raises:
        CheckpointError: unreadable, inconsistent or hostile files.
        UnsupportedFormatError: the weights are not stored as safetensors.
        HubError: the repository cannot be reached.
    """
    folder = at_home(name)
    gguf = find_gguf(folder)
    if gguf is not None:
        raise UnsupportedFormatError(
            f"{gguf}: a GGUF file, not a checkpoint folder",
            f"write it as one first: abliterate import {shlex.quote(str(gguf))} --out {shlex.quote(gguf.stem)}",
        )
    if folder.is_dir():
        return open_folder(folder, name=str(name), revision=revision)
    if folder.is_file():
        raise CheckpointError(
            f"{name}: is a file, not a checkpoint folder", "give the folder that holds it, with its config.json"
        )
    if looks_like_path(str(name)):
        raise CheckpointError(f"{name}: no such folder", "give a checkpoint folder, or a Hub name such as owner/model")
    return open_remote(str(name), revision=revision)
