"""Refusals against KL, one point for each method, as an SVG file that stands alone."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, log10
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 56, 24, 24, 48
FLOOR_NATS = 1e-3
"""KL is drawn on a scale of decades; what is less stands here."""
STYLE = """text{fill:#1c2430;font:11px ui-monospace,monospace}.axis{fill:#5b6675}.grid{stroke:#e3e7ec}
.interval{stroke:#9aa5b4}.point{fill:#2f6fab}.bound{stroke:#b4552d;stroke-dasharray:4 3}
.front{fill:none;stroke:#7a9a4e;stroke-width:1.5}"""


def trade(
    points: Mapping[str, tuple[Mapping[str, Any] | None, float | None]],
    *,
    front: Sequence[tuple[float, float]] = (),
    bound_nats: float = 0.1,
) -> str:
    """Points by name: share of harmful prompts refused, with its interval, and KL on the first token in nats.

    ``front``: shares and KL of the trials on the Pareto front of a search, on its own prompts.
    """
    shown = {name: (rate, max(kl, FLOOR_NATS)) for name, (rate, kl) in points.items() if rate and kl is not None}
    largest = max([bound_nats, *(kl for _, kl in shown.values()), *(kl for _, kl in front)])
    decades = range(round(log10(FLOOR_NATS)), ceil(log10(largest)) + 1)
    inner = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(kl: float) -> float:
        return LEFT + inner[0] * (log10(kl) - decades[0]) / (decades[-1] - decades[0])

    def y(share: float) -> float:
        return TOP + inner[1] * (1 - share)

    parts = []
    for decade in decades:
        at = x(10.0**decade)
        parts.append(_line("grid", at, TOP, at, HEIGHT - BOTTOM) + _text(at, HEIGHT - BOTTOM + 16, f"{10.0**decade:g}"))
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(_line("grid", LEFT, at, WIDTH - RIGHT, at) + _text(LEFT - 8, at + 4, f"{percent}", "end"))
    parts.append(_line("bound", x(bound_nats), TOP, x(bound_nats), HEIGHT - BOTTOM))
    parts.append(_text(LEFT + inner[0] / 2, HEIGHT - 10, "KL to the base on harmless prompts, first token, nats"))
    parts.append(_text(LEFT, 14, "harmful prompts refused, %, with 95 % intervals", "start"))
    if front:
        line = " ".join(f"{x(max(kl, FLOOR_NATS)):.1f},{y(share):.1f}" for share, kl in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
        parts.append(_text(WIDTH - RIGHT, 14, "line: the front of the search, on validation prompts", "end"))
    taken: list[tuple[float, float]] = []
    for name, (rate, kl) in shown.items():
        left, top = x(kl), y(rate["rate"])
        parts.append(_line("interval", left, y(rate["low95"]), left, y(rate["high95"])))
        parts.append(f'<circle class="point" cx="{left:.1f}" cy="{top:.1f}" r="4"/>')
        label = top + 4
        while any(abs(label - other) < 11 and abs(left - beside) < 110 for beside, other in taken):
            label -= 11
        taken.append((left, label))
        parts.append(_text(left + 7, label, name, "start"))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    style = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(parts)}</svg>\n'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
