"""The scores of all candidates as one picture that stands alone: the maps of the HTML report, one below the other."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from abliterate.evaluate.page import landscape_charts
from abliterate.method.directions import DirectionSet

STYLE = """text{fill:#1c2430;font:11px ui-monospace,monospace}.axis{fill:#5b6675}.head{font-weight:bold}
.empty{fill:none;stroke:#d5dae1}.chosen{fill:none;stroke:#fff;stroke-width:4}
.chosen-inner{fill:none;stroke:#000;stroke-width:2}"""
BOX = re.compile(r'<svg viewBox="0 0 (\d+) (\d+)"')
MARGIN, HEAD = 12, 26


def landscape(directions: DirectionSet) -> str:
    """Bypass, induce and KL of every candidate that was scored, layer by position, as an SVG file."""
    parts, top, widest = [], MARGIN, 0
    for chart in landscape_charts(directions):
        found = BOX.match(chart.svg)
        if found is None:
            raise AssertionError("a chart begins with its size")
        width, height = int(found[1]), int(found[2])
        parts.append(f'<text class="head" x="{MARGIN}" y="{top + 12}">{escape(f"{chart.title}: {chart.note}")}</text>')
        placed = f'<svg x="{MARGIN}" y="{top + HEAD}" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        parts.append(placed + chart.svg[found.end() :])
        top, widest = top + HEAD + height + MARGIN, max(widest, width, 7 * len(f"{chart.title}: {chart.note}"))
    width = widest + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def with_error(score: Mapping[str, Any], kl_nats: str) -> str:
    """The KL of a score with its standard error, or as the bound that it is."""
    error = score.get("kl_error_nats")
    return ("> " if score.get("kl_stopped") else "") + kl_nats + (f" ± {error:.3f}" if error else "")
