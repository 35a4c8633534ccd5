"""The edit and its inverse from a patch: the same bits on every machine.

The edit itself sums ``read^T W`` by whatever BLAS there is, and another one rounds another way.  Here the sums are
taken once, where the patch is made, and stored as coefficients ``c`` (one float for each column and direction); what
follows is element by element, or added in a fixed order, so that all machines agree:

    W' ~ scale W - shift,      shift = scale (strength write c - constant)

(``scale`` is 1 unless columns keep their lengths; feedback rows: + share leak, as in ``rounding.round_tail``).

Forwards, ``W'`` is the rounding of that but for a few elements in ten thousand.  Backwards, ``W'`` tells where ``W``
was before rounding: within half a step of ``W'`` around ``(W' + shift) / scale``.  Where the values of the dtype lie as
far apart there as at ``W'``, that is one value.  Where ``|W'|`` has grown past a power of two they lie closer, and
which one it was is lost in ``W'``: those bits, and no others, must be stored.

The leak of the feedback rows needs all other rows of both matrices, which are known by then in either direction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.arch.codecs import Codec
from abliterate.editing.reading import rows_of_block
from abliterate.exports.patches.bitstreams import Intervals, Sparse, ordinal, value
from abliterate.method.rounding import GRAM_TOLERANCE, feedback_rows
from abliterate.method.weight_edit import WeightEdit

SLACK = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-10, torch.float32: 2.0**-12, torch.float64: 2.0}
"""By how much the arithmetic of the edit may miss, in half steps of the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredEdit:
    """What a patch holds of an edit.

    ``write`` is times its strength; ``shares`` are the coefficients of the leak in each feedback row.
    """

    read: Float[Tensor, "d k"]
    write: Float[Tensor, "d k"]
    rows: Int[Tensor, " rows"]
    shares: Float[Tensor, "rows k"]
    constant: Float[Tensor, " d"] | None = None

    @classmethod
    def of(cls, edit: WeightEdit, *, feedback: bool) -> "StoredEdit":
        """Of one edit; without ``feedback`` every element was rounded to nearest."""
        rows = feedback_rows(edit.read) if feedback else []
        tail = edit.read[rows]
        shares = [
            tail[place] @ torch.linalg.pinv(tail[place:].T @ tail[place:], rtol=GRAM_TOLERANCE, hermitian=True)
            for place in range(len(rows))
        ]
        return cls(
            read=edit.read,
            write=edit.strength * edit.write,
            rows=torch.tensor(rows, dtype=torch.long),
            shares=torch.stack(shares) if shares else torch.zeros(0, edit.rank, dtype=torch.float64),
            constant=edit.constant,
        )


Scale = Float[Tensor, " n"] | None
"""What each column is multiplied by; None for 1."""


@runtime_checkable
class Settle(Protocol):
    """Makes both matrices of what is known of them: ``(known, shift, scale) -> (base, edited)``."""

    def __call__(self, known: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> tuple[Tensor, Tensor]:
        """``known`` is ``[rows, n]``, or both stacked."""
        ...


def exact(old: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> Float[Tensor, "rows n"]:
    """The edited values before rounding."""
    wide = old.to(torch.float64)
    return wide - shift if scale is None else wide * scale - shift


def rounded(old: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> Tensor:
    """The first guess of the edited values."""
    return exact(old, shift, scale).to(old.dtype)


def expected(new: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> tuple[Tensor, Tensor]:
    """The lowest ordinal of a base value that rounds to ``new``, and how many there are (at least one)."""
    bits = ordinal(new.abs())
    here = new.abs().to(torch.float64)
    step = value(bits + 1, new.dtype).to(torch.float64) - here
    step = torch.where(torch.isfinite(step), step, here - value((bits - 1).clamp_min(0), new.dtype).to(torch.float64))
    centre = new.to(torch.float64) + shift
    half = 0.5 * step * (1 + SLACK[new.dtype])
    if scale is not None:
        centre, half = centre / scale, half / scale
    ends = []
    for end, side in ((centre - half, 1), (centre + half, -1)):
        nearest = end.to(new.dtype)
        beyond = nearest.to(torch.float64) < end if side == 1 else nearest.to(torch.float64) > end
        ends.append(ordinal(nearest) + side * beyond.to(bits.dtype))
    return ends[0], (ends[1] - ends[0] + 1).clamp_min(1)


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Both matrices are known: what the other two will need is written down."""

    forward: Sparse = field(default_factory=Sparse)
    backward: Intervals = field(default_factory=Intervals)

    def __call__(self, known: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> tuple[Tensor, Tensor]:
        """``known`` holds base and edited."""
        old, new = known[0], known[1]
        self.forward.write(ordinal(new) - ordinal(rounded(old, shift, scale)))
        self.backward.write(ordinal(old), *expected(new, shift, scale))
        return old, new


@dataclass(slots=True)
class Forwards:
    """The base is known."""

    corrections: Sparse

    def __call__(self, known: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> tuple[Tensor, Tensor]:
        """Base and edited."""
        return known, value(self.corrections.read_onto(ordinal(rounded(known, shift, scale))), known.dtype)


@dataclass(slots=True)
class Backwards:
    """The edited matrix is known."""

    corrections: Intervals

    def __call__(self, known: Tensor, shift: Float[Tensor, "rows n"], scale: Scale = None) -> tuple[Tensor, Tensor]:
        """Base and edited."""
        return value(self.corrections.read(*expected(known, shift, scale)), known.dtype), known


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorReplay:
    """All that is known of one tensor: ``settle`` for its blocks, ``tail`` for its feedback rows.

    Two, because where a matrix is larger than memory, its feedback rows come when all else was written.
    """

    edit: StoredEdit
    coefficients: Float[Tensor, "k columns"]
    settle: Settle
    tail: Settle
    scale: Float[Tensor, " columns"] | None = None

    def walk(self, columns: slice) -> "Walk":
        """Through one matrix, or some rows that are stream vectors."""
        return Walk(self, self.coefficients[:, columns], None if self.scale is None else self.scale[columns])


class Walk:
    """One matrix ``[d, n]`` from its first row to its last, then its feedback rows.

    ``known`` blocks are ``[rows, n]``, or ``[2, rows, n]`` where both matrices are known.
    """

    def __init__(self, tensor: TensorReplay, c: Float[Tensor, "k n"], scale: Scale = None) -> None:
        self._edit, self._settle, self._tail = tensor.edit, tensor.settle, tensor.tail
        self._c = c.to(torch.float64)
        self._scale = None if scale is None else scale.to(torch.float64)
        self._leak = torch.zeros_like(self._c)
        self._held: dict[int, Tensor] = {}

    def block(self, known: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Base and edited of the rows from ``row`` on; feedback rows hold nothing yet."""
        count = known.shape[-2]
        shift = self._shift(slice(row, row + count))
        mine = [int(its) - row for its in self._edit.rows if row <= its < row + count]
        read = self._edit.read[row : row + count]
        if not mine:
            old, new = self._settle(known, shift, self._scale)
            self._gather(read, old, new, shift)
            return old, new
        for place in mine:
            self._held[row + place] = known[..., place : place + 1, :].clone()
        keep = torch.ones(count, dtype=torch.bool)
        keep[mine] = False
        found = torch.empty(2, count, known.shape[-1], dtype=known.dtype)
        if keep.any():
            old, new = self._settle(known[..., keep, :], shift[keep], self._scale)
            self._gather(read[keep], old, new, shift[keep])
            found[0, keep], found[1, keep] = old, new
        return found[0], found[1]

    def finish(self) -> list[tuple[int, Tensor, Tensor]]:
        """The feedback rows one after the other, as ``(row, base, edited)``."""
        found = []
        for place, row in enumerate(self._edit.rows.tolist()):
            shift = self._shift(slice(row, row + 1))
            taken = shift + _combine(self._edit.shares[place : place + 1], self._leak)
            old, new = self._tail(self._held.pop(row), taken, self._scale)
            found.append((row, old[0], new[0]))
            self._gather(self._edit.read[row : row + 1], old, new, shift)
        return found

    def _shift(self, rows: slice) -> Float[Tensor, "rows n"]:
        shift = _combine(self._edit.write[rows], self._c)
        if self._edit.constant is not None:
            shift = shift - self._edit.constant[rows, None]
        return shift if self._scale is None else shift * self._scale

    def _gather(self, read: Float[Tensor, "rows k"], old: Tensor, new: Tensor, shift: Float[Tensor, "rows n"]) -> None:
        """``leak += read^T (W' - (scale W - shift))``."""
        error = new.to(torch.float64) - exact(old, shift, self._scale)
        for direction in range(read.shape[1]):
            self._leak[direction] += _sum(read[:, direction, None] * error)


def _combine(vectors: Float[Tensor, "rows k"], c: Float[Tensor, "k n"]) -> Float[Tensor, "rows n"]:
    """``vectors @ c``, multiplied and added one direction after the other."""
    total = vectors[:, 0, None] * c[0]
    for direction in range(1, len(c)):
        total = total + vectors[:, direction, None] * c[direction]
    return total


def _sum(rows: Float[Tensor, "rows n"]) -> Float[Tensor, " n"]:
    """The sum of the rows by halves: element by element, so that every machine adds in the same order."""
    while len(rows) > 1:
        half = len(rows) // 2
        odd = rows[2 * half :]
        rows = torch.cat((rows[:half] + rows[half : 2 * half], odd)) if len(odd) else rows[:half] + rows[half:]
    return rows[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """One stored tensor changed in place by a patch, as ``blocks.TensorEdit`` does it by the edit.

    ``tensor`` is called when the first of its bytes are there.  ``side`` is 1 where the base is known and the edited
    values are stored, 0 the other way round.
    """

    tensor: Callable[[], TensorReplay]
    codec: Codec
    side: int

    def block_rows(self) -> int:
        """How many rows on disk make a block."""
        return rows_of_block(self.codec.values)

    def edit_rows(self, rows: Tensor, first_row: int) -> None:
        """Stream vectors stored as rows."""
        step = self.block_rows()
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            walk = self.tensor().walk(slice(first_row + start, first_row + start + len(part)))
            found = walk.block(part.T, 0)[self.side]
            part.copy_(found.T)
            for row, *both in walk.finish():
                part[:, row] = both[self.side]

    def edit_columns(self, matrix: Tensor, first_row: int) -> None:
        """Stream vectors stored as columns, the whole matrix at hand."""
        columns = self.columns(first_row)
        for step in columns.passes:
            step(matrix, 0)
        for row, values in columns.finish():
            matrix[row] = values

    def columns(self, first_row: int) -> "ColumnReplay":
        """The same where the matrix, which begins at ``first_row`` of a stack, arrives in blocks."""
        return ColumnReplay(self, first_row)


class ColumnReplay:
    """As ``blocks.ColumnEdit``: one pass is enough, as the coefficients are known."""

    def __init__(self, edit: Replay, first_row: int) -> None:
        self._edit, self._first_row = edit, first_row
        self._walk: Walk | None = None

    @property
    def passes(self) -> tuple[Callable[[Tensor, int], None], ...]:
        """What to do with each block ``(rows, place of its first row)``."""
        return (self._apply,)

    def finish(self) -> list[tuple[int, Tensor]]:
        """The values of the feedback rows."""
        rows = self._walk.finish() if self._walk is not None else []
        return [(row, both[self._edit.side]) for row, *both in rows]

    def _apply(self, block: Tensor, first_row: int) -> None:
        if self._walk is None:
            tensor, n = self._edit.tensor(), self._edit.codec.values
            place = self._first_row // len(tensor.edit.read) * n
            self._walk = tensor.walk(slice(place, place + n))
        step = self._edit.block_rows()
        for start in range(0, len(block), step):
            part = block[start : start + step]
            part.copy_(self._walk.block(part, first_row + start)[self._edit.side])
