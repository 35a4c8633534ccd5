"""One process at a time writes an output: a lock beside it, which the system drops when its process ends."""

import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from abliterate.errors import OutputError


class Lock:
    """Holds ``.NAME.lock`` beside ``target`` until released; what a process that was killed has left is taken over.

    Within a process, whoever comes last has it.

    Raises:
        OutputError: another process is writing ``target``; says which, and since when.
    """

    def __init__(self, target: Path) -> None:
        self._path = target.with_name(f".{target.name}.lock")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        holder = _text(self._path)  # before the lock is asked for, which may empty the file
        self._lock = FileLock(self._path, timeout=0)
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


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):  # not there or, on Windows, locked
        return ""
