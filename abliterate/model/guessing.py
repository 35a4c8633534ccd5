"""Greedy replies in fewer forward passes than tokens: what was said before is a guess at what comes next.

Lossless speculative decoding without a second model: prompt lookup (Saxena 2023; Yang et al. 2023, arXiv 2304.04487),
here in all prompts and replies that a loaded model has seen.  A pass is given the last token and a few that are guessed
to follow, and gives the token that greedy decoding takes after each: guesses count as far as they are these.  Out of
core a pass of all weights costs much more than a few tokens in it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from abliterate.model.chat import Batch

ORDERS = (3, 2, 1)
"""How many tokens back are looked up; the longest that was seen before counts."""
LEAST_GUESSES, MOST_GUESSES = 2, 16
"""Guessed tokens of a row and pass: twice as many where all of them were right."""
PASS_TOKENS = 256
"""Of a batch: where it has many rows, fewer are guessed of each (``room.guesses_that_fit``)."""
MOST_KEPT = 2**17
"""Runs of tokens that are remembered, some 20 MB; of more, the half that was learned first is forgotten."""
PROCESSED = (
    "bad_words_ids", "begin_suppress_tokens", "dola_layers", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "guidance_scale", "min_length", "min_new_tokens", "no_repeat_ngram_size",
    "remove_invalid_values", "sequence_bias", "suppress_tokens", "watermarking_config",
)  # fmt: skip
"""Generation settings by which ``generate`` takes another token than the likeliest."""


@dataclass(slots=True)
class Guesses:
    """Which token came last after each run of tokens."""

    seen: dict[tuple[int, ...], int] = field(default_factory=dict)

    def learn(self, tokens: Sequence[int], start: int = 1) -> None:
        """Remember what ``tokens`` says, of which those before ``start`` are known."""
        if len(self.seen) > MOST_KEPT:
            for run in list(islice(self.seen, MOST_KEPT // 2)):
                del self.seen[run]
        for place in range(max(1, start), len(tokens)):
            for order in ORDERS:
                if order <= place:
                    self.seen[tuple(tokens[place - order : place])] = tokens[place]

    def after(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may come next."""
        recent, found = list(tokens[-ORDERS[0] :]), []
        while len(found) < most:
            runs = (tuple(recent[-order:]) for order in ORDERS if order <= len(recent))
            token = next((self.seen[run] for run in runs if run in self.seen), None)
            if token is None:
                break
            found.append(token)
            recent.append(token)
        return found


def takes_likeliest(generation_config: Any) -> bool:  # noqa: ANN401 - of transformers, or None
    """Whether greedy decoding by ``generate`` takes the likeliest token whatever else the repository asks for."""
    return not any(getattr(generation_config, name, None) for name in PROCESSED)


def can_go_back(config: Any) -> bool:  # noqa: ANN401 - of transformers
    """Whether positions are rotated alike however long a row is: LongRoPE turns all anew from some length on."""
    return "longrope" not in str(getattr(config.get_text_config(), "rope_parameters", None))


@dataclass(slots=True, kw_only=True)
class Writing:
    """Rows of a batch while they are written: what ``cache`` holds of each is told by ``mask``.

    Attributes:
        rows: of the batch, those that have not ended.
        mask: ``[rows, cached]``, 0 where a row is padded.
        told: prompt and reply of every row of the batch.
        begins: where its reply begins.
        trusted: how many tokens are guessed for it, as many as ``fit(rows)`` says at most.
    """

    guesses: Guesses
    cache: Any
    ends: Collection[int]
    max_new_tokens: int
    rows: list[int]
    mask: Tensor
    told: list[list[int]]
    begins: list[int]
    trusted: list[int]
    fit: Callable[[int], int] = lambda _: MOST_GUESSES

    @classmethod
    def of(cls, batch: Batch, cache: Any, guesses: Guesses, ends: Collection[int], max_new_tokens: int) -> "Writing":  # noqa: ANN401
        """Before the first pass, which has the prompts."""
        told = [ids[kept].tolist() for ids, kept in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
        for tokens in told:
            guesses.learn(tokens)
        return cls(
            guesses=guesses, cache=cache, ends=ends, max_new_tokens=max_new_tokens, rows=list(range(len(told))),
            mask=batch.attention_mask, told=told, begins=list(map(len, told)), trusted=[LEAST_GUESSES] * len(told),
        )  # fmt: skip

    def replies(self) -> list[list[int]]:
        """What was written so far."""
        return [tokens[begin:] for tokens, begin in zip(self.told, self.begins, strict=True)]

    def next_batch(self) -> tuple[Batch, list[list[int]]]:
        """The last token of every row with what is guessed to follow, and the guesses."""
        most = self.fit(len(self.rows))
        guessed = [self._guess(row, most) for row in self.rows]
        width = 1 + max(map(len, guessed))
        ids = torch.zeros(len(self.rows), width, dtype=torch.long)
        new = torch.zeros_like(ids)
        for place, (row, guess) in enumerate(zip(self.rows, guessed, strict=True)):
            ids[place, : 1 + len(guess)] = torch.tensor([self.told[row][-1], *guess])
            new[place, : 1 + len(guess)] = 1
        self.mask = torch.cat([self.mask, new], 1)
        return Batch(rows=tuple(self.rows), input_ids=ids, attention_mask=self.mask), guessed

    def take(self, likeliest: Tensor, guessed: Sequence[list[int]]) -> None:
        """Add what greedy decoding takes after the last token of every row and after each guess as far as they hold.

        ``likeliest`` ``[rows, 1 + guesses]`` are the tokens that the pass found likeliest.
        """
        width, lasting = likeliest.shape[1], []
        for place, (row, guess) in enumerate(zip(self.rows, guessed, strict=True)):
            own = likeliest[place].tolist()
            held = next((n for n, token in enumerate(guess) if token != own[n]), len(guess))
            more = 2 * self.trusted[row] if guess and held == len(guess) else held
            self.trusted[row] = min(MOST_GUESSES, max(LEAST_GUESSES, more))
            before = len(self.told[row])
            self._add(row, own[: held + 1])
            self.guesses.learn(self.told[row], before)
            self.mask[place, self.mask.shape[1] - width + 1 + held :] = 0
            if not self._is_done(row):
                lasting.append(place)
        self._keep(lasting)

    def _guess(self, row: int, most: int) -> list[int]:
        left = self.max_new_tokens - (len(self.told[row]) - self.begins[row])
        return self.guesses.after(self.told[row], min(self.trusted[row], most, left - 1))

    def _add(self, row: int, tokens: Sequence[int]) -> None:
        for token in tokens[: self.begins[row] + self.max_new_tokens - len(self.told[row])]:
            self.told[row].append(token)
            if token in self.ends:
                break

    def _is_done(self, row: int) -> bool:
        return self.told[row][-1] in self.ends or len(self.told[row]) - self.begins[row] >= self.max_new_tokens

    def _keep(self, places: Sequence[int]) -> None:
        """Let the other rows leave, and take back what was guessed wrong: the mask is dense on its right again.

        What is padding in every row goes as well: a row that lagged behind those that left would carry theirs along.
        """
        if len(places) < len(self.rows):
            chosen = torch.tensor(places, dtype=torch.long)
            self.rows, self.mask = [self.rows[place] for place in places], self.mask[chosen]
            if places:
                self.cache.batch_select_indices(chosen.to(_device_of(self.cache)))
        most = int(self.mask.sum(1).max()) if places else 0
        if not places or (most == self.mask.shape[1] and not self._has_holes()):
            return
        order = self.mask.argsort(dim=1, stable=True)[:, -most:]  # what is padded comes first
        self.mask = self.mask.gather(1, order)
        for layer in self.cache.layers:
            if layer.is_initialized:
                _rearrange(layer, order)

    def _has_holes(self) -> bool:
        """Whether something is padded behind the first token of a row."""
        return bool((self.mask[:, 1:] < self.mask[:, :-1]).any())


def _device_of(cache: Any) -> torch.device:  # noqa: ANN401 - a cache of transformers
    return next(layer.keys.device for layer in cache.layers if layer.is_initialized)


def _rearrange(layer: Any, order: Tensor) -> None:  # noqa: ANN401 - a layer of a cache of transformers
    """Keep the tokens ``order`` ``[rows, tokens]`` of each row."""
    index = order.to(layer.keys.device)[:, None, :, None]
    for name in ("keys", "values"):
        held = getattr(layer, name)
        setattr(layer, name, held.gather(2, index.expand(-1, held.shape[1], -1, held.shape[3])))
    if layer.is_sliding:
        layer.cumulative_length = layer.keys.shape[2]


def write_by_guessing(
    run: Callable[[Batch, int], Tensor],
    writing: Writing,
    batch: Batch,
    *,
    first: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """The replies to a batch.  ``run(batch, keep)`` gives the logits of the last ``keep`` tokens of a pass.

    ``first`` is shown the logits of the first new token.
    """
    logits = run(batch, 1)[:, -1:]
    if first is not None:
        first(logits[:, 0])
    guessed: list[list[int]] = [[] for _ in batch.rows]
    while True:
        writing.take(logits.argmax(-1).cpu(), guessed)
        del logits
        if not writing.rows:
            return writing.replies()
        following, guessed = writing.next_batch()
        width = following.input_ids.shape[1]
        logits = run(following, width)[:, -width:]
