"""The file that holds directions: safetensors, never pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from abliterate.checkpoint.format_number import check_format
from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError, UsageError
from abliterate.method.directions import GIVEN, Candidate, CandidateScore, DirectionSet, Subspace, given, grid
from abliterate.method.estimators import DIFFERENCE_OF_MEANS
from abliterate.method.moments import ActivationStats, Moments

VECTORS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CLASSES = ("harmful", "harmless")
FORMAT, NUMBER = "abliterate-direction-", 2
"""Of the format that is written.  Version 1, which knew differences of means alone, is read as well."""


def save(directions: DirectionSet, path: Path) -> Path:
    """Write a direction file: ``to_bytes``."""
    write_atomically(path, to_bytes(directions))
    return path


def to_bytes(directions: DirectionSet) -> bytes:
    """A direction file.

    Tensors, all float32: ``candidates [positions, layers, d]``, where an estimator made a vector for each position and
    layer; the vectors of every other candidate, ``subspace.N [d, k]``, and ``read.N [d, k]`` where it is read along
    others; the mean of each class, ``CLASS_mean [positions, layers, d]``, where it was measured; and the chosen
    ``direction [d]``, where it is one vector.
    The metadata is one JSON document under the key ``abliterate``.  It names the estimator of ``candidates``, lists the
    other candidates with the numbers of their tensors, and holds the scores column by column.
    """
    estimator, regular = _regular(directions)
    kinds = {} if directions.statistics is None else directions.statistics.moments
    tensors = {f"{kind}_mean": moments.mean for kind, moments in kinds.items()}
    if estimator is not None:
        shape = (len(directions.positions), directions.n_layers, directions.d_model)
        tensors["candidates"] = torch.stack([one.vector for one in regular.values()]).view(shape)
    others = _listed([one for one in directions.candidates if one.id not in regular], tensors)
    if directions.choice is not None and directions.chosen.is_vector:
        tensors["direction"] = directions.direction
    document = {
        "format": f"{FORMAT}{NUMBER}",
        "layer_convention": "residual entering block l (resid_pre)",
        "positions": list(directions.positions),
        "estimator": estimator,
        "others": others,
        "counts": {kind: moments.count for kind, moments in kinds.items()},
        "scores": {name: [getattr(score, name) for score in directions.scores] for name in _Scores.model_fields},
        "choice": None if directions.choice is None else asdict(directions.choice),
        "measurement": dict(directions.metadata),
    }
    stored = {name: tensor.to(torch.float32).contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return serialise(stored, metadata={"abliterate": text})


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
        SourceError: the file is missing, corrupt, of a newer format, or holds no usable vector.
    """
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:  # strange dtypes too
        raise SourceError(
            f"{path}: not a readable direction file ({error})",
            "give a .safetensors file written by `abliterate measure` or `select`",
        ) from error
    for name, tensor in tensors.items():
        ours = "abliterate" in metadata or name == "direction"  # a patch is a direction file, and holds bytes as well
        if ours and tensor.dtype not in VECTORS:
            raise SourceError(f"{path}: tensor '{name}' is stored as {tensor.dtype}", "save it as float32")
        if not torch.isfinite(tensor).all():
            raise SourceError(f"{path}: tensor '{name}' holds NaN or infinity", "measure the direction again")
    if "abliterate" in metadata:
        directions = _read(path, metadata["abliterate"], tensors)
    elif "direction" in tensors and tensors["direction"].ndim == 1:
        directions = given(tensors["direction"].to(torch.float32), {"source": path.name})
    else:
        raise SourceError(f"{path}: no vector called 'direction'", "save it as a 1-D tensor under that name")
    if directions.choice is not None and not any(torch.any(one.vectors) for one in directions.chosen.subspaces):
        raise SourceError(f"{path}: the direction is zero", "measure the direction again")
    return directions


# --- writing ----------------------------------------------------------------------------------------------------------


def _regular(directions: DirectionSet) -> tuple[str | None, dict[str, Candidate]]:
    """The first estimator that made one vector for each position and layer, and its candidates by id, in that order."""
    by_id = {one.id: one for one in directions.candidates if one.is_vector and set(one.provenance) == _OF_GRID}
    for estimator in dict.fromkeys(one.estimator for one in by_id.values()):
        wanted = [
            f"{estimator}/{position}/{layer}"
            for position in directions.positions
            for layer in range(directions.n_layers)
        ]
        if wanted and all(one in by_id for one in wanted):
            return estimator, {one: by_id[one] for one in wanted}
    return None, {}


def _listed(candidates: Sequence[Candidate], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """``candidates`` as plain data.  Their vectors are put into ``tensors``, each subspace once."""
    numbers: dict[int, int] = {}

    def number(subspace: Subspace) -> int:
        found = numbers.setdefault(id(subspace), len(numbers))
        tensors[f"subspace.{found}"] = subspace.vectors
        if subspace.read is not None:
            tensors[f"read.{found}"] = subspace.read
        return found

    return [
        {
            "id": one.id,
            "layer": one.layer,
            "provenance": dict(one.provenance),
            "subspace": number(one.subspace) if isinstance(one.subspace, Subspace) else None,
            "by_layer": None
            if isinstance(one.subspace, Subspace)
            else {layer: number(its) for layer, its in one.subspace.items()},
            "of_mlps": None if one.of_mlps is None else {layer: number(its) for layer, its in one.of_mlps.items()},
            "as_it_is": one.subspaces[0].as_it_is,
        }
        for one in candidates
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


class _Scores(BaseModel):
    """The scores, best first, column by column.  Where a candidate was read stands with the candidate.

    NaN is what is not known.  ``kl_stopped`` and ``kl_error_nats`` came later: in older files no KL was stopped, and
    how sure it is was not kept.
    """

    candidate: tuple[str, ...]
    bypass: tuple[float, ...]
    induce: tuple[float, ...]
    kl_nats: tuple[float, ...]
    verdict: tuple[str, ...]
    kl_stopped: tuple[bool, ...]
    kl_error_nats: tuple[float, ...]

    @model_validator(mode="before")
    @classmethod
    def _older(cls, columns: dict[str, Any]) -> dict[str, Any]:
        count = len(columns["verdict"])
        return {"kl_stopped": [False] * count, "kl_error_nats": [0.0] * count, **columns}


class _Choice(BaseModel):
    candidate: str
    rule: str


class _Listed(BaseModel):
    """A candidate with the number of its tensor, or one for each layer; what has a default came later."""

    id: str
    layer: int
    provenance: dict[str, Any]
    subspace: int | None
    by_layer: dict[int, int] | None
    of_mlps: dict[int, int] | None = None
    as_it_is: bool = False

    @property
    def numbers(self) -> set[int]:
        """Of all its tensors."""
        listed = {*(self.by_layer or {}).values(), *(self.of_mlps or {}).values()}
        return listed if self.subspace is None else {self.subspace, *listed}


class _Document(BaseModel):
    """The metadata that ``save`` writes, as far as it is read."""

    positions: tuple[int, ...]
    estimator: str | None
    others: tuple[_Listed, ...]
    counts: dict[str, int]
    scores: _Scores
    choice: _Choice | None
    measurement: dict[str, Any]


class _Version1(BaseModel):
    """What version 1 held in place of that."""

    positions: tuple[int, ...]
    scores: tuple[dict[str, Any], ...]
    choice: dict[str, Any] | None
    measurement: dict[str, Any]


def _read(path: Path, text: str, tensors: Mapping[str, Tensor]) -> DirectionSet:
    """What is in a file of ours.

    Raises:
        SourceError: its format is unknown or newer than this version, or its parts do not fit together.
    """
    try:
        document = json.loads(text)
        if check_format(document["format"], FORMAT, NUMBER, where=path) == 1:
            document = _upgraded(_Version1.model_validate(document), tensors)
        return _directions(_Document.model_validate(document), tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, UsageError) as error:
        raise SourceError(f"{path}: its parts do not fit together", "measure the direction again") from error


def _upgraded(document: _Version1, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A document of version 1 as one of version 2.  Where both means are zero, a vector was given, not measured."""
    measured = any(torch.any(tensors[f"{kind}_mean"]) for kind in CLASSES)
    estimator = DIFFERENCE_OF_MEANS if measured else GIVEN
    kept = document.measurement.get("kept", {})

    def named(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "candidate": f"{estimator}/{entry['position']}/{entry['layer']}"}

    scores = [named(score) for score in document.scores]
    return {
        "positions": document.positions,
        "estimator": estimator,
        "others": (),
        "counts": {kind: kept[f"{kind}_train"] if kept else 0 for kind in CLASSES} if measured else {},
        "scores": {name: [score[name] for score in scores] for name in _VERSION_1_SCORES},
        "choice": None if document.choice is None else named(document.choice),
        "measurement": document.measurement,
    }


def _directions(document: _Document, tensors: Mapping[str, Tensor]) -> DirectionSet:
    means = {kind: tensors[f"{kind}_mean"] for kind in document.counts}
    regular = {} if document.estimator is None else {"candidates": tensors["candidates"]}
    shapes = {tuple(tensor.shape) for tensor in (means | regular).values()}
    if len(shapes) > 1 or any(len(shape) != 3 or shape[0] != len(document.positions) for shape in shapes):
        raise ValueError(f"shapes {shapes} for {len(document.positions)} positions")
    moments = {kind: Moments(count=document.counts[kind], mean=mean) for kind, mean in means.items()}
    candidates = [
        *(one for vectors in regular.values() for one in grid(str(document.estimator), vectors, document.positions)),
        *_others(document.others, tensors),
    ]
    widths = {subspace.vectors.shape[0] for one in candidates for subspace in one.subspaces}
    if len(widths) != 1 or not all(one.subspaces for one in candidates):
        raise ValueError(f"widths {widths}")
    directions = DirectionSet(
        candidates=tuple(candidates),
        statistics=ActivationStats(positions=document.positions, moments=moments) if moments else None,
        metadata=document.measurement,
    )
    scores = []
    for row in zip(*document.scores.model_dump().values(), strict=True):
        score = dict(zip(_Scores.model_fields, row, strict=True))
        one = directions.named(score["candidate"])
        scores.append(CandidateScore(layer=one.layer, position=one.position, **score))
    directions = replace(directions, scores=tuple(scores))
    choice = document.choice
    return directions if choice is None else directions.choose_candidate(choice.candidate, choice.rule)


def _others(listed: Sequence[_Listed], tensors: Mapping[str, Tensor]) -> list[Candidate]:
    """The candidates that have tensors of their own; a subspace that several layers share stays one."""
    if not all("estimator" in one.provenance for one in listed):
        raise ValueError("a candidate comes from an estimator")
    subspaces = {
        n: Subspace(vectors=tensors[f"subspace.{n}"], read=tensors.get(f"read.{n}"), as_it_is=one.as_it_is)
        for one in listed
        for n in one.numbers
    }
    if any(its.ndim != 2 or its.shape != one.vectors.shape for one in subspaces.values() for its in one.tensors):
        raise ValueError("a subspace is a matrix, and so is what it is read along")
    return [
        Candidate(
            id=one.id,
            layer=one.layer,
            provenance=one.provenance,
            subspace=subspaces[one.subspace]
            if one.subspace is not None
            else {layer: subspaces[number] for layer, number in sorted((one.by_layer or {}).items())},
            of_mlps=None
            if one.of_mlps is None
            else {layer: subspaces[number] for layer, number in sorted(one.of_mlps.items())},
        )
        for one in listed
    ]


_VERSION_1_SCORES = ("candidate", "bypass", "induce", "kl_nats", "verdict")
_OF_GRID = {"estimator", "position"}
"""What there is to say about a candidate whose id says everything."""
