"""Shells of the shards of a Hub repository: files with headers and a few small tensors, and holes for the rest.

A shell has the size of its shard.  Code that reads headers or small tensors works on it as on the shard, and the disk
holds only what was written.
"""

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.file_names import inner_name
from abliterate.checkpoint.header import MAX_HEADER_BYTES, TensorInfo
from abliterate.checkpoint.hub import is_network
from abliterate.checkpoint.output import flush
from abliterate.errors import CheckpointError, HubError

logger = logging.getLogger(__name__)
WAITS_SECONDS = (1, 4, 16, 64)
PART_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a Hub repository; the Hub gives the ``sha256`` of large files only."""

    name: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFiles:
    """The files of one commit of a Hub repository."""

    repository: str
    commit: str | None
    files: dict[str, RemoteFile]

    @classmethod
    def of(cls, repository: str, commit: str | None) -> "RemoteFiles":
        """Ask the Hub for names, sizes and hashes."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        tree = HfApi().list_repo_tree(repository, recursive=True, revision=commit)
        found = [
            RemoteFile(
                name=inner_name(entry.path, where=repository),
                size_bytes=entry.size,
                sha256=entry.lfs.sha256 if entry.lfs else None,
            )
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
        return cls(repository=repository, commit=commit, files={file.name: file for file in found})

    def read(self, name: str, start: int, end: int) -> bytes:
        """The byte range from ``start`` to ``end`` of one file.

        Raises:
            HubError: the Hub, or a proxy, does not answer range requests.
            CheckpointError: the file ends before ``end``.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.repository, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        with http_stream_backoff("GET", url, headers=headers, timeout=60) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise HubError(
                    f"{self.repository}: the Hub does not answer requests for a part of {name}",
                    "streaming needs them: do without --stream, or without the proxy",
                )
            data = response.read()
        if len(data) != end - start:
            raise CheckpointError(f"{name}: ends before byte {end:,}", "fetch this file again")
        return data

    def download(self, name: str, folder: Path) -> Path:
        """Download a whole file to ``folder``; a transfer that broke off is continued.

        After a network error it is tried again, because the client does that for transfers, not for its first request.
        """
        from huggingface_hub import hf_hub_download

        for wait in (*WAITS_SECONDS, None):
            try:
                return Path(hf_hub_download(self.repository, name, revision=self.commit, local_dir=folder))
            except Exception as error:
                if wait is None or not is_network(error):
                    raise
                logger.warning("%s: %s, trying again in %d s", name, type(error).__name__, wait)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def make_shell(self, name: str, path: Path) -> None:
        """Write the shell of the shard ``name`` to ``path``: its header, and a hole for everything else.

        Raises:
            CheckpointError: it is no safetensors file.
        """
        size = self.files[name].size_bytes
        prefix = self.read(name, 0, 8)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{name}: truncated or not a safetensors file", "choose another repository")
        write_shell(path, prefix + self.read(name, 8, 8 + length), size)

    def fill(self, tensors: Iterable[TensorInfo], folder: Path) -> int:
        """Write small tensors into the shells in ``folder``, by range requests; returns how many bytes they take."""
        total = 0
        for tensor in tensors:
            with (folder / tensor.shard).open("r+b") as file:
                for start in range(tensor.start, tensor.end, PART_BYTES):
                    file.seek(start)
                    file.write(self.read(tensor.shard, start, min(start + PART_BYTES, tensor.end)))
                file.flush()
                os.fsync(file.fileno())
            total += tensor.size_bytes
        return total


def write_shell(path: Path, head: bytes, size_bytes: int) -> None:
    """Write a file of ``size_bytes`` that begins with ``head``; the rest is a hole.  It appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(head)
        file.truncate(size_bytes)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)
