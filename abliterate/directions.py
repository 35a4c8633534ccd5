"""Directions of the residual stream: candidates, the one that was chosen, and the file that holds them.

Layer ``l`` is always the residual *entering* block ``l`` (``resid_pre``, ``hidden_states[l]`` for ``l < L``); position
``-1`` is the last token of the prompt.  The state after the final norm is never a candidate.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError, UsageError
from abliterate.moments import Moments

FORMAT = "abliterate-direction-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """How one candidate behaves (Arditi et al. 2024, appendix C).

    ``bypass``: mean refusal metric on harmful prompts with the candidate ablated (lower is better).
    ``induce``: mean refusal metric on harmless prompts with the candidate added at its layer (must be >= 0).
    ``kl_nats``: mean KL(base || ablated) at the last position of harmless prompts.
    ``verdict``: "kept", or the rule that discards it.
    """

    position: int
    layer: int
    bypass: float
    induce: float
    kl_nats: float
    verdict: str = "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which candidate was taken, and by which rule ("arditi-2024", "pareto-fallback", "given")."""

    position: int
    layer: int
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DirectionSet:
    """All candidates of one measurement, and what was chosen from them.

    ``candidates[p, l]`` is the raw difference of means ``harmful - harmless`` at ``positions[p]`` entering block ``l``.
    """

    candidates: Float[Tensor, "positions layers d"]
    harmful_mean: Float[Tensor, "positions layers d"]
    harmless_mean: Float[Tensor, "positions layers d"]
    positions: tuple[int, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[CandidateScore, ...] = ()
    choice: Choice | None = None

    @property
    def n_layers(self) -> int:
        """Number of blocks, and so of layers with candidates."""
        return self.candidates.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.candidates.shape[2]

    def candidate(self, position: int, layer: int) -> Float[Tensor, " d"]:
        """The raw candidate at a negative token offset and layer.

        Raises:
            UsageError: no such candidate was measured.
        """
        if position not in self.positions or not 0 <= layer < self.n_layers:
            raise UsageError(
                f"there is no candidate at position {position}, layer {layer}",
                f"positions are {list(self.positions)}, layers 0 to {self.n_layers - 1}",
            )
        return self.candidates[self.positions.index(position), layer]

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of ``direction``, as hexadecimal."""
        return hashlib.sha256(self.direction.contiguous().numpy().tobytes()).hexdigest()

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """The chosen raw direction.

        Raises:
            UsageError: nothing was chosen yet.
        """
        if self.choice is None:
            raise UsageError(
                "this direction file holds candidates but no choice",
                "run `abliterate select` on it, or name one with --position and --layer",
            )
        return self.candidate(self.choice.position, self.choice.layer)

    def choose(self, position: int, layer: int, rule: str = "given") -> "DirectionSet":
        """A copy with the candidate at ``position``, ``layer`` chosen."""
        self.candidate(position, layer)
        return replace(self, choice=Choice(position=position, layer=layer, rule=rule))


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
