"""A direction as a control vector of llama.cpp: a GGUF file that adds a vector to what each block puts out.

Tensors ``direction.N``: added to what leaves block ``N``, counted from 0, which is what enters block ``N + 1``.  So the
candidate of layer ``l`` is ``direction.{l - 1}``; ``direction.0`` is not allowed there, so layers 0 and 1 are left
out.  The format is llama.cpp's and repeng's; strength and sign are given where it is used.
"""

from pathlib import Path

from abliterate.errors import OutputError, UsageError
from abliterate.method.directions import DirectionSet, Subspace

ARCHITECTURE = "controlvector"
FIRST_LAYER = 2


def vectors_of(directions: DirectionSet) -> dict[int, list[float]]:
    """By block, what is added to what leaves it: the chosen candidate's vector at its layer, or at each of its layers.

    Raises:
        UsageError: nothing was chosen, or nothing of it can be expressed.
    """
    chosen = directions.chosen
    if any(subspace.as_it_is for subspace in chosen.subspaces):
        raise UsageError(
            f"candidate {chosen.id} takes something out of what writers add, and nothing of it is added",
            "choose a candidate of another estimator",
        )
    layers = [chosen.layer] if isinstance(chosen.subspace, Subspace) else sorted(chosen.subspace)
    found = {}
    for layer in layers:
        subspace = chosen.at(layer)
        if layer >= FIRST_LAYER and subspace is not None:
            found[layer - 1] = subspace.added.tolist()
    if not found:
        raise UsageError(
            f"candidate {chosen.id} is of layer {layers[0]}, and a control vector begins at layer {FIRST_LAYER}",
            "choose a candidate of a later layer (--position and --layer)",
        )
    return found


def export(directions: DirectionSet, out: Path) -> list[int]:
    """Write the control vector of what was chosen; gives the blocks that add something.

    Raises:
        UsageError: the ``gguf`` library is missing, or nothing can be expressed.
        OutputError: ``out`` exists.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "a control vector is a GGUF file, and the gguf library is missing", "pip install 'abliterate[gguf]'"
        ) from error
    import numpy as np

    found = vectors_of(directions)
    if out.exists():
        raise OutputError(f"{out}: exists already", "choose another name, or delete it")
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", str(directions.metadata.get("model", "")))
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(found))
    for block, vector in found.items():
        writer.add_tensor(f"direction.{block}", np.array(vector, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
    return sorted(found)
