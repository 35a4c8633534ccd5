"""The proof of one edited tensor, from the equation: what was written against what should have been.

With ``u`` the direction that must vanish (unit columns) and ``a`` the vectors it is taken out along, every column of a
written tensor must satisfy, within the rounding of its dtype,

    |u^T w'| <= eps |w'|                                          (removal)
    |w' - (w - a (u^T a)^-1 u^T w)| <= (1 + feedback) eps |w'|    (nothing else)

``eps`` is the unit roundoff: what rounding each element to nearest can do to a column at most.  ``feedback`` allows for
the rows that take up the leak of all others: ``FEEDBACK_ROWS`` of them may each move by a few units in their last
place, which matters in narrow matrices (2.8 at width 128) and hardly in wide ones (0.5 at 4096).

The roundoff of FP8 and MXFP4 is larger than what a typical column has along ``u`` at all, so an unedited matrix would
pass the first bound: of these the whole matrix must in addition have lost all but ``KEPT`` of it, or what half a
smallest step in each column makes along ``u``, below which such a grid resolves nothing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import Codec
from abliterate.arch.formats import FORMATS
from abliterate.arch.model_map import Writer

KEPT = 2.0**-7
"""Share of what was there along ``u`` that may be left in a quantised matrix.  Measured: 1e-5 to 1e-4, in matrices 32
to 64 wide up to 5e-4."""

FEEDBACK_ROWS = 28
FEEDBACK_STEPS = 6.0
"""Units in the last place that a feedback row may move, per direction, relative to the column's root mean square."""

BLOCK_ELEMENTS = 2**17
"""Elements widened to float64 at a time: a megabyte, which stays in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorProof:
    """One edited tensor, as measured on the written bytes.

    ``left`` is ``|u^T W'| / |W'|`` and ``before`` is ``|u^T W| / |W|`` (Frobenius), ``error`` the distance to the exact
    edit, ``|W' - (W - a c)| / |W|``; ``worst_left`` and ``worst_error`` are the largest removal and equation residuals
    over its columns, as fractions of their bounds: above 1 is a failure.
    """

    name: str
    role: str
    before: float
    left: float
    error: float
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

    def __init__(self, writer: Writer, codec: Codec, read: Float[Tensor, "d k"], write: Float[Tensor, "d k"]) -> None:
        self.writer, self.codec = writer, codec
        self._u = read / torch.linalg.vector_norm(read, dim=0)
        self._a = write @ torch.linalg.inv(self._u.T @ write)
        self._digests = (hashlib.sha256(), hashlib.sha256())
        self._squares = torch.zeros(5, dtype=torch.float64)  # removed, total, left, total written, error
        self._worst = [0.0, 0.0]
        self._columns = 0
        self._format = FORMATS[writer.format]
        self._half_step = self._format.smallest_step / 2 * codec.largest_scale

    def hash(self, old: Tensor, new: Tensor) -> None:
        """Take note of the bytes, in file order."""
        for digest, raw in zip(self._digests, (old, new), strict=True):
            digest.update(raw.numpy())  # type: ignore[arg-type] - arrays are buffers

    def rows(self, old: Tensor, new: Tensor, first_row: int) -> None:
        """Stream vectors stored as rows, from ``first_row`` of the tensor on."""
        for _, before, after in self.pairs(old, new, first_row):
            c, c_new = before @ self._u, after @ self._u
            error = after - (before - c @ self._a.T)
            self._judge(c.T, c_new.T, error.square().sum(1), before.square().sum(1), after.square().sum(1))

    def columns(self, old: Tensor, new: Tensor, first_row: int) -> None:
        """A whole matrix of stream vectors stored as columns, which begins at ``first_row`` of the tensor."""
        columns = ColumnProver(self, first_row)
        columns.gather(old, 0)
        columns.compare(old, new, 0)
        columns.finish()

    def blocks(self, rows: Tensor, first_row: int) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
        """Values in float64, block by block, with the row of the tensor where each begins."""
        step = max(1, BLOCK_ELEMENTS // max(1, self.codec.values))
        for start in range(0, len(rows), step):
            yield first_row + start, self.codec.decode(rows[start : start + step], first_row + start, torch.float64)

    def pairs(self, old: Tensor, new: Tensor, first_row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The same for both."""
        for (row, before), (_, after) in zip(self.blocks(old, first_row), self.blocks(new, first_row), strict=True):
            yield row, before, after

    def finish(self) -> TensorProof:
        """The proof, once all of the tensor was seen."""
        removed, total, left, total_new, error = self._squares.sqrt().tolist()
        worst_left = self._worst[0]
        if self.writer.packed is not None and left > 0:
            resolved = self._half_step * float(self._u.abs().max()) * self._columns**0.5
            worst_left = max(worst_left, left / (KEPT * removed + resolved))
        return TensorProof(
            name=self.writer.tensor.name,
            role=self.writer.role,
            before=removed / total if total else 0.0,
            left=left / total_new if total_new else 0.0,
            error=error / total if total else 0.0,
            worst_left=worst_left,
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
        slack = self._half_step * self._u.shape[0] ** 0.5
        arithmetic = self._format.arithmetic_roundoff * (size + size_new)
        allowed = self._format.unit_roundoff * size_new + arithmetic + slack
        d, k = self._u.shape
        feedback = 1 + FEEDBACK_STEPS * k * min(1.0, FEEDBACK_ROWS / d) ** 0.5
        for place, (residual, factor) in enumerate(((c_new.abs().amax(0), 1.0), (error.sqrt(), feedback))):
            ratio = float((residual / (factor * allowed).clamp_min(1e-300)).amax()) if residual.numel() else 0.0
            self._worst[place] = max(self._worst[place], ratio) if ratio == ratio else float("inf")
        self._columns += c.shape[1]
        squares = (c.square(), total, c_new.square(), total_new, error)
        self._squares += torch.stack([part.sum() for part in squares])


class ColumnProver:
    """A matrix ``[d, n]`` that arrives in blocks of rows, twice: to gather ``u^T W``, then to be compared."""

    def __init__(self, prover: Prover, first_row: int) -> None:
        self._prover = prover
        self._first_row = first_row
        k, n = prover._u.shape[1], prover.codec.values
        self._c = torch.zeros(k, n, dtype=torch.float64)
        self._c_new = torch.zeros(k, n, dtype=torch.float64)
        self._error, self._total, self._total_new = (torch.zeros(n, dtype=torch.float64) for _ in range(3))

    def gather(self, old: Tensor, row: int) -> None:
        """First pass, over the base alone."""
        for place, before in self._prover.blocks(old, self._first_row + row):
            self._c += self._rows_of(self._prover._u, place, before).T @ before

    def compare(self, old: Tensor, new: Tensor, row: int) -> None:
        """Second pass, over both."""
        for place, before, after in self._prover.pairs(old, new, self._first_row + row):
            self._c_new += self._rows_of(self._prover._u, place, before).T @ after
            taken = self._rows_of(self._prover._a, place, before) @ self._c
            self._error += (after - (before - taken)).square().sum(0)
            self._total += before.square().sum(0)
            self._total_new += after.square().sum(0)

    def finish(self) -> None:
        """Judge the columns, once both passes are over."""
        self._prover._judge(self._c, self._c_new, self._error, self._total, self._total_new)

    def _rows_of(self, vectors: Float[Tensor, "d k"], place: int, block: Tensor) -> Float[Tensor, "rows k"]:
        row = place - self._first_row
        return vectors[row : row + len(block)]
