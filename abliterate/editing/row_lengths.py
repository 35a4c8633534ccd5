"""The factors that give the rows of writers their lengths back, read from the weights; and what of ``r`` they put back.

A row of the attention or of the MLP of a layer goes through all matrices that write there (experts), so that one factor
for each component of what they write does it, and a hook can do the same.  A bias is scaled with its matrix.  A row of
which nothing is left keeps what it is left with, as a column does.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import Codec, HeldScales, codec_of
from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.directio import read_into
from abliterate.editing.planning import along
from abliterate.errors import NonFiniteError
from abliterate.method.edits import column_scale
from abliterate.method.places import Place
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit

BLOCK_ELEMENTS = 2**20


def with_row_lengths(plan: EditPlan) -> EditPlan:
    """``plan`` with the factors of every row, and a note of how much of the direction they put back.

    The writers are read: four times where they lie in columns, twice where they lie in rows.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        CheckpointError: the weights are not here.
    """
    if plan.stream is None or not plan.stream.lacks_lengths:
        return plan
    places: dict[Place, WeightEdit | None] = {}
    back: dict[Place, float] = {}
    held = HeldScales()
    for place in dict.fromkeys(writer.place for writer in plan.writers):
        edit = plan.stream.at(*place)
        assert edit is not None, "the writer is edited"
        writers = [writer for writer in plan.writers if writer.place == place and len(writer.tensor.shape) > 1]
        matrices = [_Matrices.of(plan, writer, held) for writer in writers]
        places[place] = edit
        if edit.keeps_rows:
            scale = _scale(matrices, edit.d_model)
            places[place] = replace(edit, row_scale=scale)
            back[place] = _put_back(matrices, scale)
    found = along(plan, StreamEdit(places=places))
    return replace(found, notes=(*found.notes, _note(back)))


def _note(back: Mapping[Place, float]) -> str:
    mean, most = math.sqrt(sum(share**2 for share in back.values()) / len(back)), max(back.values())
    return (
        f"NOT REMOVED: rows of writers keep their lengths, as published, and so {mean:.0%} of the direction is put "
        f"back ({min(back.values()):.1%} to {most:.1%} of what an attention or MLP wrote along it)"
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Matrices:
    """The matrices of one writer on disk, before the edit and after it, without scale and rounding."""

    plan: EditPlan
    writer: Writer
    codec: Codec
    edit: WeightEdit

    @classmethod
    def of(cls, plan: EditPlan, writer: Writer, held: HeldScales) -> "_Matrices":
        edit = plan.edits[writer.tensor.name]
        return cls(plan=plan, writer=writer, codec=codec_of(plan.checkpoint.folder, writer, held), edit=edit)

    def each(self) -> Iterator[tuple[Float[Tensor, "k n"], Iterator[tuple[slice, Tensor, Tensor]]]]:
        """``read^T W`` of each matrix, and blocks of its rows ``(rows, before, after)``, in float64."""
        read, write = self.edit.read, self.edit.strength * self.edit.write
        d, count = len(read), self.writer.tensor.numel // self.writer.row_elements
        if self.writer.in_rows:
            for _, wide in self._blocks(0, count):
                c = (wide @ read).T
                yield c, iter([(slice(0, d), wide.T, wide.T - write @ c)])
            return
        for first in range(0, count, d):
            c = torch.zeros(read.shape[1], self.codec.values, dtype=torch.float64)
            for row, wide in self._blocks(first, d):
                c += read[row : row + len(wide)].T @ wide
            yield c, self._edited(first, d, write, c)

    def _edited(self, first: int, d: int, write: Tensor, c: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for row, wide in self._blocks(first, d):
            rows = slice(row, row + len(wide))
            yield rows, wide, wide - write[rows] @ c

    def _blocks(self, first: int, count: int) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
        """Rows on disk from ``first`` on, with the place of each block behind it."""
        tensor, width, stored = self.writer.tensor, self.writer.row_elements, self.codec.stored
        step = max(1, BLOCK_ELEMENTS // max(1, self.codec.values))
        for row in range(0, count, step):
            raw = torch.empty(min(step, count - row), width, dtype=stored)
            start = tensor.start + (first + row) * width * stored.itemsize
            read_into(self.plan.checkpoint.folder / tensor.shard, start, raw.view(torch.uint8).flatten())
            wide = self.codec.decode(raw, first + row, torch.float64)
            if not torch.isfinite(wide).all():
                raise NonFiniteError(f"{tensor.shard}: '{tensor.name}' holds NaN or infinity")
            yield row, wide


def _scale(matrices: list[_Matrices], d: int) -> Float[Tensor, " d"]:
    """``|row| / |row'|`` through all of ``matrices``."""
    before, after = torch.zeros(2, d, dtype=torch.float64)
    for its in matrices:
        for _, blocks in its.each():
            for rows, old, new in blocks:
                before[rows] += old.square().sum(1)
                after[rows] += new.square().sum(1)
    return column_scale(before, after)


def _put_back(matrices: list[_Matrices], scale: Float[Tensor, " d"]) -> float:
    """``|read^T D W'| / |read^T W|`` (Frobenius) over all of ``matrices``."""
    was = left = 0.0
    for its in matrices:
        turned = scale[:, None] * its.edit.read
        for c, blocks in its.each():
            found = sum(turned[rows].T @ new for rows, _, new in blocks)
            was, left = was + float(c.square().sum()), left + float(torch.as_tensor(found).square().sum())
    return math.sqrt(left / was) if was else 0.0
