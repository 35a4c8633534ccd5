"""Does a plan declare what it says it does?  Its edits against the stream's, by a route of their own.

The proof on the bytes holds each writer against the edit that the plan declares for it.  Here those declarations are
held against what shall happen to the residual stream, with the gains of norms read again: a writer behind a norm with
gain ``g`` must read along ``g * r``, one without a norm along ``r`` itself, and take out as much.  What healing adds to
a writer must hold nothing of what that reads.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.gains import read_gain
from abliterate.arch.model_map import Writer
from abliterate.arch.packed import text_config
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit

TAKE_A_CONSTANT = ("embedding", "stored copy of the tied head", "projector bias")

AGREEMENT = 1e-8
"""Of unit vectors in float64, with room for gains of very different size."""


def check_declared(plan: EditPlan) -> list[str]:
    """What is wrong with the declared edits of a plan, as sentences."""
    if plan.stream is None:
        return ["the plan has no edit: nothing was checked"]
    failures, known = _not_planned(plan, plan.stream), set()
    for writer in plan.writers:
        wanted, edit = plan.stream.at(*writer.place), plan.edits.get(writer.tensor.name)
        key = (id(wanted), id(edit), writer.norms, writer.role, writer.drafts, len(writer.tensor.shape))
        if key in known:
            continue
        known.add(key)
        if wanted is None or edit is None:
            failures.append(f"'{writer.tensor.name}' is edited, and should not be")
        elif not _agree(plan, writer, wanted, edit):
            failures.append(f"the edit of '{writer.tensor.name}' is not what shall happen to the stream")
        elif not _orthogonal(edit):
            failures.append(f"what healing adds to '{writer.tensor.name}' writes along what was edited")
    return failures


def _orthogonal(edit: WeightEdit) -> bool:
    """Whether what healing adds holds nothing along what the edit reads, and nothing else was promised of lengths."""
    if edit.added is None:
        return True
    b, along = edit.added.b, _span(edit.read).T @ edit.added.b
    return not edit.scales and not edit.keeps_rows and float(along.norm()) <= AGREEMENT * float(b.norm())


def _agree(plan: EditPlan, writer: Writer, wanted: WeightEdit, edit: WeightEdit) -> bool:
    gain = read_gain(plan.checkpoint.folder, writer) if writer.norms else torch.ones(edit.d_model, dtype=torch.float64)
    same_read = _distance(_span(gain[:, None] * wanted.read), _span(edit.read)) < AGREEMENT
    same_rank = wanted.rank == edit.rank and wanted.strength == edit.strength
    same_scale = wanted.column_scale == edit.column_scale and wanted.keeps_rows == edit.keeps_rows
    if not (
        same_read
        and same_rank
        and same_scale
        and _same_rows(wanted, edit)
        and _same_constant(plan, writer, wanted, edit)
    ):
        return False
    if writer.norms:
        return _agree_behind(gain, wanted, edit)
    return torch.dist(_operator(wanted), _operator(edit)).item() < AGREEMENT * (1 + float(wanted.write.norm()))


def _same_rows(wanted: WeightEdit, edit: WeightEdit) -> bool:
    if wanted.row_scale is None or edit.row_scale is None:
        return wanted.row_scale is edit.row_scale
    return torch.equal(wanted.row_scale, edit.row_scale)


def _not_planned(plan: EditPlan, stream: StreamEdit) -> list[str]:
    """Writers that the edit of the stream reaches, and the plan leaves out without its options saying so."""
    planned = {writer.tensor.name for writer in plan.writers}
    kept = plan.tied == "keep" and plan.model_map.tied
    wanted = [
        writer.tensor.name
        for writer in plan.model_map.writers
        if stream.at(*writer.place) is not None
        and not (kept and writer.role == "embedding")
        and (plan.mtp or not writer.drafts)
    ]
    return [f"writer '{name}' is not in the plan, and should be" for name in wanted if name not in planned]


def _agree_behind(gain: Float[Tensor, " d"], wanted: WeightEdit, edit: WeightEdit) -> bool:
    """Behind a norm ``read^T write`` must stay what it is in the stream; which ``write`` gives it is a choice.

    No choice is farther from the hook than the one orthogonal to ``g * r``.
    """
    lengths = torch.linalg.vector_norm(gain[:, None] * wanted.read, dim=0)
    kept = lengths[:, None] * edit.kept / lengths
    taken = gain[:, None] * wanted.write / lengths
    farthest = taken @ torch.linalg.pinv(edit.read.T @ taken) @ (edit.read.T @ edit.write)
    safe = torch.where(gain == 0, torch.full_like(gain, 1e-12), gain)
    ideal = wanted.write / safe[:, None] * lengths
    ours, most = (_distance_to_hook(gain, write, ideal) for write in (edit.write, farthest))
    return torch.dist(kept, wanted.kept).item() < AGREEMENT and ours <= most * (1 + AGREEMENT) + AGREEMENT


def _distance_to_hook(gain: Float[Tensor, " d"], write: Float[Tensor, "d k"], ideal: Float[Tensor, "d k"]) -> float:
    """``J^2`` of docs/post-norm.md, for an isotropic write."""
    size, d = write.square().sum(0), len(gain)
    turn = (gain[:, None] * (write - ideal)).square().sum(0) / gain.square().sum()
    return float((turn + ((size - 2) / (2 * d)).square() + 2 * (size / (2 * d)).square()).mean())


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
