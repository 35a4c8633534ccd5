"""A direction as a control vector of llama.cpp: a GGUF file that adds a vector to what each block puts out.

Tensors ``direction.N``, float32 ``[d_model]``: added to what leaves block ``N``, counted from 0, which is what enters
block ``N + 1``.  So the candidate of layer ``l`` is ``direction.{l - 1}``; ``direction.0`` is not allowed there, so
layers 0 and 1 are left out.  The format is llama.cpp's and repeng's; strength and sign are given where it is used.

It adds the same whatever the stream holds.  An ablation takes out what the stream holds along a direction, so no file
of this kind can express one: that is a ``projection``, or an edit of the weights.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from abliterate.errors import UsageError
from abliterate.exports.gguf_file import write_gguf
from abliterate.method.directions import DirectionSet, Subspace

ARCHITECTURE = "controlvector"
FIRST_LAYER = 2
WHAT = "a control vector"

WAYS_OF_ABLATION = (
    "write a projection (abliterate export projection), or edit the weights (abliterate edit, handed on as a patch)"
)


def refuse_ablation() -> None:
    """Say why none can be had here, and where it can.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{WHAT} is added to the stream whatever that holds: it cannot take anything out, as ablation does",
        WAYS_OF_ABLATION,
    )


def vectors_of(directions: DirectionSet) -> Mapping[int, Float[Tensor, " d"]]:
    """By block, what is added to what leaves it: the chosen candidate's vector at its layer, or at each of its layers.

    Raises:
        UsageError: nothing was chosen, or nothing of it can be expressed.
    """
    chosen = directions.chosen
    if any(subspace.as_it_is for subspace in chosen.subspaces):
        raise UsageError(
            f"candidate {chosen.id} takes something out of what writers add, and nothing of it is added",
            "choose a candidate of another estimator, or edit the weights (abliterate edit, handed on as a patch)",
        )
    layers = [chosen.layer] if isinstance(chosen.subspace, Subspace) else sorted(chosen.subspace)
    found = {}
    for layer in layers:
        subspace = chosen.at(layer)
        if layer >= FIRST_LAYER and subspace is not None:
            found[layer - 1] = subspace.added
    if not found:
        raise UsageError(
            f"candidate {chosen.id} is of layer {layers[0]}, and {WHAT} begins at layer {FIRST_LAYER}",
            "choose a candidate of a later layer (--position and --layer)",
        )
    return found


def export(directions: DirectionSet, out: Path) -> list[int]:
    """Write the control vector of what was chosen; gives the blocks that add something.

    Raises:
        UsageError: the ``gguf`` library is missing, or nothing can be expressed.
        OutputError: ``out`` exists, or cannot be written.
    """
    found = vectors_of(directions)
    values = {
        f"{ARCHITECTURE}.model_hint": str(directions.metadata.get("model", "")),
        f"{ARCHITECTURE}.layer_count": len(found),
    }
    write_gguf(out, ARCHITECTURE, values, {f"direction.{block}": vector for block, vector in found.items()}, what=WHAT)
    return sorted(found)
