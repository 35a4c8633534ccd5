"""What waits on disk, keys and values above all: where they do not fit into memory beside the weights that pass.

A weight pass serves every batch that is there, so batches that would otherwise take turns, each with passes of its own,
wait together with their caches in files.  A file is mapped into memory: new tokens are written to it, attention reads
it in place, and its pages are given back when the next layer's turn comes.  What memory is free keeps them, by the
system's page cache.  A card gets a copy of one layer at a time.  A file is reserved as a whole: the process would be
stopped where a disk fills up under a mapping.
"""

import mmap
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


def _reserved(folder: Path, size: int) -> mmap.mmap:
    """A mapped file of ``folder`` without a name, all of its ``size`` bytes reserved; it goes with the mapping.

    Raises:
        OSError: the disk has no room for it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


class Mapped:
    """A tensor ``[rows, heads, tokens, d]`` in a file without a name, with room for ``most`` tokens.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, folder: Path, like: Tensor, most: int) -> None:
        self._folder = folder
        self._reserve(like, most)
        self.tokens = 0

    def _reserve(self, like: Tensor, most: int) -> None:
        rows, heads, _, d = like.shape
        self.most = most
        self._map = _reserved(self._folder, rows * heads * most * d * like.element_size())
        self._room = torch.frombuffer(self._map, dtype=like.dtype).view(rows, heads, most, d)

    @property
    def held(self) -> Tensor:
        """What is in it; a view."""
        return self._room[:, :, : self.tokens]

    def append(self, states: Tensor) -> None:
        """Add tokens to every row; where they are more than was thought, a larger file takes the place of this one."""
        end = self.tokens + states.shape[2]
        if end > self.most:
            held = self.held
            self._reserve(states, 2 * end)
            self._room[:, :, : self.tokens] = held
        self._room[:, :, self.tokens : end] = states
        self.tokens = end

    def put(self, states: Tensor) -> None:
        """Hold ``states`` alone, which may have fewer rows."""
        self._room = self._room[: len(states)]
        self.tokens = states.shape[2]
        self._room[:, :, : self.tokens] = states

    def leave_memory(self) -> None:
        """Give the pages back; they are read again when they are looked at."""
        self._map.madvise(mmap.MADV_DONTNEED)


def parked(values: Tensor, folder: Path) -> Tensor:
    """A copy of ``values`` in a file of ``folder`` without a name, which goes with it.

    Raises:
        OSError: the disk has no room for it.
    """
    held = _reserved(folder, values.nbytes or values.element_size())
    copy = torch.frombuffer(held, dtype=values.dtype)[: values.numel()].view(values.shape).copy_(values)
    held.madvise(mmap.MADV_DONTNEED)
    return copy


class MappedLayer(DynamicLayer):
    """A layer of a cache whose keys and values lie in files of ``folder``; ``others`` leave memory when it is used."""

    def __init__(self, folder: Path, most: int, others: Callable[[], None]) -> None:
        self._files: dict[str, Mapped] = {}
        self._folder, self._most, self._others = folder, most, others
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """``[rows, heads, tokens, d]``; None before there are any."""
        return self._of("keys")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._set("keys", states)

    @property
    def values(self) -> Tensor | None:
        """``[rows, heads, tokens, d]``; None before there are any."""
        return self._of("values")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._set("values", states)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: Any,  # noqa: ANN401 - what other layers take
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; gives all of them."""
        self._others()
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._files = {
                name: Mapped(self._folder, states, self._most)
                for name, states in (("keys", key_states), ("values", value_states))
            }
            self.is_initialized = True
        for name, states in (("keys", key_states), ("values", value_states)):
            self._files[name].append(states)
        return self._there("keys"), self._there("values")

    def reset(self) -> None:
        """Let go of the files."""
        self._files, self.is_initialized = {}, False

    def leave_memory(self) -> None:
        """Give the pages of its files back."""
        for file in self._files.values():
            file.leave_memory()

    def _of(self, name: str) -> Tensor | None:
        return self._there(name) if name in self._files else None

    def _there(self, name: str) -> Tensor:
        """What a file holds, where the model computes: on the host a view, on a card a copy."""
        return self._files[name].held.to(self.device)

    def _set(self, name: str, states: Tensor | None) -> None:
        if states is None:
            self._files.pop(name, None)
        else:
            self._files[name].put(states)


def cache_on_disk(cache: Any, folder: Path, most: int) -> Any:  # noqa: ANN401 - a cache of transformers
    """``cache``, which holds nothing yet, with layers in files of ``folder`` that have room for ``most`` tokens.

    Sliding windows wider than a row ever gets are whole layers as well.

    Raises:
        OSError: later, when the first token comes: the disk has no room.
    """
    layers: list[MappedLayer] = []

    def leave(number: int) -> None:
        layers[number - 1].leave_memory()

    layers += [MappedLayer(folder, most, partial(leave, number)) for number in range(len(cache.layers))]
    cache.layers = [*layers]
    return cache
