"""Directions of the residual stream: candidates, and the one that was chosen.

Layer ``l`` is always the residual *entering* block ``l`` (``resid_pre``, ``hidden_states[l]`` for ``l < L``); position
``-1`` is the last token of the prompt.  The state after the final norm is never a candidate.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import UsageError
from abliterate.method.linalg import orthonormal_basis
from abliterate.method.moments import ActivationStats

GIVEN = "given"
"""Stands for an estimator where a vector comes from elsewhere, and for a rule where somebody named a candidate."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subspace:
    """The span of ``vectors``, columns of any lengths and angles.  Ablation needs the span, addition the lengths.

    ``read``: along what a stream is read for what is taken out along ``vectors`` (LEACE); None: along these themselves.
    ``as_it_is``: what is taken out is ``vectors read^T s`` and no more, which need not be all that is read.
    """

    vectors: Float[Tensor, "d k"]
    read: Float[Tensor, "d k"] | None = None
    as_it_is: bool = False

    @property
    def k(self) -> int:
        """Number of vectors."""
        return self.vectors.shape[1]

    @property
    def basis(self) -> Float[Tensor, "d rank"]:
        """Orthonormal basis of the span, in float64.

        Raises:
            ValueError: all vectors are zero, or one is not finite.
        """
        return orthonormal_basis(self.vectors)

    @property
    def added(self) -> Float[Tensor, " d"]:
        """What activation addition adds: the vector itself; of several, their mean."""
        return self.vectors[:, 0] if self.k == 1 else self.vectors.mean(1)

    def to(self, dtype: torch.dtype) -> "Subspace":
        """With its vectors in ``dtype``: itself, where they are that already."""
        if self.vectors.dtype == dtype and (self.read is None or self.read.dtype == dtype):
            return self
        return replace(self, vectors=self.vectors.to(dtype), read=None if self.read is None else self.read.to(dtype))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return (self.vectors,) if self.read is None else (self.vectors, self.read)

    @property
    def usable(self) -> bool:
        """Whether all vectors are finite, and one of them is not zero."""
        return all(bool(torch.isfinite(its).all() and torch.any(its != 0)) for its in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A subspace that may be the one to remove.

    ``id`` is unique in a set and stays the same from file to file: estimator, then what tells its candidates apart, as
    in "difference-of-means/-1/12" (position, layer).
    ``subspace`` is one for all layers, or one for each layer that the mapping names.  ``of_mlps``: those of the MLPs,
    where these have others than the attention of their layer.
    ``layer``: where it was read, and where addition adds it.
    ``provenance`` is plain data: the "estimator", the "position" if it was read at one, and whatever else made it.
    """

    id: str
    subspace: Subspace | Mapping[int, Subspace]
    layer: int
    provenance: Mapping[str, Any]
    of_mlps: Mapping[int, Subspace] | None = None

    @property
    def estimator(self) -> str:
        """The name of what made it."""
        return str(self.provenance["estimator"])

    @property
    def position(self) -> int | None:
        """The negative token offset it was read at, if there is one."""
        return self.provenance.get("position")

    @property
    def subspaces(self) -> tuple[Subspace, ...]:
        """The one subspace, or those of the layers, from the first layer on, and then those of the MLPs."""
        if isinstance(self.subspace, Subspace):
            return (self.subspace,)
        return tuple(its[layer] for its in (self.subspace, self.of_mlps or {}) for layer in sorted(its))

    def with_subspaces(self, change: Callable[[Subspace], Subspace]) -> "Candidate":
        """The same with other subspaces: ``change`` is called once for each, though several layers share it."""
        if isinstance(self.subspace, Subspace):
            return replace(self, subspace=change(self.subspace))
        different = {id(its): its for its in self.subspaces}
        changed = {known: change(its) for known, its in different.items()}
        of_layers, of_mlps = (
            None if some is None else {layer: changed[id(its)] for layer, its in some.items()}
            for some in (self.subspace, self.of_mlps)
        )
        return replace(self, subspace=of_layers or {}, of_mlps=of_mlps)

    def at(self, layer: int) -> Subspace | None:
        """The subspace of one layer; None where the layer has none."""
        return self.subspace if isinstance(self.subspace, Subspace) else self.subspace.get(layer)

    @property
    def everywhere(self) -> Subspace:
        """The subspace that is the same in all layers.

        Raises:
            UsageError: there is another one in each layer.
        """
        if isinstance(self.subspace, Subspace):
            return self.subspace
        raise UsageError(
            f"candidate {self.id} has another subspace in each layer", "choose one that is the same in all layers"
        )

    @property
    def is_vector(self) -> bool:
        """Whether it is a single vector, the same in all layers, and read along itself."""
        return self.is_orthogonal and self.everywhere.k == 1

    @property
    def is_orthogonal(self) -> bool:
        """Whether it is one subspace, the same in all layers, and read along itself."""
        return isinstance(self.subspace, Subspace) and self.subspace.read is None

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The raw vector of a candidate that is a single one.

        Raises:
            UsageError: it has several vectors, or others in each layer.
        """
        if self.everywhere.k != 1:
            raise UsageError(
                f"candidate {self.id} has {self.everywhere.k} vectors, not one", "choose a single direction"
            )
        return self.everywhere.vectors[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """How one candidate behaves (Arditi et al. 2024, appendix C).

    ``candidate`` is its id; ``layer`` and ``position`` are where it was read.
    ``bypass``: mean refusal metric on harmful prompts with the candidate ablated (lower is better).
    ``induce``: mean refusal metric on harmless prompts with the candidate added at its layer (must be >= 0).
    Chosen by COSMIC, ``bypass`` is ``-(S_comply + S_refuse)`` instead, and ``induce`` is ``S_refuse``, without a bound.
    ``kl_nats``: mean KL(base || ablated) at the last position of harmless prompts; with ``kl_stopped`` the least that
    it can be, because not all prompts were run.  ``kl_error_nats``: the standard error of that mean; 0 where it is not
    known.
    ``verdict``: "kept", the rule that discards it, or "not asked".

    A score that is not known is NaN.
    """

    candidate: str
    layer: int
    position: int | None = None
    bypass: float
    induce: float
    kl_nats: float
    verdict: str = "kept"
    kl_stopped: bool = False
    kl_error_nats: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The id of the candidate that was taken, where it was read, and by which rule it was taken.

    Rules are "arditi-2024", "cosmic", "without-induce", "without-margin", "pareto-fallback" and "given".
    """

    candidate: str
    layer: int
    position: int | None = None
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DirectionSet:
    """All candidates of one measurement, their scores, and what was chosen.

    ``statistics`` are what they were estimated from: None for vectors that were given.  A file keeps the means alone.

    Raises:
        ValueError: there is no candidate, or two have the same id.
    """

    candidates: tuple[Candidate, ...]
    statistics: ActivationStats | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[CandidateScore, ...] = ()
    choice: Choice | None = None

    def __post_init__(self) -> None:
        if not self.candidates or len({one.id for one in self.candidates}) < len(self.candidates):
            raise ValueError("a set of directions takes candidates with different ids")

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that were measured, or else those of the candidates, in order."""
        if self.statistics is not None:
            return self.statistics.positions
        return tuple(sorted({one.position for one in self.candidates if one.position is not None}))

    @property
    def n_layers(self) -> int:
        """Number of blocks, and so of layers that were measured; or else as many as the candidates take."""
        if self.statistics is not None:
            return self.statistics.n_layers
        return 1 + max(one.layer for one in self.candidates)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.candidates[0].subspaces[0].vectors.shape[0]

    def named(self, candidate: str) -> Candidate:
        """The candidate with this id.

        Raises:
            UsageError: there is none.
        """
        for one in self.candidates:
            if one.id == candidate:
                return one
        raise UsageError(f"there is no candidate {candidate!r}", f"one of them is {self.candidates[0].id!r}")

    def at(self, position: int, layer: int) -> Candidate:
        """The candidate that was read at a negative token offset and layer.

        Raises:
            UsageError: there is none, or several estimators made one.
        """
        found = [one for one in self.candidates if (one.position, one.layer) == (position, layer)]
        if not found:
            raise UsageError(
                f"there is no candidate at position {position}, layer {layer}",
                f"positions are {list(self.positions)}, layers 0 to {self.n_layers - 1}",
            )
        if len(found) > 1:
            raise UsageError(
                f"several candidates are at position {position}, layer {layer}: {', '.join(one.id for one in found)}",
                "choose one by its id (--candidate)",
            )
        return found[0]

    def candidate(self, position: int, layer: int) -> Float[Tensor, " d"]:
        """The raw vector of the candidate at a negative token offset and layer.

        Raises:
            UsageError: there is none, or several, or it has several vectors.
        """
        return self.at(position, layer).vector

    @property
    def chosen(self) -> Candidate:
        """The chosen candidate.

        Raises:
            UsageError: nothing was chosen yet.
        """
        if self.choice is None:
            raise UsageError(
                "this direction file holds candidates but no choice",
                "run `abliterate select` on it, or name one with --position and --layer",
            )
        return self.named(self.choice.candidate)

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """The raw vector of the chosen candidate.

        Raises:
            UsageError: nothing was chosen yet, or something that is not a single vector.
        """
        return self.chosen.vector

    @property
    def stability(self) -> float | None:
        """How far two random halves of the prompts agree on what was chosen; None where that is not known."""
        return None if self.choice is None else self.metadata.get("stability", {}).get(self.choice.candidate)

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of the chosen vectors, as hexadecimal: of ``direction``, where it is a single one."""
        found, subspace = hashlib.sha256(), self.chosen.subspace
        if not isinstance(subspace, Subspace):
            found.update(repr(sorted(subspace)).encode())
        if self.chosen.of_mlps is not None:
            found.update(repr(sorted(self.chosen.of_mlps)).encode())
        for subspace in self.chosen.subspaces:
            for tensor in subspace.tensors:
                found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of prompts whose directions are the vectors of what was chosen, in their order."""
        return tuple(self.chosen.provenance.get("categories", ()))

    def of_category(self, name: str) -> "DirectionSet":
        """A copy with one category's direction of what was chosen taken alone.

        Raises:
            UsageError: nothing was chosen yet, or it has no direction of this category.
        """
        chosen, names = self.chosen, self.categories
        if name not in names:
            raise UsageError(
                f"candidate {chosen.id} has no direction of a category {name!r}",
                f"its categories are: {', '.join(names)}" if names else "measure with --method categories",
            )
        place = names.index(name)
        one = Candidate(
            id=f"{chosen.id}/{name}",
            subspace=Subspace(vectors=chosen.everywhere.vectors[:, place : place + 1]),
            layer=chosen.layer,
            provenance={"estimator": chosen.estimator, "position": chosen.position, "category": name},
        )
        return replace(self, candidates=(*self.candidates, one)).choose_candidate(one.id)

    def choose(self, position: int, layer: int, rule: str = GIVEN) -> "DirectionSet":
        """A copy with the candidate at ``position``, ``layer`` chosen."""
        return self.choose_candidate(self.at(position, layer).id, rule)

    def choose_candidate(self, candidate: str, rule: str = GIVEN) -> "DirectionSet":
        """A copy with the candidate of this id chosen."""
        one = self.named(candidate)
        return replace(self, choice=Choice(candidate=one.id, layer=one.layer, position=one.position, rule=rule))


def grid(
    estimator: str, vectors: Float[Tensor, "positions layers d"], positions: Sequence[int]
) -> tuple[Candidate, ...]:
    """A candidate for each position and layer, ``vectors[p, l]`` for ``positions[p]``; nothing is copied."""
    return tuple(
        Candidate(
            id=f"{estimator}/{position}/{layer}",
            subspace=Subspace(vectors=vector[:, None]),
            layer=layer,
            provenance={"estimator": estimator, "position": position},
        )
        for position, its in zip(positions, vectors, strict=True)
        for layer, vector in enumerate(its)
    )


def given(vector: Float[Tensor, " d"], metadata: Mapping[str, Any] | None = None) -> DirectionSet:
    """A vector from elsewhere, chosen.  Addition adds it at layer 0, and prompts are read along it at their end."""
    made = DirectionSet(candidates=grid(GIVEN, vector[None, None], (-1,)), metadata=metadata or {})
    return made.choose_candidate(made.candidates[0].id)
