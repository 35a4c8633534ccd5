"""Replies of one model under several interventions, side by side."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import each_job, generate_ids, rows_of_replies
from abliterate.model.load import LoadedModel

Intervention = Callable[[], AbstractContextManager[None]]
"""Makes the hooks of ``interventions`` that an intervention is, anew for each batch."""


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

    Hooks act on the passes of their own batch alone, so that out of core all interventions share the weight passes.
    """

    def reply(intervention: Intervention, batch: Batch) -> Tensor:
        with intervention():
            tokens = generate_ids(loaded, chat, batch, max_new_tokens)
        advance(len(batch.rows))
        return tokens

    batches = list(chat.batches(prompts, rows_of_replies(loaded, chat, prompts, batch_size, max_new_tokens)))
    order = [(place, batch) for place in range(len(interventions)) for batch in batches]
    jobs = ((batch, partial(reply, interventions[place], batch)) for place, batch in order)
    replies = [[""] * len(prompts) for _ in interventions]
    for (place, _), (batch, rows) in zip(order, each_job(loaded, jobs, new_tokens=max_new_tokens), strict=True):
        for row, tokens in zip(batch.rows, rows, strict=True):
            replies[place][row] = str(chat.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return replies
