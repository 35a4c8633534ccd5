"""Replies of one model under several interventions, side by side."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from abliterate.events import Advanced, Event
from abliterate.model.chat import ChatFormat
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import share
from abliterate.model.replying import generate

Intervention = Callable[[], AbstractContextManager[None]]
"""Makes the hooks of ``interventions`` that an intervention is, anew for each use."""


def replies_under(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    interventions: Sequence[Intervention],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[str]]:
    """Greedy replies to all ``prompts`` under each of ``interventions``, special tokens removed.

    Hooks act on the passes of their own batches alone, so that out of core all interventions share the weight passes.
    """

    def heard(event: Event) -> None:
        if isinstance(event, Advanced):
            advance(event.amount)

    def reply(intervention: Intervention) -> list[str]:
        options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "on_event": heard}
        with intervention():
            return generate(loaded, chat, prompts, **options)

    return share(loaded, [partial(reply, its) for its in interventions])
