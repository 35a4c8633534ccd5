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


def is_whole(edit: Mapping[str, Any]) -> bool:
    """Whether every writer that there is was edited."""
    done, there = _coverage(edit)
    return done >= there


def removes(edit: Mapping[str, Any]) -> bool:
    """Whether nothing writes along what was chosen any more."""
    edits = edits_of(edit)
    return is_whole(edit) and len(edits) == 1 and bool(edits[0]["removes"])


def is_ablation(edit: Mapping[str, Any]) -> bool:
    """Whether it is directional ablation by weights: whatever writes is orthogonalized, and nothing else done to it."""
    its = edits_of(edit)[0]
    return removes(edit) and its["column_scale"] == "none" and not its.get("oblique")


def adds(edit: Mapping[str, Any]) -> bool:
    """Whether something is added to the stream, and nothing removed from it."""
    return all("added" in its for its in edits_of(edit))


def title(edit: Mapping[str, Any]) -> str:
    """What the checkpoint is, to follow the name of its base and a comma."""
    return "with a direction added" if adds(edit) else "abliterated"


def summary(edit: Mapping[str, Any]) -> str:
    """What was done to the checkpoint, to follow the word "with"."""
    edits, healed = edits_of(edit), ", and healed afterwards" if edit.get("healed") else ""
    if adds(edit):
        against = "" if edits[0]["added"] > 0 else ", against its sense,"
        return f"one direction added{against} to its residual stream, and nothing removed from it"
    if len(edits) > 1:
        return f"{len(edits)} edits, each at places of its own, of what writes to its residual stream{healed}"
    word = "removed from" if edits[0]["removes"] else "edited in"
    done, there = _coverage(edit)
    writers = "everything that writes" if is_whole(edit) else f"{done} of the {there} writers"
    return f"{_directions(edits[0], one='one direction')} {word} {writers} to its residual stream{healed}"


def method(edit: Mapping[str, Any]) -> str:
    """What such an edit is called, to come before the paper."""
    if adds(edit):
        return "activation addition, written into a bias"
    if is_ablation(edit):
        return "directional ablation as weight orthogonalization"
    return "an edit of weights along directions of the residual stream, after weight orthogonalization"


def effect(edit: Mapping[str, Any], *, complete: bool = True) -> str:
    """What to expect of the replies, to follow the word "it"; not ``complete`` is what expresses a part of the edit."""
    if removes(edit) and complete:
        return "will comply with many requests that the original declines"
    if adds(edit) and edits_of(edit)[0]["added"] > 0:
        return "may decline requests that the original answers, harmless ones too, or reply otherwise than the original"
    return "may comply with requests that the original declines, or reply otherwise than the original"


def details(edit: Mapping[str, Any]) -> list[str]:
    """A line for each edit, where there is more to say than that one direction was removed from everything."""
    edits = edits_of(edit)
    lines = [] if len(edits) == 1 and is_whole(edit) and _is_plain(edits[0]) else [_line(its) for its in edits]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more edits, which stand in `abliterate.json`"]
    if edit.get("given"):
        lines.append("the edit was given as it is: direction and recipe do not make it again, its file does")
    return lines


def equation(edit: Mapping[str, Any]) -> str:
    """The equation that the edited tensors satisfy."""
    if adds(edit):
        return "b' = b + v"
    plain = all(map(_is_plain, edits_of(edit)))
    its = "W' = W − r̂r̂ᵀW" if plain else "W' = (W − strength · write (readᵀW) + constant) · scale"
    if not edit.get("healed"):
        return its
    return f"{its} + BA with {'r̂' if plain else 'read'}ᵀB = 0"


MOST_LINES = 8
"""Edits that are told one by one."""


def _line(its: Mapping[str, Any]) -> str:
    if "added" in its:
        parts = [f"1 direction added, not removed: {its['added']:+.4g} along it"]
    else:
        parts = [f"{_directions(its, one='1 direction')} {'removed' if its['removes'] else 'edited'}"]
    if its["strength"] != 1 and "added" not in its:
        parts.append(f"strength {its['strength']:g}")
    if its.get("oblique"):
        parts.append("read along one, taken out along another")
    if its["column_scale"] != "none":
        parts.append("columns keep their lengths")
    if its.get("keeps_rows"):
        parts.append("rows keep their lengths, which puts a part of the direction back")
    if its["constant"] and "added" not in its:
        parts.append("a constant added")
    count = its.get("writers", 0)
    writers = f"{count} writer{'' if count == 1 else 's'}"
    where = " ".join(filter(None, [its.get("places", ""), f"({writers})" if "places" in its else writers]))
    return f"{where if count else 'these'}: {', '.join(parts)}"


def _directions(its: Mapping[str, Any], *, one: str) -> str:
    return one if its["directions"] == 1 else f"{its['directions']} directions"


def _is_plain(its: Mapping[str, Any]) -> bool:
    return {key: its[key] for key in REMOVAL} == REMOVAL and not its.get("oblique")  # kept rows do not remove


def _coverage(edit: Mapping[str, Any]) -> tuple[int, int]:
    """Writers that were edited, and writers that there are."""
    done, _, there = str(edit["coverage"]).partition(" of ")
    return int(done), int(there)
