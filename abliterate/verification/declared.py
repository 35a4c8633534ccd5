"""Does a plan declare what it says it does?  Its edits against the stream's, by a route of their own.

The proof on the bytes holds each writer against the edit that the plan declares for it.  Here those declarations are
held against what shall happen to the residual stream, with the gains of norms read again: a writer behind a norm with
gain ``g`` must read along ``g * r``, one without a norm along ``r`` itself, and take out as much.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.gains import read_gain
from abliterate.arch.model_map import Writer
from abliterate.arch.packed import text_config
from abliterate.method.weight_edit import WeightEdit

TAKE_A_CONSTANT = ("embedding", "stored copy of the tied head", "projector bias")

AGREEMENT = 1e-8
"""Of unit vectors in float64, with room for gains of very different size."""


def check_declared(plan: EditPlan) -> list[str]:
    """What is wrong with the declared edits of a plan, as sentences."""
    if plan.stream is None:
        return ["the plan has no edit: nothing was checked"]
    failures, known = [], set()
    for writer in plan.writers:
        wanted, edit = plan.stream.at(*writer.place), plan.edits.get(writer.tensor.name)
        key = (id(wanted), id(edit), writer.norms)
        if key in known:
            continue
        known.add(key)
        if wanted is None or edit is None:
            failures.append(f"'{writer.tensor.name}' is edited, and should not be")
        elif not _agree(plan, writer, wanted, edit):
            failures.append(f"the edit of '{writer.tensor.name}' is not what shall happen to the stream")
    return failures


def _agree(plan: EditPlan, writer: Writer, wanted: WeightEdit, edit: WeightEdit) -> bool:
    gain = read_gain(plan.checkpoint.folder, writer) if writer.norms else torch.ones(edit.d_model, dtype=torch.float64)
    same_read = _distance(_span(gain[:, None] * wanted.read), _span(edit.read)) < AGREEMENT
    same_rank = wanted.rank == edit.rank and wanted.strength == edit.strength
    same_scale = wanted.column_scale == edit.column_scale
    if not (same_read and same_rank and same_scale and _same_constant(plan, writer, wanted, edit)):
        return False
    if writer.norms:  # which ``write`` is closest to the hook is a choice; that ``read^T write`` stays is not
        return torch.dist(wanted.kept.diagonal(), edit.kept.diagonal()).item() < AGREEMENT
    return torch.dist(_operator(wanted), _operator(edit)).item() < AGREEMENT * (1 + float(wanted.write.norm()))


def _same_constant(plan: EditPlan, writer: Writer, wanted: WeightEdit, edit: WeightEdit) -> bool:
    """The embedding takes the constant, divided by its scale; elsewhere one bias does; all others take none."""
    takes = writer.role in TAKE_A_CONSTANT if writer.place[1] == "embedding" else len(writer.tensor.shape) == 1
    if wanted.constant is None or not takes or writer.drafts:
        return edit.constant is None
    config = text_config(plan.checkpoint.config)
    factor = 1.0 if writer.role.endswith(" bias") else plan.model_map.family.scale_of_embedding(config)
    return edit.constant is not None and torch.dist(factor * edit.constant, wanted.constant).item() < AGREEMENT * (
        1 + float(wanted.constant.norm())
    )


def _span(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    u, s, _ = torch.linalg.svd(vectors / torch.linalg.vector_norm(vectors, dim=0), full_matrices=False)
    return u[:, s > 1e-6 * s[0]]


def _distance(first: Float[Tensor, "d k"], second: Float[Tensor, "d r"]) -> float:
    """Between the subspaces that two orthonormal bases span; infinite for different dimensions."""
    if first.shape != second.shape:
        return float("inf")
    return float(torch.linalg.matrix_norm(second - first @ (first.T @ second), ord=2))


def _operator(edit: WeightEdit) -> Float[Tensor, "d k"]:
    """``write read^T`` on a few fixed vectors: enough to tell two operators of low rank apart."""
    probe = torch.randn(edit.d_model, 2 * edit.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return edit.write @ (edit.read.T @ probe)
