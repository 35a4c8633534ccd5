"""Embeddings whose weight stays on disk: only the rows of the tokens at hand are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from abliterate.arch.codecs import HeldScales, packed_codec, plain
from abliterate.arch.packed import Packed
from abliterate.checkpoint.directio import read_into
from abliterate.model.stored import Stored, empty

DESCRIBES = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size", "__len__"}
"""Functions of a tensor that do not read its values."""


class Rows:
    """The rows of one stored matrix that were asked for.

    They lie in memory of the size of the whole matrix, of which only the pages with rows in them are used.  So torch
    looks them up as in any matrix.  When the rows take more than ``most_bytes``, all of them are dropped.
    ``change`` is made of rows as they are stored, from the given one on.
    """

    def __init__(
        self,
        folder: Path,
        stored: Stored,
        dtype: torch.dtype,
        *,
        most_bytes: int,
        change: Callable[[Tensor, int], None] = lambda *_: None,
    ) -> None:
        values = stored.values if isinstance(stored, Packed) else stored
        self.path = folder / values.shard
        self.start = values.start
        self.shape = stored.shape
        self.dtype = dtype
        self._most_bytes = most_bytes
        self._change = change
        if isinstance(stored, Packed):
            self.codec = packed_codec(folder, stored, HeldScales())
            self.bytes_read = stored.scales.size_bytes
        else:
            self.codec = plain(stored.dtype, stored.shape[1])
            self.bytes_read = 0
        self._forget()

    def holding(self, ids: Int[Tensor, "*any"]) -> Tensor:
        """The matrix ``[count, width]`` in which the rows ``ids`` are filled in.

        Raises:
            CheckpointError: the shard ends too early.
        """
        count, width = self.shape
        if self._n_held * width * self.dtype.itemsize > self._most_bytes:
            self._forget()
        wanted = ids.flatten().unique()
        wanted = wanted[(wanted >= 0) & (wanted < count)]  # the lookup itself refuses others
        for first, end in _runs(wanted[~self._held[wanted]].tolist()):
            rows = torch.empty(end - first, width, dtype=self.codec.stored)
            read_into(self.path, self.start + first * width * rows.itemsize, rows.view(torch.uint8).flatten())
            self._change(rows, first)
            self._memory[first:end] = self.codec.decode(rows, first, self.dtype)
            self._held[first:end] = True
            self._n_held += end - first
            self.bytes_read += rows.nbytes
        return self._memory

    def weight(self) -> "RowWeight":
        """A tensor that takes the place of the embedding's weight."""
        face = torch.zeros(1, dtype=self.dtype).expand(self.shape)
        weight = torch.Tensor._make_subclass(RowWeight, face)
        weight.rows = self
        return weight

    def _forget(self) -> None:
        count, width = self.shape
        self._memory = empty(count * width, self.dtype, reserve=False).view(count, width)
        self._held = torch.zeros(count, dtype=torch.bool)
        self._n_held = 0


class RowWeight(Tensor):
    """Has the shape and dtype of the whole matrix, and allows lookups only."""

    rows: Rows

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401 - any function of torch
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        """Call ``func``; for a lookup, read the rows that it needs first.

        Raises:
            NotImplementedError: ``func`` reads values and is no lookup.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is functional.embedding:
            ids = args[0]
            weight, *rest = args[1:] if len(args) > 1 else (kwargs.pop("weight"),)
            return functional.embedding(ids, weight.rows.holding(ids), *rest, **kwargs)
        if name == "__getitem__":
            first = args[1][0] if isinstance(args[1], tuple) else args[1]
            if isinstance(first, int):
                return args[0].rows.holding(torch.tensor(first % len(args[0])))[args[1]]
        if name in DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise NotImplementedError(f"{name} of an embedding that is read row by row")


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """Cut ascending numbers into runs without gaps: the first number of each, and its last plus one."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
