"""The page of directions by category: one self-contained HTML file, like the report, with numbers and no prompts."""

from pathlib import Path

from abliterate.checkpoint.output import write_text
from abliterate.evaluate.category_report import CategoryReport
from abliterate.evaluate.charts import CHARACTER, HeatMap, curves, heat_map
from abliterate.evaluate.page import FIGURES, Chart, filled
from abliterate.version import __version__


def write_categories(path: Path, title: str, found: CategoryReport) -> None:
    """Write the page to ``path``."""
    write_text(path, render_categories(title, found))


def render_categories(title: str, found: CategoryReport) -> str:
    """The page as text."""
    base, bare = found.removals[0], found.removals[-1]
    over = list(base.over_refused)[-1]
    parts = [
        (
            "Cosines of the directions",
            "Each is the mean over one category of harmful prompts less the mean over all harmless ones.",
            [_chart(_cosines(found))],
        ),
        (
            "Without a direction",
            "Share of the prompts that is refused, by what was removed from the stream: nothing, the direction of one "
            "category, or the span of all.",
            [_chart(_removals(found))],
        ),
        (
            "With more or less of a direction",
            "Each direction added to what enters its layer, in lengths of the difference of means; below 0 it is "
            f"subtracted. Refusals of harmful prompts of all categories against those of {over} ones.",
            [Chart(title="", note="", svg=_curves(found, over))],
        ),
    ]
    where = f"layer {found.layer}" + ("" if found.position is None else f", position {found.position}")
    prompts = {**{name: its.count for name, its in base.refused.items()}}
    prompts |= {kind: its.count for kind, its in base.over_refused.items()}
    counts = ", ".join(f"{count} {kind}" for kind, count in prompts.items())
    return filled(
        FIGURES,
        title=title,
        version=__version__,
        about=f"Greedy replies to test prompts: {counts}. Directions of {found.candidate}, {where}; all by hooks.",
        facts=[
            ("harmful refused, as it is", f"{base.harmful.value:.1%}", f"of {base.harmful.count}"),
            ("without all directions", f"{bare.harmful.value:.1%}", f"of {bare.harmful.count}"),
            (f"{over} refused, as it is", f"{base.over.value:.1%}", f"of {base.over.count}"),
        ],
        parts=parts,
        note=_broken(found),
    )


def _chart(chart: HeatMap) -> Chart:
    return Chart(title="", note="", svg=heat_map(chart))


def _cosines(found: CategoryReport) -> HeatMap:
    names = list(found.categories)
    return HeatMap(
        title="Cosines", values=found.cosines, rows=names, columns=names, row_axis="", column_axis="category",
        scale="diverging", limits=(-1.0, 1.0), cell_width=_width(names),
    )  # fmt: skip


def _removals(found: CategoryReport) -> HeatMap:
    kinds = [*found.categories, *found.removals[0].over_refused]
    return HeatMap(
        title="Refused",
        values=[
            [its.value for its in (*one.refused.values(), *one.over_refused.values())] for one in found.removals
        ],
        rows=[one.name for one in found.removals], columns=kinds, row_axis="", column_axis="prompts",
        limits=(0.0, 1.0), cell_width=_width(kinds),
    )  # fmt: skip


def _curves(found: CategoryReport, over: str) -> str:
    series = {
        name: [(one.over.value, one.harmful.value, f"{one.name}") for one in found.curve(name)]
        for name in found.categories
    }
    return curves("Refusal and over-refusal", series, (f"{over} refused", "harmful refused"))


def _broken(found: CategoryReport) -> str:
    worst = max(found.tried, key=lambda one: one.broken.value)
    if not worst.broken.hits:
        return ""
    return f"Empty or broken replies count as not refused: at most {worst.broken.value:.1%} ({worst.name})."


def _width(names: list[str]) -> int:
    """Of a column that is called by its whole name, in pixels."""
    return int(14 + CHARACTER * max(map(len, names)))
