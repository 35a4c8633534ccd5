"""The edit of one stored matrix in place, a block at a time, in reused float buffers.

``edits`` says what the edit is, on whole matrices; here the same is done to stored bytes at the speed of memory: fresh
allocations would cost several times the arithmetic.  A block of about a megabyte stays in the cache while it is
widened, projected, rounded and measured.

Quantised writers keep their scales, and with them the grid their values lie on.  There rounding to nearest would undo
much of the edit: most values move by less than half a step and fall back to where they were.  So the target is first
pulled along ``read`` until the rounded columns hold as little as the grid allows: of all stored matrices ``Q`` with
``read^T Q = 0`` the one closest to ``W'`` is the rounding of ``W' - read m`` for some ``m`` (its Lagrange multipliers),
found by ``m <- m + (read^T read)^-1 read^T Q``.  The feedback rows then take the rest, as everywhere.

What healing adds to a writer is added to its stored values before they are edited, which takes out of it as well what
the rounding of the arithmetic put along ``read``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import Codec
from abliterate.errors import NonFiniteError
from abliterate.method.edits import column_scale
from abliterate.method.rounding import GRAM_TOLERANCE, feedback_rows, round_tail
from abliterate.method.weight_edit import LowRank, WeightEdit

Rounding = Literal["direction", "nearest"]
"""How the edited matrix is rounded to its dtype: so that nothing is left along the direction, or each element alone."""

WORK_ELEMENTS = 2**18
"""Elements of a block.  Sums are grouped by blocks that begin at multiples of it, whatever the memory budget, so the
budget does not change a bit of the result."""


class Workspace:
    """One float buffer, reused by every block of every tensor."""

    def __init__(self) -> None:
        self._elements = WORK_ELEMENTS
        self._buffer = torch.empty(0)

    def rows(self, width: int) -> int:
        """How many rows of ``width`` elements make a block; at least one."""
        return max(1, self._elements // max(1, width))

    def block(self, rows: int, width: int, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
        """A buffer of ``rows`` x ``width``, its content undefined; the next call returns the same memory."""
        needed = max(self._elements, rows * width) * (dtype.itemsize // 4)
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(needed, dtype=torch.float32)
        return self._buffer.view(dtype)[: rows * width].view(rows, width)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorEdit:
    """An edit prepared for one tensor: cast to the dtype of its arithmetic, with its feedback rows picked."""

    where: str
    edit: WeightEdit
    codec: Codec
    read: Float[Tensor, "d k"]
    write: Float[Tensor, "d k"]
    constant: Float[Tensor, " d"] | None
    row_scale: Float[Tensor, " d"] | None
    added: LowRank | None
    inverse: Float[Tensor, "k k"]
    compute: torch.dtype
    feedback: Tensor
    work: Workspace

    @classmethod
    def of(
        cls, where: str, edit: WeightEdit, codec: Codec, work: Workspace, rounding: Rounding = "direction"
    ) -> "TensorEdit":
        """Prepare ``edit`` for a tensor; ``where`` names it in errors.

        With ``rounding`` "nearest" there are no feedback rows: every element is rounded to nearest.

        Raises:
            ValueError: rows keep their lengths, and what that takes was not read from the weights.
        """
        scale = edit.known_row_scale
        rows = feedback_rows(edit.read) if rounding == "direction" else []
        lengths = edit.scales or edit.keeps_rows  # are what large numbers leave
        compute = torch.float64 if lengths else codec.compute
        return cls(
            where=where,
            edit=edit,
            codec=codec,
            read=edit.read.to(compute),
            write=edit.write.to(compute),
            constant=None if edit.constant is None else edit.constant.to(compute),
            row_scale=None if scale is None else scale.to(compute),
            added=None if edit.added is None else edit.added.to(compute),
            inverse=torch.linalg.pinv(edit.read.T @ edit.read, rtol=GRAM_TOLERANCE, hermitian=True).to(compute),
            compute=compute,
            feedback=torch.tensor(rows, dtype=torch.long),
            work=work,
        )

    def block_rows(self) -> int:
        """How many rows on disk make a block."""
        return self.work.rows(self.codec.values)

    def columns(self, first_row: int) -> "ColumnEdit":
        """The edit of a matrix that arrives in blocks and begins at ``first_row`` of a stack."""
        return ColumnEdit(self, first_row)

    def edit_rows(self, rows: Tensor, first_row: int) -> None:
        """Edit stream vectors stored as rows (embeddings, ``[in, d]``, biases) from ``first_row`` on, in place.

        Raises:
            NonFiniteError: an element is NaN or infinite, or becomes so.
        """
        codec, read = self.codec, self.read
        n, d = len(rows), codec.values
        held = torch.empty(n, len(self.feedback), dtype=self.compute)
        leak = torch.empty(n, read.shape[1], dtype=self.compute)
        step = self.work.rows(d)
        for start in range(0, n, step):
            part, row = rows[start : start + step], first_row + start
            wide = self.work.block(len(part), d, self.compute)
            codec.widen(part, row, wide)
            coefficients = wide @ read
            self.check(coefficients, "holds NaN or infinity")
            expected = self.change(wide, coefficients)
            places = torch.arange(row, row + len(part))
            for _ in range(codec.pulls):
                beside = codec.nearest(wide, places) @ read
                off = beside if expected is None else beside - expected
                wide.addmm_(off @ self.inverse, read.T, alpha=-1)
            held[start : start + step] = wide[:, self.feedback]
            codec.encode(wide, part, row)
            codec.widen(part, row, wide)
            wide[:, self.feedback] = held[start : start + step]
            torch.mm(wide, read, out=leak[start : start + step])
            if expected is not None:
                leak[start : start + step] -= expected
        self.check(leak, *OVERFLOWS)
        places = torch.arange(first_row, first_row + n)

        def nearest(position: int, values: Tensor) -> Tensor:
            return codec.nearest(values.T, places, self.feedback[position : position + 1]).T

        rounded = self._round(held.T, nearest, leak.T)
        rows[:, self.feedback] = codec.codes(rounded.T, places, self.feedback)

    def change(self, wide: Float[Tensor, "n d"], coefficients: Float[Tensor, "n k"]) -> Float[Tensor, "n k"] | None:
        """Edit stream vectors in place; gives back what they then hold along ``read``, None for nothing."""
        edit, expected = self.edit, self.edit.expected(coefficients.T)
        before = wide.square().sum(1) if edit.scales else None
        wide.addmm_(coefficients, self.write.T, alpha=-edit.strength)
        if self.constant is not None:
            wide += self.constant
        if before is not None:
            scale = column_scale(before, wide.square().sum(1))
            wide *= scale[:, None]
            expected = None if expected is None else expected * scale
        if self.row_scale is not None:
            wide *= self.row_scale
            return wide @ self.read
        return None if expected is None else expected.T

    def edit_columns(self, matrix: Tensor, first_row: int) -> None:
        """Edit stream vectors stored as columns (output projections), in place, the whole matrix at hand.

        Raises:
            NonFiniteError: an element is NaN or infinite, or becomes so.
        """
        columns = ColumnEdit(self, first_row)
        for step in columns.passes:
            step(matrix, 0)
        for row, values in columns.finish():
            matrix[row] = values

    def check(self, values: Tensor, what: str, *hint: str) -> None:
        """``read^T W`` is finite exactly when every element of ``W`` is, so this checks a whole block at little cost.

        Raises:
            NonFiniteError: names the tensor.
        """
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"{self.where} {what}", *hint)

    def _round(
        self, held: Float[Tensor, "rows n"], nearest: Callable[[int, Tensor], Tensor], leak: Float[Tensor, "k n"]
    ) -> Float[Tensor, "rows n"]:
        rounded = round_tail(held, nearest, self.edit.read[self.feedback], leak)
        self.check(rounded, *OVERFLOWS)
        return rounded


OVERFLOWS = (
    "overflows its dtype when edited",
    "nothing is damaged: write the checkpoint as bfloat16 first (save_pretrained of transformers), and edit that",
)


class ColumnEdit:
    """One matrix ``[d, n]`` that arrives in blocks of rows, once for each of ``passes``; all of them, in this order.

    ``first_row`` is where it begins in a stack.  The feedback rows are rounded to nearest like all others, remembered,
    and given their final values by ``finish``.
    """

    def __init__(self, edit: TensorEdit, first_row: int) -> None:
        k, n, dtype = edit.read.shape[1], edit.codec.values, edit.compute
        self.edit = edit
        self._first_row = first_row
        self._coefficients = torch.zeros(k, n, dtype=dtype)
        self._pull = torch.zeros(k, n, dtype=dtype)
        self._held = torch.zeros(len(edit.feedback), n, dtype=dtype)
        self._leak = torch.zeros(k, n, dtype=dtype)
        self._expected: Tensor | None = None
        self._scale: Tensor | None = None
        self._lengths = torch.zeros(1 + k, n, dtype=dtype) if edit.edit.scales else None
        self._turned = None if edit.row_scale is None else edit.row_scale[:, None] * edit.read
        self._along = torch.zeros(k, n, dtype=dtype)
        self._begun = False

    @property
    def passes(self) -> tuple[Callable[[Tensor, int], None], ...]:
        """What to do with each block ``(rows, place of its first row in the matrix)``; only the last changes it."""
        return (self._gather, *[self._try] * self.edit.codec.pulls, self._apply)

    def finish(self) -> list[tuple[int, Tensor]]:
        """The final values of the feedback rows as they are stored, as ``(row, values)``.

        Raises:
            NonFiniteError: the edit overflowed the stored dtype.
        """
        edit = self.edit
        edit.check(self._leak, *OVERFLOWS)
        places = edit.feedback + self._first_row

        def nearest(position: int, values: Tensor) -> Tensor:
            return edit.codec.nearest(values, places[position : position + 1])

        stored = edit.codec.codes(edit._round(self._held, nearest, self._leak), places)
        return list(zip(edit.feedback.tolist(), stored, strict=True))

    def _gather(self, block: Tensor, first_row: int) -> None:
        """``c += read^T W``; what the lengths of columns, or scaled rows, leave along ``read`` takes more sums."""
        for row, part in self._parts(block, first_row):
            wide = self._wide(part, row)
            self._coefficients.addmm_(self.edit.read[row : row + len(part)].T, wide)
            if self._turned is not None:
                self._along.addmm_(self._turned[row : row + len(part)].T, wide)
            if self._lengths is not None:
                self._lengths[1:].addmm_(self.edit.write[row : row + len(part)].T, wide)
                self._lengths[0] += wide.square_().sum(0)

    def _try(self, block: Tensor, first_row: int) -> None:
        """Round without storing, to see what would be left along ``read``, and pull by that."""
        codec = self.edit.codec
        for row, part in self._parts(block, first_row):
            if row == 0:
                self._begin()
            rounded = codec.nearest(self._target(part, row), self._places(part, row))
            self._leak.addmm_(self.edit.read[row : row + len(part)].T, rounded)

    def _apply(self, block: Tensor, first_row: int) -> None:
        """Store the target, rounded to nearest.

        Raises:
            NonFiniteError: the first pass met NaN or infinity.
        """
        edit = self.edit
        for row, part in self._parts(block, first_row):
            if row == 0:
                self._begin()
            wide = self._target(part, row)
            mine = (edit.feedback >= row) & (edit.feedback < row + len(part))
            places = edit.feedback[mine] - row
            self._held[mine] = wide[places]
            edit.codec.encode(wide, part, self._first_row + row)
            edit.codec.widen(part, self._first_row + row, wide)
            wide[places] = self._held[mine]
            self._leak.addmm_(edit.read[row : row + len(part)].T, wide)

    def _begin(self) -> None:
        if not self._begun:
            self.edit.check(self._coefficients, "holds NaN or infinity")
            self._know()
            self._begun = True
        self._pull += self.edit.inverse @ self._leak
        self._leak.zero_()
        if self._expected is not None:
            self._leak -= self._expected

    def _know(self) -> None:
        """What the first pass tells: the scale of every column, and what the edit leaves along ``read``."""
        edit, c = self.edit.edit, self._coefficients
        self._expected = edit.expected(c)
        if self._turned is not None:
            self._expected = self._along - edit.strength * (self._turned.T @ self.edit.write) @ c
            if self.edit.constant is not None:
                self._expected += (self._turned.T @ self.edit.constant)[:, None]
        if self._lengths is None:
            return
        gram = (edit.write.T @ edit.write).to(c.dtype)
        before, along = self._lengths[0], self._lengths[1:]
        taken = edit.strength * (2 * along - edit.strength * (gram @ c))
        self._scale = column_scale(before, before - (taken * c).sum(0))
        if self._expected is not None:
            self._expected = self._expected * self._scale

    def _target(self, part: Tensor, row: int) -> Float[Tensor, "rows n"]:
        """``diag(row_scale) (W - strength write c + constant) diag(scale) - read m``, ``W`` with what healing adds."""
        edit, rows = self.edit, slice(row, row + len(part))
        wide = self._wide(part, row).addmm_(edit.write[rows], self._coefficients, alpha=-edit.edit.strength)
        if edit.constant is not None:
            wide += edit.constant[rows, None]
        if self._scale is not None:
            wide *= self._scale
        if edit.row_scale is not None:
            wide *= edit.row_scale[rows, None]
        return wide.addmm_(edit.read[rows], self._pull, alpha=-1) if edit.codec.pulls else wide

    def _wide(self, part: Tensor, row: int) -> Float[Tensor, "rows n"]:
        codec = self.edit.codec
        wide = self.edit.work.block(len(part), codec.values, self.edit.compute)
        codec.widen(part, self._first_row + row, wide)
        added = self.edit.added
        return wide if added is None else wide.addmm_(added.b[row : row + len(part)], added.a)

    def _places(self, part: Tensor, row: int) -> Tensor:
        return torch.arange(self._first_row + row, self._first_row + row + len(part))

    def _parts(self, block: Tensor, first_row: int) -> Iterator[tuple[int, Tensor]]:
        step = self.edit.work.rows(self.edit.codec.values)
        for start in range(0, len(block), step):
            yield first_row + start, block[start : start + step]
