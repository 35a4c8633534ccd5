"""Prompts whose attention cache is kept, so that several things are run behind them: given tokens, or replies.

The rows may be run under several interventions at once, one for each equal stretch of them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.model.chat import Batch
from abliterate.model.forward import run_batch
from abliterate.model.interventions import observed
from abliterate.model.load import LoadedModel
from abliterate.model.prefix import empty_cache, repeated, shared_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Prompts that were run.  ``log_probs`` of their next token; ``states[row, l]`` enters block ``l`` at their end."""

    loaded: LoadedModel
    cache: Any
    mask: Tensor
    log_probs: Tensor
    states: Tensor

    def of(self, rows: Sequence[int]) -> "Rows":
        """Some of the rows, in this order; what is run behind them leaves the others as they are."""
        chosen = torch.tensor(rows)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.batch_select_indices(chosen)
        return Rows(
            loaded=self.loaded,
            cache=cache,
            mask=self.mask[chosen],
            log_probs=self.log_probs[chosen],
            states=self.states[chosen],
        )

    def forced(self, tails: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities ``[tokens, vocab]`` of each token of ``tails``, one for each row, in float32."""
        width = max(map(len, tails)) - 1
        ids = torch.tensor([[*tail[:-1], *[0] * (width + 1 - len(tail))] for tail in tails])
        if not width:
            return list(self.log_probs[:, None])
        logits = self._next(ids, torch.cat([self.mask, torch.ones_like(ids)], dim=1))
        return [
            torch.cat([first[None], its[: len(tail) - 1].float().log_softmax(-1)])
            for first, its, tail in zip(self.log_probs, logits, tails, strict=True)
        ]

    def greedy(self, tokens: int, ends: set[int]) -> list[list[int]]:
        """Greedy replies, without what follows their end."""
        mask, new = self.mask, [self.log_probs.argmax(-1)]
        ended = torch.zeros(len(mask), dtype=torch.bool)
        for _ in range(tokens - 1):
            ended |= torch.isin(new[-1], torch.tensor(sorted(ends)))
            if bool(ended.all()):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            new.append(self._next(new[-1][:, None], mask)[:, -1].argmax(-1))
        replies = torch.stack(new, dim=1).tolist()
        stops = ([place for place, token in enumerate(reply) if token in ends] for reply in replies)
        return [reply[: min(stop, default=len(reply))] for reply, stop in zip(replies, stops, strict=True)]

    def _next(self, ids: Tensor, mask: Tensor) -> Tensor:
        batch = Batch(rows=tuple(range(len(ids))), input_ids=ids, attention_mask=mask)
        return run_batch(self.loaded, batch, keep=ids.shape[1], cache=self.cache)


def run_rows(loaded: LoadedModel, encoded: Sequence[list[int]], pad_id: int, *, copies: int = 1) -> Rows:
    """Run ``encoded``, all of it ``copies`` times; the tokens that all begin with are run once for each copy."""
    from transformers.cache_utils import DynamicLayer

    cache = empty_cache(loaded)
    shared = shared_tokens(encoded) if all(type(layer) is DynamicLayer for layer in cache.layers) else 0
    if shared:
        prefix = torch.tensor([encoded[0][:shared]] * copies)
        run_batch(loaded, Batch(rows=(0,), input_ids=prefix, attention_mask=torch.ones_like(prefix)), cache=cache)
        cache = repeated(cache, len(encoded))
    width = max(map(len, encoded)) - shared
    pads = [width + shared - len(ids) for ids in encoded]
    ids = torch.tensor([[pad_id] * pad + its[shared:] for pad, its in zip(pads, encoded, strict=True)])
    mask = torch.tensor([[1] * shared + [0] * pad + [1] * (width - pad) for pad in pads])
    states: list[Tensor] = []

    def see(_: int, x: Tensor) -> None:
        states.append(x[:, -1].float())

    batch = Batch(rows=tuple(range(len(ids))), input_ids=ids.repeat(copies, 1), attention_mask=mask.repeat(copies, 1))
    with observed(loaded, see):
        logits = run_batch(loaded, batch, cache=cache)[:, -1]
    return Rows(
        loaded=loaded,
        cache=cache,
        mask=batch.attention_mask,
        log_probs=logits.float().log_softmax(-1),
        states=torch.stack(states, dim=1),
    )
