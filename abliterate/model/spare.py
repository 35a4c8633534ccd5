"""Memory of weights that were released, for those that are read next: fresh memory costs more than reading into it."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from abliterate.model.stored import SMALL_BYTES, empty


class Spare:
    """Large pieces of host memory by their size.

    It never holds more than what was released since memory was last asked for in vain: blocks are of one size, so what
    one leaves is what the next but one takes.
    """

    def __init__(self) -> None:
        self._pieces: defaultdict[int, list[Tensor]] = defaultdict(list)

    @property
    def held_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(size * len(pieces) for size, pieces in self._pieces.items())

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Take over the memory of tensors that nobody uses any more."""
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= SMALL_BYTES:
                self._pieces[tensor.nbytes].append(tensor.detach().view(-1).view(torch.uint8))

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for ``numel`` elements, its content undefined."""
        size = numel * dtype.itemsize
        if self._pieces.get(size):
            return self._pieces[size].pop().view(dtype)
        if size >= SMALL_BYTES:
            self.clear()  # or there would be more memory than the two units that the budget counts
        return empty(numel, dtype)

    def clear(self) -> None:
        """Give everything back."""
        self._pieces.clear()
