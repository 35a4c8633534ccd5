"""Memory of weights that were released, for those that are read next: fresh memory costs more than reading into it."""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from abliterate.model.stored import SMALL_BYTES, empty


class Spare:
    """Large pieces of host memory by their size.

    A unit that is read takes what lay here when its reading began; what is left of that goes when something is asked
    for in vain, and at the end.  What is kept meanwhile is for the next one.  So there is never more memory than that
    of two units: one that is read, and one that runs or has left its memory here.  Blocks are of one size: each takes
    what the last but one left.
    """

    def __init__(self) -> None:
        self._pieces: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._offered: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._asked = threading.Lock()  # several tensors are read at a time

    @property
    def held_bytes(self) -> int:
        """Bytes of all pieces."""
        both = (*self._pieces.items(), *self._offered.items())
        return sum(size * len(pieces) for size, pieces in both)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Take over the memory of tensors that nobody uses any more."""
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= SMALL_BYTES:
                self._pieces[tensor.nbytes].append(tensor.detach().view(-1).view(torch.uint8))

    @contextmanager
    def offered(self) -> Iterator[None]:
        """While a unit is read, which may take what is here now."""
        self._pieces, self._offered = defaultdict(list), self._pieces
        try:
            yield
        finally:
            self._offered = defaultdict(list)

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for ``numel`` elements, its content undefined."""
        size = numel * dtype.itemsize
        with self._asked:
            if self._offered.get(size):
                return self._offered[size].pop().view(dtype)
            if size >= SMALL_BYTES:
                self.decline()
        return empty(numel, dtype)

    def decline(self) -> None:
        """Let go of what is offered."""
        self._offered.clear()

    def clear(self) -> None:
        """Give everything back."""
        self._pieces.clear()
        self._offered.clear()
