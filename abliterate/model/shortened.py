"""Forward passes that leave out what nobody reads: blocks below a layer, and the end of the last block.

A pass that begins in the middle lets the blocks below hand on what they are given; and where logits are wanted at the
last position only, so is all that the last block does after its attention.

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
    """A model whose blocks can be passed over; where several tasks take turns at it, by each task on its own.

    With ``last_only``, the last sublayer runs at the last position only and is zero elsewhere.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.last_only = False
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

    def run_last(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What the last sublayer gives; ``[rows, tokens, d]`` go in and out where it can be shortened.

        Raises:
            TypeError: it gives something else.
        """
        if not self.last_only or not args or args[0].ndim != 3:
            return forward(*args, **kwargs)
        last = forward(args[0][:, -1:], *args[1:], **kwargs)
        if not isinstance(last, Tensor):
            raise TypeError("the last sublayer gives more than a tensor")
        out = last.new_zeros(*args[0].shape[:2], last.shape[-1])
        out[:, -1:] = last
        return out


@contextmanager
def shortened(loaded: LoadedModel) -> Iterator[Shortened]:
    """Prepare ``loaded`` for passes that begin in the middle."""
    short = Shortened(loaded)
    undoing = [_wrap(block, partial(short.run, place)) for place, block in enumerate(loaded.blocks)]
    undoing.append(_wrap(_last_sublayer(loaded), short.run_last))
    try:
        yield short
    finally:
        for undo in undoing:
            undo()


def _last_sublayer(loaded: LoadedModel) -> nn.Module:
    """The part of the last block that holds the last of its writers: its MLP, mostly."""
    site = loaded.sites[-1][-1]
    return next(child for child in loaded.blocks[-1].children() if any(part is site for part in child.modules()))


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
