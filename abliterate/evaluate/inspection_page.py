"""The page of an inspection: one self-contained HTML file, like the report, with numbers and no prompts."""

import math
from pathlib import Path

from abliterate.checkpoint.output import write_text
from abliterate.evaluate.charts import HeatMap, heat_map, lines
from abliterate.evaluate.inspection import SPANS, Inspected, Inspection
from abliterate.evaluate.page import FIGURES, Chart, filled
from abliterate.version import __version__

MOST_UNEXPLAINED = 0.01
HEAD_WIDTH = 44
"""Width of a column that is called by its layer and head, in pixels."""


def write_inspection(path: Path, title: str, found: Inspection) -> None:
    """Write the page to ``path``."""
    write_text(path, render_inspection(title, found))


def render_inspection(title: str, found: Inspection) -> str:
    """The page as text."""
    parts = [
        (
            "Along the direction, layer by layer",
            "Cosine of the residual stream with the direction entering every block; the last place is behind all.",
            [_cosines(found)],
        ),
        (
            "What each block writes",
            "Component along the unit direction that attention and MLP of each block add to the stream.",
            [_blocks(found)],
        ),
    ]
    if found.heads:
        named = ", ".join(f"{layer}.{head}" for layer, head in found.heads)
        parts += [
            (
                "What each head writes",
                f"The part of each attention head, all on one scale. Framed are those that write most on "
                f"{found.sets[0].name} prompts: {named} (block.head).",
                _heads(found),
            ),
            (
                "Where these heads look",
                "Share of the last token's attention that goes to each part of the prompt; what is missing goes to the "
                "template before the user's text.",
                [_looks(found)],
            ),
        ]
    sets = ", ".join(f"{one.prompts} {one.name}" for one in found.sets)
    off = max(one.attribution.unexplained for one in found.sets)
    return filled(
        FIGURES,
        title=title,
        version=__version__,
        about=f"Everything is measured at the last token of the prompt, means over the prompts: {sets}.",
        facts=[_peak(one) for one in found.sets],
        parts=parts,
        note=f"These parts do not add up to the stream (off by {off:.1%}): the model scales what it adds."
        if off > MOST_UNEXPLAINED
        else "",
    )


def _states(found: Inspection) -> list[str]:
    blocks = found.sets[0].attribution.attention.shape[1]
    return [*map(str, range(blocks)), "end"]


def _peak(one: Inspected) -> tuple[str, str, str]:
    means = one.attribution.cosine.mean(0)
    place = int(means.abs().argmax())
    where = "at the end" if place == len(means) - 1 else f"entering block {place}"
    return f"largest cosine, {one.name}", f"{float(means[place]):+.3f}", where


def _cosines(found: Inspection) -> Chart:
    series = {one.name: one.attribution.cosine.mean(0).tolist() for one in found.sets}
    return Chart(title="", note="", svg=lines("Cosine with the direction", series, _states(found), "block"))


def _blocks(found: Inspection) -> Chart:
    rows, values = [], []
    for one in found.sets:
        for name, written in (("attention", one.attribution.attention), ("MLP", one.attribution.mlp)):
            rows.append(f"{one.name}: {name}")
            values.append(written.mean(0).tolist())
    chart = HeatMap(
        title="Written along the direction by each block", values=values, rows=rows, columns=_states(found)[:-1],
        row_axis="", column_axis="block", scale="diverging",
    )  # fmt: skip
    return Chart(title="", note="", svg=heat_map(chart))


def _heads(found: Inspection) -> list[Chart]:
    means = {one.name: one.attribution.heads.mean(0) for one in found.sets}
    finite = [abs(value) for heads in means.values() for value in heads.flatten().tolist() if math.isfinite(value)]
    largest = max(finite, default=1.0) or 1.0
    charts = []
    for name, heads in means.items():
        chart = HeatMap(
            title=f"Written by each head, {name}", values=heads.T.tolist(), rows=[*map(str, range(heads.shape[1]))],
            columns=_states(found)[:-1], row_axis="head", column_axis="block", scale="diverging",
            limits=(-largest, largest),
            outlined=frozenset((head, layer) for layer, head in found.heads),
        )  # fmt: skip
        charts.append(Chart(title=name, note="", svg=heat_map(chart)))
    return charts


def _looks(found: Inspection) -> Chart:
    rows, values = [], []
    for one in found.sets:
        for place, span in enumerate(SPANS):
            if span != "suffix" or " + " in one.name:
                rows.append(f"{one.name}: {span}")
                values.append(one.attention[:, place].tolist())
    chart = HeatMap(
        title="Attention of the heads that write most", values=values, rows=rows,
        columns=[f"{layer}.{head}" for layer, head in found.heads], row_axis="", column_axis="block.head",
        limits=(0.0, 1.0), cell_width=HEAD_WIDTH,
    )  # fmt: skip
    return Chart(title="", note="", svg=heat_map(chart))
