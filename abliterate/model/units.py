"""The parts in which the weights of a model are loaded: blocks, and the modules outside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import CheckpointError
from abliterate.model.stored import Reader, stored_tensors
from abliterate.model.weights import Conversion, conversions_of, make

Place = tuple[nn.Module, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unit:
    """A module that is loaded and released as one.

    ``conversions`` make its parameters.  ``places`` says where each of them goes: a tied one goes to several places.
    """

    name: str
    module: nn.Module
    conversions: tuple[Conversion, ...]
    places: dict[str, tuple[Place, ...]]
    is_block: bool

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read from disk to load it."""
        return sum(conversion.stored_bytes for conversion in self.conversions)

    @property
    def is_read_as_stored(self) -> bool:
        """Whether each parameter is one stored tensor, cast or decoded."""
        return all(conversion.transform is None for conversion in self.conversions)

    @property
    def size_bytes(self) -> int:
        """Bytes of its parameters when they are loaded."""
        return sum(get(places[0]).nbytes for places in self.places.values())


def get(place: Place) -> Tensor:
    """The parameter or buffer at a place."""
    module, name = place
    return module._parameters[name] if name in module._parameters else module._buffers[name]  # type: ignore[return-value]


def put(place: Place, value: Tensor) -> Tensor:
    """Set a parameter or buffer, and return the one before; ``setattr`` of a module would check and register it."""
    module, name = place
    before = get(place)
    if name in module._buffers:
        module._buffers[name] = value
    elif isinstance(value, nn.Parameter) or type(value) is not Tensor:
        module._parameters[name] = value  # type: ignore[assignment] - a stand-in for a parameter
    else:
        # As transformers does: torch.matmul takes another path, and rounds otherwise, where a gradient is wanted.
        module._parameters[name] = nn.Parameter(value, requires_grad=value.is_floating_point())
    return before


def is_lookup(unit: Unit) -> bool:
    """Whether it is an embedding whose rows can be read one by one."""
    return (
        not unit.is_block
        and isinstance(unit.module, nn.Embedding)
        and unit.module.max_norm is None
        and len(unit.conversions) == 1
        and unit.conversions[0].transform is None
    )


def compute_buffers(model: Any, stored: set[str], device: torch.device) -> None:  # noqa: ANN401
    """Allocate the buffers that the checkpoint does not hold, and have the model compute their values."""
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[attribute] = torch.empty_like(buffer, device=device)
    for module in model.modules():
        module._is_hf_initialized = False  # all: some models compute the buffers of their blocks at the top
    model.initialize_weights()


def units_of(
    model: Any,  # noqa: ANN401 - a model of transformers
    conversions: tuple[Conversion, ...],
    blocks: tuple[nn.Module, ...],
    name: str,
) -> tuple[Unit, ...]:
    """Units for the blocks, and for every module outside the blocks that has parameters of its own.

    Raises:
        CheckpointError: no conversion makes a parameter.
    """
    by_target = {target: conversion for conversion in conversions for target in conversion.targets}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | {
        key: buffer for key, buffer in model.named_buffers() if buffer.is_meta
    }
    target_of = {id(tensors[target]): target for target in by_target if target in tensors}
    missing = [key for key, tensor in tensors.items() if id(tensor) not in target_of]
    if missing:
        raise CheckpointError(
            f"{name}: has no weights for {missing[0]} and {len(missing) - 1} more", "fetch the checkpoint again"
        )
    inside = {id(part): block for block in blocks for part in block.modules()}
    names = {id(module): key for key, module in model.named_modules()}
    gathered: dict[int, tuple[nn.Module, dict[str, list[Place]]]] = {}
    for key, tensor in tensors.items():
        owner, _, attribute = key.rpartition(".")
        module = model.get_submodule(owner)
        home: nn.Module = inside.get(id(module)) or module
        places = gathered.setdefault(id(home), (home, {}))[1].setdefault(target_of[id(tensor)], [])
        if (module, attribute) not in places:
            places.append((module, attribute))
    return tuple(
        Unit(
            name=names[key],
            module=home,
            conversions=tuple({id(by_target[target]): by_target[target] for target in places}.values()),
            places={target: tuple(found) for target, found in places.items()},
            is_block=any(home is block for block in blocks),
        )
        for key, (home, places) in gathered.items()
    )


def hold(model: Any, checkpoint: Checkpoint, blocks: Iterable[nn.Module], *, device: torch.device) -> None:  # noqa: ANN401
    """Load all weights of a model that is on the meta device, with the conversions that are used out of core.

    Raises:
        CheckpointError: the checkpoint lacks a parameter, or a shard ends too early.
        UnsupportedFormatError: it stores one in a dtype that no parameter has, or quantised in a way not known here.
    """
    conversions = conversions_of(model, stored_tensors(checkpoint))
    compute_buffers(model, {target for conversion in conversions for target in conversion.targets}, device)
    reader = Reader(folder=checkpoint.folder, device=device)
    for unit in units_of(model, conversions, tuple(blocks), checkpoint.name):
        for conversion in unit.conversions:
            for name, value in make(conversion, model, reader).items():
                for place in unit.places.get(name, ()):
                    put(place, value)
    model.tie_weights()  # so that tied places share one parameter again
