"""The command that shows what is in a direction file."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, show_json

if TYPE_CHECKING:
    from abliterate.method.directions import Candidate, DirectionSet

SHADES = " ░▒▓█"
"""Cosines from 0 to 1, by fifths; the sign is not shown."""


@guarded
def directions(
    file: opt.DirectionFile,
    other: Annotated[Path | None, typer.Argument(help="Another direction file, to compare with.")] = None,
    json: opt.Json = False,
) -> None:
    """Show what is in a direction file: estimators, layers, scores, stability, cosines; or compare two files.

    Example: abliterate directions edited/abliterate/direction.safetensors
    """
    from abliterate.checkpoint import direction_file

    first = direction_file.load(file)
    second = None if other is None else direction_file.load(other)
    found = {**_summary(first), **({} if second is None else {"compared": _compared(first, second)})}
    if json:
        show_json(found)
        return
    from abliterate.cli.search import show_search
    from abliterate.cli.tables import runs_of, show_selection, table

    shown = table(f"{file.name}: {len(first.candidates)} candidates, width {first.d_model}", *_COLUMNS, right=(1,))
    for name, its in found["estimators"].items():
        shown.add_row(name, str(its["candidates"]), its["vectors"], runs_of(its["layers"]))
    out.print(shown)
    show_selection(first)
    show_search(first)
    if found["cosines"]:
        of = "categories" if found["categories"] else "layers, at the position"
        out.print(f"cosines of the {of} of what was chosen:")
        names = found["categories"] or [str(layer) for layer in range(len(found["cosines"]))]
        width = max(3, *map(len, names))
        for name, row in zip(names, found["cosines"], strict=True):
            shades = "".join(SHADES[min(len(SHADES) - 1, int(abs(value) * len(SHADES)))] * 2 for value in row)
            out.print(f"{name:>{width}} {shades}", markup=False, highlight=False)
    if second is not None:
        compared = found["compared"]
        if compared["chosen"] is not None:
            out.print(f"what was chosen in both: cosine {compared['chosen']:.4f}", markup=False)
        if compared["shared"]:
            line = f"{compared['shared']} candidates of the same name: cosine {compared['mean']:.4f} on average"
            out.print(f"{line}, least {compared['least']:.4f} ({compared['least_of']})", markup=False)
        else:
            out.print("no candidate of the same name is in both")


_COLUMNS = ("estimator", "candidates", "vectors each", "layers")


def _summary(directions: "DirectionSet") -> dict[str, Any]:
    """What is in a file, as plain data."""
    estimators: dict[str, Any] = {}
    for name, count in Counter(one.estimator for one in directions.candidates).items():
        its = [one for one in directions.candidates if one.estimator == name]
        estimators[name] = {
            "candidates": count,
            "vectors": _vectors(its),
            "layers": sorted({one.layer for one in its}),
        }
    choice = directions.choice
    return {
        "estimators": estimators,
        "choice": None if choice is None else {"candidate": choice.candidate, "rule": choice.rule},
        "stability": directions.stability,
        "categories": [] if choice is None else list(directions.categories),
        "cosines": _cosines(directions),
    }


def _vectors(candidates: "list[Candidate]") -> str:
    """How many vectors each has, and how they are meant."""
    parts = {str(its.k) for one in candidates for its in one.subspaces}
    text = ", ".join(sorted(parts, key=int))
    if any(not one.is_orthogonal and len(one.subspaces) > 1 for one in candidates):
        text += " a layer"
    return text + (", read along others" if any(its.read is not None for its in candidates[0].subspaces) else "")


def _cosines(directions: "DirectionSet") -> list[list[float]]:
    """Of the categories of what was chosen; else of all layers, of its estimator and at its position."""
    from abliterate.method.linalg import cosine

    if directions.choice is None:
        return []
    chosen = directions.chosen
    its = [
        one.vector
        for one in directions.candidates
        if chosen.is_vector and one.is_vector and (one.estimator, one.position) == (chosen.estimator, chosen.position)
    ]
    if directions.categories:
        its = list(chosen.everywhere.vectors.T)
    return [[round(float(cosine(a, b)), 4) for b in its] for a in its] if len(its) > 1 else []


def _compared(first: "DirectionSet", second: "DirectionSet") -> dict[str, Any]:
    """How far two files agree: cosines of vectors, mean cosines of the principal angles of subspaces.

    Raises:
        UsageError: their widths differ.
    """
    from abliterate.errors import UsageError
    from abliterate.method.estimators import agreement

    if first.d_model != second.d_model:
        raise UsageError(
            f"one file is of width {first.d_model}, the other of width {second.d_model}",
            "compare directions of models of one width",
        )
    others = {one.id: one for one in second.candidates}
    shared = {
        one.id: agreement(one, others[one.id])
        for one in first.candidates
        if one.id in others and len(one.subspaces) == len(others[one.id].subspaces)
    }
    shared = {name: value for name, value in shared.items() if not math.isnan(value)}
    least = min(shared, key=lambda name: shared[name], default=None)
    both = first.choice is not None and second.choice is not None
    alike = both and len(first.chosen.subspaces) == len(second.chosen.subspaces)
    return {
        "chosen": round(agreement(first.chosen, second.chosen), 6) if alike else None,
        "shared": len(shared),
        "mean": round(sum(shared.values()) / len(shared), 6) if shared else None,
        "least": None if least is None else round(shared[least], 6),
        "least_of": least,
    }
