"""From stored tensors to the parameters of a model: read, converted and cast, a few at a time.

The conversions are those of transformers: renaming, fusing of experts, dtypes that a model insists on.  They are taken
from its tables once, as ``Conversion`` values, and carried out each time the parameters are needed.  Nothing is
written, so a fused tensor is made from the stored ones again each time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.arch.packed import Packed
from abliterate.model.malloc import give_back
from abliterate.model.stored import Reader, Stored, decoding_bytes, dtype_of, empty, without_data

MOVES = {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "PermuteForRope", "Split", "SplitModulelist",
         "Transpose"}  # fmt: skip
"""Operations of transformers that only move numbers: cast after them, tensors are half as large while they move."""

Sources = tuple[tuple[str, Stored], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversion:
    """How the parameters ``targets`` are made from stored tensors.

    ``sources`` pairs each stored tensor with the pattern of ``transform`` that its name matched.  ``transform`` is None
    where the parameter is a stored tensor under another name.  ``dtype`` and ``shape`` are those of the first target.
    ``parts`` are the sources of each expert where a stack of experts can be made one expert at a time.
    """

    targets: tuple[str, ...]
    sources: Sources
    transform: Any
    dtype: torch.dtype
    shape: torch.Size
    parts: tuple[Sources, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read from disk."""
        return sum(tensor.size_bytes for _, tensor in self.sources)

    @property
    def is_plain(self) -> bool:
        """Whether the parameter is a stored tensor, but for its dtype."""
        return self.transform is None and not any(isinstance(tensor, Packed) for _, tensor in self.sources)

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype that sources have while they are converted.

        transformers casts before it converts.  Where casting afterwards gives the same numbers, this is the stored
        dtype; else it is ``dtype``.
        """
        kinds = {dtype_of(tensor) for _, tensor in self.sources}
        if len(kinds) > 1 or any(isinstance(tensor, Packed) for _, tensor in self.sources):
            return self.dtype  # values must not be rounded to another dtype on the way
        return kinds.pop() if _only_moves(self.transform) else self.dtype

    @property
    def extra_bytes(self) -> int:
        """Bytes that the conversion takes beside its result: joining holds its sources as well as what it gives."""
        decoding = max((decoding_bytes(tensor) for _, tensor in self.sources), default=0)
        if self.transform is None:
            return decoding
        largest = max(sum(tensor.numel for _, tensor in part) for part in self.parts or (self.sources,))
        return decoding + 2 * largest * self.read_dtype.itemsize


def _only_moves(transform: Any) -> bool:  # noqa: ANN401 - a transform of transformers
    return all(type(operation).__name__ in MOVES for operation in transform.operations)


def conversions_of(model: Any, tensors: Mapping[str, Stored]) -> tuple[Conversion, ...]:  # noqa: ANN401 - of transformers
    """The conversions for ``model``, whose parameters have their final dtypes and lie on the meta device.

    Tensors that the model does not have are left out, as transformers leaves them out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    found: dict[str, tuple[Any, list[tuple[str, Stored]]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            continue
        transform = None if pattern is None else by_pattern[pattern]
        found.setdefault(target, (transform, []))[1].append((pattern or name, tensors[name]))
    return tuple(
        Conversion(
            targets=_targets(model, target, transform, sources),
            sources=tuple(sources),
            transform=transform,
            dtype=state[target].dtype,
            shape=state[target].shape,
            parts=_parts(model, target, transform, sources, state[target].shape),
        )
        for target, (transform, sources) in found.items()
    )


def make(
    conversion: Conversion,
    model: Any,  # noqa: ANN401 - a model of transformers
    reader: Reader,
    room: Callable[[int, torch.dtype], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The parameters of ``conversion`` on the device of ``reader``.

    ``room`` gives memory for what is not converted, as to ``Reader.read``.

    Raises:
        CheckpointError: a shard ends too early.
    """
    if conversion.transform is None:
        ((_, tensor),) = conversion.sources
        return {conversion.targets[0]: reader.read(tensor, conversion.dtype, room)}
    first, transform = conversion.targets[0], conversion.transform

    def converted(sources: Sources) -> dict[str, Tensor]:
        dtype = conversion.read_dtype
        read = ((pattern, reader.read(tensor, dtype)) for pattern, tensor in sources)
        return _convert(model, first, transform, read)

    if conversion.parts:
        own = {first: _room_for(conversion.shape, conversion.dtype, reader.device)}
        for place, part in enumerate(conversion.parts):
            own[first][place] = converted(part)[first][0]
    else:
        made = converted(conversion.sources)
        own = {name: _own(made.pop(name), conversion.dtype) for name in tuple(made)}
    give_back()
    return own


def _room_for(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return empty(shape.numel(), dtype).reshape(shape)


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, in memory that is given back when it is dropped."""
    if value.device.type != "cpu" or not value.is_contiguous():
        return value.to(dtype)
    return empty(value.numel(), dtype).copy_(value.flatten()).reshape(value.shape)


def _targets(
    model: Any,  # noqa: ANN401 - a model of transformers
    first: str,
    transform: Any,  # noqa: ANN401 - a transform of transformers
    sources: Iterable[tuple[str, Stored]],
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


def _parts(
    model: Any,  # noqa: ANN401 - a model of transformers
    first: str,
    transform: Any,  # noqa: ANN401 - a transform of transformers
    sources: Sequence[tuple[str, Stored]],
    shape: torch.Size,
) -> tuple[Sources, ...]:
    """The sources of each place along the first axis, where the conversion stacks and goes on within each place."""
    if transform is None or not _only_moves(transform):
        return ()
    stack, *others = transform.operations
    if type(stack).__name__ != "MergeModulelist" or stack.dim != 0:
        return ()
    if not {type(operation).__name__ for operation in others} <= {"Concatenate", "Transpose"}:
        return ()
    lists: dict[str, list[tuple[str, Stored]]] = {}
    for source in sources:
        lists.setdefault(source[0], []).append(source)
    if {len(found) for found in lists.values()} != {shape[0]}:
        return ()
    parts = tuple(zip(*lists.values(), strict=True))
    made = _convert(model, first, transform, ((pattern, without_data(tensor)) for pattern, tensor in parts[0]))
    return parts if [tuple(value.shape) for value in made.values()] == [(1, *shape[1:])] else ()
