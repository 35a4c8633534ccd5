"""The edit of one stored matrix in place, a block at a time, in reused float buffers.

``edits`` says what the edit is, on whole matrices; here the same is done to stored bytes at the speed of memory: fresh
allocations would cost several times the arithmetic.  A block of about a megabyte stays in the cache while it is
widened, projected, rounded and measured.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import edits
from abliterate.edits import Projector
from abliterate.errors import NonFiniteError

Rounding = Literal["direction", "nearest"]
"""How the edited matrix is rounded to its dtype: so that nothing is left along the direction, or each element alone."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

WORK_ELEMENTS = 2**18
"""Elements of a block.  Sums are grouped by blocks that begin at multiples of it, whatever the memory budget, so the
budget does not change a bit of the result."""


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 for half-precision storage and float64 for float32 and wider."""
    return torch.float32 if stored.itemsize == 2 else torch.float64


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
    """A projector prepared for one tensor: cast to the dtype of its arithmetic, with its feedback rows picked."""

    where: str
    projector: Projector
    stored: torch.dtype
    read: Float[Tensor, "d k"]
    write: Float[Tensor, "d k"]
    feedback: Tensor
    work: Workspace

    @classmethod
    def of(
        cls, where: str, projector: Projector, stored: torch.dtype, work: Workspace, rounding: Rounding = "direction"
    ) -> "TensorEdit":
        """Prepare ``projector`` for a tensor; ``where`` names it in errors.

        With ``rounding`` "nearest" there are no feedback rows: every element is rounded to nearest.
        """
        dtype = compute_dtype(stored)
        rows = edits.feedback_rows(projector.read) if rounding == "direction" else []
        return cls(
            where=where,
            projector=projector,
            stored=stored,
            read=projector.read.to(dtype),
            write=projector.write.to(dtype),
            feedback=torch.tensor(rows, dtype=torch.long),
            work=work,
        )

    def edit_rows(self, rows: Float[Tensor, "n d"]) -> None:
        """Edit stream vectors stored as rows (embeddings, ``[in, d]`` matrices, biases), in place.

        Raises:
            NonFiniteError: an element is NaN or infinite, or becomes so.
        """
        n, d = rows.shape
        held = torch.empty(n, len(self.feedback), dtype=self.read.dtype)
        leak = torch.empty(n, self.read.shape[1], dtype=self.read.dtype)
        step = self.work.rows(d)
        for first in range(0, n, step):
            part = rows[first : first + step]
            wide = self.work.block(len(part), d, self.read.dtype)
            wide.copy_(part)
            coefficients = wide @ self.read
            self.check(coefficients, "holds NaN or infinity")
            wide.addmm_(coefficients, self.write.T, alpha=-1)
            held[first : first + step] = wide[:, self.feedback]
            part.copy_(wide)
            wide.copy_(part)
            wide[:, self.feedback] = held[first : first + step]
            torch.mm(wide, self.read, out=leak[first : first + step])
        self.check(leak, "overflows its dtype when edited")
        rows[:, self.feedback] = self._round(held.T, leak.T).T

    def edit_columns(self, matrix: Float[Tensor, "d n"]) -> None:
        """Edit stream vectors stored as columns (output projections), in place, the whole matrix at hand.

        Raises:
            NonFiniteError: an element is NaN or infinite, or becomes so.
        """
        columns = ColumnEdit(self, matrix.shape[1])
        columns.gather(matrix, 0)
        columns.apply(matrix, 0)
        for row, values in columns.finish():
            matrix[row] = values

    def check(self, values: Tensor, what: str) -> None:
        """``read^T W`` is finite exactly when every element of ``W`` is, so this checks a whole block at little cost.

        Raises:
            NonFiniteError: names the tensor.
        """
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"{self.where} {what}", NAN_HINT)

    def _round(self, held: Float[Tensor, "rows n"], leak: Float[Tensor, "k n"]) -> Float[Tensor, "rows n"]:
        rounded = edits.round_tail(held, self.stored, self.projector.read[self.feedback], leak)
        self.check(rounded, "overflows its dtype when edited")
        return rounded


class ColumnEdit:
    """A matrix ``[d, n]`` that arrives in blocks of rows, twice: first to gather ``read^T W``, then to be edited.

    The feedback rows are rounded to nearest like all others, remembered, and given their final values by ``finish``.
    """

    def __init__(self, edit: TensorEdit, n: int) -> None:
        self._edit = edit
        self._coefficients = torch.zeros(edit.read.shape[1], n, dtype=edit.read.dtype)
        self._held = torch.zeros(len(edit.feedback), n, dtype=edit.read.dtype)
        self._leak = torch.zeros(edit.read.shape[1], n, dtype=edit.read.dtype)
        self._checked = False

    def gather(self, block: Float[Tensor, "rows n"], first_row: int) -> None:
        """First pass: ``c += read^T W`` over the rows from ``first_row`` on."""
        edit = self._edit
        step = edit.work.rows(block.shape[1])
        for start in range(0, len(block), step):
            part = block[start : start + step]
            wide = edit.work.block(part.shape[0], part.shape[1], edit.read.dtype)
            wide.copy_(part)
            row = first_row + start
            self._coefficients.addmm_(edit.read[row : row + len(part)].T, wide)

    def apply(self, block: Float[Tensor, "rows n"], first_row: int) -> None:
        """Second pass: replace the rows from ``first_row`` on by ``W - write c``, rounded to nearest.

        Raises:
            NonFiniteError: the first pass met NaN or infinity.
        """
        edit = self._edit
        if not self._checked:
            edit.check(self._coefficients, "holds NaN or infinity")
            self._checked = True
        step = edit.work.rows(block.shape[1])
        for start in range(0, len(block), step):
            part = block[start : start + step]
            row = first_row + start
            wide = edit.work.block(part.shape[0], part.shape[1], edit.read.dtype)
            wide.copy_(part)
            wide.addmm_(edit.write[row : row + len(part)], self._coefficients, alpha=-1)
            mine = (edit.feedback >= row) & (edit.feedback < row + len(part))
            places = edit.feedback[mine] - row
            self._held[mine] = wide[places]
            part.copy_(wide)
            wide.copy_(part)
            wide[places] = self._held[mine]
            self._leak.addmm_(edit.read[row : row + len(part)].T, wide)

    def finish(self) -> list[tuple[int, Float[Tensor, " n"]]]:
        """The final values of the feedback rows, as ``(row, values)``.

        Raises:
            NonFiniteError: the edit overflowed the stored dtype.
        """
        self._edit.check(self._leak, "overflows its dtype when edited")
        rounded = self._edit._round(self._held, self._leak)
        return list(zip(self._edit.feedback.tolist(), rounded, strict=True))


NAN_HINT = "the checkpoint is damaged: fetch it again, or repair that tensor before editing"
