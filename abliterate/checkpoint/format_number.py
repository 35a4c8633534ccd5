"""The number of the format of a file that abliterate wrote: older ones are read, newer ones refused with words."""

from pathlib import Path

from abliterate.errors import CheckpointError


def check_format(found: object, name: str, newest: int, *, where: Path) -> int:
    """The number behind ``name`` in ``found``, from 1 to ``newest``.

    Raises:
        CheckpointError: it is newer than this version knows, or is no such format at all.
    """
    text = found if isinstance(found, str) else ""
    number = text.removeprefix(name)
    if text == number or not number.isdecimal() or int(number) < 1:
        raise CheckpointError(f"{where}: format {found!r} is unknown", f"known are {name}1 to {name}{newest}")
    if int(number) > newest:
        raise CheckpointError(
            f"{where}: was written by a newer abliterate (format {number}, this one knows up to {newest})",
            "update abliterate",
        )
    return int(number)
