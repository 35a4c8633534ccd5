"""Uploading to the Hub: the target is looked at first, files are sent one by one, one commit makes them appear.

``HfApi.upload_folder`` commits a large folder in several steps, between which half a checkpoint lies on the Hub under
its final name.  Here every large file is sent ahead (``preupload_lfs_files``: content that the Hub has already is not
sent again, and nothing refers to it yet), and a single commit at the end names them all.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.checkpoint.upload_errors import plain_upload_errors, quiet_client
from abliterate.errors import HubError, OutputError, UsageError
from abliterate.events import OnEvent

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

MAIN = "main"
OUR_MANIFEST = "abliterate.json"
UNIMPORTANT = (".gitattributes", "README.md")
"""Files of a repository that holds nothing yet."""

NOT_A_BRANCH = re.compile(
    r"$|-|/|\.|refs/|HEAD$|@$|.*(?:[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|/\.|@\{|/$|\.$|\.lock(?:/|$))"
)
"""What git takes for no branch, and the ``refs/`` of pull requests, which cannot be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A branch of a model repository.  ``head`` is its latest commit (None: not there), ``files`` what it holds."""

    name: str
    branch: str
    private: bool
    head: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A large file that the Hub has, and that no commit names yet."""

    path: str
    size_bytes: int
    sha256: str

    def operation(self) -> "CommitOperationAdd":
        """What a commit says of it, after the file itself is gone.

        The client has no public way to say so in another process than the one that sent it; these are the two marks
        that ``preupload_lfs_files`` leaves on an operation.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo

        operation = CommitOperationAdd(path_in_repo=self.path, path_or_fileobj=b"")
        operation.upload_info = UploadInfo(size=self.size_bytes, sample=b"", sha256=bytes.fromhex(self.sha256))
        operation._upload_mode, operation._is_uploaded = "lfs", True
        return operation


@contextmanager
def uploading(name: str, on_event: OnEvent) -> Iterator[None]:
    """The client kept quiet, and its failures in plain words."""
    with quiet_client(on_event), plain_upload_errors(name):
        yield


def look(name: str, *, branch: str | None, private: bool) -> Target:
    """Look at ``branch`` (None: main) of the repository ``name`` before anything is made or sent.

    Raises:
        UsageError: no branch can be called so.
        HubError: nobody is logged in, or the Hub refuses.
        OutputError: it is public though ``private`` was asked for, or it holds files that this tool did not write.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    branch = MAIN if branch is None else branch
    if NOT_A_BRANCH.match(branch):
        raise UsageError(f"--branch {branch!r}: not the name of a branch", "choose a plain one, such as rank-1")
    validate_repo_id(name)
    if name.count("/") != 1:
        raise HubError(f"{name}: not the name of a repository of somebody", "names look like owner/model")
    if get_token() is None:
        raise HubError(f"{name}: nobody is logged in", "log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        return Target(name=name, branch=branch, private=private)
    if private and not info.private:
        raise OutputError(
            f"{name}: exists, and is public", "make it private on its settings page, or push to another repository"
        )
    main = info.sha
    if branch != MAIN:
        refs = api.list_repo_refs(name)
        if branch in {tag.name for tag in refs.tags}:  # else the commit would fail, after everything is sent
            raise OutputError(f"{name}: {branch!r} is a tag, not a branch", "choose another --branch")
        if branch not in {there.name for there in refs.branches}:
            return Target(name=name, branch=branch, private=private)
        info = api.model_info(name, revision=branch)
    files = tuple(sibling.rfilename for sibling in info.siblings or [])
    strange = [file for file in files if file not in UNIMPORTANT]
    # A branch that is at main's commit, as a new one is, holds nothing of its own that could be lost.
    if strange and OUR_MANIFEST not in files and (branch == MAIN or info.sha != main):
        raise OutputError(
            f"{name}: holds files already that abliterate did not write ({strange[0]})",
            "push to a new repository, or to another --branch",
        )
    return Target(name=name, branch=branch, private=private, head=info.sha, files=files)


def create(target: Target) -> Target:
    """Make the repository and the branch, unless they are there; gives back the target as it is then.

    A new branch begins at main's commit: what it has from there goes with the one commit, as an earlier upload would.
    """
    from huggingface_hub import HfApi

    if target.head is not None:
        return target
    api = HfApi()
    api.create_repo(target.name, private=target.private or None, exist_ok=True)
    if target.branch == MAIN:
        return target
    api.create_branch(target.name, branch=target.branch, exist_ok=True)
    info = api.model_info(target.name, revision=target.branch)
    return replace(target, head=info.sha, files=tuple(sibling.rfilename for sibling in info.siblings or []))


def send(target: Target, files: Sequence[tuple[str, Path, str | None]]) -> "list[CommitOperationAdd]":
    """Send the large ones of ``files`` (name, place, SHA-256 if known); the small ones will go with the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = []
    for name, path, sha256 in files:
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        if sha256 is not None:
            operation.upload_info.sha256 = bytes.fromhex(sha256)
        operations.append(operation)
    HfApi().preupload_lfs_files(
        target.name,
        additions=operations,
        revision=target.branch,
        free_memory=False,
        gitignore_content="",  # else a .gitignore among the files would leave others out
    )
    return operations


def is_large(operation: "CommitOperationAdd") -> bool:
    """Whether a file went ahead of the commit, so that it may be deleted here."""
    return operation._upload_mode == "lfs"


def commit(target: Target, operations: "list[CommitOperationAdd]", message: str) -> str:
    """One commit that names all ``operations`` and drops what an earlier upload left; gives back its id.

    Raises:
        HubError: the repository does not hold what was sent.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    sent = {operation.path_in_repo for operation in operations}
    stale = [name for name in target.files if name not in sent and name != ".gitattributes"]
    made = HfApi().create_commit(
        target.name,
        [*operations, *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale)],
        commit_message=message,
        revision=target.branch,
        parent_commit=target.head,
    )
    _confirm(target, operations, made.oid)
    return made.oid


def _confirm(target: Target, operations: "list[CommitOperationAdd]", oid: str) -> None:
    """Compare what the Hub says it holds with what was sent, by size and hash."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(target.name, recursive=True, revision=oid)
    held = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for operation in operations:
        path, info, file = operation.path_in_repo, operation.upload_info, held.get(operation.path_in_repo)
        if file is not None and file.lfs:
            same = file.lfs.sha256 == info.sha256.hex()
        else:
            same = file is not None and file.blob_id == _git_hash(operation)
        if not same:
            raise HubError(
                f"{target.name}: holds another '{path}' than was sent",
                "do not use it: delete the repository and push again",
            )


def _git_hash(operation: "CommitOperationAdd") -> str:
    with operation.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
