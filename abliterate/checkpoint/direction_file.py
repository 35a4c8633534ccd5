"""The file that holds directions: safetensors, never pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError, UsageError
from abliterate.method.directions import CandidateScore, Choice, DirectionSet
from abliterate.method.moments import Moments

FORMAT = "abliterate-direction-1"


def save(directions: DirectionSet, path: Path) -> Path:
    """Write a direction file: safetensors, never pickle.

    Tensors: ``candidates``, ``harmful_mean``, ``harmless_mean`` ``[positions, layers, d] float32`` and, once chosen,
    ``direction [d] float32``.  The metadata is one JSON document under the key ``abliterate``.
    """
    tensors = {
        "candidates": directions.candidates,
        "harmful_mean": directions.harmful_mean,
        "harmless_mean": directions.harmless_mean,
    }
    if directions.choice is not None:
        tensors["direction"] = directions.direction
    document = {
        "format": FORMAT,
        "layer_convention": "residual entering block l (resid_pre)",
        "positions": list(directions.positions),
        "scores": [asdict(score) for score in directions.scores],
        "choice": None if directions.choice is None else asdict(directions.choice),
        "measurement": dict(directions.metadata),
    }
    stored = {name: tensor.to(torch.float32).contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, serialise(stored, metadata={"abliterate": json.dumps(document, sort_keys=True)}))
    return path


def save_covariances(path: Path, found: Mapping[str, Moments]) -> Path:
    """Write the covariances of each class at the last position, and their means, for methods that want more than means.

    Tensors for each ``KIND``, "harmful" and "harmless": ``KIND_covariance [layers, d, d] float32``, divided by
    ``count - 1``, and ``KIND_mean [layers, d] float32``.  The metadata holds ``KIND_count``.
    """
    tensors = {}
    for kind, moments in found.items():
        if moments.covariance is None:
            raise AssertionError("covariances were measured")
        tensors[f"{kind}_covariance"] = moments.covariance.to(torch.float32)
        tensors[f"{kind}_mean"] = moments.mean[-1].to(torch.float32).contiguous()
    counts = {f"{kind}_count": str(moments.count) for kind, moments in found.items()}
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata={"format": "abliterate-covariance-1", **counts})
    temporary.replace(path)
    return path


def load(path: Path) -> DirectionSet:
    """Read a direction file written by ``save``, or any safetensors file with one vector called ``direction``.

    Raises:
        SourceError: the file is missing, corrupt, or holds no usable vector.
    """
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path}: not a readable direction file ({error})",
            "give a .safetensors file written by `abliterate measure` or `select`",
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SourceError(f"{path}: tensor '{name}' holds NaN or infinity", "measure the direction again")
    if "abliterate" in metadata:
        try:
            directions = _from_document(_Document.model_validate(json.loads(metadata["abliterate"])), tensors)
        except (KeyError, ValueError, UsageError) as error:
            raise SourceError(f"{path}: its parts do not fit together", "measure the direction again") from error
    elif "direction" in tensors and tensors["direction"].ndim == 1:
        directions = _from_vector(tensors["direction"], path.name)
    else:
        raise SourceError(f"{path}: no vector called 'direction'", "save it as a 1-D tensor under that name")
    if directions.choice is not None and not torch.any(directions.direction):
        raise SourceError(f"{path}: the direction is zero", "measure the direction again")
    return directions


class _Document(BaseModel):
    """The metadata that ``save`` writes, as far as it is read."""

    positions: tuple[int, ...]
    scores: tuple[CandidateScore, ...]
    choice: Choice | None
    measurement: dict[str, Any]


def _from_vector(vector: Tensor, name: str) -> DirectionSet:
    vector = vector.to(torch.float32)[None, None]
    return DirectionSet(
        candidates=vector,
        harmful_mean=torch.zeros_like(vector),
        harmless_mean=torch.zeros_like(vector),
        positions=(-1,),
        choice=Choice(position=-1, layer=0, rule="given"),
        metadata={"source": name},
    )


def _from_document(document: _Document, tensors: Mapping[str, Tensor]) -> DirectionSet:
    parts = {name: tensors[name] for name in ("candidates", "harmful_mean", "harmless_mean")}
    shapes = {tuple(tensor.shape) for tensor in parts.values()}
    if len(shapes) != 1 or parts["candidates"].ndim != 3 or len(parts["candidates"]) != len(document.positions):
        raise ValueError(f"shapes {shapes} for {len(document.positions)} positions")
    directions = DirectionSet(
        candidates=parts["candidates"],
        harmful_mean=parts["harmful_mean"],
        harmless_mean=parts["harmless_mean"],
        positions=document.positions,
        metadata=document.measurement,
        scores=document.scores,
    )
    choice = document.choice
    return directions if choice is None else directions.choose(choice.position, choice.layer, choice.rule)
