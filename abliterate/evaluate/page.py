"""The report: one self-contained HTML file that needs no network and no script.

It is made from values only: an evaluation and, where they are at hand, the directions with their scores, the manifest
of the edit, and how far prompts reach along the direction.  Replies stand in it folded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoint.output import write_text
from abliterate.evaluate.benchmarks import TaskScore, against_base, figure
from abliterate.evaluate.charts import Bar, Dot, HeatMap, heat_map, histogram, intervals, scatter
from abliterate.evaluate.evaluation import EvalReport, ModelScores
from abliterate.evaluate.flinching import Flinching
from abliterate.method.directions import Candidate, DirectionSet
from abliterate.method.measurement import chosen_by, measured_on, told_apart
from abliterate.method.search import SEARCH, front, trials_in
from abliterate.method.selection import NOT_ASKED, WHY
from abliterate.method.statistics import Rate

METRICS = (
    ("bypass", "bypass", "refusal log-odds on harmful prompts with the candidate ablated: lower is better"),
    ("induce", "induce", "refusal log-odds on harmless prompts with the candidate added: must not be negative"),
    ("kl_nats", "KL", "nats, on harmless prompts with the candidate ablated: lower is better"),
)
COSMIC_NOTES = {
    "bypass": "minus the sum that COSMIC takes the highest of: lower is better",
    "induce": "cosine of harmless residuals, the candidate added, with the harmful mean: has no bound",
}
"""What the first two are where COSMIC chose."""


WIDER = 3.0
"""How far the chart of a search reaches, in the largest KL on its front: a trial that ruins the model has far more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawing with its caption."""

    title: str
    note: str
    svg: str


def write_report(
    path: Path,
    title: str,
    evaluation: EvalReport,
    *,
    directions: DirectionSet | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write the page to ``path``."""
    write_text(path, render(title, evaluation, directions=directions, manifest=manifest))


def render(
    title: str,
    evaluation: EvalReport,
    *,
    directions: DirectionSet | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """The page as text."""
    return filled(
        "report.html.j2",
        title=title,
        evaluation=evaluation,
        words=evaluation.flinching,
        **_of_the_edit(directions, manifest),
        bars=_bars(evaluation),
        pairs=_pairs(evaluation),
        unfinished=any(its.unfinished.hits for model in evaluation.models for its in model.scores.values()),
        tasks=_tasks(evaluation),
        landscape=landscape_charts(directions) if directions is not None and directions.scores else [],
        trials=search_chart(directions) if directions is not None and SEARCH in directions.metadata else None,
        scored=directions.metadata.get("scored") if directions is not None else None,
        cosines=_cosines(directions) if directions is not None else None,
        projections=_projections(evaluation),
        along=_place(directions),
        samples=[
            (kind, [(s, bool(evaluation.changed(s))) for s in evaluation.samples if s.kind == kind])
            for kind in evaluation.kinds
        ],
    )


def write_words(
    path: Path,
    title: str,
    words: Flinching,
    *,
    directions: DirectionSet | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write a page to ``path`` with what the report says of words, and of the edit where its manifest is at hand."""
    write_text(path, filled("words_page.html.j2", title=title, words=words, **_of_the_edit(directions, manifest)))


def _of_the_edit(directions: DirectionSet | None, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a page says of the edit, in the names of its template."""
    measurement = manifest["direction"].get("measurement", {}) if manifest else {}
    return {
        "manifest": manifest,
        "measured": measured_on(measurement) if manifest else "",
        "apart": told_apart(measurement) if manifest else "",
        "by": chosen_by(directions.metadata) if directions is not None else "",
        "search": directions.metadata.get(SEARCH) if directions is not None else None,
        "choice": directions.choice if directions is not None else None,
        "why": WHY,
    }


FIGURES = "figures.html.j2"
"""The template of a page of parts, each with its charts."""


def filled(name: str, **values: Any) -> str:  # noqa: ANN401 - whatever the template takes
    """A template of this folder as a page."""
    from jinja2 import Environment, FunctionLoader
    from markupsafe import Markup

    here = files("abliterate.evaluate")
    loader = FunctionLoader(lambda its: (here / its).read_text("utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["rate"] = _rate
    environment.filters["number"] = _number
    environment.filters["figure"] = figure
    environment.filters["against_base"] = against_base
    environment.filters["svg"] = Markup  # drawn by charts.py, which escapes what it writes
    style = (here / "page.css").read_text("utf-8").rstrip()
    return environment.get_template(name).render(style=style, **values)


def _bars(evaluation: EvalReport) -> Chart:
    names = [model.name for model in evaluation.models]
    thinks = any(its.unfinished.hits for model in evaluation.models for its in model.scores.values())
    bars = []
    for kind in evaluation.kinds:
        for field, label in (
            ("refused", "refused"),
            ("degenerate", "broken"),
            ("unfinished", "thinking never ended"),
            ("accuracy", "known answer"),
        ):
            for place, model in enumerate(evaluation.models):
                value: Rate = getattr(model.scores[kind], field)
                if value.count and (field != "unfinished" or thinks):
                    low, high = value.interval
                    bars.append(Bar(label=f"{kind}: {label}", series=place, value=value.value, low=low, high=high))
    svg = intervals("Rates with 95 % intervals", bars, names)
    return Chart(title="Rates", note="dots are rates, lines their 95 % Wilson intervals", svg=svg)


def _pairs(evaluation: EvalReport) -> list[list[ModelScores]]:
    """The base and the first of the others, for each mode."""
    modes = dict.fromkeys(model.mode for model in evaluation.models)
    return [[model for model in evaluation.models if model.mode == mode][:2] for mode in modes]


def _tasks(evaluation: EvalReport) -> list[tuple[str, list[list[TaskScore | None]]]]:
    """Rows of scores, a column for each model that has any: of what was asked for, and of its parts."""
    models = [model for model in evaluation.models if model.tasks]
    found: dict[tuple[str, str], list[TaskScore | None]] = {}
    for place, model in enumerate(models):
        for score in model.tasks:
            found.setdefault((score.task, score.metric), [None] * len(models))[place] = score
    asked, parts = [], []
    for row in found.values():
        (asked if any(score is not None and score.asked for score in row) else parts).append(row)
    return [(title, rows) for title, rows in (("", asked), ("parts of these", parts)) if rows]


def landscape_charts(directions: DirectionSet) -> list[Chart]:
    """Every candidate's scores, layer by position."""
    places = {position: row for row, position in enumerate(directions.positions)}
    tokens = list(directions.metadata.get("position_tokens", []))
    rows = [f"{position} {tokens[position]!r}" if tokens else str(position) for position in directions.positions]
    columns = [str(layer) for layer in range(directions.n_layers)]
    choice, shown = directions.choice, _shown(directions)
    chosen = (places[choice.position], choice.layer) if choice is not None and choice.position in places else None
    scores = [(places[s.position], s) for s in directions.scores if s.position is not None and s.candidate in shown]
    struck = frozenset((row, score.layer) for row, score in scores if score.verdict not in ("kept", NOT_ASKED))
    charts, notes = [], COSMIC_NOTES if chosen_by(directions.metadata) else {}
    for field, name, note in METRICS:
        values: list[list[float | None]] = [[None] * directions.n_layers for _ in directions.positions]
        for row, score in scores:
            stopped = field == "kl_nats" and score.kl_stopped  # a bound is no colour
            values[row][score.layer] = None if stopped else getattr(score, field)
        chart = HeatMap(
            title=f"{name} of every candidate", values=values, rows=rows, columns=columns, row_axis="position",
            column_axis="layer", chosen=chosen, struck=struck,
            scale="sequential" if field == "kl_nats" else "diverging",
        )  # fmt: skip
        charts.append(Chart(title=name, note=notes.get(field, note), svg=heat_map(chart)))
    return charts


def search_chart(directions: DirectionSet) -> Chart:
    """Every trial of a search, but those that broke the model: harmful prompts without an answer against KL."""
    trials = [trial for trial in trials_in(directions) if trial.is_finite]
    best, taken = front(trials), directions.metadata[SEARCH]["taken"]["number"]
    most = WIDER * max(its.kl_nats for its in best)
    dots = [
        Dot(
            label=f"trial {its.number}: {its.refused} refused and {its.unclear} unclear of {its.of}, "
            f"KL {its.kl_nats:.4f} nats",
            x=min(its.kl_nats, most),
            y=100 * its.unanswered,
            series=int(its in best),
        )
        for its in trials
    ]
    place = next((n for n, its in enumerate(trials) if its.number == taken), None)
    axes = ("KL on harmless prompts, nats", "harmful prompts without an answer, %")
    svg = scatter("Trials of the search", dots, ("trials", "Pareto front"), axes, chosen=place)
    note = f"{len(trials)} trials on validation prompts, the one that was taken with a ring: lower left is better"
    if beyond := sum(its.kl_nats > most for its in trials):
        note += f"; at the right edge {beyond} with a KL of more than {most:.3g} nats"
    return Chart(title="Trials", note=note, svg=svg)


def _cosines(directions: DirectionSet) -> Chart | None:
    """Cosine of the candidates of different layers at the chosen position; None where there are no two."""
    position = directions.choice.position if directions.choice is not None else directions.positions[-1]
    its = [one for one in _shown(directions).values() if one.position == position and one.is_vector]
    if len(its) < 2:
        return None
    vectors = torch.stack([one.vector.double() for one in its])
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    values = (vectors / lengths @ (vectors / lengths).T).tolist()  # NaN for a token that is always the same
    names = [str(one.layer) for one in its]
    chart = HeatMap(
        title="Cosine of the direction between layers", values=values, rows=names, columns=names, row_axis="layer",
        column_axis="layer", scale="diverging",
    )  # fmt: skip
    return Chart(title="Between layers", note=f"cosine of the candidates at position {position}", svg=heat_map(chart))


def _shown(directions: DirectionSet) -> dict[str, Candidate]:
    """The candidates of the estimator of the chosen one (or of the first): one map shows those of one estimator."""
    estimator = (directions.candidates[0] if directions.choice is None else directions.chosen).estimator
    return {one.id: one for one in directions.candidates if one.estimator == estimator}


def _projections(evaluation: EvalReport) -> list[Chart]:
    """How far prompts reach along the direction, model by model on one scale."""
    every = [value for model in evaluation.models for values in model.along.values() for value in values]
    limits = (min(every), max(every)) if every else None
    return [
        Chart(title=model.name, note="", svg=histogram(f"Projections, {model.name}", model.along, limits=limits))
        for model in evaluation.models
        if model.along
    ]


def _place(directions: DirectionSet | None) -> str:
    if directions is None or directions.choice is None:
        return ""
    position = "" if directions.choice.position is None else f", position {directions.choice.position}"
    return f"entering block {directions.choice.layer}{position}"


def _rate(value: Rate) -> str:
    if not value.count:
        return "–"
    low, high = value.interval
    return f"{100 * value.value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
