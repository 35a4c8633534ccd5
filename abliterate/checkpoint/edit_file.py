"""The file that holds what an edit does to the residual stream: safetensors, never pickle.

Tensors ``edit.N.read``, ``edit.N.write`` (absent where it is the same) ``[d, k]`` and ``edit.N.constant`` ``[d]``,
float64. The metadata is one JSON document under ``abliterate-edit``: strength and column scale of each edit, and at
which place which of them stands.
"""

import json
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError
from abliterate.method.stream_edit import Kind, Place, StreamEdit
from abliterate.method.weight_edit import ColumnScale, WeightEdit

KEY = "abliterate-edit"
FORMAT = 1
HINT = "give the file that an edit left in its folder, under abliterate/"


class _Edit(BaseModel):
    """What is written of one edit beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    edits = list(stream.edits())
    numbers = {id(edit): number for number, edit in enumerate(edits)} | {id(None): None}
    tensors: dict[str, Tensor] = {}
    for number, edit in enumerate(edits):
        tensors[f"edit.{number}.read"] = edit.read.contiguous()
        if edit.write is not edit.read:
            tensors[f"edit.{number}.write"] = edit.write.contiguous()
        if edit.constant is not None:
            tensors[f"edit.{number}.constant"] = edit.constant.contiguous()
    document = {
        "format": FORMAT,
        "edits": [{"strength": edit.strength, "column_scale": edit.column_scale} for edit in edits],
        "everywhere": numbers[id(stream.everywhere)],
        "places": [[layer, kind, numbers[id(edit)]] for (layer, kind), edit in stream.places.items()],
    }
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
    for number, its in enumerate(document.edits):
        read = tensors[f"edit.{number}.read"]
        write, constant = tensors.get(f"edit.{number}.write", read), tensors.get(f"edit.{number}.constant")
        parts = [part for part in (read, write, constant) if part is not None]
        if read.ndim != 2 or write.shape != read.shape or any(p.dtype != torch.float64 for p in parts):
            raise ValueError("shapes or dtypes")
        if not all(torch.isfinite(part).all() for part in parts):
            raise ValueError("not finite")
        edits.append(
            WeightEdit(read=read, write=write, strength=its.strength, column_scale=its.column_scale, constant=constant)
        )
    if any(kind not in get_args(Kind) for _, kind, _ in document.places):
        raise ValueError("an unknown kind of place")
    at = [*edits, None]
    places: dict[Place, WeightEdit | None] = {
        (layer, kind): at[-1 if number is None else number] for layer, kind, number in document.places
    }
    return StreamEdit(everywhere=at[-1 if document.everywhere is None else document.everywhere], places=places)
