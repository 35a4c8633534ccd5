"""The losses of ``method.refusal_cone`` on a model: forward passes under hooks, through which gradients flow.

Only the direction is a parameter.  The weights are frozen and stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.linalg import unit
from abliterate.method.refusal_cone import (
    ABLATION,
    ADDITION,
    INDEPENDENCE,
    RETAIN,
    independence_loss,
    layers_compared,
    retain_loss,
    target_loss,
)
from abliterate.method.scope import Scope
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import run_batch
from abliterate.model.interventions import added, observed, removed
from abliterate.model.load import LoadedModel
from abliterate.model.targets import Example

Loss = Callable[[Tensor, Sequence[Any]], Tensor]
"""``loss(v, examples)``: its sum over ``examples`` for a direction ``v [d]``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watched:
    """A harmful prompt, and the residuals of its last token at the layers that RepInd compares.

    ``base [layers, d]``: as they are; ``without [m, layers, d]``: with each of the given directions ablated.
    """

    ids: list[int]
    base: Tensor
    without: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Losses:
    """The losses on a model, whose weights are frozen by it.

    ``length`` is ``alpha``, the length of what is added to what enters block ``layer``; ``scope`` is where directions
    are ablated, ``given [d, m]`` of what they shall be independent.
    """

    loaded: LoadedModel
    chat: ChatFormat
    length: float
    layer: int
    scope: Scope
    given: Float[Tensor, "d m"] | None = None

    def __post_init__(self) -> None:
        self.loaded.model.requires_grad_(requires_grad=False)

    @property
    def by_name(self) -> Mapping[str, Loss]:
        """Each of them."""
        found: dict[str, Loss] = {ABLATION: self.ablation, ADDITION: self.addition, RETAIN: self.retain}
        return found if self.given is None else {**found, INDEPENDENCE: self.independence}

    def ablation(self, v: Float[Tensor, " d"], examples: Sequence[Example]) -> Float[Tensor, ""]:
        """Cross-entropy of answers to harmful prompts with ``v`` ablated."""
        with removed(self.loaded, v[:, None], self.scope):
            return self._targets(examples)

    def addition(self, v: Float[Tensor, " d"], examples: Sequence[Example]) -> Float[Tensor, ""]:
        """Cross-entropy of refusals of harmless prompts with ``alpha v / |v|`` added at the start's layer."""
        with added(self.loaded, unit(v), self.layer, scale=self.length):
            return self._targets(examples)

    def retain(self, v: Float[Tensor, " d"], examples: Sequence[Example]) -> Float[Tensor, ""]:
        """KL of the model with ``v`` ablated to the base along the base's replies to harmless prompts."""
        with torch.no_grad():
            base = [logits for _, logits in self._logits(examples)]
        with removed(self.loaded, v[:, None], self.scope):
            ablated = [logits for _, logits in self._logits(examples)]
        return torch.stack([retain_loss(p, q) for p, q in zip(ablated, base, strict=True)]).sum()

    def independence(self, v: Float[Tensor, " d"], examples: Sequence[Watched]) -> Float[Tensor, ""]:
        """RepInd's cosine condition of ``v`` with each of the given directions, summed over these."""
        if self.given is None:
            raise AssertionError("there are directions to be independent of")
        with removed(self.loaded, v[:, None], self.scope):
            without_v = self._residuals([one.ids for one in examples])
        base, without = (torch.stack(its) for its in zip(*((one.base, one.without) for one in examples), strict=True))
        each = [
            independence_loss(base, without_v, without[:, m], v, w).sum() for m, w in enumerate(self.given.unbind(1))
        ]
        return torch.stack(each).sum()

    def watched(self, prompts: Sequence[str], rows: int) -> tuple[Watched, ...]:
        """Harmful ``prompts`` as the examples of ``independence``, ``rows`` in a forward pass."""
        if self.given is None:
            raise AssertionError("there are directions to be independent of")
        found: list[Watched] = []
        for first in range(0, len(prompts), rows):
            encoded = [self.chat.encode(prompt) for prompt in prompts[first : first + rows]]
            with torch.no_grad():
                base, without = self._residuals(encoded), []
                for w in self.given.unbind(1):
                    with removed(self.loaded, w[:, None], self.scope):
                        without.append(self._residuals(encoded))
            each = zip(encoded, base, torch.stack(without, dim=1), strict=True)
            found += [Watched(ids=ids, base=one, without=others) for ids, one, others in each]
        return tuple(found)

    def _targets(self, examples: Sequence[Example]) -> Tensor:
        each = []
        for example, logits in self._logits(examples):
            targets = torch.tensor(example.ids[-example.length :], device=logits.device)
            each.append(target_loss(logits[:-1], targets))
        return torch.stack(each).sum()

    def _logits(self, examples: Sequence[Example]) -> Iterator[tuple[Example, Tensor]]:
        """Each example with the logits of its reply's tokens and of the one that would follow, in float32 or wider."""
        longest = 1 + max(example.length for example in examples)
        for batch in self.chat.pack([example.ids for example in examples], len(examples)):
            logits = run_batch(self.loaded, batch, keep=longest, gradients=True)
            for place, row in enumerate(batch.rows):
                its = logits[place, -examples[row].length - 1 :]
                yield examples[row], its.to(torch.promote_types(its.dtype, torch.float32))

    def _residuals(self, encoded: Sequence[list[int]]) -> Tensor:
        """What enters the blocks below 0.9 L at the last token of each prompt, ``[prompts, layers, d]``."""
        compared = layers_compared(self.loaded.n_layers)
        rows: list[Tensor | None] = [None] * len(encoded)
        for batch in self.chat.pack(encoded, len(encoded)):
            seen: dict[int, Tensor] = {}
            with observed(self.loaded, lambda layer, x, seen=seen: seen.update({layer: x[:, -1]})):
                run_batch(self.loaded, batch, gradients=True)
            states = torch.stack([seen[layer].to(self.loaded.device) for layer in compared], dim=1)
            for place, row in enumerate(batch.rows):
                rows[row] = states[place].to(torch.promote_types(states.dtype, torch.float32))
        return torch.stack([row for row in rows if row is not None])
