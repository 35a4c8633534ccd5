"""Moving files past the page cache.

Copying a shard through the page cache costs several times what the disk itself needs, most of it system time.  Where
the file system allows it (``O_DIRECT`` on Linux) bytes go straight between disk and a few large reused buffers; where
it does not, plain reads and writes are used and the cache is told to forget.  What of a source already lies in the
cache is taken from there (``RWF_NOWAIT``): that is faster than any disk, and nothing is added to the cache.

Direct transfers need the address in memory, the offset in the file and the length to be multiples of the page.  A
``Slab`` therefore holds a byte range at the same offset modulo the page as the file does, so that what was read can be
edited in place and written without moving, as long as it keeps its offset modulo the page in the output.
"""

import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from abliterate.errors import CheckpointError

PAGE = 4096
BOUNCE_BYTES = 2**20
O_DIRECT = getattr(os, "O_DIRECT", 0)
O_BINARY = getattr(os, "O_BINARY", 0)
POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwritev")
NO_WAIT = getattr(os, "RWF_NOWAIT", 0)


class Slab:
    """A buffer that holds up to ``capacity`` bytes at any offset modulo the page.

    It lies at the beginning of ``memory``, which begins a page; by default in memory of its own.
    """

    def __init__(self, capacity: int, memory: Tensor | None = None) -> None:
        self.bytes = pages_of(capacity) if memory is None else memory[: slab_bytes(capacity)]

    def byte_range(self, offset: int, size: int) -> Tensor:
        """``size`` bytes whose address is ``offset`` modulo the page."""
        return self.bytes[offset % PAGE : offset % PAGE + size]


def slab_bytes(capacity: int) -> int:
    """Bytes of memory that a slab for ``capacity`` bytes takes up."""
    return (-(-capacity // PAGE) + 2) * PAGE


def pages_of(capacity: int) -> Tensor:
    """Fresh memory on a page boundary; untouched until used."""
    return torch.frombuffer(mmap.mmap(-1, slab_bytes(capacity)), dtype=torch.uint8)


class SourceFile:
    """A file to read from, past the page cache where that works, except for what already lies there.

    Without ``look`` nothing is looked for there.  To look is to have the kernel fetch a page, which the next look
    finds, and then asks for all of it: what is read over and over would be read twice.
    """

    def __init__(self, path: Path, *, direct: bool = True, look: bool = True) -> None:
        self.path = path
        self._file, self.direct = open_direct(path, os.O_RDONLY, direct=direct)
        self._cached = _open_cached(path) if self.direct and look else None

    def read(self, slab: Slab, start: int, size: int) -> Tensor:
        """The bytes from ``start`` on, in ``slab`` at the same offset modulo the page.

        Raises:
            CheckpointError: the file ends before that.
        """
        target = slab.byte_range(start, size)
        if not self.direct:
            self._fill(view_of(target), start, size)
            _forget(self._file, start, size)
            return target
        found = self._from_cache(view_of(target), start)
        if found == size:
            return target
        before = start % PAGE
        pages = -(-(before + size) // PAGE) * PAGE
        try:
            self._fill(view_of(slab.bytes[:pages]), start - before, before + size, done=before + found)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            os.close(self._file)
            self._file, self.direct = open_direct(self.path, os.O_RDONLY, direct=False)
            return self.read(slab, start, size)
        return target

    def _from_cache(self, view: memoryview, start: int) -> int:
        """How many of the first bytes of ``view`` could be filled from the page cache.

        Both ends are probed first: asking for what is not there makes the kernel fetch as much as was asked for.
        """
        if self._cached is None:
            return 0
        try:
            for place in (0, len(view) - 1):
                if not os.preadv(self._cached, [view[place : place + 1]], start + place, NO_WAIT):
                    return 0
            return os.preadv(self._cached, [view], start, NO_WAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            os.close(self._cached)
            self._cached = None
            return 0

    def _fill(self, view: memoryview, start: int, needed: int, *, done: int = 0) -> None:
        """Read into ``view`` until at least ``needed`` bytes are there (the file may end inside the last page)."""
        while done < needed:
            # A short direct read ends inside a page: it is continued from the page's beginning.
            begin = done - done % PAGE if self.direct else done
            try:
                count = _read_at(self._file, view[begin:], start + begin)
            except OSError as error:
                error.filename = str(self.path)  # a descriptor has no name
                raise
            if begin + count <= done:
                raise CheckpointError(f"{self.path}: the file ends too early", "fetch this file again")
            done = begin + count

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        if self._cached is not None:
            os.close(self._cached)

    def __enter__(self) -> "SourceFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class TargetFile:
    """A new file, written from front to back, past the page cache where that works.

    Bytes that do not fill a page wait in a page of their own until the next ones arrive.
    """

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self.position = 0
        self._waiting = Slab(PAGE)
        self._bounce: Slab | None = None
        self._file, self.direct = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, direct=direct)

    def append(self, data: Tensor) -> None:
        """Write ``data`` (uint8) at the end."""
        if self.position % PAGE:
            room = min(PAGE - self.position % PAGE, len(data))
            self._wait(data[:room])
            data = data[room:]
        whole = len(data) // PAGE * PAGE
        if whole:
            self._write_pages(data[:whole])
        if whole < len(data):
            self._wait(data[whole:])

    def finish(self) -> None:
        """Write what still waits, cut the file to its length, and flush it to the disk."""
        rest = self.position % PAGE
        if rest:
            end = PAGE if self.direct else rest
            self._put(self._waiting.bytes[:end], self.position - rest)
            os.ftruncate(self._file, self.position)
        os.fsync(self._file)
        if not self.direct:
            _forget(self._file, 0, 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> "TargetFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _wait(self, data: Tensor) -> None:
        place = self.position % PAGE
        self._waiting.bytes[place : place + len(data)] = data
        self.position += len(data)
        if self.position % PAGE == 0:
            self._put(self._waiting.bytes[:PAGE], self.position - PAGE)

    def _write_pages(self, data: Tensor) -> None:
        if not self.direct or data.data_ptr() % PAGE == 0:
            self._put(data, self.position)
            self.position += len(data)
            return
        self._bounce = self._bounce or Slab(BOUNCE_BYTES)
        for start in range(0, len(data), BOUNCE_BYTES):
            part = data[start : start + BOUNCE_BYTES]
            aligned = self._bounce.bytes[: len(part)]
            aligned.copy_(part)
            self._put(aligned, self.position)
            self.position += len(part)

    def _put(self, data: Tensor, place: int) -> None:
        try:
            write_all(self._file, view_of(data), place)
        except OSError as error:
            if not self.direct or error.errno not in _NOT_DIRECT:
                raise
            os.close(self._file)
            self.direct = False
            self._file = _open(self.path, os.O_WRONLY, direct=False)
            write_all(self._file, view_of(data), place)


def read_stretch(path: Path, start: int, size: int) -> Tensor:
    """A small part of a file, through the page cache, in memory of its own.

    Raises:
        CheckpointError: the file ends before that.
    """
    with SourceFile(path, direct=False) as file:
        return file.read(Slab(size), start, size).clone()


def read_into(path: Path, start: int, target: Tensor) -> None:
    """Fill ``target`` (uint8) from ``start`` on, through the page cache, which may keep it for the next time.

    Raises:
        CheckpointError: the file ends before that.
    """
    with SourceFile(path, direct=False) as file:
        file._fill(view_of(target), start, len(target))


def read_pieces(
    path: Path, start: int, size: int, piece_bytes: int, *, past_cache: bool
) -> Iterator[tuple[int, Tensor]]:
    """A stretch of a file piece by piece, each with its place in the stretch.

    All are given in the same memory, which a thread keeps for the next stretch.  ``past_cache``: as a ``SourceFile``
    reads that does not look; else through the page cache, which may keep them for the next time.

    Raises:
        CheckpointError: the file ends before that.
    """
    slab: Slab | None = getattr(_of_thread, "slab", None)
    if slab is None or len(slab.bytes) < slab_bytes(piece_bytes):
        slab = _of_thread.slab = Slab(piece_bytes)
    with SourceFile(path, direct=past_cache, look=False) as file:
        for first in range(0, size, piece_bytes):
            count = min(piece_bytes, size - first)
            if past_cache:
                yield first, file.read(slab, start + first, count)
                continue
            piece = slab.byte_range(start + first, count)
            file._fill(view_of(piece), start + first, count)
            yield first, piece


def patch(path: Path, patches: list[tuple[int, Tensor]]) -> None:
    """Overwrite some bytes of a finished file, each patch a place and its bytes, and flush it to the disk."""
    file, _ = open_direct(path, os.O_WRONLY, direct=False)
    try:
        for place, data in patches:
            write_all(file, view_of(data), place)
        os.fsync(file)
    finally:
        os.close(file)


def view_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type] - arrays are buffers


_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_of_thread = threading.local()


def _open(path: Path, flags: int, *, direct: bool) -> int:
    descriptor = os.open(path, flags | O_BINARY | (O_DIRECT if direct else 0), 0o666)  # the umask takes from it
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


def open_direct(path: Path, flags: int, *, direct: bool) -> tuple[int, bool]:
    """The file, opened to bypass the page cache if asked and possible, and whether it does."""
    if direct and O_DIRECT:
        try:
            return _open(path, flags, direct=True), True
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
    return _open(path, flags, direct=False), False


def _open_cached(path: Path) -> int | None:
    """The file, opened to be read from the page cache without reading ahead; None where it cannot be probed."""
    if not (NO_WAIT and hasattr(os, "posix_fadvise")):
        return None
    file = _open(path, os.O_RDONLY, direct=False)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _read_at(file: int, view: memoryview, place: int) -> int:
    if POSITIONAL:
        return os.preadv(file, [view], place)
    os.lseek(file, place, os.SEEK_SET)
    data = os.read(file, len(view))
    view[: len(data)] = data
    return len(data)


def write_all(file: int, view: memoryview, place: int) -> None:
    """Write all of ``view`` at ``place`` of an open file."""
    while len(view):
        if POSITIONAL:
            count = os.pwritev(file, [view], place)
        else:
            os.lseek(file, place, os.SEEK_SET)
            count = os.write(file, view)
        view, place = view[count:], place + count


def _forget(file: int, start: int, size: int) -> None:
    """Drop a byte range of a file from the page cache, where the platform can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)
