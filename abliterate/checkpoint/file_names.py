r"""Names of files that stand in a file of anybody: each stays inside the folder that it is meant for."""

from pathlib import Path, PureWindowsPath

from abliterate.errors import CheckpointError


def inner_name(name: object, *, where: str | Path) -> str:
    r"""``name``, found at ``where``, if it names a file below a folder, with ``/`` between its parts.

    Absolute names, drives, backslashes, ``.`` and ``..``, NUL and nothing at all are refused.

    Raises:
        CheckpointError: it does not.
    """
    if (
        isinstance(name, str)
        and not {"\\", "\0"} & set(name)
        and not PureWindowsPath(name).drive
        and not {"", ".", ".."} & set(name.split("/"))
    ):
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
