"""Rates with intervals, and distances between distributions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Z95 = 1.959963984540054
DRAWN_TOGETHER = 2**22
"""Draws of a bootstrap held at once."""
SMOOTHING = 1e-6
"""Added inside the logarithms of the KL, as in the paper's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """``hits`` of ``count``, with its 95 % Wilson interval."""

    hits: int
    count: int

    @classmethod
    def of(cls, found: Iterable[bool]) -> "Rate":
        """How many of them are true."""
        each = list(found)
        return cls(hits=sum(each), count=len(each))

    @property
    def value(self) -> float:
        """The rate; NaN of nothing."""
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927): within [0, 1], sensible at 0 and 1 and for small counts."""
        if not self.count:
            return (math.nan, math.nan)
        n, p, z = self.count, self.value, Z95
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return (max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A mean difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval says: "lower", "higher", or "tie" where it holds zero."""
        if math.isnan(self.value) or self.low <= 0 <= self.high:
            return "tie"
        return "lower" if self.value < 0 else "higher"


def paired_difference(before: Sequence[float], after: Sequence[float], *, resamples: int = 10_000) -> Difference:
    """Mean of ``after - before`` over the same prompts, with the percentile interval of a paired bootstrap.

    Pairs are drawn together (Efron 1979), so that what makes a prompt hard for both is not taken for uncertainty.  The
    draws are the same every time.
    """
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    if not len(change):
        return Difference(value=math.nan, low=math.nan, high=math.nan)
    generator = torch.Generator().manual_seed(0)
    rows = max(1, DRAWN_TOGETHER // len(change))
    means = torch.cat(
        [
            change[torch.randint(len(change), (min(rows, resamples - first), len(change)), generator=generator)].mean(1)
            for first in range(0, resamples, rows)
        ]
    )
    low, high = (float(torch.quantile(means, share)) for share in (0.025, 0.975))
    return Difference(value=float(change.mean()), low=low, high=high)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of their mean; 0 where it cannot be told: of one value, or where one is not finite."""
    count, mean = len(values), math.fsum(values) / max(1, len(values)) if all(map(math.isfinite, values)) else math.nan
    if count < 2 or math.isnan(mean):
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def spearman(a: Float[Tensor, "*m n"], b: Float[Tensor, "*m n"]) -> Float[Tensor, "*m"]:
    """Spearman's rank correlation, ties given their mean rank; NaN where one side is all the same."""
    first, second = _centred_ranks(a), _centred_ranks(b)
    return (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()


def _centred_ranks(values: Float[Tensor, "*m n"]) -> Float[Tensor, "*m n"]:
    """The place of each in order, from the middle; equal ones share the mean of theirs."""
    beside, each = values[..., None, :], values[..., :, None]
    return ((beside < each).sum(-1) - (beside > each).sum(-1)).to(torch.float64) / 2


def kl_nats(base: Float[Tensor, "*n vocab"], other: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """KL(base || other) in nats from log-probabilities, smoothed by ``SMOOTHING`` as in the paper's code."""
    p, q = base.exp(), other.exp()
    return (p * ((p + SMOOTHING).log() - (q + SMOOTHING).log())).sum(-1)


def least_kl_nats(base: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """The least value of ``kl_nats(base, q)`` over all distributions ``q``; the smoothing lets it be below zero.

    The cross term is largest where ``q + s = max(s, p / t)`` (water filling): the ``k`` most likely tokens get what is
    in proportion to ``p``, with ``t = sum of their p / (1 + k s)``, and the others nothing.
    """
    p = base.exp().sort(-1, descending=True).values
    sums = p.cumsum(-1)
    filled = torch.arange(1, p.shape[-1] + 1, dtype=p.dtype, device=p.device) * SMOOTHING + 1
    count = (p * filled >= SMOOTHING * sums).sum(-1, keepdim=True).clamp_min(1)
    t = (sums / filled).gather(-1, count - 1)
    return (p * ((p + SMOOTHING).log() - (p / t).clamp_min(SMOOTHING).log())).sum(-1)


def exact_kl_nats(base: Float[Tensor, "*n vocab"], other: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """KL(base || other) in nats from log-probabilities, unsmoothed."""
    return torch.nn.functional.kl_div(other, base, reduction="none", log_target=True).sum(-1)


LEAST_REFUSAL = math.log(1e-8) - math.log(1 + 1e-8)
"""The least value of ``refusal_metric``: that of ``p = 0``."""


def refusal_metric(log_probs: Float[Tensor, "*n vocab"], refusal_tokens: list[int]) -> Float[Tensor, "*n"]:
    """Log-odds of refusing at the first token (Arditi et al. 2024, appendix B).

    It is ``log_odds`` of the summed probability of the refusal tokens.
    """
    return log_odds(log_probs[..., refusal_tokens].to(torch.float64).exp().sum(-1))


def log_odds(p: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``log(p + 1e-8) - log(1 - p + 1e-8)``.  The smoothing, the paper's, clips it to about +-18.4."""
    return (p + 1e-8).log() - (1 - p + 1e-8).clamp_min(1e-8).log()
