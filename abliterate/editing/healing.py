"""Healing as a part of the plan: what is added to edited writers, orthogonal to what the edit reads."""

from collections.abc import Mapping
from dataclasses import replace

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.errors import CheckpointError, PlanRefusedError
from abliterate.method.weight_edit import LowRank

HINT = "give the folder as abliterate wrote it, or heal the edited checkpoint again"


def healable(plan: EditPlan) -> tuple[Writer, ...]:
    """The writers of ``plan`` that something may be added to: plain linear layers of blocks.

    Raises:
        PlanRefusedError: there are none, or the edit promises lengths that would not last.
    """
    if any(edit.scales or edit.keeps_rows for edit in plan.distinct_edits):
        raise PlanRefusedError(
            f"{plan.checkpoint.name}: its edit keeps the lengths of columns or rows, and healing would change them",
            "heal an edit that keeps no lengths, such as the default one",
        )
    if any(edit.added is not None for edit in plan.distinct_edits):
        raise PlanRefusedError(
            f"{plan.checkpoint.name}: the edited checkpoint was healed already", "heal the one that it was made from"
        )
    found = tuple(writer for writer in plan.writers if _takes_more(writer))
    if not found:
        raise PlanRefusedError(
            f"{plan.checkpoint.name}: no edited writer is a plain linear layer, so there is nothing to heal with",
            "use the edited checkpoint as it is",
        )
    return found


def healed(plan: EditPlan, added: Mapping[str, LowRank]) -> EditPlan:
    """``plan`` with what healing adds to its writers, by tensor name.

    Raises:
        PlanRefusedError: nothing may be added to such an edit.
        CheckpointError: ``added`` does not fit its writers.
    """
    writers = {writer.tensor.name: writer for writer in healable(plan)}
    for name, its in added.items():
        shape = writers[name].tensor.shape if name in writers else None
        if shape is None or (its.b.shape[0], its.a.shape[1]) != shape or its.b.shape[1] != its.a.shape[0]:
            why = "is not in the plan" if shape is None else f"has the shape {list(shape)}"
            raise CheckpointError(f"what healed {plan.checkpoint.name} does not fit: '{name}' {why}", HINT)
    rank = max(its.b.shape[1] for its in added.values())
    note = (
        f"healed: a trained matrix of rank {rank} is added to {len(added)} writers, orthogonal to what was edited; it "
        "no longer equals what hooks make of the base alone"
    )
    edits = {name: replace(edit, added=added.get(name)) for name, edit in plan.edits.items()}
    return replace(plan, edits=edits, notes=(*plan.notes, note))


def _takes_more(writer: Writer) -> bool:
    plain = writer.packed is None and not writer.in_rows and len(writer.tensor.shape) == 2
    return plain and writer.layer is not None and not writer.drafts and ".experts." not in writer.name
