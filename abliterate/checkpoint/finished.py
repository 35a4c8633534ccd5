"""A checkpoint that abliterate wrote: by its folder, or by its name on the Hub."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from abliterate.checkpoint.documents import InnerName, Part, check_document
from abliterate.checkpoint.file_names import at_home
from abliterate.checkpoint.hub import plain_errors
from abliterate.checkpoint.source import OTHER_WEIGHTS, OUR_MANIFEST, looks_like_path, read_json
from abliterate.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedFolder:
    """Where it lies on this disk.  What came from the Hub lies in its cache, and nothing is written there."""

    path: Path
    from_hub: bool


def finished_folder(name: str | Path, *, revision: str | None = None) -> FinishedFolder:
    """The folder ``name``; where there is none and ``name`` is OWNER/NAME, that repository, fetched to the Hub cache.

    Raises:
        CheckpointError: the repository holds no ``abliterate.json``; nothing of it is fetched.
        HubError: it cannot be reached.
    """
    folder = at_home(name)
    if folder.is_dir() or looks_like_path(str(name)) or str(name).count("/") != 1:
        return FinishedFolder(path=folder, from_hub=False)
    return FinishedFolder(path=_fetch(str(name), revision), from_hub=True)


class _Source(Part):
    shards: dict[InnerName, int] = Field(default_factory=dict)


class _Names(Part):
    """What a manifest says of the files beside it."""

    source: _Source
    files: dict[InnerName, str] | None = None


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with plain_errors(name):
        info = HfApi().model_info(name, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if OUR_MANIFEST not in files:
            raise CheckpointError(f"{name}: has no {OUR_MANIFEST}", "give a repository that abliterate uploaded to")
        where = Path(hf_hub_download(name, OUR_MANIFEST, revision=info.sha))
        manifest = check_document(read_json(where), _Names, where=f"{name}: {OUR_MANIFEST}", hint="edit the base again")
        named = {*(manifest.get("files") or ()), *manifest["source"].get("shards", ())}
        wanted = [file for file in files if file in named or not file.endswith(OTHER_WEIGHTS)]
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
