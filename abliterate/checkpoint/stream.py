"""Read ahead, change, write behind: one file streamed into another through a few reused buffers."""

import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.checkpoint.directio import Slab, SourceFile, TargetFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Some bytes of a file: read, changed by ``change`` (in place) if there is one, and appended if ``written``."""

    start: int
    size: int
    change: Callable[[Tensor], None] | None = None
    written: bool = True


class SlabPool:
    """The buffers in circulation.  ``stop`` wakes a reader that waits for one."""

    def __init__(self, slabs: Sequence[Slab]) -> None:
        self._free: queue.Queue[Slab | None] = queue.Queue()
        for slab in slabs:
            self._free.put(slab)

    def take(self) -> Slab:
        """A free buffer, as soon as there is one.

        Raises:
            StoppedError: the work was given up.
        """
        slab = self._free.get()
        if slab is None:
            raise StoppedError
        return slab

    def give(self, slab: Slab) -> None:
        """Put a buffer back."""
        self._free.put(slab)

    def stop(self) -> None:
        """No more buffers: the work is given up."""
        self._free.put(None)


class StoppedError(Exception):
    """Raised in the reading thread, and only there, when the work was given up."""


def stream(
    source: SourceFile,
    out: TargetFile,
    stretches: Sequence[Stretch],
    slabs: Sequence[Slab],
    *,
    advance: Callable[[int], None],
) -> None:
    """Run ``stretches`` in order: one thread reads ahead, this one changes, one writes behind.

    ``advance`` is told the bytes handed to the writer.  Any failure, in any thread, stops all three and is raised here.
    """
    pool = SlabPool(slabs)

    def read(stretch: Stretch) -> tuple[Slab, Tensor]:
        slab = pool.take()
        return slab, source.read(slab, stretch.start, stretch.size)

    def write(slab: Slab, data: Tensor, *, written: bool) -> None:
        if written:
            out.append(data)
        pool.give(slab)

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        reads = [reader.submit(read, stretch) for stretch in stretches]
        with _stopping(pool, reads):
            writes: deque[Future[None]] = deque()
            for stretch, future in zip(stretches, reads, strict=True):
                slab, data = _next(future, writes)
                if stretch.change is not None:
                    stretch.change(data)
                writes.append(writer.submit(write, slab, data, written=stretch.written))
                if stretch.written:
                    advance(stretch.size)
            for done in writes:
                done.result()


def _next(read: "Future[tuple[Slab, Tensor]]", writes: "deque[Future[None]]") -> tuple[Slab, Tensor]:
    """The next buffer that was read.  A failed write is raised at once: it may be what the reader waits for."""
    while not read.done() and writes:
        writes.popleft().result()
    return read.result()


@contextmanager
def _stopping(pool: SlabPool, reads: "list[Future[tuple[Slab, Tensor]]]") -> Iterator[None]:
    try:
        yield
    except BaseException:
        for future in reads:
            future.cancel()
        pool.stop()
        raise


def buffers(count: int, size: int) -> list[Slab]:
    """``count`` buffers of ``size`` bytes; their memory is not touched until used."""
    return [Slab(size) for _ in range(count)]


def bytes_of(data: bytes) -> Tensor:
    """``data`` as a tensor of bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
