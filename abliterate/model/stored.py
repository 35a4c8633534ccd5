"""Stored tensors as they are read for a model: plain ones, and quantised ones, decoded on the way.

A quantised tensor stands for one of the same shape as the model's parameter: its values, times their scales in float32,
rounded once to the dtype of the computation.  That is what transformers' dequantisation gives where it knows the format
and is asked for that dtype; it is done here because transformers leaves out the scales of some formats (ModelOpt), and
refuses blocks that reach beyond a matrix (DeepSeek).
"""

import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.arch.codecs import HeldScales, Mxfp4, decode_piece, packed_codec, pieces_of
from abliterate.arch.formats import DTYPES
from abliterate.arch.packed import Packed, packed_tensors, quantisation
from abliterate.checkpoint.directio import PAGE, read_into, read_pieces
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UnsupportedFormatError
from abliterate.model.carrying import Carrier

STORED = {
    **DTYPES, "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)
PIECE_BYTES = 2**21
DECODED_BYTES = 2**16
"""Stored bytes decoded at a time: less than a MiB in float32, beyond which malloc takes fresh pages for each piece."""
DECODERS = max(1, min(4, (os.cpu_count() or 1)))
"""Threads that decode pieces of a tensor."""
PIECE_COST = 16
"""Bytes that decoding a byte takes at most: itself, its place in a table, its values and their scales."""
SMALL_BYTES = 2**16
QUANTISED_DTYPE = torch.bfloat16
"""The dtype of quantised values where nobody asks for another."""

Stored = TensorInfo | Packed


def stored_tensors(checkpoint: Checkpoint) -> Mapping[str, Stored]:
    """The tensors of ``checkpoint`` by the names they have once dequantised; scales belong to their values.

    Raises:
        UnsupportedFormatError: it is quantised in a way that is not known here.
    """
    if quantisation(checkpoint.config) is None:
        return checkpoint.tensors
    packed, extra = packed_tensors(checkpoint)
    kept = {name: packed.get(name, tensor) for name, tensor in checkpoint.tensors.items() if name not in extra}
    return {tensor.name: tensor for tensor in kept.values()}


def is_decodable(checkpoint: Checkpoint) -> bool:
    """Whether ``checkpoint`` is quantised, and its values can be decoded here."""
    if quantisation(checkpoint.config) is None:
        return False
    try:
        packed_tensors(checkpoint)
    except UnsupportedFormatError:
        return False
    return True


def dtype_of(tensor: Stored) -> torch.dtype:
    """The dtype that ``tensor`` has if it is not cast.

    Raises:
        UnsupportedFormatError: it is one that no parameter has.
    """
    if isinstance(tensor, Packed):
        return QUANTISED_DTYPE
    if tensor.dtype not in STORED:
        raise UnsupportedFormatError(f"{tensor.name}: {tensor.dtype} is not run out of core", _TRY_HELD)
    return STORED[tensor.dtype]


_TRY_HELD = "give it enough memory to be held whole (a larger --memory, or none)"


def without_data(tensor: Stored) -> Tensor:
    """A tensor of the shape and dtype of ``tensor``, on the meta device.

    Raises:
        UnsupportedFormatError: it has a dtype that no parameter has.
    """
    return torch.empty(tensor.shape, dtype=dtype_of(tensor), device="meta")


def decoding_bytes(tensor: Stored) -> int:
    """Memory that reading takes beside the result: the scales, as they are stored and in float32, and a piece."""
    if not isinstance(tensor, Packed):
        return 0
    wide = 0 if tensor.kind == "mxfp4" else tensor.scales.numel * torch.float32.itemsize
    return tensor.scales.size_bytes + wide + DECODERS * PIECE_COST * min(DECODED_BYTES, tensor.values.size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads stored tensors of one folder for a model on ``device``.

    ``carrier`` brings them there, where that is no host.  ``past_cache``: the page cache is not to keep what is read.
    Where it is smaller than the model, it would have lost each byte before it is needed again.
    """

    folder: Path
    device: torch.device
    carrier: Carrier | None = None
    past_cache: bool = False

    def read(
        self, tensor: Stored, dtype: torch.dtype, room: Callable[[int, torch.dtype], Tensor] | None = None
    ) -> Tensor:
        """A stored tensor in ``dtype``, in pieces where it must be cast or decoded.

        ``room`` gives memory for so many elements of a dtype, on the host (by default, ``empty``).

        Raises:
            CheckpointError: the shard ends too early.
        """
        room = (room or empty) if self.carrier is None else self.carrier.room
        if isinstance(tensor, Packed):
            values = _read_packed(self.folder, tensor, dtype, room)
        else:
            stored = STORED[tensor.dtype]
            values = self._read_plain(tensor, room(tensor.numel, stored if self.device.type != "cpu" else dtype))
        if self.carrier is not None:
            return self.carrier.carry(values, dtype)
        return values.to(self.device).to(dtype)

    def _read_plain(self, tensor: TensorInfo, out: Tensor) -> Tensor:
        """Fill ``out``, in whose dtype the values are stored or are cast to, piece by piece."""
        stored, path = STORED[tensor.dtype], self.folder / tensor.shard
        width = stored.itemsize
        if not self.past_cache and stored == out.dtype:
            read_into(path, tensor.start, out.view(torch.uint8))
            return out.reshape(tensor.shape)
        size = tensor.numel * width
        for first, raw in read_pieces(path, tensor.start, size, PIECE_BYTES, past_cache=self.past_cache):
            values = (raw if tensor.start % width == 0 else raw.clone()).view(stored)
            out[first // width : first // width + len(values)] = values
        return out.reshape(tensor.shape)


def _read_packed(
    folder: Path, packed: Packed, dtype: torch.dtype, room: Callable[[int, torch.dtype], Tensor]
) -> Tensor:
    out = room(packed.numel, dtype).reshape(packed.shape)
    matrices = out.view(-1, *packed.shape[-2:])
    if packed.transposed:
        matrices = matrices.mT
    path, codec = folder / packed.values.shard, packed_codec(folder, packed, HeldScales())
    pieces = list(pieces_of(packed, DECODED_BYTES))
    at_once = min(DECODERS, len(pieces))

    def decode(number: int) -> None:
        piece = empty(max(DECODED_BYTES, packed.row_bytes), torch.uint8)
        for place in pieces[number::at_once]:
            raw = piece[: place.size_bytes]
            read_into(path, place.start, raw)
            matrices[place.matrix, place.first : place.first + place.count] = decode_piece(place, codec, raw)

    if at_once == 0:
        return out
    if isinstance(codec, Mxfp4):
        codec.scales()  # read once, and not by all threads
    with ThreadPoolExecutor(at_once, thread_name_prefix="decoder") as pool:
        list(pool.map(decode, range(at_once)))  # what one of them raises is raised here
    return out


def empty(numel: int, dtype: torch.dtype, *, reserve: bool = True) -> Tensor:
    """Uninitialised memory, given back to the system as soon as it is dropped; malloc would keep some of it.

    Without ``reserve`` it may be larger than the machine: only pages that are written take up memory, others read 0.
    """
    size = numel * dtype.itemsize
    if size < SMALL_BYTES:
        return torch.empty(numel, dtype=dtype)
    flags = {}
    if not reserve and _NO_RESERVE:
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE}
    return torch.frombuffer(mmap.mmap(-1, -(-size // PAGE) * PAGE, **flags), dtype=dtype)[:numel]
