"""Read ahead, change, write behind: one file into another through one reused buffer."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.checkpoint.directio import Slab, SourceFile, pages_of, slab_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Some bytes of a file: read, changed by ``change`` (in place) if there is one, and written if ``written``."""

    start: int
    size: int
    change: Callable[[Tensor], None] | None = None
    written: bool = True


class Ring:
    """One buffer handed out piece by piece and taken back in the same order, so that small pieces run far ahead.

    Its memory is not touched until used.
    """

    def __init__(self, capacity: int) -> None:
        self._memory = pages_of(capacity)
        self._out: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    @property
    def capacity(self) -> int:
        """Bytes of memory."""
        return len(self._memory)

    def take(self, size: int) -> Slab:
        """Room for ``size`` bytes, as soon as there is some.

        Raises:
            ValueError: the ring can never hold that much.
            StoppedError: the work was given up.
        """
        needed = slab_bytes(size)
        if needed > self.capacity:
            raise ValueError(f"{size} bytes do not fit into a ring of {self.capacity}")
        with self._changed:
            while (start := self._place(needed)) is None and not self._stopped:
                self._changed.wait()
            if self._stopped or start is None:
                raise StoppedError
            self._out.append((start, start + needed))
        return Slab(size, self._memory[start:])

    def give(self) -> None:
        """Take the oldest piece back."""
        with self._changed:
            self._out.popleft()
            self._changed.notify_all()

    def start(self) -> None:
        """Everything is free."""
        self._out.clear()
        self._stopped = False

    def stop(self) -> None:
        """No more pieces: the work is given up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _place(self, needed: int) -> int | None:
        """Where ``needed`` bytes are free: behind the newest piece, or before the oldest."""
        if not self._out:
            return 0
        oldest, newest = self._out[0][0], self._out[-1][1]
        if newest <= oldest:
            return newest if newest + needed <= oldest else None
        if newest + needed <= self.capacity:
            return newest
        return 0 if needed <= oldest else None


class StoppedError(Exception):
    """Raised in the reading thread, and only there, when the work was given up."""


def transfer(
    source: SourceFile,
    byte_ranges: Sequence[ByteRange],
    ring: Ring,
    *,
    write: Callable[[int, Tensor], None],
    advance: Callable[[int], None],
) -> None:
    """Move ``byte_ranges`` in order: one thread reads ahead, this one changes, one writes behind.

    ``write`` takes where the byte range began in the source, and its bytes.  ``advance`` is told how many bytes were
    handed to the writer.  Any failure, in any thread, stops all three and is raised here.
    """
    ring.start()

    def read(byte_range: ByteRange) -> Tensor:
        return source.read(ring.take(byte_range.size), byte_range.start, byte_range.size)

    def put(byte_range: ByteRange, data: Tensor) -> None:
        if byte_range.written:
            write(byte_range.start, data)
        ring.give()

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        reads = [reader.submit(read, byte_range) for byte_range in byte_ranges]
        with _stopping(ring, reads):
            writes: deque[Future[None]] = deque()
            for byte_range, future in zip(byte_ranges, reads, strict=True):
                data = _next(future, writes)
                if byte_range.change is not None:
                    byte_range.change(data)
                writes.append(writer.submit(put, byte_range, data))
                if byte_range.written:
                    advance(byte_range.size)
            for done in writes:
                done.result()


def _next(read: "Future[Tensor]", writes: "deque[Future[None]]") -> Tensor:
    """The next buffer that was read.  A failed write is raised at once: it may be what the reader waits for."""
    while not read.done() and writes:
        writes.popleft().result()
    return read.result()


@contextmanager
def _stopping(ring: Ring, reads: "list[Future[Tensor]]") -> Iterator[None]:
    try:
        yield
    except BaseException:
        for future in reads:
            future.cancel()
        ring.stop()
        raise


def bytes_of(data: bytes) -> Tensor:
    """``data`` as a tensor of bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def one_core(*, needed: bool = True) -> Iterator[None]:
    """Do arithmetic on one core while files are read and written.

    It is faster than the disk, and idle worker threads would burn the other cores.  Not ``needed`` where there is more
    arithmetic than one core can do in that time.
    """
    before = torch.get_num_threads()
    if needed:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
