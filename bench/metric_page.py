"""The page of the study of selection metrics, from its files."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.edit_speed import machine
from bench.metric_readings import (
    DAMAGE,
    METRICS,
    OUTCOMES,
    VARIANTS,
    correlation,
    difference,
    interval,
    rate,
    table_of,
)
from bench.metric_study import DAMAGE_TOKENS, LATE, REPLY_TOKENS, Sizes

Done = tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]
PAGE = """# Selecting a direction: which metric predicts?

Written by `make bench-metrics` from one file for each candidate.

A candidate is taken by numbers that stand for what it does to replies. Here they are held against replies. On each
model, candidates over all layers and positions (all but four of layers below 0.8 L) are ablated in turn. The metrics
are computed on validation prompts, from one or two teacher-forced rows a prompt; then greedy replies of {tokens} tokens
are written to these prompts and to test prompts, and read by the scorer `rules`. Spearman's correlation over the
candidates says how well a metric predicts the share of refusals. In brackets: the 95 % interval of a bootstrap over
candidates.

- **first-token**: log-odds that the reply begins with a refusal token, the paper's bypass score.
- **opening**: mean log-probability of the first tokens of the model's own refusal, less that of the commonest
  opening of its answers, both teacher-forced.
- **cosmic**: cosine of ablated harmful residuals with the mean of harmless ones, plus that of induced harmless
  residuals with the mean of harmful ones; negated here, so that a positive correlation is a good one everywhere.

Their equations stand at the functions of `abliterate/method/selection_metrics.py`.

## Refusals

{refusals}

On the test prompts, no metric was computed. {verdict}

## Damage

Damage is the KL along {damage_tokens} tokens of the base's own answers to harmless test prompts; the metrics see
harmless validation prompts.

{damage}

## What each metric would take

The best candidate of layers below 0.8 L by each metric alone: the share of refusals among test replies (before: the
base's), and the damage. "Least possible" is the candidate with the fewest refusals, and of those the least damage.

{choices}

The same among candidates whose first-token KL is at most 0.1, where there are any.

{bounded}

## Variants

Chosen between on validation replies alone, so the test replies say nothing about what was picked here. Correlations
with the share of refusals among validation replies.

{variants}

## The candidates

{candidates}

Machine: {machine}.
"""


def page(done: Mapping[str, Done]) -> str:
    """The page, in Markdown."""
    columns = {name: table_of(results, base) for name, (_, base, results) in done.items()}
    return PAGE.format(
        tokens=REPLY_TOKENS,
        damage_tokens=DAMAGE_TOKENS,
        refusals=refusals(done, columns),
        verdict=verdict(columns),
        damage=correlations(columns, [*DAMAGE, *METRICS], "damage"),
        choices=choices(done, columns, bounded=False),
        bounded=choices(done, columns, bounded=True),
        variants=correlations(columns, [*METRICS, *VARIANTS], "val", intervals=False),
        candidates="\n\n".join(candidates(name, done[name], columns[name]) for name in done),
        machine=machine(),
    )


def refusals(done: Mapping[str, Done], columns: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """What was run, and the correlations with the shares of refusals."""
    sizes = Sizes()
    lines = [
        "| model | dtype | candidates | base refuses (val, test) | tokens of openings: refusal, answer "
        "| refusal tokens |",
        "|---|---|--:|--:|--:|---|",
    ]
    for name, (info, _, results) in done.items():
        tokens = ", ".join(f"`{token.strip() or token!r}`" for token in info["refusal_tokens"])
        val, test = (f"{hits} of {count}" for hits, count in (info["refused"][f"harmful_{p}"] for p in ("val", "test")))
        lines.append(
            f"| {name} | {info['dtype']} | {len(results)} | {val}, {test} "
            f"| {info['k']['refusal']}, {info['k']['answer']} | {tokens} |"
        )
    parts = {
        "validation replies": "val",
        "test replies": "test",
        "all replies": "all",
    }
    found = "\n\n".join(
        f"Correlation with the share of refusals, {text}:\n\n{correlations(columns, list(METRICS), outcome)}"
        for text, outcome in parts.items()
    )
    used = (
        f"Metrics: at most {sizes.refused_val} validation prompts that the base refuses and {sizes.harmless_val} that "
        f"it answers ({sizes.induced} under addition). Replies: to these, to at most {sizes.refused_test} test prompts "
        f"that it refuses, and to {sizes.others} harmful ones that it answers."
    )
    return "\n".join([*lines, "", used, "", found])


def correlations(
    columns: Mapping[str, Mapping[str, Sequence[float]]],
    metrics: Sequence[str],
    outcome: str,
    *,
    intervals: bool = True,
) -> str:
    """A row for each metric, a column for each model."""
    lines = [f"| metric | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for metric in metrics:
        cells = []
        for its in columns.values():
            cells.append(f"{correlation(its, metric, outcome):.2f}")
            if intervals:
                low, high = interval(its, metric, outcome)
                cells[-1] += f" [{low:.2f}, {high:.2f}]"
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(columns: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """How much better or worse than first-token the others are."""
    parts = []
    for metric in list(METRICS)[1:]:
        cells = [
            f"{name} [{low:+.2f}, {high:+.2f}]"
            for name, its in columns.items()
            for low, high in [difference(its, metric, "first-token", "all")]
        ]
        parts.append(f"{metric} less first-token: {', '.join(cells)}")
    return "Differences of correlations over all replies, 95 % intervals, drawn together: " + "; ".join(parts) + "."


def choices(done: Mapping[str, Done], columns: Mapping[str, Mapping[str, Sequence[float]]], *, bounded: bool) -> str:
    """What each metric takes on each model."""
    lines = [f"| metric | {' | '.join(done)} |", "|---|" + "---|" * len(done)]
    picks: dict[str, list[str]] = {name: [] for name in ("base", *METRICS, "least possible")}
    for name, (info, base, results) in done.items():
        its = columns[name]
        allowed = [
            n
            for n, one in enumerate(results)
            if one["layer"] < int(LATE * info["n_layers"]) and not (bounded and its["first-token KL"][n] > 0.1)
        ]
        picks["base"].append(f"{rate(base, 'test', 'others'):.0%}")
        for metric in METRICS:
            picks[metric].append(taken(results, its, min(allowed, key=lambda n: its[metric][n])) if allowed else "none")
        best = min(allowed, key=lambda n: (its["test"][n], its["damage"][n]), default=None)
        picks["least possible"].append("none" if best is None else taken(results, its, best))
    return "\n".join([*lines, *(f"| {metric} | {' | '.join(cells)} |" for metric, cells in picks.items())])


def taken(results: Sequence[Mapping[str, Any]], its: Mapping[str, Sequence[float]], n: int) -> str:
    """A candidate and what it does."""
    one = results[n]
    return f"{one['position']}/{one['layer']}: {its['test'][n]:.0%}, {its['damage'][n]:.2f} nats"


def candidates(name: str, done: Done, its: Mapping[str, Sequence[float]]) -> str:
    """A row for each candidate of a model."""
    _, base, results = done
    shown = [*METRICS, "first-token KL", "opening KL", "val", "test", "damage", "broken"]
    lines = [
        f"### {name}",
        "",
        f"| position/layer | {' | '.join(shown)} |",
        "|---|" + "--:|" * len(shown),
        "| base | " + " | ".join(f"{of_base(column, base):.2f}" for column in shown) + " |",
    ]
    for n, one in enumerate(results):
        lines.append(
            f"| {one['position']}/{one['layer']} | " + " | ".join(f"{its[column][n]:.2f}" for column in shown) + " |"
        )
    seconds = fmean(one["seconds"] for one in results) if results else math.nan
    return "\n".join([*lines, "", f"Seconds a candidate: {seconds:.0f}."])


def of_base(column: str, base: Mapping[str, Any]) -> float:
    """A metric or outcome of the base itself."""
    return {**METRICS, **DAMAGE, **OUTCOMES}[column](base, base)
