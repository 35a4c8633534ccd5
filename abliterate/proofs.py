"""The proof of one edited tensor, from the equation: what was written against what should have been.

With ``u`` the direction that must vanish (unit columns) and ``a`` the vectors it is taken out along, every column of a
written tensor must satisfy, within the rounding of its dtype,

    |u^T w'| <= eps |w'|                                          (removal)
    |w' - (w - a (u^T a)^-1 u^T w)| <= (1 + feedback) eps |w'|    (nothing else)

``eps`` is the unit roundoff: what rounding each element to nearest can do to a column at most.  ``feedback`` allows for
the rows that take up the leak of all others: ``FEEDBACK_ROWS`` of them may each move by a few units in their last
place, which matters in narrow matrices (2.8 at width 128) and hardly in wide ones (0.5 at 4096).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.blocks import DTYPES

UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
"""Largest relative error of rounding to nearest."""

SMALLEST_STEP = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}
"""Spacing of the subnormal numbers: below it, rounding has an absolute error."""

ARITHMETIC_ROUNDOFF = {"BF16": 2.0**-20, "F16": 2.0**-20, "F32": 2.0**-46, "F64": 2.0**-46}
"""Allowance for the arithmetic of the edit, relative to the column: float32 for halves, float64 for the rest."""

FEEDBACK_ROWS = 28
FEEDBACK_STEPS = 6.0
"""Units in the last place that a feedback row may move, per direction, relative to the column's root mean square."""

BLOCK_ELEMENTS = 2**17
"""Elements widened to float64 at a time: a megabyte, which stays in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorProof:
    """One edited tensor, as measured on the written bytes.

    ``left`` is ``|u^T W'| / |W'|`` and ``before`` is ``|u^T W| / |W|`` (Frobenius); ``worst_left`` and ``worst_error``
    are the largest removal and equation residuals over its columns, as fractions of their bounds: above 1 is a failure.
    """

    name: str
    role: str
    before: float
    left: float
    worst_left: float
    worst_error: float
    sha256_before: str
    sha256_after: str

    @property
    def ok(self) -> bool:
        """Both residuals are within their bounds (NaN is not)."""
        return self.worst_left <= 1.0 and self.worst_error <= 1.0


class Prover:
    """Takes a tensor and its written counterpart block by block, and finds the worst column.

    ``read`` and ``write`` are ``u`` and ``a`` of the module's docstring, any lengths, in float64.
    """

    def __init__(
        self, name: str, role: str, dtype: str, read: Float[Tensor, "d k"], write: Float[Tensor, "d k"]
    ) -> None:
        self.name, self.role, self.dtype = name, role, dtype
        self._u = read / torch.linalg.vector_norm(read, dim=0)
        self._a = write @ torch.linalg.inv(self._u.T @ write)
        self._digests = (hashlib.sha256(), hashlib.sha256())
        self._squares = torch.zeros(4, dtype=torch.float64)  # removed, total, left, total written
        self._worst = [0.0, 0.0]

    def hash(self, old: Tensor, new: Tensor) -> None:
        """Take note of the bytes, in file order."""
        for digest, raw in zip(self._digests, (old, new), strict=True):
            digest.update(raw.numpy())  # type: ignore[arg-type] - arrays are buffers

    def rows(self, old: Float[Tensor, "n d"], new: Float[Tensor, "n d"]) -> None:
        """Stream vectors stored as rows."""
        step = block_rows(old.shape[1])
        for first in range(0, len(old), step):
            before, after = (part[first : first + step].double() for part in (old, new))
            c, c_new = before @ self._u, after @ self._u
            error = after - (before - c @ self._a.T)
            self._judge(c.T, c_new.T, error.square().sum(1), before.square().sum(1), after.square().sum(1))

    def columns(self, old: Float[Tensor, "d n"], new: Float[Tensor, "d n"]) -> None:
        """A whole matrix of stream vectors stored as columns."""
        columns = ColumnProver(self, old.shape[1])
        columns.gather(old, 0)
        columns.compare(old, new, 0)
        columns.finish()

    def finish(self) -> TensorProof:
        """The proof, once all of the tensor was seen."""
        removed, total, left, total_new = self._squares.tolist()
        return TensorProof(
            name=self.name,
            role=self.role,
            before=(removed / total) ** 0.5 if total else 0.0,
            left=(left / total_new) ** 0.5 if total_new else 0.0,
            worst_left=self._worst[0],
            worst_error=self._worst[1],
            sha256_before=self._digests[0].hexdigest(),
            sha256_after=self._digests[1].hexdigest(),
        )

    def _judge(
        self,
        c: Float[Tensor, "k n"],
        c_new: Float[Tensor, "k n"],
        error: Float[Tensor, " n"],
        total: Float[Tensor, " n"],
        total_new: Float[Tensor, " n"],
    ) -> None:
        """Hold the columns against their bounds; ``error`` and the totals are squared lengths."""
        size, size_new = total.sqrt(), total_new.sqrt()
        slack = SMALLEST_STEP[self.dtype] * self._u.shape[0] ** 0.5
        allowed = UNIT_ROUNDOFF[self.dtype] * size_new + ARITHMETIC_ROUNDOFF[self.dtype] * (size + size_new) + slack
        d, k = self._u.shape
        feedback = 1 + FEEDBACK_STEPS * k * min(1.0, FEEDBACK_ROWS / d) ** 0.5
        for place, (residual, factor) in enumerate(((c_new.abs().amax(0), 1.0), (error.sqrt(), feedback))):
            ratio = float((residual / (factor * allowed).clamp_min(1e-300)).amax()) if residual.numel() else 0.0
            self._worst[place] = max(self._worst[place], ratio) if ratio == ratio else float("inf")
        self._squares += torch.stack([c.square().sum(), total.sum(), c_new.square().sum(), total_new.sum()])


class ColumnProver:
    """A matrix ``[d, n]`` that arrives in blocks of rows, twice: to gather ``u^T W``, then to be compared."""

    def __init__(self, prover: Prover, n: int) -> None:
        self._prover = prover
        k = prover._u.shape[1]
        self._c = torch.zeros(k, n, dtype=torch.float64)
        self._c_new = torch.zeros(k, n, dtype=torch.float64)
        self._error, self._total, self._total_new = (torch.zeros(n, dtype=torch.float64) for _ in range(3))

    def gather(self, old: Float[Tensor, "rows n"], first_row: int) -> None:
        """First pass, over the base alone."""
        for row, before in self._blocks(old, first_row):
            self._c += self._prover._u[row : row + len(before)].T @ before

    def compare(self, old: Float[Tensor, "rows n"], new: Float[Tensor, "rows n"], first_row: int) -> None:
        """Second pass, over both."""
        u, a = self._prover._u, self._prover._a
        for (row, before), (_, after) in zip(self._blocks(old, first_row), self._blocks(new, first_row), strict=True):
            rows = slice(row, row + len(before))
            self._c_new += u[rows].T @ after
            self._error += (after - (before - a[rows] @ self._c)).square().sum(0)
            self._total += before.square().sum(0)
            self._total_new += after.square().sum(0)

    def finish(self) -> None:
        """Judge the columns, once both passes are over."""
        self._prover._judge(self._c, self._c_new, self._error, self._total, self._total_new)

    def _blocks(self, rows: Tensor, first_row: int) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
        step = block_rows(rows.shape[1])
        for start in range(0, len(rows), step):
            yield first_row + start, rows[start : start + step].double()


def block_rows(width: int) -> int:
    """Rows of ``width`` elements that are looked at together."""
    return max(1, BLOCK_ELEMENTS // max(1, width))


def as_rows(raw: Tensor, dtype: str, width: int) -> Tensor:
    """Bytes as rows of ``width`` elements, copied where they lie at an odd address."""
    stored = DTYPES[dtype]
    aligned = raw if raw.data_ptr() % stored.itemsize == 0 else raw.clone()
    return aligned.view(stored).view(-1, width)
