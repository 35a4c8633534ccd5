"""Directions of the residual stream: candidates, and the one that was chosen.

Layer ``l`` is always the residual *entering* block ``l`` (``resid_pre``, ``hidden_states[l]`` for ``l < L``); position
``-1`` is the last token of the prompt.  The state after the final norm is never a candidate.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from abliterate.errors import UsageError


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
