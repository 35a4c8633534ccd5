"""The proof of one edited tensor, from the equation: what was written against what should have been.

With ``u`` the directions that are read (unit columns), ``a`` the vectors they are taken out along, ``s`` the strength,
``c`` the constant, ``k`` what gives a column its length back (or 1) and ``D`` what does so for rows (or 1), every
column ``w`` of the base and ``w'`` of the result must satisfy, within the rounding of the stored dtype,

    |u^T w' - k (u^T D w - s (u^T D a) (u^T w) + u^T D c)| <= eps |w'|    (the post-condition)
    |w' - k D (w - s a (u^T w) + c)| <= (1 + feedback) eps |w'|           (and nothing else)

Of a writer that was healed the second has ``b a`` beside the edit of ``w``, and the first stays as it is: what healing
adds must hold nothing along ``u``.

The first says that nothing is left along ``u`` where the edit removes.  ``eps`` is the unit roundoff: what rounding
each element to nearest can do to a column at most.  ``feedback`` allows for the rows that take up the leak of all
others: ``FEEDBACK_ROWS`` of them may each move by a few units in their last place, which matters in narrow matrices
(2.8 at width 128) and hardly in wide ones (0.5 at 4096).

The roundoff of FP8 and MXFP4 is larger than what a typical column has along ``u`` at all, so an unedited matrix would
pass the first bound: of these the whole matrix must in addition have lost all but ``KEPT`` of what it should lose, or
what half a smallest step in each column makes along ``u``, below which such a grid resolves nothing.
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
from abliterate.method.weight_edit import FEEDBACK_RANK, NOTHING_LEFT, WeightEdit

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

    ``before`` is ``|u^T W| / |W|`` (Frobenius), ``left`` how far ``u^T W'`` is from what the edit leaves, relative to
    ``|W'|``: the residual fraction, where the edit ``removes``.  ``error`` is the distance to the exact edit relative
    to ``|W|``.  ``worst_left`` and ``worst_error`` are the largest residuals of post-condition and equation over its
    columns, as fractions of their bounds: above 1 is a failure.  ``kept_along`` is ``|u^T W'| / |u^T W|``: what the
    written bytes still hold along ``u`` of what the base did.
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
    removes: bool = True
    kept_along: float = 0.0
    keeps_rows: bool = False
    healed: bool = False

    @property
    def ok(self) -> bool:
        """Both residuals are within their bounds (NaN is not)."""
        return self.worst_left <= 1.0 and self.worst_error <= 1.0


class Prover:
    """Takes a tensor and its written counterpart block by block, and finds the worst column."""

    def __init__(self, writer: Writer, codec: Codec, edit: WeightEdit) -> None:
        self.writer, self.codec, self.edit = writer, codec, edit
        lengths = torch.linalg.vector_norm(edit.read, dim=0)
        self._u, self._a = edit.read / lengths, edit.strength * edit.write * lengths
        self._removes, self._row_scale = edit.removes, edit.known_row_scale
        self._turned = self._u if self._row_scale is None else self._row_scale[:, None] * self._u
        self.row_squares = torch.zeros(2, len(self._u), dtype=torch.float64)
        self._digests = (hashlib.sha256(), hashlib.sha256())
        self._squares = torch.zeros(7, dtype=torch.float64)  # in the order of ``finish``
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
            c, c_new = (before @ self._u).T, (after @ self._u).T
            along = c if self._row_scale is None else (before @ self._turned).T
            exact = before - c.T @ self._a.T
            if self.edit.constant is not None:
                exact = exact + self.edit.constant
            total = before.square().sum(1)
            scale = self.scale(total, exact.square().sum(1))
            exact = exact if scale is None else exact * scale[:, None]
            error = after - (exact if self._row_scale is None else exact * self._row_scale)
            self._judge(
                c, c_new, self.left_along(c, along, scale), scale, error.square().sum(1), total, after.square().sum(1)
            )
            self.see_rows(slice(None), before.T, after.T)

    def scale(self, before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        """What gives edited columns of squared length ``after`` their length back; None where they are not to have it.

        A column of which nothing is left stays as it is.
        """
        if not self.edit.scales:
            return None
        nothing = after <= NOTHING_LEFT * before
        return torch.where(nothing, 1.0, (before / torch.where(nothing, 1.0, after)).sqrt())

    def see_rows(self, rows: slice, before: Float[Tensor, "rows n"], after: Float[Tensor, "rows n"]) -> None:
        """Take note of the lengths of rows, where they are to be what they were."""
        if self._row_scale is not None:
            for squares, values in zip(self.row_squares, (before, after), strict=True):
                squares[rows] += values.square().sum(1)

    def left_along(
        self, c: Float[Tensor, "k n"], along: Float[Tensor, "k n"], scale: Float[Tensor, " n"] | None
    ) -> Float[Tensor, "k n"]:
        """``u^T W'`` as it must be, given ``u^T W`` and ``u^T D W``."""
        left = torch.zeros_like(c) if self._removes else along - (self._turned.T @ self._a) @ c
        if self.edit.constant is not None:
            left = left + (self._turned.T @ self.edit.constant)[:, None]
        return left if scale is None else left * scale

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
        removed, total, left, total_new, error, before, after = self._squares.sqrt().tolist()
        worst_left = self._worst[0]
        if self.writer.packed is not None and left > 0:
            resolved = self._half_step * float(self._u.abs().max()) * self._columns**0.5
            worst_left = max(worst_left, left / (KEPT * removed + resolved))
        return TensorProof(
            name=self.writer.tensor.name,
            role=self.writer.role,
            before=before / total if total else 0.0,
            left=left / total_new if total_new else 0.0,
            error=error / total if total else 0.0,
            worst_left=worst_left,
            worst_error=self._worst[1],
            sha256_before=self._digests[0].hexdigest(),
            sha256_after=self._digests[1].hexdigest(),
            removes=self._removes,
            kept_along=after / before if before else 0.0,
            keeps_rows=self.edit.keeps_rows,
            healed=self.edit.added is not None,
        )

    def _judge(
        self,
        c: Float[Tensor, "k n"],
        c_new: Float[Tensor, "k n"],
        expected: Float[Tensor, "k n"],
        scale: Float[Tensor, " n"] | None,
        error: Float[Tensor, " n"],
        total: Float[Tensor, " n"],
        total_new: Float[Tensor, " n"],
    ) -> None:
        """Hold the columns against their bounds; ``error`` and the totals are squared lengths."""
        size, size_new = total.sqrt(), total_new.sqrt()
        wrong = c_new - expected
        slack = self._half_step * self._u.shape[0] ** 0.5
        arithmetic = self._format.arithmetic_roundoff * (size + size_new)
        if scale is not None:
            arithmetic = arithmetic * scale.square().clamp_min(
                1.0
            )  # what is left of a column, and its rounding with it
        allowed = self._format.unit_roundoff * size_new + arithmetic + slack
        d, k = self._u.shape
        feedback = 1 + (FEEDBACK_STEPS * k * min(1.0, FEEDBACK_ROWS / d) ** 0.5 if k <= FEEDBACK_RANK else 0)
        for place, (residual, factor) in enumerate(((wrong.abs().amax(0), 1.0), (error.sqrt(), feedback))):
            ratio = float((residual / (factor * allowed).clamp_min(1e-300)).amax()) if residual.numel() else 0.0
            self._worst[place] = max(self._worst[place], ratio) if ratio == ratio else float("inf")
        self._columns += c.shape[1]
        squares = ((c - expected).square(), total, wrong.square(), total_new, error, c.square(), c_new.square())
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
        self._turned = torch.zeros_like(self._c) if prover._row_scale is not None else self._c
        self._along, self._base = torch.zeros(k, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        self._scale: Tensor | None = None
        added = prover.edit.added
        self._added = None if added is None else added.to(torch.float64)
        self._gathered = False

    def gather(self, old: Tensor, row: int) -> None:
        """First pass, over the base alone; where columns keep their lengths, those are taken as well."""
        for place, before in self._prover.blocks(old, self._first_row + row):
            self._c += self._rows_of(self._prover._u, place, before).T @ before
            if self._prover._row_scale is not None:
                self._turned += self._rows_of(self._prover._turned, place, before).T @ before
            if self._prover.edit.scales:
                self._along += self._rows_of(self._prover._a, place, before).T @ before
                self._base += before.square().sum(0)

    def _end_of_gathering(self) -> None:
        """``|w - a c|^2 = |w|^2 - 2 (a^T w) c + c^T a^T a c`` tells the scale of each column."""
        a, c = self._prover._a, self._c
        after = self._base - ((2 * self._along - (a.T @ a) @ c) * c).sum(0)
        self._scale, self._gathered = self._prover.scale(self._base, after), True

    def compare(self, old: Tensor, new: Tensor, row: int) -> None:
        """Second pass, over both."""
        if not self._gathered:
            self._end_of_gathering()
        for place, before, after in self._prover.pairs(old, new, self._first_row + row):
            self._c_new += self._rows_of(self._prover._u, place, before).T @ after
            exact = before - self._rows_of(self._prover._a, place, before) @ self._c
            if self._prover.edit.constant is not None:
                exact = exact + self._rows_of(self._prover.edit.constant[:, None], place, before)
            exact = exact if self._scale is None else exact * self._scale
            if self._added is not None:
                exact = exact + self._rows_of(self._added.b, place, before) @ self._added.a
            if self._prover._row_scale is not None:
                exact = exact * self._rows_of(self._prover._row_scale[:, None], place, before)
                row = place - self._first_row
                self._prover.see_rows(slice(row, row + len(before)), before, after)
            self._error += (after - exact).square().sum(0)
            self._total += before.square().sum(0)
            self._total_new += after.square().sum(0)

    def finish(self) -> None:
        """Judge the columns, once both passes are over."""
        expected = self._prover.left_along(self._c, self._turned, self._scale)
        self._prover._judge(self._c, self._c_new, expected, self._scale, self._error, self._total, self._total_new)

    def _rows_of(self, vectors: Float[Tensor, "d k"], place: int, block: Tensor) -> Float[Tensor, "rows k"]:
        row = place - self._first_row
        return vectors[row : row + len(block)]
