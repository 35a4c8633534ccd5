"""Greedy replies to prompts, and what is seen of the pass over a prompt that begins one."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.footprint import guess_bytes, running_bytes, waiting_bytes
from abliterate.model.forward import DEFAULT_BATCH_SIZE, Tell, each_batch, run_batch
from abliterate.model.guessing import MOST_GUESSES, Writing, can_go_back, takes_likeliest, write_by_guessing
from abliterate.model.interventions import observed
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import reserved, room_for_prompts, run_together
from abliterate.model.prefix import can_take_back, empty_cache, is_plain
from abliterate.model.ranks import least
from abliterate.model.room import guesses_that_fit, prompt_tokens, reply_rows

FIRST = "first"
STRETCH = 16
"""New tokens after which the rows that have ended leave their batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """Who is shown what of the pass over prompts that begins replies to them.

    ``first(rows, logits)``: the logits of the first new token after some prompts.  ``see(rows, l, values)``: what
    enters each block of ``layers`` at their last ``n_positions`` tokens.
    """

    first: Callable[[Sequence[int], Tensor], None] | None = None
    see: Callable[[Sequence[int], int, Tensor], None] = lambda *_: None
    layers: Collection[int] = ()
    n_positions: int = 1

    def told(self, batch: Batch, name: str, values: Tensor) -> None:
        """Pass on what was told of a batch: under ``FIRST`` its first logits, under a number what enters that block."""
        if name != FIRST:
            self.see(batch.rows, int(name), values)
        elif self.first is not None:
            self.first(batch.rows, values)


def generate(loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[str], **options: Any) -> list[str]:  # noqa: ANN401
    """The replies of ``generate_tokens`` as text, special tokens removed."""
    return [chat.text(tokens) for tokens in generate_tokens(loaded, chat, prompts, **options)]


def generate_tokens(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = DEFAULT_BATCH_SIZE,
    task: str = "generate",
    watching: Watching | None = None,
    on_event: OnEvent = ignore,
) -> list[list[int]]:
    """Greedy replies as token ids, in the order of ``prompts``; ``watching`` is shown what begins them.

    A reply that ended in time ends in the token that says so, and what pads it behind that is left out.
    """
    on_event(Started(task=task, total=len(prompts), unit="prompts"))

    its = watching or Watching()

    def reply(batch: Batch, tell: Tell) -> Tensor:
        return reply_and_see(
            loaded, chat, batch, max_new_tokens, tell, layers=its.layers, n_positions=its.n_positions,
            first=its.first is not None,
        )  # fmt: skip

    replies: list[list[int]] = [[] for _ in prompts]
    rows = rows_of_replies(loaded, chat, prompts, batch_size, max_new_tokens)
    batches = chat.batches(prompts, rows, prompt_tokens(loaded))
    options: dict[str, Any] = {"told": its.told, "new_tokens": max_new_tokens}
    options["guessed"] = partial(is_guessed, loaded, chat)
    options["advance"] = lambda n: on_event(Advanced(task=task, amount=n))
    for batch, found in each_batch(loaded, batches, reply, **options):
        for row, its_own in zip(batch.rows, found.tolist(), strict=True):
            replies[row] = until_end(its_own, ends_of(loaded))
    on_event(Finished(task=task))
    return replies


def ends_of(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a reply."""
    stated = settings_of(loaded)
    ends = None if stated is None else stated.eos_token_id
    ends = loaded.tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def until_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """``tokens`` up to the first that ends a reply, that one as well; what is behind it only pads."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: end + 1])


def rows_of_replies(
    loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[str], batch_size: int, max_new_tokens: int
) -> int:
    """Rows of a batch in which replies to ``prompts`` are written; see ``reply_rows``."""
    longest = max((len(chat.encode(prompt)) for prompt in prompts), default=0)
    return least(reply_rows(loaded, batch_size, longest + max_new_tokens))


def is_guessed(loaded: LoadedModel, chat: ChatFormat, tokens: int) -> bool:
    """Whether replies in rows of ``tokens`` tokens are written by guessing, and their caches may lie on disk."""
    return loaded.offload is not None and chat.pads and _guesses(loaded, empty_cache(loaded), tokens)


def _guesses(loaded: LoadedModel, cache: Any, tokens: int) -> bool:  # noqa: ANN401 - a cache of transformers
    """Whether a model out of core may be asked ahead of what it said, in rows of ``tokens`` tokens."""
    fits = can_take_back(cache, tokens + MOST_GUESSES) and can_go_back(loaded.model.config)
    return fits and takes_likeliest(settings_of(loaded))


def generate_ids(
    loaded: LoadedModel,
    chat: ChatFormat,
    batch: Batch,
    max_new_tokens: int,
    *,
    first: Callable[[Tensor], None] | None = None,
) -> Int[Tensor, "batch new_tokens"]:
    """Greedy continuation of a batch: only the new tokens, padded on the right once a row has ended.

    ``first`` is called with the logits ``[batch, vocab]`` of the first new token.  A model that learned its positions
    stops where they end.  Rows that have ended leave the batch, where its cache can do without them.  Out of core
    passes are spared by guesses (``guessing``).
    """
    if loaded.other_embeddings and chat.context is not None:  # there is no position to go on at
        max_new_tokens = max(1, min(max_new_tokens, chat.context - batch.input_ids.shape[1] + 1))
    cache = empty_cache(loaded)
    tokens = batch.input_ids.shape[1] + max_new_tokens
    alike = chat.pads or len(batch.rows) == 1
    if loaded.offload is not None and alike and _guesses(loaded, cache, tokens):
        if loaded.offload.caches_on_disk and loaded.offload.scratch is not None:
            from abliterate.model.disk_cache import cache_on_disk

            cache = cache_on_disk(cache, loaded.offload.scratch, tokens + MOST_GUESSES)
        return _guessed(loaded, chat, batch, max_new_tokens, cache, first)
    cache, stretch = (cache, STRETCH) if is_plain(cache) else (None, max_new_tokens)
    ids, mask, rows = batch.input_ids, batch.attention_mask, torch.arange(len(batch.rows))
    found = torch.full((len(rows), max_new_tokens), chat.pad_id, dtype=torch.long)
    ends = torch.tensor(sorted(ends_of(loaded)), dtype=torch.long)
    done = 0
    while done < max_new_tokens and len(rows):
        ids = _written_on(loaded, chat, ids, mask, min(stretch, max_new_tokens - done), cache, first)
        new = ids[:, mask.shape[1] :]
        found[rows, done : done + new.shape[1]] = new
        done, first = done + new.shape[1], None
        goes_on = ~torch.isin(new, ends).any(1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)[goes_on]
        ids, rows = ids[goes_on], rows[goes_on]
        if cache is None or not len(rows):
            break
        if not goes_on.all():
            cache.batch_select_indices(goes_on.nonzero().flatten().to(loaded.device))
    return found[:, :done]


def _guessed(
    loaded: LoadedModel,
    chat: ChatFormat,
    batch: Batch,
    max_new_tokens: int,
    cache: Any,  # noqa: ANN401 - a cache of transformers
    first: Callable[[Tensor], None] | None,
) -> Tensor:
    """As ``generate_ids``, out of core; what it guesses by is kept with the weights."""
    if loaded.offload is None:
        raise AssertionError("the weights are in memory")
    weights, (rows, width) = loaded.offload, batch.input_ids.shape
    writing = Writing.of(batch, cache, weights.guesses, ends_of(loaded), max_new_tokens)
    writing.fit = partial(guesses_that_fit, loaded)
    waits, most = rows * waiting_bytes(loaded, width), rows * width * running_bytes(loaded)

    def run(each: Batch, keep: int) -> Tensor:
        logits = len(each.rows) * guess_bytes(loaded, keep)
        room = reserved(weights, 0, logits, lasting=True)
        with room_for_prompts(weights, waits, max(most, logits)) if each is batch else room:
            return run_batch(loaded, each, keep=keep, cache=cache)

    replies = write_by_guessing(run, writing, batch, first=first)
    for layer in cache.layers:
        layer.reset()  # now, not when somebody collects it: files may be behind it
    found = torch.full((len(replies), max(map(len, replies))), chat.pad_id, dtype=torch.long)
    for row, tokens in zip(found, replies, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return found


def settings_of(loaded: LoadedModel) -> Any:  # noqa: ANN401 - of transformers
    """The generation settings of the repository; None where a model has none."""
    return getattr(loaded.model, "generation_config", None)


def _written_on(
    loaded: LoadedModel,
    chat: ChatFormat,
    ids: Int[Tensor, "rows tokens"],
    mask: Int[Tensor, "rows tokens"],
    new_tokens: int,
    cache: Any,  # noqa: ANN401 - a cache of transformers
    first: Callable[[Tensor], None] | None,
) -> Tensor:
    """``ids`` ``[rows, tokens]`` and what follows them; ``cache`` holds all of them but the last one, or nothing yet.

    No shape is stated of what is given back: this function may pause.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    class Show(LogitsProcessor):
        waiting = first

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
            if self.waiting is not None:
                self.waiting(scores)
                self.waiting = None
            return scores

    def run() -> Tensor:
        with torch.inference_mode():
            return loaded.model.generate(
                input_ids=ids.to(loaded.device),
                attention_mask=mask.to(loaded.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # what is likeliest, whatever the repository would rather have sampled
                logits_processor=LogitsProcessorList([Show()]),
                pad_token_id=chat.pad_id,
                **({} if cache is None else {"past_key_values": cache}),
            )

    (out,) = run_together(loaded, [run])
    return out.cpu()


def reply_and_see(
    loaded: LoadedModel,
    chat: ChatFormat,
    batch: Batch,
    max_new_tokens: int,
    tell: Tell,
    *,
    layers: Collection[int],
    n_positions: int,
    first: bool,
) -> Tensor:
    """The greedy continuation of a batch; tells what was seen of the pass over the prompts that begins it.

    Under the number of each block of ``layers``, what entered it at the last tokens of the prompts,
    ``[rows, n_positions, d]`` in float32, on the host; with ``first``, under ``FIRST`` the logits of the first token.
    """
    seen: dict[int, Tensor] = {}
    on_first = partial(tell, FIRST) if first else None
    if not layers:
        return generate_ids(loaded, chat, batch, max_new_tokens, first=on_first)

    def show(layer: int, x: Tensor) -> None:
        if (
            layer in layers and layer not in seen
        ):  # the first forward pass has the prompts, the others one new token each
            seen[layer] = x[:, -n_positions:].detach().to(device="cpu", dtype=torch.float32, copy=True)

    with observed(loaded, show):
        tokens = generate_ids(loaded, chat, batch, max_new_tokens, first=on_first)
    if any(values.shape[1] < n_positions for values in seen.values()):  # as in see_residuals
        seen.clear()
        with observed(loaded, show):
            run_batch(loaded, batch, keep=n_positions)
    for layer, values in seen.items():
        tell(str(layer), values)
    return tokens
