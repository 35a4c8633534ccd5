"""What an edit does to the residual stream: one operator for everything that is added to it, or another at each place.

The operator stands in the coordinates of the stream: what a writer adds, ``s``, becomes
``s - strength write (read^T s) + constant``.  Hooks put it on the output of every writer; a plan turns it into the edit
of every writer's matrix, where the gain of a norm behind the writer has to be taken into account.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.linalg import orthonormal_basis
from abliterate.method.places import KINDS, Kind, Place
from abliterate.method.weight_edit import WeightEdit

SAME_SUBSPACE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamEdit:
    """``everywhere`` but at ``places``, which have an edit of their own; None leaves a place alone.

    Raises:
        ValueError: a place is of no kind that there is.
    """

    everywhere: WeightEdit | None = None
    places: Mapping[Place, WeightEdit | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [kind for _, kind in self.places if kind not in KINDS]
        if unknown:
            raise ValueError(f"there is no kind of place {unknown[0]!r}; there are {', '.join(KINDS)}")

    def at(self, layer: int | None, kind: Kind) -> WeightEdit | None:
        """The edit at one place."""
        return self.places.get((layer, kind), self.everywhere)

    def edits(self) -> Iterator[WeightEdit]:
        """The different edits, each once."""
        seen: set[int] = set()
        for edit in (self.everywhere, *self.places.values()):
            if edit is not None and id(edit) not in seen:
                seen.add(id(edit))
                yield edit

    def with_edits(self, change: Callable[[WeightEdit], WeightEdit]) -> "StreamEdit":
        """The same with other edits at the same places: ``change`` is called once for each."""
        changed: dict[int, WeightEdit | None] = {id(edit): change(edit) for edit in self.edits()} | {id(None): None}
        places = {place: changed[id(edit)] for place, edit in self.places.items()}
        return StreamEdit(everywhere=changed[id(self.everywhere)], places=places)

    @property
    def d_model(self) -> int:
        """Width of the stream, 0 where nothing is edited."""
        return next((edit.d_model for edit in self.edits()), 0)

    @property
    def adds(self) -> bool:
        """Whether it adds constants and does nothing else."""
        return all(edit.adds for edit in self.edits())

    @property
    def lacks_lengths(self) -> bool:
        """Whether rows are to keep their lengths, and these were not read from the weights yet."""
        return any(edit.keeps_rows and edit.row_scale is None for edit in self.edits())

    @property
    def sha256(self) -> str:
        """SHA-256 of every edit and of where it stands, as hexadecimal."""
        numbers = {id(edit): number for number, edit in enumerate(self.edits())} | {id(None): None}
        places = sorted((str(layer), kind, str(numbers[id(edit)])) for (layer, kind), edit in self.places.items())
        found = hashlib.sha256(repr((numbers[id(self.everywhere)], places)).encode())
        for edit in self.edits():
            found.update(repr((edit.rank, edit.strength, edit.column_scale, edit.constant is None)).encode())
            if edit.keeps_rows:
                found.update(b"keeps rows")
            for vectors in (edit.read, edit.write, edit.constant, edit.row_scale):
                if vectors is not None:
                    found.update(vectors.contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def removed(self) -> Float[Tensor, "d k"] | None:
        """An orthonormal basis of what the edit removes at every place; None where that differs, or is nothing."""
        found = [self.everywhere, *self.places.values()]
        if not found or any(edit is None or not edit.removes for edit in found):
            return None
        bases = [orthonormal_basis(edit.read) for edit in self.edits()]
        first = bases[0]
        same = all(
            basis.shape == first.shape and torch.dist(basis, first @ (first.T @ basis)) < SAME_SUBSPACE
            for basis in bases[1:]
        )
        return first if same and self.everywhere is not None else None
