"""What weights say of an edit: whether a base was abliterated, where, along what, and how completely."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.linalg import unit
from abliterate.verification.comparison import ChangedTensor, Diff

Kind = Literal["unchanged", "ablated", "in part", "other", "unlike"]
ONE_DIRECTION = 0.9
"""From this |cosine| on, what was removed of two tensors is called one direction."""
SAME = 0.8
"""And from this on, the direction that is found today is called that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditFound:
    """A checkpoint against its base.

    Attributes:
        kind: "ablated": of every writer one direction was removed; "in part": of some; "other": it was changed, but
            not by removing a direction; "unlike": tensors have other names, shapes or dtypes.
        unlike: tensors that only one has, or of another shape or dtype.
        changed: tensors that differ, ``of`` how many that both have.
        projected: the writers of which one direction was removed, of ``writers``.
        layers: the blocks that these lie in.
        one_direction: the least |cosine| of what was removed of one of them with what they share.
        left: the most that any of them still holds along that, as a share of what the base does.
        besides: changed tensors of which no direction was removed.
        today: the |cosine| of what they share with the direction that is found on the base now; None where it is not
            known.
        candidate: which that is.
    """

    kind: Kind
    base: str
    unlike: int
    changed: int
    of: int
    writers: int
    projected: int
    layers: tuple[int, ...]
    one_direction: float | None
    left: float | None
    besides: tuple[str, ...]
    today: float | None = None
    candidate: str = ""

    @classmethod
    def of_diff(
        cls, found: Diff, base: str, *, today: Float[Tensor, " d"] | None = None, candidate: str = ""
    ) -> "EditFound":
        """From a comparison with ``base``, and the direction found on it."""
        projected = [its for its in found.changed if its.projected]
        kind: Kind = "other"
        unlike = len(found.reshaped) + len(found.removed) + len([name for name in found.added if name != found.head])
        if not found.changed:
            kind = "unlike" if unlike or not found.identical else "unchanged"
        elif projected:
            kind = "ablated" if len(projected) == found.writers else "in part"
        cosines = [its.cosine for its in projected if its.cosine is not None]
        left = [its.left for its in projected if its.left is not None]
        shared = torch.tensor(found.direction, dtype=torch.float64)
        same = None
        if today is not None and projected and shared.shape == today.shape:
            same = float((unit(shared) @ unit(today.double())).abs())
        return cls(
            kind=kind, base=base, unlike=unlike, changed=len(found.changed), of=len(found.changed) + found.identical,
            writers=found.writers, projected=len(projected), layers=_layers(projected),
            one_direction=min(cosines, default=None), left=max(left, default=None),
            besides=tuple(its.name for its in found.changed if not its.projected), today=same, candidate=candidate,
        )  # fmt: skip

    def in_words(self) -> list[str]:
        """What a model card can quote."""
        if self.kind == "unchanged":
            return [f"not edited: all {self.of} tensors are those of {self.base}"]
        if self.kind == "unlike":
            return [
                f"cannot be held against {self.base}: {self.unlike} tensors have other names, shapes or dtypes (a "
                "quantised or converted copy)"
            ]
        if self.kind == "other":
            return [
                f"{self.changed} of {self.of} tensors differ from {self.base}, and of none one direction was removed: "
                "that is training, or an edit along several directions"
            ]
        where = f"blocks {self.layers[0]} to {self.layers[-1]}" if self.layers else "no block"
        said = [
            f"abliterated: of {self.projected} of the {self.writers} writers of {self.base}, in {where}, a direction "
            f"was removed; no more than {100 * (self.left or 0.0):.1f} % of it is left in any"
        ]
        if self.kind == "in part":
            said.append(f"not completely: of {self.writers - self.projected} writers none was removed")
        least = self.one_direction or 0.0
        if least < ONE_DIRECTION:
            said.append(f"not everywhere the same direction: the least |cosine| with what they share is {least:.2f}")
        if self.today is not None:
            is_it = "that is the one found" if self.today >= SAME else "it is not the one found"
            said.append(f"{is_it} on {self.base} today ({self.candidate}): |cosine| {self.today:.2f}")
        if self.besides:
            said.append(f"{len(self.besides)} other tensors were changed, {self.besides[0]} the first")
        return said

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "summary": self.in_words()}


def _layers(tensors: list[ChangedTensor]) -> tuple[int, ...]:
    return tuple(sorted({its.layer for its in tensors if its.layer is not None}))
