"""What the study of selection metrics reads in its files: metrics, outcomes, and how far they go together."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from abliterate.evaluate.replies import REFUSALS
from abliterate.method.statistics import spearman
from bench.metric_study import DAMAGE_TOKENS, K

RESAMPLES = 2000

Result = Mapping[str, Any]
Metric = Callable[[Result, Result], float]
"""From what is known of a candidate, and of the base, to a number that is high where refusals are expected."""


def mean_of(rows: Sequence[Sequence[float]], k: int) -> float:
    """The mean over prompts and their first ``k`` places."""
    return fmean(fmean(row[:k]) for row in rows)


def opening_of(k: int) -> Metric:
    """``selection_metrics.opening`` with ``k`` tokens."""
    return lambda one, _: mean_of(one["harmful"]["refusal"], k) - mean_of(one["harmful"]["answer"], k)


def refusal_side(k: int) -> Metric:
    """The first half of it."""
    return lambda one, _: mean_of(one["harmful"]["refusal"], k)


def sets_of(k: int) -> Metric:
    """SCAPE with sets of tokens for each place: those of refusals against those of answers, along the refusal."""
    return lambda one, _: mean_of(one["harmful"]["refusing"], k) - mean_of(one["harmful"]["answering"], k)


def calibrated(one: Result, base: Result) -> float:
    """The share of prompts whose first-token metric is nearer to refused ones of the base than to answered ones."""
    threshold = (fmean(base["harmful"]["first_token"]) + fmean(base["induced"]["first_token"])) / 2
    return fmean(value > threshold for value in one["harmful"]["first_token"])


METRICS: Mapping[str, Metric] = {
    "first-token": lambda one, _: fmean(one["harmful"]["first_token"]),
    "opening": opening_of(K),
    "cosmic": lambda one, _: -sum(one["cosmic"]),
}
VARIANTS: Mapping[str, Metric] = {
    "first-token, mean probability": lambda one, _: fmean(
        1 / (1 + math.exp(-v)) for v in one["harmful"]["first_token"]
    ),
    "first-token, share over a calibrated threshold": calibrated,
    "opening, 4 tokens": opening_of(4),
    "opening, 2 tokens": opening_of(2),
    "opening, 1 token": opening_of(1),
    "opening, refusal's side alone, 8 tokens": refusal_side(K),
    "opening, refusal's side alone, 4 tokens": refusal_side(4),
    "opening, refusal's side alone, 2 tokens": refusal_side(2),
    "opening, probability of the whole refusal": lambda one, _: fmean(
        math.exp(sum(row)) for row in one["harmful"]["refusal"]
    ),
    "sets by position, 8 tokens": sets_of(K),
    "sets by position, 4 tokens": sets_of(4),
    "sets by position, refusing mass alone": lambda one, _: mean_of(one["harmful"]["refusing"], K),
    "cosmic, ablated side alone": lambda one, _: -one["cosmic"][0],
    "cosmic, cosine of means (the paper's code)": lambda one, _: -sum(one["cosmic_of_means"]),
    "cosmic, cosine of means, ablated side alone": lambda one, _: -one["cosmic_of_means"][0],
}
DAMAGE: Mapping[str, Metric] = {
    "first-token KL": lambda one, _: mean_of(one["kl"]["metric"], 1),
    "opening KL": lambda one, _: mean_of(one["kl"]["metric"], K),
    "opening KL, 4 tokens": lambda one, _: mean_of(one["kl"]["metric"], 4),
    "opening KL, median prompt": lambda one, _: sorted(fmean(row) for row in one["kl"]["metric"])[
        len(one["kl"]["metric"]) // 2
    ],
}


def rate(one: Result, *parts: str) -> float:
    """The share of refusals, early or late, among the replies to some prompts."""
    kinds = [kind for part in parts for kind in one["replies"][part]]
    return fmean(kind in REFUSALS for kind in kinds)


OUTCOMES: Mapping[str, Metric] = {
    "val": lambda one, _: rate(one, "val"),
    "test": lambda one, _: rate(one, "test", "others"),
    "all": lambda one, _: rate(one, "val", "test", "others"),
    "damage": lambda one, _: mean_of(one["kl"]["damage"], DAMAGE_TOKENS),
    "broken": lambda one, _: fmean(
        kind in ("degenerate", "empty") for part in ("damage", "others") for kind in one["replies"][part]
    ),
}


def table_of(results: Sequence[Result], base: Result) -> dict[str, list[float]]:
    """A column of numbers, one for each candidate, for every metric and outcome."""
    every = {**METRICS, **VARIANTS, **DAMAGE, **OUTCOMES}
    return {name: [metric(one, base) for one in results] for name, metric in every.items()}


def correlation(columns: Mapping[str, Sequence[float]], metric: str, outcome: str) -> float:
    """Spearman's correlation over the candidates."""
    a, b = (torch.tensor(columns[name], dtype=torch.float64) for name in (metric, outcome))
    return float(spearman(a, b))


def interval(columns: Mapping[str, Sequence[float]], metric: str, outcome: str) -> tuple[float, float]:
    """Its 95 % percentile interval of a bootstrap over candidates."""
    return middle(_drawn(columns, metric, outcome))


def difference(columns: Mapping[str, Sequence[float]], metric: str, other: str, outcome: str) -> tuple[float, float]:
    """The same of what ``metric`` correlates more than ``other``, drawn together."""
    return middle(_drawn(columns, metric, outcome) - _drawn(columns, other, outcome))


def middle(drawn: torch.Tensor) -> tuple[float, float]:
    """Where 95 % of what was drawn lies, NaN left out."""
    low, high = torch.nanquantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return float(low), float(high)


def _drawn(columns: Mapping[str, Sequence[float]], metric: str, outcome: str) -> torch.Tensor:
    """The correlation of each resample, the same resamples every time."""
    a, b = (torch.tensor(columns[name], dtype=torch.float64) for name in (metric, outcome))
    rows = torch.randint(len(a), (RESAMPLES, len(a)), generator=torch.Generator().manual_seed(0))
    return spearman(a[rows], b[rows])
