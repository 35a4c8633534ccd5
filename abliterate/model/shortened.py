"""Forward passes that begin in the middle: the blocks below a layer hand on what they are given.

The model's own code runs, so that masks, rotations and whatever else a block is given besides the residual are made as
always.  Where a block takes something from one below it by another way (keys and values that layers share), such a
pass is wrong or fails; who uses it must compare (see ``scoring``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from abliterate.model.interventions import replaced
from abliterate.model.load import LoadedModel
from abliterate.model.tasks import Task, current


class Shortened:
    """A model whose blocks can be passed over; where several tasks take turns at it, by each task on its own."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._first: dict[Task | None, int] = {}
        self._lengths: dict[int, int] = {}

    @contextmanager
    def starting_at(self, layer: int, state: Tensor) -> Iterator[None]:
        """Run the blocks from ``layer`` on, which ``state`` enters.  Each block must have run before, to be known."""
        task = current()
        with replaced(self._loaded, layer, state):
            self._first[task] = layer
            try:
                yield
            finally:
                del self._first[task]

    def run(self, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What block ``place`` gives, or would give if it did nothing."""
        if place >= self._first.get(current(), 0):
            out = forward(*args, **kwargs)
            self._lengths[place] = len(out) if isinstance(out, tuple) else 0
            return out
        x = args[0] if args else kwargs["hidden_states"]
        length = self._lengths[place]
        return (x, *[None] * (length - 1)) if length else x


@contextmanager
def shortened(loaded: LoadedModel) -> Iterator[Shortened]:
    """Prepare ``loaded`` for passes that begin in the middle."""
    short = Shortened(loaded)
    undoing = [_wrap(block, partial(short.run, place)) for place, block in enumerate(loaded.blocks)]
    try:
        yield short
    finally:
        for undo in undoing:
            undo()


def _wrap(block: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
    """Have ``run`` called with the block's ``forward``: outside of what loads its weights, where something does."""
    before = block.__dict__.get("forward")
    forward = block.forward
    block.forward = wraps(forward)(partial(run, forward))

    def undo() -> None:
        if before is None:
            del block.forward
        else:
            block.forward = before

    return undo
