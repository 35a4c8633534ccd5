"""Weights on their way to an accelerator: read into pinned memory, and copied on a stream of their own.

Such a copy runs beside what the card computes; one from other memory, or on the stream of the computation, would wait
for it.  The thread that reads waits for its copy, so one buffer serves all tensors, one after the other.
"""

from typing import Protocol

import torch
from torch import Tensor


class Card(Protocol):
    """What is asked of an accelerator."""

    def pinned(self, size_bytes: int) -> Tensor:
        """So many bytes of host memory that the card reads by itself."""
        ...

    def copied(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` on the card in ``dtype``, beside what it computes; waits until they are there."""
        ...

    def lend(self, values: Tensor) -> None:
        """Have the computation use ``values``: their memory is given to no other copy before it has."""
        ...


class Cuda:
    """A card of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, size_bytes: int) -> Tensor:
        """Pinned bytes."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def copied(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy on the stream of copies."""
        with torch.cuda.stream(self._stream):
            there = values.to(self._device, non_blocking=True).to(dtype)
        self._stream.synchronize()
        return there

    def lend(self, values: Tensor) -> None:
        """Let the allocator know of the stream that computes."""
        values.record_stream(torch.cuda.current_stream(self._device))


class Carrier:
    """Carries tensors to ``card`` through one buffer of pinned memory, as large as the largest that came."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory for the next tensor, and only until the one after it."""
        size = numel * dtype.itemsize
        if size > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # first, so that there are never two
            self._buffer = self._card.pinned(size)
        return self._buffer[:size].view(dtype)

    def carry(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` on the card, in ``dtype``."""
        there = self._card.copied(values, dtype)
        self._card.lend(there)
        return there


def carrier_to(device: torch.device) -> Carrier | None:
    """What carries weights to ``device``; None where they are copied as everything is."""
    return Carrier(Cuda(device)) if device.type == "cuda" else None
