r"""Names of files that stand in a file of anybody: each stays inside the folder that it is meant for."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from abliterate.errors import CheckpointError

ON_WINDOWS = os.name == "nt"
WINDOWS_OBEYS = re.compile(
    r'.*[<>:"|?*\x00-\x1f].*|.*[ .]|(?:con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³])(?:[ .].*)?',
    re.IGNORECASE | re.DOTALL,
)
"""Parts of a path that are no plain names there: devices, streams of a file, and what loses its last characters."""


def is_plain(part: str) -> bool:
    """Whether a part of a path names a file of exactly this name on every system."""
    return not WINDOWS_OBEYS.fullmatch(part)


def same_without_case(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of ``names`` that are one file where a file system takes no notice of case; None where there are none."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(name.casefold(), name) != name:
            return known[name.casefold()], name
    return None


def at_home(path: str | Path) -> Path:
    """``path`` with ``~`` spelled out; where nobody is called so, or has a home, it is the name of a folder."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - of pathlib, it raises what is no OSError


def is_text(name: str) -> bool:
    """Whether a name is UTF-8 on the disk; other bytes of it are halves of characters here."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)


def is_inner(name: str) -> bool:
    """Whether ``inner_name`` takes it."""
    return (
        not {"\\", "\0"} & set(name)
        and is_text(name)
        and not PureWindowsPath(name).drive
        and not {"", ".", ".."} & set(name.split("/"))
        and (not ON_WINDOWS or all(map(is_plain, name.split("/"))))
    )


def inner_name(name: object, *, where: str | Path) -> str:
    r"""``name``, found at ``where``, if it names a file below a folder, with ``/`` between its parts.

    Absolute names, drives, backslashes, ``.`` and ``..``, NUL and nothing at all are refused; on Windows also what is
    no plain name there.  Elsewhere such files exist (``12:30.log``), and are theirs.

    Raises:
        CheckpointError: it does not.
    """
    if isinstance(name, str) and is_inner(name):
        return name
    raise CheckpointError(
        f"{where}: names a file outside its folder: {name!r}"[:300], "do not use it: get it elsewhere"
    )


def inside(folder: Path, name: object, *, where: str | Path) -> Path:
    """The file ``name`` of a folder that is written to, links on the way to it followed.

    Raises:
        CheckpointError: it lies elsewhere.
    """
    path = folder / inner_name(name, where=where)
    if folder.resolve() not in path.resolve().parents:
        raise CheckpointError(f"{where}: names a file outside its folder: {name!r}", "do not use it: get it elsewhere")
    return path
