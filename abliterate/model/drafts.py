"""Greedy replies in few passes, where it is known beforehand what the model is likely to say.

Speculative decoding with a whole reply as the draft (Leviathan et al. 2023, arXiv 2211.17192; Stern et al. 2018, arXiv
1811.03115): one forward pass over prompt and draft gives the token that greedy decoding takes at each place.  As far as
the draft has these tokens it is the reply, and from where they part the model writes on.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import Tell, each_batch, run_batch
from abliterate.model.guessing import takes_likeliest
from abliterate.model.interventions import observed
from abliterate.model.likelihood import LOGIT_BYTES, logit_row_bytes
from abliterate.model.load import LoadedModel
from abliterate.model.ranks import least
from abliterate.model.replying import (
    FIRST,
    Watching,
    ends_of,
    generate_ids,
    generate_tokens,
    is_guessed,
    settings_of,
    until_end,
)
from abliterate.model.room import logits_room, prompt_tokens, reply_rows

NOTHING = -1
"""Behind the tokens of a row."""
TIE_NATS = {2: 0.125, 4: 1e-4, 8: 1e-8}
"""By the bytes of a logit: how far tokens may be apart that rounding alone puts in order.  A bfloat16 logit between 16
and 32 is a multiple of 0.125; in float32 and wider, sums in another order differ by less than this."""


def follow(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    drafts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    task: str,
    watching: Watching | None = None,
    on_event: OnEvent = ignore,
) -> list[list[int]]:
    """Greedy replies as ``forward.generate_tokens`` gives them, read off ``drafts`` as far as those agree.

    Of two tokens that rounding cannot tell apart (``TIE_NATS``) the draft's is taken.  Where the repository wants other
    tokens than the likeliest, drafts are of no use.
    """
    if not takes_likeliest(settings_of(loaded)):
        return generate_tokens(
            loaded, chat, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, task=task,
            watching=watching, on_event=on_event,
        )  # fmt: skip
    on_event(Started(task=task, total=len(prompts), unit="prompts"))
    ends, its = ends_of(loaded), watching or Watching()
    encoded = [chat.encode(prompt) for prompt in prompts]
    drafts = [until_end(draft[:max_new_tokens], ends) for draft in drafts]
    longest = max(map(len, drafts), default=0)
    row_bytes = logit_row_bytes(loaded, longest + max(1, its.n_positions))
    rows = max(1, min(batch_size, logits_room(loaded, LOGIT_BYTES) // row_bytes))
    found: list[list[int]] = [[] for _ in prompts]

    def check(batch: Batch, tell: Tell) -> Tensor:
        own = [drafts[row] for row in batch.rows]
        with observed(loaded, partial(_show, its, list(map(len, own)), tell)):
            logits = run_batch(loaded, batch, keep=max(map(len, own)) + max(1, its.n_positions))
        if its.first is not None:
            tell(FIRST, torch.stack([logits[place, -len(draft) - 1] for place, draft in enumerate(own)]))
        read = [agreed(logits[place, -len(draft) - 1 :], draft) for place, draft in enumerate(own)]
        return torch.tensor([[*tokens, *[NOTHING] * (longest + 1 - len(tokens))] for tokens in read])

    together = [ids + draft for ids, draft in zip(encoded, drafts, strict=True)]
    for batch, read in each_batch(loaded, chat.pack(together, rows), check, told=its.told, logits_bytes=row_bytes):
        for row, tokens in zip(batch.rows, read.tolist(), strict=True):
            found[row] = until_end([token for token in tokens if token != NOTHING][:max_new_tokens], ends)
            on_event(Advanced(task=task, amount=int(_is_done(found[row], max_new_tokens, ends))))
    missing = [row for row, tokens in enumerate(found) if not _is_done(tokens, max_new_tokens, ends)]
    if loaded.offload is not None:  # a draft that errs in one place may be right in those behind it
        for row in missing:
            loaded.offload.guesses.learn(drafts[row])
    begun = [encoded[row] + found[row] for row in missing]
    needs = [max_new_tokens - len(found[row]) for row in missing]
    for row, more in zip(missing, _write_on(loaded, chat, begun, needs, batch_size), strict=True):
        found[row] += more
    on_event(Advanced(task=task, amount=len(missing)))
    on_event(Finished(task=task))
    return found


def agreed(logits: Tensor, draft: Sequence[int]) -> list[int]:
    """The tokens of ``draft`` as far as greedy decoding takes them, and the one that it takes after these.

    ``logits`` ``[len(draft) + 1, vocab]`` are those at the last token of the prompt and at each of the draft.
    """
    most, own = logits.max(-1)
    asked = torch.tensor([*draft, 0], dtype=torch.long, device=logits.device)[:, None]
    behind = (most - logits.gather(1, asked)[:, 0]).float()
    takes = (behind <= TIE_NATS[logits.dtype.itemsize]).tolist()
    same = next((place for place, take in enumerate(takes[: len(draft)]) if not take), len(draft))
    return [*draft[:same], int(own[same])]


def _is_done(tokens: Sequence[int], max_new_tokens: int, ends: frozenset[int]) -> bool:
    return len(tokens) >= max_new_tokens or bool(tokens and tokens[-1] in ends)


def _show(watching: Watching, behind: Sequence[int], tell: Tell, layer: int, x: Tensor) -> None:
    """Tell what enters a block at the last tokens of prompts that ``behind`` more tokens follow."""
    if layer not in watching.layers:
        return
    width, n = x.shape[1], watching.n_positions
    parts = [x[place, width - more - n : width - more] for place, more in enumerate(behind)]
    tell(str(layer), torch.stack(parts).detach().to(device="cpu", dtype=torch.float32, copy=True))


def _write_on(
    loaded: LoadedModel, chat: ChatFormat, begun: Sequence[list[int]], needs: Sequence[int], batch_size: int
) -> list[list[int]]:
    """What follows after ``begun``, up to as many tokens as each row ``needs``."""
    found: list[list[int]] = [[] for _ in begun]
    ends, most = ends_of(loaded), max(needs, default=0)

    def write(batch: Batch, _: Tell) -> Tensor:
        return generate_ids(loaded, chat, batch, max(needs[row] for row in batch.rows))

    rows = least(reply_rows(loaded, batch_size, max(map(len, begun), default=0) + most))
    batches = chat.pack(begun, rows, prompt_tokens(loaded))
    guessed = partial(is_guessed, loaded, chat)
    for batch, written in each_batch(loaded, batches, write, new_tokens=most, guessed=guessed):
        for row, its in zip(batch.rows, written.tolist(), strict=True):
            found[row] = until_end(its, ends)[: needs[row]]
    return found
