"""The file that holds what an edit does to the residual stream: safetensors, never pickle.

Tensors ``vectors.N``, float64: ``read`` and ``write`` of edits ``[d, k]``, constants and scales of rows ``[d]``, each
different one once. The metadata is one JSON document under ``abliterate-edit``: which vectors each edit has, its
strength and column scale, and at which place which of the edits stands.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError
from abliterate.method.places import Kind, Place
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import ColumnScale, WeightEdit

KEY = "abliterate-edit"
FORMAT = 1
SHORTEST, LONGEST = 1e-6, 1e6
"""Lengths that a vector which is read may have; those that are written by an edit have length one."""
INDEPENDENT = 1e-9
"""The share of the largest singular value that the smallest of such vectors, at length one, must exceed."""
HINT = "give the file that an edit left in its folder, under abliterate/"


_Number = Annotated[int, Field(strict=True, ge=0)]


class _Edit(BaseModel):
    """One edit, its vectors by their numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    read: _Number
    write: _Number
    constant: _Number | None
    strength: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    column_scale: ColumnScale
    row_scale: _Number | None = None


class _Document(BaseModel):
    """The metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(strict=True, ge=1)]
    edits: tuple[_Edit, ...]
    everywhere: _Number | None
    places: tuple[tuple[_Number | None, Kind, _Number | None], ...]


def save(stream: StreamEdit, path: Path) -> Path:
    """Write ``stream`` to ``path``."""
    vectors: list[Tensor] = []

    def number(tensor: Tensor) -> int:
        for known, other in enumerate(vectors):
            if other.shape == tensor.shape and torch.equal(other, tensor):
                return known
        vectors.append(tensor)
        return len(vectors) - 1

    edits = list(stream.edits())
    numbers = {id(edit): place for place, edit in enumerate(edits)} | {id(None): None}
    document = {
        "format": FORMAT,
        "edits": [
            {
                "read": number(edit.read),
                "write": number(edit.write),
                "constant": None if edit.constant is None else number(edit.constant),
                "strength": edit.strength,
                "column_scale": edit.column_scale,
                **({} if edit.known_row_scale is None else {"row_scale": number(edit.known_row_scale)}),
            }
            for edit in edits
        ],
        "everywhere": numbers[id(stream.everywhere)],
        "places": [[layer, kind, numbers[id(edit)]] for (layer, kind), edit in stream.places.items()],
    }
    tensors = {f"vectors.{place}": tensor.contiguous().clone() for place, tensor in enumerate(vectors)}
    write_atomically(path, serialise(tensors, metadata={KEY: json.dumps(document, sort_keys=True)}))
    return path


def load(path: Path) -> StreamEdit:
    """Read what ``save`` wrote.

    Raises:
        SourceError: missing, damaged, or of a newer format than this version knows.
    """
    try:
        with safe_open(path, "pt") as handle:
            text = (handle.metadata() or {}).get(KEY, "")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:  # strange dtypes too
        raise SourceError(f"{path}: not a readable edit file ({error})", HINT) from error
    try:
        found: Any = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise SourceError(f"{path}: is of format {found['format']}, known is {FORMAT}", "update abliterate")
        return _stream_of(_Document.model_validate(found), tensors)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        why = "" if isinstance(error, RecursionError) else f" ({_first_line(error)})"
        raise SourceError(f"{path}: its parts do not fit together{why}", HINT) from error


def _stream_of(document: _Document, tensors: dict[str, Tensor]) -> StreamEdit:
    edits = [_edit_of(its, tensors) for its in document.edits]
    if len({edit.d_model for edit in edits}) > 1:
        raise ValueError("edits of different widths")
    places: dict[Place, WeightEdit | None] = {
        (layer, kind): None if number is None else edits[number] for layer, kind, number in document.places
    }
    if len(places) < len(document.places):
        raise ValueError("a place has two edits")
    everywhere = None if document.everywhere is None else edits[document.everywhere]
    return StreamEdit(everywhere=everywhere, places=places)


def _edit_of(its: _Edit, tensors: dict[str, Tensor]) -> WeightEdit:
    read, write = tensors[f"vectors.{its.read}"], tensors[f"vectors.{its.write}"]
    constant, scale = (
        None if number is None else tensors[f"vectors.{number}"] for number in (its.constant, its.row_scale)
    )
    if read.ndim != 2 or write.shape != read.shape or not 1 <= read.shape[1] <= read.shape[0]:
        raise ValueError("vectors of other shapes")
    of_rows = [part for part in (constant, scale) if part is not None]
    if any(part.shape != read.shape[:1] for part in of_rows):
        raise ValueError("a constant, or a scale, of another length")
    parts = [read, write, *of_rows]
    if not all(part.dtype == torch.float64 and bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError("values that are not finite, or no float64")
    lengths = torch.linalg.vector_norm(read, dim=0)
    if not bool(((lengths >= SHORTEST) & (lengths <= LONGEST)).all()):
        raise ValueError("a vector that is zero, or far too long")
    sizes: Tensor = torch.linalg.svdvals(read / lengths)
    if float(sizes[-1]) <= INDEPENDENT * float(sizes[0]):
        raise ValueError("vectors that depend on each other")
    edit = WeightEdit(
        read=read, write=write, strength=its.strength, column_scale=its.column_scale, constant=constant,
        keeps_rows=scale is not None, row_scale=scale,
    )  # fmt: skip
    if not bool(torch.isfinite(edit.kept).all()):
        raise ValueError("numbers too large to be multiplied")
    return edit


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
