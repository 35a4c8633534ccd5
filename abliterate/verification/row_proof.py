"""The proof that rows of writers kept their lengths, where that is the edit: on the written bytes."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.formats import FORMATS
from abliterate.method.places import Place
from abliterate.verification.tensor_proof import FEEDBACK_STEPS

RowSquares = Float[Tensor, "2 d"]
"""Squared lengths of the rows of a tensor: in the base, and as written."""


def check_rows(plan: EditPlan, rows: Mapping[str, RowSquares]) -> list[str]:
    """What is wrong with the lengths of rows, as sentences; a row goes through all matrices of a place.

    Rounding moves each element of a row by at most the roundoff of its format, and elements of the feedback rows by
    some units in their last place more, relative to a row of mean length.  Rows of which the edit leaves nothing are
    not scaled, and not looked at.
    """
    totals: dict[Place, Tensor] = {}
    roundoff: dict[Place, float] = {}
    for writer in plan.writers:
        squares = rows.get(writer.tensor.name)
        if squares is not None and len(writer.tensor.shape) > 1:
            totals[writer.place] = totals.get(writer.place, torch.zeros_like(squares)) + squares
            its = FORMATS[writer.format]
            roundoff[writer.place] = max(roundoff.get(writer.place, 0.0), its.unit_roundoff + its.arithmetic_roundoff)
    failures = []
    for place, squares in totals.items():
        edit = None if plan.stream is None else plan.stream.at(*place)
        if edit is None or edit.row_scale is None:
            failures.append(f"what the rows of {place} are to be multiplied by is not known")
            continue
        before, after = squares.sqrt()
        mean = before.square().mean().sqrt()
        off = (after - before).abs() / (roundoff[place] * (before + FEEDBACK_STEPS * edit.rank * mean)).clamp_min(
            1e-300
        )
        worst = float(off[edit.row_scale != 1].max()) if bool((edit.row_scale != 1).any()) else 0.0
        if not worst <= 1:
            where = f"the {place[1]} of block {place[0]}" if place[0] is not None else f"the {place[1]}"
            failures.append(
                f"rows of {where} have other lengths than in the base: {worst:,.1f} times what rounding explains"
            )
    return failures
