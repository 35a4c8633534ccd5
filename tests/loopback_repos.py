"""What the Hub on the loopback holds, and what it may do wrong."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass(kw_only=True)
class Fault:
    """What happens instead of, or to, the next ``times`` requests whose "METHOD /path" matches.

    ``status`` answers; ``drop`` closes the connection unanswered; ``cut`` closes it after so many bytes of the answer's
    body; ``delay`` waits first (seconds); ``call`` is called first.  ``skip`` requests pass before.
    """

    match: str
    times: int = 10**9
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    drop: bool = False
    cut: int | None = None
    delay: float = 0.0
    call: Callable[[], None] | None = None
    hits: int = 0


@dataclass(kw_only=True)
class Blob:
    """One file of a commit: its bytes, or where they lie.  ``declared`` (hash, size): it went to Xet, not here."""

    data: bytes | Path = b""
    large: bool
    declared: tuple[str, int] | None = None

    def read(self) -> bytes:
        return self.data.read_bytes() if isinstance(self.data, Path) else self.data

    def oid(self) -> str:
        if self.declared:
            return self.declared[0]
        content = self.read()
        if self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        size = self.declared[1] if self.declared else len(self.read())
        lfs = {"lfs": {"oid": self.oid(), "sha256": self.oid(), "size": size, "pointerSize": 130}} if self.large else {}
        return {"type": "file", "path": path, "rfilename": path, "size": size, "oid": self.oid(), **lfs}


@dataclass(kw_only=True)
class Repo:
    """Commits by id, branches and tags by name, the messages in order."""

    private: bool = False
    gated: str | bool = False
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, Blob], message: str, *, oid: str | None = None) -> str:
        oid = oid or hashlib.sha1(f"{len(self.trees)}{message}".encode()).hexdigest()
        self.trees[oid] = tree
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        found = {**self.tags, **self.branches}.get(unquote(revision), unquote(revision))
        return found if found in self.trees else None

    def refs(self) -> dict[str, list[dict[str, str]]]:
        """What the Hub answers of branches and tags."""

        def entries(kind: str, found: Mapping[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in found.items()
            ]

        return {"branches": entries("heads", self.branches), "tags": entries("tags", self.tags), "converts": []}
