"""Files that share their blocks with another one until they are overwritten (btrfs, XFS, bcachefs; Linux only)."""

import errno
import os
from pathlib import Path
from types import TracebackType

from torch import Tensor

from abliterate.checkpoint.directio import PAGE, open_direct, view_of, write_all

FICLONE = 0x40049409
"""``ioctl`` that makes one whole file share the blocks of another; from linux/fs.h."""

_NOT_SHARED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ENOSYS)


def share_blocks(source: Path, target: Path) -> bool:
    """Make ``target`` a new file with the content of ``source`` at no cost; False where the file system cannot."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    with source.open("rb") as a, target.open("wb") as b:
        try:
            fcntl.ioctl(b.fileno(), FICLONE, a.fileno())
        except OSError as error:
            if error.errno in _NOT_SHARED:
                return False
            raise
    return True


class SharedFile:
    """An existing file of which some byte ranges are overwritten, past the page cache where that works."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self._plain, _ = open_direct(path, os.O_WRONLY, direct=False)
        self._file, self.direct = open_direct(path, os.O_WRONLY, direct=direct)

    def overwrite(self, place: int, data: Tensor) -> None:
        """Put ``data`` (uint8) at ``place``; whole pages go directly, the ends through the cache."""
        head = min(-place % PAGE, len(data))
        pages = (len(data) - head) // PAGE * PAGE
        if not self.direct or data[head:].data_ptr() % PAGE:
            write_all(self._plain, view_of(data), place)
            return
        write_all(self._plain, view_of(data[:head]), place)
        write_all(self._file, view_of(data[head : head + pages]), place + head)
        write_all(self._plain, view_of(data[head + pages :]), place + head + pages)

    def finish(self) -> None:
        """Flush to the disk."""
        os.fsync(self._plain)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        os.close(self._plain)

    def __enter__(self) -> "SharedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
