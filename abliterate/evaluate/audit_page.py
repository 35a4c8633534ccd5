"""The page of an audit: one self-contained HTML file, like the report, with numbers and no prompts."""

from collections.abc import Sequence
from pathlib import Path

from abliterate.checkpoint.output import write_text
from abliterate.evaluate.audit_report import Audit, side_by_side
from abliterate.evaluate.charts import CHARACTER, HeatMap, curves, heat_map, lines
from abliterate.evaluate.edit_found import EditFound
from abliterate.evaluate.page import FIGURES, Chart, filled
from abliterate.version import __version__


def write_audit(path: Path, audits: Sequence[Audit], edit: EditFound | None = None) -> None:
    """Write the page of one or several models to ``path``; ``edit`` is what their weights say of one."""
    write_text(path, render_audit(audits, edit))


def render_audit(audits: Sequence[Audit], edit: EditFound | None = None) -> str:
    """The page as text."""
    names = [one.model for one in audits]
    if not audits:
        about = "By the weights alone: a checkpoint against its base."
        note = "; ".join(edit.in_words()) if edit else ""
        return filled(FIGURES, title="Is it edited?", version=__version__, about=about, facts=[], parts=[], note=note)
    layers = [str(one.layer) for one in max((its.separations for its in audits), key=len)]
    apart = {one.model: [its.auc for its in one.separations] for one in audits}
    rows = side_by_side(audits)
    tried = HeatMap(
        title="Refused",
        values=[[float("nan") if its is None else its.refused.value for its in of_models] for _, of_models in rows],
        rows=[name for name, _ in rows], columns=names, row_axis="", column_axis="model", limits=(0.0, 1.0),
        cell_width=int(14 + CHARACTER * max(map(len, names))),
    )  # fmt: skip
    parts = [
        (
            "Declined and answered prompts apart",
            "The probability that a declined prompt reaches further along the difference of means than an answered "
            "one, each half of the prompts along the direction of the other half, layer by layer.",
            [Chart(title="", note="", svg=lines("AUC", apart, layers, "entering block"))],
        ),
        (
            "Refused under interventions",
            "Share of harmful test prompts that is refused: as it is, without a random direction, without one and more "
            "directions, without the direction in a part of the model, and with less or more of it.",
            [Chart(title="", note="", svg=heat_map(tried))],
        ),
        (
            "Refusal against over-refusal",
            "Less of the direction, the model as it is, and more of it: harmful prompts that are refused against "
            "harmless ones that are, with their 95 % intervals. A guard goes up without going right.",
            [Chart(title="", note="", svg=_trade(audits))],
        ),
    ]
    return filled(
        FIGURES,
        title=f"How firmly {' and '.join(names)} refuse{'s' if len(names) == 1 else ''}",
        version=__version__,
        about="All by hooks, on test prompts that neither measuring nor choosing saw; greedy replies.",
        facts=[(one.model, f"{one.base.refused.value:.1%}", f"of {one.base.refused.count} refused") for one in audits],
        parts=parts,
        note=" ".join(
            [
                *([f"Against {edit.base}: {'; '.join(edit.in_words())}."] if edit else []),
                *(f"{one.model}: {'; '.join(one.in_words())}." for one in audits),
            ]
        ),
    )


def _trade(audits: Sequence[Audit]) -> str:
    """Refusals of harmful prompts against those of harmless ones, by dose."""
    points = {
        its.model: [(one.over_refused.value, one.refused.value, f"{its.model}, {one.name}") for one in its.curve]
        for its in audits
    }
    spans = {its.model: [(one.over_refused.interval, one.refused.interval) for one in its.curve] for its in audits}
    return curves("Refusal by dose", points, ("harmless refused", "harmful refused"), spans=spans)
