"""From stored tensors to the parameters of a model: read, converted and cast, a few at a time.

The conversion is that of transformers (renaming, fusing of experts, dtypes that a model insists on), worked out once
as ``Recipe`` values from its own tables and carried out whenever the parameters are needed.  Nothing is written: a
fused tensor is made anew from the stored ones each time.
"""

import mmap
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.directio import PAGE, read_into
from abliterate.checkpoint.header import TensorInfo
from abliterate.errors import UnsupportedFormatError
from abliterate.model.malloc import give_back

STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)
PIECE_BYTES = 2**22
SMALL_BYTES = 2**16
MOVES = {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "PermuteForRope", "Split", "SplitModulelist",
         "Transpose"}  # fmt: skip
"""Operations of transformers that only move numbers: cast after them, tensors are half as large while they move."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """How some parameters are made: ``sources`` pairs each stored tensor with the pattern of ``transform`` it matched.

    ``transform`` is None where the parameter is the stored tensor under another name.
    """

    targets: tuple[str, ...]
    sources: tuple[tuple[str, TensorInfo], ...]
    transform: Any
    dtype: torch.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes read."""
        return sum(tensor.size_bytes for _, tensor in self.sources)

    @property
    def cast_last(self) -> bool:
        """Whether casting after the conversion gives the same numbers as before it, which is what transformers does."""
        kinds = {tensor.dtype for _, tensor in self.sources}
        return len(kinds) == 1 and all(type(operation).__name__ in MOVES for operation in self.transform.operations)


def recipes_of(model: Any, tensors: Mapping[str, TensorInfo]) -> tuple[Recipe, ...]:  # noqa: ANN401 - of transformers
    """The recipes for ``model``, whose parameters have their final dtypes and lie on the meta device.

    Tensors that the model does not have are left out, as transformers leaves them out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    found: dict[str, tuple[Any, list[tuple[str, TensorInfo]]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            continue
        transform = None if pattern is None else by_pattern[pattern]
        found.setdefault(target, (transform, []))[1].append((pattern or name, tensors[name]))
    return tuple(
        Recipe(
            targets=_targets(model, target, transform, sources),
            sources=tuple(sources),
            transform=transform,
            dtype=state[target].dtype,
        )
        for target, (transform, sources) in found.items()
    )


_TRY_RESIDENT = "give it enough memory to be held whole (a larger --memory, or none)"


def make(
    recipe: Recipe,
    model: Any,  # noqa: ANN401 - a model of transformers
    folder: Path,
    device: torch.device,
) -> dict[str, Tensor]:
    """The parameters of ``recipe`` on ``device``.

    Raises:
        CheckpointError: a shard ends too early.
    """
    if recipe.transform is None:
        ((_, tensor),) = recipe.sources
        return {recipe.targets[0]: read_tensor(folder, tensor, recipe.dtype, device)}
    dtype = STORED[recipe.sources[0][1].dtype] if recipe.cast_last else recipe.dtype
    read = ((pattern, read_tensor(folder, tensor, dtype, device)) for pattern, tensor in recipe.sources)
    made = _convert(model, recipe.targets[0], recipe.transform, read)
    own = {name: _own(made.pop(name), recipe.dtype) for name in tuple(made)}
    give_back()
    return own


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, in memory that is given back when it is dropped."""
    if value.device.type != "cpu" or not value.is_contiguous():
        return value.to(dtype)
    return empty(value.numel(), dtype).copy_(value.flatten()).reshape(value.shape)


def read_tensor(folder: Path, tensor: TensorInfo, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stored tensor in ``dtype``, read in pieces where it must be cast.

    Raises:
        CheckpointError: the shard ends too early.
    """
    stored = STORED[tensor.dtype]
    if device.type != "cpu" or stored == dtype:
        whole = empty(tensor.numel, stored)
        read_into(folder / tensor.shard, tensor.start, whole.view(torch.uint8))
        return whole.reshape(tensor.shape).to(device).to(dtype)
    out = empty(tensor.numel, dtype)
    width = stored.itemsize
    piece = empty(min(PIECE_BYTES // width, tensor.numel), stored)  # no large malloc: that one keeps what it got
    for first in range(0, tensor.numel, len(piece) or 1):
        part = piece[: tensor.numel - first]
        read_into(folder / tensor.shard, tensor.start + first * width, part.view(torch.uint8))
        out[first : first + len(part)] = part
    return out.reshape(tensor.shape)


def without_data(tensor: TensorInfo) -> Tensor:
    """A tensor of the shape and dtype of ``tensor``, on the meta device.

    Raises:
        UnsupportedFormatError: it has a dtype that no parameter has.
    """
    if tensor.dtype not in STORED:
        raise UnsupportedFormatError(f"{tensor.name}: {tensor.dtype} is not run out of core", _TRY_RESIDENT)
    return torch.empty(tensor.shape, dtype=STORED[tensor.dtype], device="meta")


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


def _targets(
    model: Any,  # noqa: ANN401 - a model of transformers
    first: str,
    transform: Any,  # noqa: ANN401 - a transform of transformers
    sources: Iterable[tuple[str, TensorInfo]],
) -> tuple[str, ...]:
    """All parameters that come of a conversion, found by carrying it out without data; ``first`` comes first."""
    if transform is None:
        return (first,)
    shapes = ((pattern, without_data(tensor)) for pattern, tensor in sources)
    return tuple(sorted(_convert(model, first, transform, shapes), key=lambda name: name != first))


def _convert(
    model: Any,  # noqa: ANN401 - a model of transformers
    first: str,
    transform: Any,  # noqa: ANN401 - a transform of transformers
    tensors: Iterable[tuple[str, Tensor]],
) -> dict[str, Tensor]:
    own = deepcopy(transform)
    for pattern, tensor in tensors:
        own.add_tensor(first, "", pattern, tensor)
        del tensor
    with torch.no_grad():
        made = own.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
