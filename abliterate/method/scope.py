"""Where an edit acts and how strongly: the same for every method.

Less than everything leaves writers that still write along the direction; the rest of the model, and the proof, is as
ever: the edited checkpoint equals its base under hooks at the writers that were edited.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from abliterate.errors import UsageError
from abliterate.method.places import IN_BLOCKS, KINDS, ROLES, Kind, Place, Role
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit

_RUN = re.compile(r"(\d+)(%?)(?:-(\d+)(%?))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """``kinds`` of places, without the layers ``left_out``; next-token blocks with them unless a kind is missing.

    ``strength`` 1 takes out all of what an edit takes out, 0.5 the half of it.
    """

    kinds: frozenset[Kind] = frozenset(KINDS)
    left_out: frozenset[int] = frozenset()
    strength: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether an edit acts everywhere, in full."""
        return self.kinds == frozenset(KINDS) and not self.left_out and self.strength == 1

    @property
    def as_plain(self) -> tuple[list[str], list[int], float]:
        """As plain data, to tell one from another."""
        return sorted(self.kinds), sorted(self.left_out), self.strength

    def holds(self, place: Place) -> bool:
        """Whether an edit acts at ``place``."""
        layer, kind = place
        return kind in self.kinds and layer not in self.left_out

    def of(self, stream: StreamEdit, n_layers: int) -> StreamEdit:
        """``stream`` where this holds, and nothing elsewhere."""
        if self.is_whole:
            return stream
        weaker: dict[int, WeightEdit] = {}

        def at(place: Place) -> WeightEdit | None:
            edit = stream.at(*place) if self.holds(place) else None
            if edit is None or self.strength == 1:
                return edit
            return weaker.setdefault(id(edit), _times(edit, self.strength))

        in_blocks = [(layer, kind) for layer in range(n_layers) for kind in IN_BLOCKS]
        outside: list[Place] = [(None, "embedding"), (None, "next-token block")]
        return StreamEdit(places={place: at(place) for place in [*outside, *in_blocks]})


def _times(edit: WeightEdit, strength: float) -> WeightEdit:
    """``edit`` by ``strength``: what it takes out, and what it adds."""
    constant = None if edit.constant is None else strength * edit.constant
    return replace(edit, strength=strength * edit.strength, constant=constant)


WHOLE = Scope()


def scope_of(roles: Collection[Role], exclude_layers: str, strength: float, n_layers: int) -> Scope:
    """The scope that a recipe names, for a model of ``n_layers``.

    Raises:
        UsageError: there are no such layers, or nothing is left to edit.
    """
    kinds: frozenset[Kind] = frozenset(ROLES[role] for role in roles)
    if len(kinds) == len(ROLES):
        kinds = frozenset(KINDS)
    left_out = frozenset(layers_of(exclude_layers, n_layers))
    if not strength or not kinds or (not kinds & {"embedding"} and len(left_out) == n_layers):
        raise UsageError(
            "nothing is left to edit", "leave out fewer layers, name more --roles, or give another --strength"
        )
    return Scope(kinds=kinds, left_out=left_out, strength=strength)


def layers_of(text: str, n_layers: int) -> set[int]:
    """The layers of a text as "0-7,20": numbers from 0, or shares of the depth as "0%-33%", ends included.

    A share names the layers that begin below it: "0%-33%" of 24 layers are 0 to 7.

    Raises:
        UsageError: it cannot be read, or there is no such layer.
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RUN.fullmatch(part)
        if match is None:
            raise UsageError(f"{part!r} names no layers", 'name them as "0-7,20", or by depth as "0%-33%"')
        first, first_share, last, last_share = match.groups()
        begin = _layer(int(first), bool(first_share), n_layers, last=False)
        end = begin if last is None else _layer(int(last), bool(last_share), n_layers, last=True)
        if end >= n_layers or begin > end:
            raise UsageError(f"there are no layers {part!r}", f"this model has layers 0 to {n_layers - 1}")
        found.update(range(begin, end + 1))
    return found


def _layer(number: int, is_share: bool, n_layers: int, *, last: bool) -> int:  # noqa: FBT001 - beside its number
    if not is_share:
        return number
    below = -(-number * n_layers // 100)  # rounded up: how many begin below the share
    return below - 1 if last else below
