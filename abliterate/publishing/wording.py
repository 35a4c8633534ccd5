"""An edit in words, from what a manifest says of it."""

from collections.abc import Mapping, Sequence
from typing import Any

REMOVAL: Mapping[str, Any] = {
    "directions": 1, "strength": 1.0, "column_scale": "none", "constant": False, "removes": True
}  # fmt: skip
"""What manifests of version 1 do not say, as there was nothing else: one direction, removed."""


def edits_of(edit: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The different edits in the ``edit`` part of a manifest of any version."""
    return edit.get("edits") or [REMOVAL]


def summary(edit: Mapping[str, Any]) -> str:
    """What was done to the checkpoint, to follow the word "with"."""
    edits = edits_of(edit)
    done = "removed from" if all(its["removes"] for its in edits) else "edited in"
    where = "everything that writes to its residual stream"
    if len(edits) > 1:
        return f"{len(edits)} edits, each at places of its own, of what writes to its residual stream"
    count = edits[0]["directions"]
    return f"{'one direction' if count == 1 else f'{count} directions'} {done} {where}"


def details(edit: Mapping[str, Any]) -> list[str]:
    """A line for each edit that is more than the removal of one direction."""
    lines = []
    for its in edits_of(edit):
        if {key: its[key] for key in REMOVAL} == REMOVAL:
            continue
        parts = [f"{its['directions']} direction{'s' if its['directions'] > 1 else ''}"]
        parts.append("removed" if its["removes"] else f"strength {its['strength']:g}")
        if its["column_scale"] != "none":
            parts.append("columns keep their lengths")
        if its["constant"]:
            parts.append("a constant added")
        lines.append(f"{its['writers']} writers: {', '.join(parts)}")
    return lines


def equation(edit: Mapping[str, Any]) -> str:
    """The equation that the edited tensors satisfy."""
    if all({key: its[key] for key in REMOVAL} == REMOVAL for its in edits_of(edit)):
        return "W' = W − r̂r̂ᵀW"
    return "W' = (W − strength · write (readᵀW) + constant) · scale"
