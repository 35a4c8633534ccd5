"""``push``: a finished and verified folder to the Hub, in one commit.

Nothing is sent unless the manifest says that the folder was verified, its files have the hashes that the manifest says,
and, where the base lies on this disk, the proof on the bytes succeeds once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from abliterate.checkpoint import upload
from abliterate.checkpoint.file_names import at_home
from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.hub import cached
from abliterate.checkpoint.output import JOURNAL
from abliterate.checkpoint.source import HUBS_OWN, Checkpoint, looks_like_path, open_folder
from abliterate.data.bundled import resolve_model
from abliterate.errors import CheckpointError, InterruptedRunError, OutputError, VerificationError
from abliterate.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from abliterate.publishing import manifest
from abliterate.publishing.finished import FinishedEdit
from abliterate.verification.checkpoint_proof import verify_bytes

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

TASK, CHECK = "upload", "check hashes"
DAMAGED = "do not publish it: edit the base again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What is on the Hub now: ``commit`` is the one that made it appear on ``branch``."""

    name: str
    branch: str
    url: str
    commit: str
    files: int
    size_bytes: int


def push(
    folder: Path,
    name: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    base: str | Path | None = None,
    verify: bool = True,
    on_event: OnEvent = ignore,
) -> Published:
    """Upload a finished folder to the model repository ``name``; ``verify`` proves it once more if the base is here.

    ``branch`` (None: main) is made if it is not there.

    Raises:
        UsageError: no branch can be called so.
        OutputError: the folder is unfinished, or the repository holds something else.
        VerificationError: the folder was never verified, or is not what was verified.
        HubError: the Hub refused or cannot be reached.
        InterruptedRunError: stopped; the same command continues.
    """
    document = finished_manifest(folder)
    refuse_base(document["source"]["name"], name, branch)
    target = check_target(name, branch=branch, private=private, on_event=on_event)
    hashes = check_files(folder, document, base=base, verify=verify, on_event=on_event)
    warn_if_gated(folder, on_event)
    files = [(file, folder / file, hashes.get(file)) for file in manifest.files_of(folder)]
    total = sum(path.stat().st_size for _, path, _ in files)
    on_event(Started(task=TASK, total=total, unit="bytes"))
    try:
        with upload.uploading(name, on_event):
            target = upload.create(target)
            operations = _send(target, files, set(document["verification"]["sha256"]), on_event)
            commit = upload.commit(target, operations, message or default_message(document))
    except KeyboardInterrupt:
        raise interrupted(name) from None
    on_event(Finished(task=TASK))
    return published(target, commit, files=len(files), size_bytes=total)


def refuse_base(base: str, name: str, branch: str | None) -> None:
    """Keep the base what it is: it may get an edit on a branch, but not in its place.

    Raises:
        OutputError: the edit would take its place.
    """
    if name == base and branch in (None, upload.MAIN):
        raise OutputError(f"{name}: is the base itself", "push to a repository of your own, or to a --branch")


def check_target(
    name: str, *, branch: str | None = None, private: bool = False, on_event: OnEvent = ignore
) -> upload.Target:
    """Whether ``name`` can be pushed to, as far as can be known before: worth asking before hours of work.

    Raises:
        UsageError: no branch can be called so.
        OutputError: the repository holds something else, or is public and must not be.
        HubError: nobody is logged in, or the Hub refused or cannot be reached.
    """
    with upload.uploading(name, on_event):
        return upload.look(name, branch=branch, private=private)


def published(target: upload.Target, commit: str, *, files: int, size_bytes: int) -> Published:
    """The result, with the address of the page."""
    from huggingface_hub.constants import ENDPOINT

    page = "" if target.branch == upload.MAIN else f"/tree/{quote(target.branch, safe='')}"
    return Published(
        name=target.name, branch=target.branch, url=f"{ENDPOINT}/{target.name}{page}", commit=commit, files=files,
        size_bytes=size_bytes,
    )  # fmt: skip


def interrupted(name: str) -> InterruptedRunError:
    """What to say of a stop before the commit."""
    return InterruptedRunError(
        f"interrupted: nothing of it is to be seen at {name} yet",
        "run the same command again: what was sent is not sent again",
    )


def default_message(document: Mapping[str, Any]) -> str:
    """The message of the commit."""
    base = document["source"]["name"].rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return f"{base}, edited by abliterate {document['versions']['abliterate']}"


def finished_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that is finished and verified.

    Raises:
        OutputError: it is unfinished.
        CheckpointError: there is no manifest.
        VerificationError: it was not verified, or the verification failed.
    """
    if folder.name.endswith(".partial") or (folder / JOURNAL).exists():
        raise OutputError(f"{folder}: is unfinished", "finish it with the command that began it")
    document = manifest.read(folder)
    verification = document["verification"]
    if verification is None:
        raise VerificationError(f"{folder}: was never verified", f"run `abliterate verify {folder}`, then push again")
    if not verification["ok"]:
        raise VerificationError(f"{folder}: its verification failed: {verification['failures'][0]}", DAMAGED)
    return document


def check_files(
    folder: Path, document: Mapping[str, Any], *, base: str | Path | None, verify: bool, on_event: OnEvent = ignore
) -> dict[str, str]:
    """Hold every file against the manifest, and the bytes against the base if it is here; gives back the hashes.

    Raises:
        VerificationError: a file is missing, strange or changed, or the proof fails.
        CheckpointError: ``base`` was given and is not a checkpoint.
    """
    shards, others = document["verification"]["sha256"], document.get("files")
    found = [name for name in manifest.files_of(folder) if name not in manifest.OUR_FILES]
    found = [name for name in found if name not in HUBS_OWN or name in (others or ())]
    if others is not None and (odd := sorted(set(found) ^ {*shards, *others})):
        what = "was not there when it was verified" if odd[0] in found else "is missing"
        raise VerificationError(f"{folder}: {odd[0]} {what}", "move it away" if odd[0] in found else DAMAGED)
    proven: Mapping[str, str] = {}
    if verify:
        proven = _prove_again(folder, document, base, on_event)
    else:
        on_event(Noted(text="not proven again: the files are held against the hashes of the manifest only"))
    return _hash({**(others or {}), **shards}, folder, proven, on_event)


def warn_if_gated(folder: Path, on_event: OnEvent) -> None:
    """Say that the terms of a gated base come along in the card, but the gate itself does not."""
    from abliterate.publishing.card import GATED

    text = (folder / "README.md").read_text("utf-8") if (folder / "README.md").is_file() else ""
    if any(line.startswith(GATED) for line in text.splitlines()):
        on_event(Noted(text="the base is gated: its terms are in the card; switch the gate on in the settings"))


def _hash(expected: Mapping[str, str], folder: Path, known: Mapping[str, str], on_event: OnEvent) -> dict[str, str]:
    sizes = {name: (folder / name).stat().st_size for name in expected if name not in known}
    on_event(Started(task=CHECK, total=sum(sizes.values()), unit="bytes"))
    for name, wanted in expected.items():
        actual = known.get(name) or sha256_file(folder / name)
        if actual != wanted:
            raise VerificationError(f"{folder}: {name} is not the file that was verified", DAMAGED)
        on_event(Advanced(task=CHECK, amount=sizes.get(name, 0)))
    on_event(Finished(task=CHECK))
    return dict(expected)


def _prove_again(
    folder: Path, document: Mapping[str, Any], base: str | Path | None, on_event: OnEvent
) -> Mapping[str, str]:
    """The proof on the bytes; gives back the hashes of the shards, which it reads anyway."""
    source = _base_here(document, base)
    if source is None:
        name = document["source"]["name"]
        on_event(Noted(text=f"{name} is not on this disk: the files are held against the hashes of the manifest only"))
        return {}
    finished = FinishedEdit.open(folder)
    made = finished.plan(source)
    report = verify_bytes(made, folder, memory_bytes=finished.recipe.edit_memory_bytes, on_event=on_event)
    if not report.ok:
        raise VerificationError(f"{folder}: {report.failures[0]}", DAMAGED)
    return report.sha256_files


def _base_here(document: Mapping[str, Any], base: str | Path | None) -> Checkpoint | None:
    source = document["source"]
    path = at_home(resolve_model(base or source["name"]))
    if path.is_dir():
        return open_folder(path, name=str(base or source["name"]))
    if base is not None:
        raise CheckpointError(f"{base}: no such folder", "give the folder of the base, or leave --base away")
    if looks_like_path(source["name"]):
        return None
    return cached(source["name"], revision=source["revision"])


def _send(
    target: upload.Target, files: list[tuple[str, Path, str | None]], shards: set[str], on_event: OnEvent
) -> "list[CommitOperationAdd]":
    """Each shard by itself, everything else together."""
    groups = [[file for file in files if file[0] not in shards], *([file] for file in files if file[0] in shards)]
    operations = []
    for group in groups:
        operations += upload.send(target, group)
        on_event(Advanced(task=TASK, amount=sum(path.stat().st_size for _, path, _ in group)))
    return operations
