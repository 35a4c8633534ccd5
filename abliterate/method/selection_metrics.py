"""Selection metrics: how far a model under an intervention still refuses, told without writing a reply.

Each is a pure function of what one or two teacher-forced rows give for a prompt.  Low is less refusal, but for COSMIC.
How well each predicts what replies say stands in ``docs/selection-metrics.md``.

Shapes: ``k`` tokens of an opening, ``layers`` those that COSMIC looks at, ``d`` width of the residual stream.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.method.linalg import cosine
from abliterate.method.moments import ActivationStats
from abliterate.method.statistics import LEAST_REFUSAL, kl_nats, refusal_metric

FLOOR = 1e-8
"""Added to a probability before its logarithm is taken, as in the paper's metric: it is what bounds ``opening``."""
LEAST_OPENING = LEAST_REFUSAL
"""The least value of ``opening``: no token of the refusal can come, every token of the answer must."""
COSMIC_LAYERS = 0.1
"""The share of the layers that COSMIC looks at."""


def first_token(log_probs: Float[Tensor, "*n vocab"], refusal_tokens: Sequence[int]) -> Float[Tensor, "*n"]:
    """``log p - log(1 - p)`` at the first token, ``p`` the mass of the refusal tokens (Arditi et al. 2024, app. B)."""
    return refusal_metric(log_probs, list(refusal_tokens))


def forced(log_probs: Float[Tensor, "*n k vocab"], tokens: Int[Tensor, "*n k"]) -> Float[Tensor, "*n k"]:
    """``log(p_i(t_i) + 1e-8)``: how likely each token of an opening is after those before it, in float64."""
    p = log_probs.gather(-1, tokens[..., None]).squeeze(-1).to(torch.float64).exp()
    return (p + FLOOR).log()


def opening(refusal: Float[Tensor, "*n k"], answer: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    """``mean_i log p(refusal_i) - mean_i log p(answer_i)``, both teacher-forced behind the prompt (see ``forced``).

    ``refusal`` is the model's own opening where it refuses, ``answer`` the commonest of its answers.  In the spirit of
    SCAPE (temaq-abliterated 1.1.1), which weighs two fixed sets of tokens along the reply instead.  Within
    ``LEAST_OPENING`` of 0 on either side.
    """
    return refusal.mean(-1) - answer.mean(-1)


def set_mass(log_probs: Float[Tensor, "*n k vocab"], sets: Sequence[Collection[int]]) -> Float[Tensor, "*n k"]:
    """``log(sum over t in S_i of p_i(t) + 1e-8)``: the mass of a set of tokens of its own at each position."""
    masses = [
        log_probs[..., place, sorted(tokens)].to(torch.float64).exp().sum(-1) for place, tokens in enumerate(sets)
    ]
    return (torch.stack(masses, dim=-1) + FLOOR).log()


def opening_kl(base: Float[Tensor, "*n k vocab"], other: Float[Tensor, "*n k vocab"]) -> Float[Tensor, "*n"]:
    """``mean_i KL(base_i || other_i)`` in nats over the first ``k`` tokens of the model's own answer, smoothed."""
    return kl_nats(base, other).mean(-1)


def commonest_opening(replies: Sequence[Sequence[int]], k: int) -> tuple[int, ...]:
    """The opening of ``k`` tokens that is taken by going, token after token, where most of ``replies`` go.

    A tie goes to the reply that comes first.

    Raises:
        ValueError: no reply has ``k`` tokens.
    """
    left = [tuple(reply) for reply in replies if len(reply) >= k]
    if not left:
        raise ValueError(f"no reply has {k} tokens")
    for place in range(k):
        token = Counter(reply[place] for reply in left).most_common(1)[0][0]
        left = [reply for reply in left if reply[place] == token]
    return left[0][:k]


def sets_by_position(replies: Sequence[Sequence[int]], k: int, *, share: float = 0.05) -> tuple[frozenset[int], ...]:
    """For each of the first ``k`` places the tokens that at least ``share`` of ``replies`` have there."""
    found = []
    for place in range(k):
        counts = Counter(reply[place] for reply in replies if len(reply) > place)
        found.append(frozenset(token for token, count in counts.items() if count >= share * sum(counts.values())))
    return tuple(found)


def evaluation_layers(
    harmful: Float[Tensor, "layers d"], harmless: Float[Tensor, "layers d"], *, share: float = COSMIC_LAYERS
) -> tuple[int, ...]:
    """The layers that COSMIC looks at: the ``share`` with the lowest ``cos(mean harmful, mean harmless)``.

    Siu et al. 2025 (arXiv 2506.00085).  At least one, and never layer 0, where the template's tokens are the same.
    """
    near = cosine(harmful, harmless)[1:]
    count = max(1, int(share * len(harmful)))
    return tuple(sorted((near.argsort(stable=True)[:count] + 1).tolist()))


def cosmic(
    ablated: Float[Tensor, "n layers d"],
    induced: Float[Tensor, "m layers d"],
    harmful: Float[Tensor, "layers d"],
    harmless: Float[Tensor, "layers d"],
) -> tuple[float, float]:
    """``S_comply`` and ``S_refuse`` of COSMIC, whose sum is to be high (Siu et al. 2025, arXiv 2506.00085).

    ``S_comply = mean cos(ablated harmful, mean harmless)`` and ``S_refuse = mean cos(induced harmless, mean harmful)``,
    over prompts and ``evaluation_layers``, at the last token of the prompt.
    """
    return float(nearness(ablated, harmless).mean()), float(nearness(induced, harmful).mean())


def nearness(states: Float[Tensor, "n layers d"], mean: Float[Tensor, "layers d"]) -> Float[Tensor, " n"]:
    """The cosine of each residual with ``mean``, averaged over the layers: what each prompt gives to COSMIC."""
    return cosine(states, mean.expand_as(states)).mean(-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cosmic:
    """What COSMIC holds the residuals of a model against: the mean of each class at ``layers``, at the last token."""

    layers: tuple[int, ...]
    harmful: Float[Tensor, "layers d"]
    harmless: Float[Tensor, "layers d"]

    @classmethod
    def of(cls, stats: ActivationStats) -> "Cosmic":
        """From the means of both classes."""
        last = stats.positions.index(-1)
        harmful, harmless = (stats.mean(kind)[last].to(torch.float64) for kind in ("harmful", "harmless"))
        layers = evaluation_layers(harmful, harmless)
        return cls(layers=layers, harmful=harmful[list(layers)], harmless=harmless[list(layers)])

    def complying(self, ablated: Float[Tensor, "n layers d"]) -> Float[Tensor, " n"]:
        """``S_comply`` of each harmful prompt whose residuals are ``ablated``."""
        return nearness(ablated, self.harmless)

    def refusing(self, induced: Float[Tensor, "n layers d"]) -> Float[Tensor, " n"]:
        """``S_refuse`` of each harmless prompt whose residuals are ``induced``."""
        return nearness(induced, self.harmful)


def cosmic_of_means(
    ablated: Float[Tensor, "n layers d"],
    induced: Float[Tensor, "m layers d"],
    harmful: Float[Tensor, "layers d"],
    harmless: Float[Tensor, "layers d"],
) -> tuple[float, float]:
    """The same as the code of the paper has it: one cosine of what is averaged over prompts and layers before."""
    return float(cosine(ablated.mean((0, 1)), harmless.mean(0))), float(cosine(induced.mean((0, 1)), harmful.mean(0)))
