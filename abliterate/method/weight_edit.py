"""What happens to one writer, as a value.  Everything that edits, proves, previews or hands on an edit reads it.

A *writer* is a matrix (or bias) whose output is added to the residual stream.  Here it always stands as ``W`` of shape
``(d, n)``: the residual axis first, one column per thing it can write.  Every edit has the form

    W' = diag(row_scale) (W - strength * write (read^T W) + constant 1^T) diag(column_scale)

and so, whatever made it, every edited writer whose rows are not scaled satisfies the *post-condition*

    read^T W' = (kept (read^T W) + read^T constant 1^T) diag(column_scale),       kept = I - strength read^T write

``kept = 0`` and no constant: nothing can make ``W'`` write along ``read``.  Scaled rows turn what is written, and a
part of it comes to lie along ``read`` again: such an edit never removes a direction.

A *healed* writer gets ``b a`` beside its edit, with ``read^T b = 0``: ``W' + b a`` satisfies the same post-condition.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ColumnScale = Literal["none", "kept norms"]
"""What ``diag(column_scale)`` is: the identity, or what gives every column the length it had before the edit."""

ROUNDING = 1e-9
"""Entries of ``kept`` below this are the rounding of float64 arithmetic."""

FEEDBACK_RANK = 32
"""Of an edit along more directions than this every element is rounded to nearest: rows that take up the leak of all
others would be most rows, each at the cost of inverting a matrix of this width."""

NOTHING_LEFT = 2.0**-20
"""Share of a column's squared length: a column of which less is left keeps the length it is left with, as the rest is
mostly rounding and would be blown up with it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What healing adds to one writer: ``b a``, the residual axis first; ``b`` in float64, ``a`` in float32."""

    b: Float[Tensor, "d k"]
    a: Float[Tensor, "k n"]

    def to(self, dtype: torch.dtype) -> "LowRank":
        """Both in ``dtype``."""
        return LowRank(b=self.b.to(dtype), a=self.a.to(dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightEdit:
    """One edit, its vectors in float64.

    Attributes:
        read: what is taken from a column, one unit vector for each direction.
        write: what it is taken out along.  ``read is write`` for an orthogonal edit.
        strength: 1 takes it out, 0 leaves the writer alone.
        column_scale: "kept norms" gives every column its length back, which leaves what is zero along ``read`` zero;
            but for columns of which hardly anything is left (``NOTHING_LEFT``).
        constant: what every column gains; None for nothing.
        keeps_rows: whether every row of a writer gets the length back that it had before the edit.
        row_scale: what each row is multiplied by for that; None while the weights have not been read.
        predicted_error: relative distance to hook ablation that an isotropic write would see (0 when exact).
        ridge: the weight of the regularisation chosen by ``edits.behind_norm``.
        added: what healing adds to the edited writer, orthogonal to ``read``; None for nothing.
    """

    read: Float[Tensor, "d k"]
    write: Float[Tensor, "d k"]
    strength: float = 1.0
    column_scale: ColumnScale = "none"
    constant: Float[Tensor, " d"] | None = None
    keeps_rows: bool = False
    row_scale: Float[Tensor, " d"] | None = None
    predicted_error: float = 0.0
    ridge: float = 0.0
    added: LowRank | None = None

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.read.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.read.shape[1]

    @cached_property
    def kept(self) -> Float[Tensor, "k k"]:
        """What the edit leaves of ``read^T W``: ``I - strength read^T write``, exact zeros where only rounding is."""
        left = torch.eye(self.rank, dtype=torch.float64) - self.strength * (self.read.T @ self.write)
        return torch.where(left.abs() <= ROUNDING, torch.zeros_like(left), left)

    @property
    def removes(self) -> bool:
        """Whether nothing is left along ``read``."""
        return not self.kept.any() and self.constant is None and not self.keeps_rows

    @property
    def adds(self) -> bool:
        """Whether it adds a constant and does nothing else."""
        return not self.strength and self.constant is not None and not self.scales and not self.keeps_rows

    @property
    def is_oblique(self) -> bool:
        """Whether it takes out along other vectors than it reads."""
        return self.read is not self.write and not torch.equal(self.read, self.write)

    @property
    def scales(self) -> bool:
        """Whether columns get another length than the edit leaves them."""
        return self.column_scale != "none"

    @property
    def known_row_scale(self) -> Float[Tensor, " d"] | None:
        """``row_scale``, None where rows are not scaled.

        Raises:
            ValueError: rows keep their lengths, and what that takes was not read from the weights.
        """
        if self.keeps_rows and self.row_scale is None:
            raise ValueError("the lengths of rows were not read from the weights")
        return self.row_scale

    def expected(self, coefficients: Float[Tensor, "k n"]) -> Float[Tensor, "k n"] | None:
        """``read^T W'`` before any scale of rows or columns, given ``read^T W``; None for zero."""
        if not self.kept.any() and self.constant is None:
            return None
        left = self.kept.to(coefficients.dtype) @ coefficients
        if self.constant is not None:
            left = left + (self.read.T @ self.constant).to(coefficients.dtype)[:, None]
        return left
