"""Scores of lm-eval's tasks, model against base on the same documents, and the deltas the paper published."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from numbers import Real
from typing import Any

from abliterate.method.statistics import Z95, Difference, paired_difference

IN_PERCENT = ("acc", "exact_match")
"""Metrics whose names begin so are shares of the documents; others are shown as they are."""
FIXED = ("name", "alias", "sample_len", "sample_count")
EQUAL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task (or group of tasks) for one model.

    ``value`` and ``stderr`` are lm-eval's, ``stderr`` NaN where it gives none; ``count`` is the number of documents and
    ``shots`` that of examples before each.  ``asked`` says that the user named this task, or a tag it has; the others
    are parts of a group.
    ``change`` is the difference to the base: ``paired`` over the same documents where their mean is the value, else of
    two independent figures; None for the base itself, or where there is nothing to go by.
    """

    task: str
    metric: str
    value: float
    stderr: float
    count: int
    shots: int
    asked: bool
    higher_is_better: bool | None
    change: Difference | None = None
    paired: bool = False

    @property
    def in_percent(self) -> bool:
        """Whether the value is a share."""
        return self.metric.startswith(IN_PERCENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmarks:
    """How tasks were put, in a sentence, and what was published for them, by task."""

    about: str
    published: Mapping[str, str]


def scores_of(
    results: Mapping[str, Any], base: Mapping[str, Any] | None, asked: Sequence[str]
) -> tuple[TaskScore, ...]:
    """Every task and metric of ``results`` (what lm-eval gives back), compared with ``base``; None: it is the base."""
    found = []
    parts = {part for below in results.get("group_subtasks", {}).values() for part in below}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, chosen = key.partition(",")
            if key in FIXED or name.endswith("_stderr") or not isinstance(value, Real):
                continue
            change, paired = _change(results, base, task, name, chosen)
            found.append(
                TaskScore(
                    task=task,
                    metric=name if chosen == "none" else f"{name} ({chosen})",
                    value=float(value),
                    stderr=_number(metrics.get(f"{name}_stderr,{chosen}")),
                    count=int(metrics["sample_len"]),
                    shots=int(results["n-shot"].get(task, 0)),
                    asked=task in asked or task not in parts,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(name),
                    change=change,
                    paired=paired,
                )
            )
    order = {name: place for place, name in enumerate(asked)}
    return tuple(sorted(found, key=lambda score: order.get(score.task, len(order))))


def published_for(base: str, tasks: Sequence[str]) -> dict[str, str]:
    """What Arditi et al. 2024 give for these tasks, as text by task.

    It is the change of ``base`` where that is one of their models, else the range over their models.
    """
    found = {}
    for task in tasks:
        entry = _published()["tasks"].get(task)
        if entry is None:
            continue
        own = entry.get("models", {}).get(base)
        figure = f"{own:+.1f} points for this model" if own is not None else _range(entry)
        found[task] = f"{figure} ({_published()['source']})"
    return found


@cache
def _published() -> Mapping[str, Any]:
    return tomllib.loads((files("abliterate.evaluate") / "published.toml").read_text("utf-8"))


def _range(entry: Mapping[str, Any]) -> str:
    return f"{entry['least']:+.1f} to {entry['most']:+.1f} points over the paper's models"


def _change(
    results: Mapping[str, Any], base: Mapping[str, Any] | None, task: str, metric: str, chosen: str
) -> tuple[Difference | None, bool]:
    """The difference to the base with its interval, and whether it is a paired one."""
    theirs = None if base is None else base["results"].get(task, {}).get(f"{metric},{chosen}")
    if base is None or theirs is None:
        return None, False
    mine = results["results"][task][f"{metric},{chosen}"]
    before, after = (_samples(its, task, metric, chosen) for its in (base, results))
    if before and before.keys() == after.keys() and _is_mean(before, theirs) and _is_mean(after, mine):
        places = sorted(before)
        return paired_difference([before[place] for place in places], [after[place] for place in places]), True
    errors = [_number(its["results"][task].get(f"{metric}_stderr,{chosen}")) for its in (base, results)]
    if any(math.isnan(error) for error in errors):
        return None, False
    half = Z95 * math.hypot(*errors)
    return Difference(value=mine - theirs, low=mine - theirs - half, high=mine - theirs + half), False


def _samples(results: Mapping[str, Any], task: str, metric: str, chosen: str) -> dict[tuple[str, int, str], float]:
    """The metric of every document of a task, or of the parts of a group; nothing where it is not one number."""
    found = {}
    for part in _leaves(results.get("group_subtasks", {}), task):
        for sample in results["samples"].get(part, []):
            value = sample.get(metric)
            if sample["filter"] != chosen:
                continue
            if not isinstance(value, Real) or not math.isfinite(value):
                return {}
            found[part, int(sample["doc_id"]), str(sample["doc_hash"])] = float(value)
    return found


def _leaves(parts: Mapping[str, Sequence[str]], task: str) -> list[str]:
    below = parts.get(task)
    return [leaf for part in below for leaf in _leaves(parts, part)] if below else [task]


def _is_mean(samples: Mapping[Any, float], value: float) -> bool:
    return bool(abs(math.fsum(samples.values()) / len(samples) - value) < EQUAL)


def _number(value: Any) -> float:  # noqa: ANN401 - lm-eval writes "N/A" where there is none
    return float(value) if isinstance(value, Real) else math.nan


def score_of(document: Mapping[str, Any]) -> TaskScore:
    """A score as a manifest has it, where null stands for NaN."""
    change = document["change"] and Difference(**{key: _number(value) for key, value in document["change"].items()})
    fields = {key: value for key, value in document.items() if key != "verdict"}
    return TaskScore(
        **{**fields, "stderr": _number(document["stderr"]), "value": _number(document["value"]), "change": change}
    )


def figure(score: TaskScore) -> str:
    """Value and standard error for people, e.g. "65.8 % ± 0.4"."""
    factor, digits, unit = (100, 1, " %") if score.in_percent else (1, 4, "")
    error = "" if math.isnan(score.stderr) else f" ± {factor * score.stderr:.{digits}f}"
    return f"{factor * score.value:.{digits}f}{unit}{error}"


def against_base(score: TaskScore) -> str:
    """The difference to the base for people, e.g. "-0.8 points (-1.4 to -0.2: lower)"; "" where there is none."""
    change = score.change
    if change is None:
        return ""
    factor, digits, unit = (100, 1, " points") if score.in_percent else (1, 4, "")
    low, high = (f"{factor * value:+.{digits}f}" for value in (change.low, change.high))
    unpaired = "" if score.paired else ", unpaired"
    return f"{factor * change.value:+.{digits}f}{unit} ({low} to {high}: {change.verdict}{unpaired})"
