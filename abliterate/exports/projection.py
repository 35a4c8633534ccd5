"""A direction as a projection file (GLP): a GGUF file that says what a runtime is to take out of the stream.

It holds the tensors of a ``control_vector``, ``direction.N`` for what leaves block ``N`` (from 0; 0 itself is not
allowed), and keys that say what is to be done along them: ``h' = h - alpha r (r^T h)`` instead of ``h' = h + r``.

What is known of the format (as of November 2026) is what weightless says of it, whose plugins for vLLM and SGLang read
it: the tensors, and the keys ``glp.mode`` ("project" or "add"), ``glp.alpha_default``, ``glp.rank``,
``glp.hook_point`` and ``glp.spec_version``.  Not known, and our choice: the types of the keys, "resid_post" for what
leaves a block, and 1 as the version.  How several vectors of one block would lie in it is not known either: they are
refused, not guessed.  No file of ours was tried in a runtime.

llama.cpp knows none of these keys.  It would take such a file for a control vector, and add.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from abliterate.errors import UsageError
from abliterate.exports.control_vector import ARCHITECTURE, FIRST_LAYER
from abliterate.exports.gguf_file import write_gguf
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.linalg import unit

WHAT = "a projection"
HOOK_POINT = "resid_post"
SPEC_VERSION = 1
EDIT = "edit the weights (abliterate edit), and hand the edit on as a patch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A projection file that was written: from the stream behind which ``blocks`` (from 0) it takes something out."""

    out: Path
    blocks: tuple[int, ...]


def vectors_of(directions: DirectionSet, n_blocks: int | None = None) -> Mapping[int, Float[Tensor, " d"]]:
    """By block, the unit vector along which the stream behind it is projected.

    A candidate that is the same in all layers is taken out behind every block but the first.  One that differs from
    layer to layer is taken out where it was read: that of layer ``l`` of what leaves block ``l - 1``.  ``n_blocks`` is
    how many blocks the model has, for a file that holds no measurement.

    Raises:
        UsageError: nothing was chosen, it cannot be expressed, or the number of blocks is not known.
    """
    chosen = directions.chosen
    _check(chosen)
    if isinstance(chosen.subspace, Subspace):
        at = dict.fromkeys(range(FIRST_LAYER - 1, _blocks(directions, n_blocks)), chosen.subspace)
    else:
        at = {layer - 1: one for layer, one in sorted(chosen.subspace.items()) if layer >= FIRST_LAYER}
    found = {block: unit(subspace.vectors[:, 0]) for block, subspace in at.items() if subspace.usable}
    if not found:
        raise UsageError(
            f"candidate {chosen.id}: {WHAT} begins behind the second block, and there is nothing of it there", EDIT
        )
    return found


def _check(chosen: Candidate) -> None:
    """Check that what was chosen is one vector for each layer, taken out along itself.

    Raises:
        UsageError: it is not.
    """
    if chosen.of_mlps is not None:
        raise UsageError(
            f"candidate {chosen.id} has other vectors for MLPs than for attention: {WHAT} acts behind whole blocks",
            EDIT,
        )
    if any(subspace.as_it_is or subspace.read is not None for subspace in chosen.subspaces):
        raise UsageError(
            f"candidate {chosen.id} takes out something else than what it reads: that is no projection along it",
            f"choose a candidate of another estimator, or {EDIT}",
        )
    most = max(subspace.k for subspace in chosen.subspaces)
    if most > 1:
        raise UsageError(
            f"candidate {chosen.id} has {most} vectors: how {WHAT} holds several for one block is not known",
            f"take one of them (--category, or another candidate), or {EDIT}",
        )


def _blocks(directions: DirectionSet, n_blocks: int | None) -> int:
    """How many blocks the model has.

    Raises:
        UsageError: neither the file nor the caller says so, or they say different things.
    """
    measured = None if directions.statistics is None else directions.statistics.n_layers
    if measured is not None and n_blocks not in (None, measured):
        raise UsageError(
            f"--blocks says {n_blocks} blocks, the measurement in the direction file {measured}", "leave --blocks out"
        )
    count = n_blocks if measured is None else measured
    if count is None:
        raise UsageError(
            "the direction file holds no measurement, so it does not say how many blocks the model has",
            "say it with --blocks",
        )
    return count


def export(directions: DirectionSet, out: Path, *, n_blocks: int | None = None) -> Projection:
    """Write the projection of what was chosen.

    Raises:
        UsageError: the ``gguf`` library is missing, or it cannot be expressed.
        OutputError: ``out`` exists, or cannot be written.
    """
    found = vectors_of(directions, n_blocks)
    values = {
        f"{ARCHITECTURE}.model_hint": str(directions.metadata.get("model", "")),
        f"{ARCHITECTURE}.layer_count": len(found),
        "glp.mode": "project",
        "glp.alpha_default": 1.0,
        "glp.rank": 1,
        "glp.hook_point": HOOK_POINT,
        "glp.spec_version": SPEC_VERSION,
    }
    write_gguf(out, ARCHITECTURE, values, {f"direction.{block}": vector for block, vector in found.items()}, what=WHAT)
    return Projection(out=out, blocks=tuple(sorted(found)))
