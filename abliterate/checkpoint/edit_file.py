"""The file that holds what an edit does to the residual stream: safetensors, never pickle.

Tensors ``vectors.N``, float64: ``read`` and ``write`` of edits ``[d, k]``, and constants ``[d]``, each different one
once. The metadata is one JSON document under ``abliterate-edit``: which vectors each edit has, its strength and column
scale, and at which place which of the edits stands.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
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
HINT = "give the file that an edit left in its folder, under abliterate/"


class _Edit(BaseModel):
    """One edit, its vectors by their numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    read: int
    write: int
    constant: int | None
    strength: float
    column_scale: ColumnScale


class _Document(BaseModel):
    """The metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    edits: tuple[_Edit, ...]
    everywhere: int | None
    places: tuple[tuple[int | None, Kind, int | None], ...]


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
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path}: not a readable edit file ({error})", HINT) from error
    try:
        found: Any = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise SourceError(f"{path}: is of format {found['format']}, known is {FORMAT}", "update abliterate")
        return _stream_of(_Document.model_validate(found), tensors)
    except (ValueError, KeyError, IndexError, TypeError, ValidationError) as error:
        raise SourceError(f"{path}: its parts do not fit together", HINT) from error


def _stream_of(document: _Document, tensors: dict[str, Tensor]) -> StreamEdit:
    edits: list[WeightEdit | None] = []
    for its in document.edits:
        read, write = tensors[f"vectors.{its.read}"], tensors[f"vectors.{its.write}"]
        constant = None if its.constant is None else tensors[f"vectors.{its.constant}"]
        parts = [part for part in (read, write, constant) if part is not None]
        if read.ndim != 2 or write.shape != read.shape or not all(map(_usable, parts)):
            raise ValueError("shapes, dtypes, or values that are not finite")
        edits.append(
            WeightEdit(read=read, write=write, strength=its.strength, column_scale=its.column_scale, constant=constant)
        )
    at = [*edits, None]
    places: dict[Place, WeightEdit | None] = {
        (layer, kind): at[-1 if number is None else number] for layer, kind, number in document.places
    }
    return StreamEdit(everywhere=at[-1 if document.everywhere is None else document.everywhere], places=places)


def _usable(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64 and bool(torch.isfinite(tensor).all())
