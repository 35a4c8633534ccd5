"""The Hub, through ``huggingface_hub``: headers by range requests, snapshots on demand, errors in plain words."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abliterate.checkpoint.file_names import inner_name
from abliterate.checkpoint.header import Shard, TensorInfo
from abliterate.checkpoint.source import (
    INDEX_NAME,
    Checkpoint,
    check_index,
    open_folder,
    read_config,
    read_json,
    safe_shard_names,
    without_weights,
)
from abliterate.errors import AbliterateError, CheckpointError, HubError, NotEnoughDiskError, UnsupportedFormatError

NO_NETWORK = "check the network and HF_ENDPOINT, or give the path of a local folder"

FAILURES: tuple[tuple[str, type[AbliterateError], str, str], ...] = (
    ("GatedRepoError", HubError, "access is gated", "accept its terms on its page, then `hf auth login`"),
    (
        "RepositoryNotFoundError",
        HubError,
        "no such repository, or it is private",
        "check the spelling; for a private one, log in with `hf auth login`",
    ),
    ("RevisionNotFoundError", HubError, "no such revision", "check --revision"),
    ("NotASafetensorsRepoError", UnsupportedFormatError, "has no safetensors weights", "choose one that has"),
    ("SafetensorsParsingError", CheckpointError, "a safetensors header is malformed", "choose another repository"),
    ("HFValidationError", HubError, "neither a folder nor a valid Hub name", "names look like owner/model"),
    (
        "OfflineModeIsEnabled",
        HubError,
        "not in the local cache, and offline mode is on",
        "unset HF_HUB_OFFLINE, or give the path of a local folder",
    ),
    ("LocalEntryNotFoundError", HubError, "not in the local cache, and the Hub cannot be reached", NO_NETWORK),
    ("EntryNotFoundError", CheckpointError, "a file of the checkpoint is missing", "choose another repository"),
)
"""What ``huggingface_hub`` raises (names of ``huggingface_hub.errors``, most special first), and what to say of it."""


def is_network(error: BaseException) -> bool:
    """Whether the connection failed, not the Hub."""
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into one line and a next step.  Tokens are never part of either."""
    from huggingface_hub import errors

    try:
        yield
    except AbliterateError:
        raise
    except Exception as error:
        for kind, ours, what, hint in FAILURES:
            if isinstance(error, getattr(errors, kind)):
                raise ours(f"{name}: {what}", hint) from error
        if isinstance(error, errors.HfHubHTTPError):
            status = getattr(getattr(error, "response", None), "status_code", "an error")
            raise HubError(f"{name}: the Hub answered {status}", "try again later, or check your rights") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDiskError(
                f"{name}: the disk is full", "free some space and run the same command: it continues"
            ) from error
        if isinstance(error, OSError) or is_network(error):
            raise HubError(f"{name}: the Hub cannot be reached ({type(error).__name__})", NO_NETWORK) from error
        raise


def open_remote(name: str, *, revision: str | None = None) -> Checkpoint:
    """Headers and configuration of a Hub repository, by range requests; no tensor is downloaded.

    Raises:
        HubError, CheckpointError, UnsupportedFormatError: as ``open_checkpoint``.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with plain_errors(name):
        api = HfApi()
        info = api.model_info(name, revision=revision)
        commit = info.sha
        files = [inner_name(sibling.rfilename, where=name) for sibling in info.siblings or []]
        config = read_config(Path(hf_hub_download(name, "config.json", revision=commit)))
        metadata = api.get_safetensors_metadata(name, revision=commit)
        index = None
        if metadata.sharded:
            index_path = Path(hf_hub_download(name, INDEX_NAME, revision=commit))
            index = read_json(index_path)
            safe_shard_names(index, index_path)
    shards = []
    for file_name, file in metadata.files_metadata.items():
        tensors = sorted(
            (
                TensorInfo(
                    name=tensor_name,
                    shard=file_name,
                    dtype=tensor.dtype,
                    shape=tuple(tensor.shape),
                    start=tensor.data_offsets[0],
                    end=tensor.data_offsets[1],
                )
                for tensor_name, tensor in file.tensors.items()
            ),
            key=lambda tensor: tensor.start,
        )
        size = max((tensor.end for tensor in tensors), default=0)
        shards.append(
            Shard(name=file_name, data_start=0, size_bytes=size, tensors=tuple(tensors), metadata=dict(file.metadata))
        )
    check_index(index, tuple(shards), where=Path(name) / INDEX_NAME)
    named = {shard.name for shard in shards} | {INDEX_NAME}
    others, left_out = without_weights(file for file in files if file not in named)
    return Checkpoint(
        name=name,
        root=None,
        revision=commit,
        config=config,
        shards=tuple(shards),
        index=index,
        other_files=others,
        left_out=left_out,
    )


def cached(name: str, *, revision: str | None) -> Checkpoint | None:
    """A Hub repository as far as it lies complete in the local cache, without asking the Hub; else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        return open_folder(folder, name=name, revision=revision)
    except (HFValidationError, LocalEntryNotFoundError, CheckpointError):
        return None


BLOB = re.compile(r"blobs[/\\]([0-9a-f]{64})$")
"""Where the cache has a large file: its name is the SHA-256 that the Hub gave."""


def check_cached(path: Path, sha256: str) -> None:
    """Check that a file, if it lies in the Hub cache, is what the Hub said; the client compares sizes only.

    Raises:
        CheckpointError: its hash is another.
    """
    blob = os.path.realpath(path)
    named = BLOB.search(blob)
    if named and named[1] != sha256:
        raise CheckpointError(
            f"{blob}: its SHA-256 is not the one that the Hub gave",
            "delete this file and what was made of it, and run the command again: it is fetched anew",
        )


def fetch(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with its files on this disk: itself when local, else a snapshot in the Hub cache.

    Only the shards that the index names and the small files are downloaded.

    Raises:
        HubError: the download failed.
        CheckpointError: what arrived is not a complete checkpoint.
    """
    if checkpoint.root is not None:
        return checkpoint
    from huggingface_hub import snapshot_download

    wanted = [shard.name for shard in checkpoint.shards] + list(checkpoint.other_files)
    if checkpoint.index is not None:
        wanted.append(INDEX_NAME)
    with plain_errors(checkpoint.name):
        folder = Path(snapshot_download(checkpoint.name, revision=checkpoint.revision, allow_patterns=wanted))
    local = open_folder(folder, name=checkpoint.name, revision=checkpoint.revision)
    if local.tensors.keys() != checkpoint.tensors.keys():
        raise CheckpointError(f"{checkpoint.name}: the download differs from the plan", "run the same command again")
    return local
