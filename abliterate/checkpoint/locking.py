"""One process at a time writes an output: a lock beside it, which the system drops when its process ends."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from abliterate.errors import OutputError


class Lock:
    """Holds ``.NAME.lock`` beside ``target`` until released; what a process that was killed has left is taken over.

    Within a process, whoever comes last has it.

    Raises:
        OutputError: another process is writing ``target``; says which, and since when.  Or nothing can be written
            there.
    """

    def __init__(self, target: Path) -> None:
        self._path = target.with_name(f".{target.name}.lock")
        self._lock = FileLock(self._path, timeout=0)
        with refused_as_output(target):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            holder = _text(self._path)  # before the lock is asked for, which may empty the file
            try:
                self._lock.acquire()
            except Timeout:
                if holder.split(",")[0] == f"process {os.getpid()}":
                    return
                raise OutputError(
                    f"{target}: another run ({holder or 'process unknown'}) is writing this",
                    "wait until it is done, stop it, or choose another --out",
                ) from None
            self._path.write_text(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}", "utf-8")

    def release(self) -> None:
        """Give it up, and remove its file."""
        self._path.unlink(missing_ok=True)
        self._lock.release()


@contextmanager
def refused_as_output(target: Path) -> Iterator[None]:
    """What the system refuses is said of ``target``, which cannot be written.

    Raises:
        OutputError: no rights, a name that is too long, a file on the way to it, a disk that is read only.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error})", "choose another --out, or mend its rights"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):  # not there or, on Windows, locked
        return ""
