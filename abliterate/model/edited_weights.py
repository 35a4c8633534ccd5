"""A model out of core as it will be once it is edited: its writers are edited where they are at hand, each time anew.

The base and its edit so run in the same weight passes.  What a task under ``applied`` runs with are the bytes that the
edit writes, rounding and all, so what it says is what the written checkpoint will say.  Hooks add what rounding takes
from a matrix, and in half precision one reply in ten parts from the checkpoint's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.arch.packed import Packed
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.transfer import one_core
from abliterate.editing.blocks import WORK_ELEMENTS, Rounding
from abliterate.editing.shards import InPlace, edit_whole
from abliterate.editing.writing import edits_of
from abliterate.model.memory import rows_bytes
from abliterate.model.offload import Offloaded
from abliterate.model.rows import Rows
from abliterate.model.stored import STORED, empty
from abliterate.model.tasks import Task, current, lineage
from abliterate.model.units import Place, Unit, get, is_lookup, put
from abliterate.model.weights import Conversion

SHARE = 2
"""Edited writers take at most one part in so many of the working memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Writing:
    """One writer, and where the model has it."""

    writer: Writer
    unit: Unit
    dtype: torch.dtype
    places: tuple[Place, ...]


class EditedWeights:
    """The writers of one plan, as they will be, on the model that is to be edited.

    Those of one block are there at a time, in memory of their own (``size_bytes``), and are made again where a block is
    loaded again.
    """

    def __init__(self, weights: Offloaded, plan: EditPlan, rounding: Rounding) -> None:
        self._weights = weights
        self._edit_of = edits_of(plan, rounding)
        self._edits: dict[str, InPlace] = {}
        self._tasks: list[Task] = []
        self._made: dict[tuple[str, torch.Size, torch.dtype], tuple[tuple[str, int], Tensor]] = {}
        self._stored = torch.empty(0, dtype=torch.uint8)
        self._rows: dict[str, Tensor] = {}
        self._writings, self.is_whole = _found(weights, plan)

    @classmethod
    def of(cls, weights: Offloaded, plan: EditPlan, rounding: Rounding) -> "EditedWeights | str":
        """The weights as ``plan`` edits them, or why they cannot be made on the way."""
        if weights.device.type != "cpu":
            return "the model runs on an accelerator"
        if plan.packed:
            return "writers are quantised"
        if plan.model_map.tied and plan.tied == "shared":
            return "the head is edited with the embedding"
        found = cls(weights, plan, rounding)
        if not found.is_whole:
            return "writers are converted as they are loaded, or cast to a narrower dtype"
        if found.size_bytes > weights.working_bytes // SHARE:
            return f"the writers of a block would take {found.size_bytes / 2**20:,.0f} MiB of the working memory"
        return found

    @property
    def size_bytes(self) -> int:
        """Memory of the writers of one block, of the largest as it is stored if that is cast, and of rows."""
        in_blocks = [its for its in self._writings if its.unit.is_block]
        slots = {_slot(its): its.writer.tensor.numel * its.dtype.itemsize for its in in_blocks}
        cast = (its.writer.tensor for its in in_blocks if STORED[its.writer.tensor.dtype] != its.dtype)
        stored = max((tensor.size_bytes for tensor in cast), default=0)
        rows = rows_bytes(self._weights.memory_bytes)
        return sum(slots.values()) + stored + rows + WORK_ELEMENTS * torch.float64.itemsize

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Reserve the memory, and have the modules of all writers ask whose turn it is."""
        owners: dict[nn.Module, list[tuple[str, _Writing]]] = {}
        for its in self._writings:
            for module, name in its.places:
                owners.setdefault(module, []).append((name, its))
        befores = {module: module.__dict__.get("forward") for module in owners}
        for module, writings in owners.items():
            module.forward = self._turning(module, writings)
        size = self.size_bytes
        self._weights.working_bytes -= size
        try:
            yield
        finally:
            self._weights.working_bytes += size
            for module, before in befores.items():
                del module.forward
                if before is not None:
                    module.forward = before
            self._made.clear()
            self._rows.clear()
            self._stored = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the edited writers, in the task that asks for it and in all its parts."""
        task = current()
        if task is None:
            raise AssertionError("the base and its edit take turns as tasks")
        self._tasks.append(task)
        try:
            yield
        finally:
            self._tasks.remove(task)

    def _turning(self, module: nn.Module, writings: list[tuple[str, _Writing]]) -> Callable[..., Any]:
        """The ``forward`` of ``module``, with edited ``writings`` where the task that runs wants them."""
        forward = module.forward

        @wraps(forward)
        def turned(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the module takes and gives
            if not any(task in self._tasks for task in lineage()):
                return forward(*args, **kwargs)
            made = [((module, name), self._edited(its)) for name, its in writings]
            befores = [(place, put(place, value)) for place, value in made]
            try:
                return forward(*args, **kwargs)
            finally:
                for place, before in befores:
                    put(place, before)

        return turned

    def _edited(self, its: _Writing) -> Tensor:
        """The writer as it will be; made where this is the first to ask since its unit was loaded."""
        if not its.unit.is_block:
            return self._looked_up(its)
        slot, when = _slot(its), (its.unit.name, self._weights.loads[its.unit.name])
        made = self._made.pop(slot, None)  # half made, it would be none
        if made is None:
            made = None, empty(its.writer.tensor.numel, its.dtype).reshape(its.writer.tensor.shape)
        if made[0] != when:
            self._make(its, get(its.places[0]), made[1])
        self._made[slot] = when, made[1]
        return made[1]

    def _make(self, its: _Writing, before: Tensor, out: Tensor) -> None:
        """The edit of ``before`` as it is stored, widened into ``out``."""
        writer = its.writer
        stored = STORED[writer.tensor.dtype]
        if stored == its.dtype:
            values = out.copy_(before)
        else:
            if len(self._stored) < writer.tensor.size_bytes:
                self._stored = empty(writer.tensor.size_bytes, torch.uint8)
            values = self._stored[: writer.tensor.size_bytes].view(stored).view(before.shape).copy_(before)
        with one_core(needed=writer.in_rows):  # as it is written: sums of several threads are rounded otherwise
            edit_whole(values.view(-1, writer.row_elements), writer, self._edit(writer))
        if stored != its.dtype:
            out.copy_(values)

    def _looked_up(self, its: _Writing) -> Tensor:
        """Rows of an embedding, edited as they are read."""
        writer = its.writer
        if writer.name not in self._rows:
            edit, folder = self._edit(writer), self._weights.reader.folder
            most = rows_bytes(self._weights.memory_bytes) // len(self._weights.rows)
            change = partial(edit_some, edit, writer.tensor.shape[0])
            rows = Rows(folder, writer.tensor, its.dtype, most_bytes=most, change=change)
            self._rows[writer.name] = rows.weight()
        return self._rows[writer.name]

    def _edit(self, writer: Writer) -> InPlace:
        if writer.name not in self._edits:
            self._edits[writer.name] = self._edit_of(writer)
        return self._edits[writer.name]


def edit_some(edit: InPlace, count: int, rows: Tensor, first: int) -> None:
    """Edit some rows of a matrix of ``count``, from row ``first`` on, as they are where all of it is edited.

    The arithmetic of a row is rounded otherwise in a block of another size, so each is put in its place in its block.
    """
    step, end = edit.block_rows(), first + len(rows)
    with one_core():
        for start in range(first // step * step, end, step):
            block = rows.new_zeros(min(step, count - start), rows.shape[1])
            low, high = max(first, start), min(end, start + len(block))
            block[low - start : high - start] = rows[low - first : high - first]
            edit.edit_rows(block, start)
            rows[low - first : high - first] = block[low - start : high - start]


def _slot(its: _Writing) -> tuple[str, torch.Size, torch.dtype]:
    """Memory that writers of all blocks share."""
    return its.writer.role, torch.Size(its.writer.tensor.shape), its.dtype


def _found(weights: Offloaded, plan: EditPlan) -> tuple[list[_Writing], bool]:
    """The writers of ``plan`` that a model has as they are stored, and whether these are all that it runs."""
    writers = {writer.tensor.name: writer for writer in plan.writers if not writer.drafts}
    found: dict[str, _Writing] = {}
    for unit in weights.units:
        for conversion in unit.conversions:
            stored = _plain_source(conversion)
            writer = None if stored is None else writers.get(stored.name)
            if writer is None or not (unit.is_block or (is_lookup(unit) and writer.in_rows)):
                continue  # a head that is tied to the embedding stays as it is
            kind, places = STORED[writer.tensor.dtype], unit.places[conversion.targets[0]]
            if unit.is_block and any(module is unit.module for module, _ in places):
                continue  # it would take its turn before its weights are there
            if unit.is_block and torch.promote_types(kind, conversion.dtype) != conversion.dtype:
                continue  # what was stored is not there any more
            found[writer.tensor.name] = _Writing(writer=writer, unit=unit, dtype=conversion.dtype, places=places)
    slots = {(its.unit.name, _slot(its)) for its in found.values()}
    return list(found.values()), found.keys() == writers.keys() and len(slots) == len(found)


def _plain_source(conversion: Conversion) -> TensorInfo | None:
    """The stored tensor that a parameter is, but for its dtype."""
    if conversion.transform is not None:
        return None
    ((_, stored),) = conversion.sources
    return None if isinstance(stored, Packed) else stored
