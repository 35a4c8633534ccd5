"""Charts as inline SVG: pure functions from numbers to markup, for the report.

Colours that carry a value are fixed and readable on light and on dark ground; everything else takes the text's colour
from the page.  Every mark has a title, which browsers show under the pointer and screen readers read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import Literal

SEQUENTIAL = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Anchors of a scale that grows in lightness (viridis): told apart without colour vision, and in print."""
DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))
SERIES = ("#3b82c4", "#d97706", "#6b7280", "#16a34a", "#a855f7", "#db2777", "#0891b2", "#84701c")

CELL = 22
LABEL_WIDTH = 92
CHARACTER = 6.6
"""Width of a character of the labels, in pixels."""

Scale = Literal["sequential", "diverging"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Values in rows and columns; NaN and None are left empty.

    ``chosen`` and ``outlined`` have a frame, ``struck`` cells carry a stroke.  With the diverging scale zero is in the
    middle.  ``limits`` are the ends of the scale where several maps share one; ``cell_width`` is in pixels.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    row_axis: str
    column_axis: str
    scale: Scale = "sequential"
    chosen: tuple[int, int] | None = None
    struck: frozenset[tuple[int, int]] = frozenset()
    outlined: frozenset[tuple[int, int]] = frozenset()
    limits: tuple[float, float] | None = None
    cell_width: int = CELL


def heat_map(chart: HeatMap) -> str:
    """A grid of cells with its scale beside it."""
    low, high = chart.limits or _range(chart)
    cell = chart.cell_width
    left = max([LABEL_WIDTH, *(12 + CHARACTER * len(row) for row in chart.rows)])
    width, height = left + cell * len(chart.columns) + 90, 34 + CELL * len(chart.rows) + 30
    parts = [_open(width, height, chart.title), f'<text class="axis" x="0" y="14">{escape(chart.row_axis)}</text>']
    for y, name in enumerate(chart.rows):
        parts.append(f'<text x="{left - 8}" y="{_y(y) + 15}" text-anchor="end">{escape(name)}</text>')
        for x, value in enumerate(chart.values[y]):
            parts += _cell(chart, x, y, value, left, (low, high))
    every = max(
        1, math.ceil(len(chart.columns) * CHARACTER * max(map(len, chart.columns)) / (cell * len(chart.columns)))
    )
    bottom = _y(len(chart.rows)) + 14
    for x, name in enumerate(chart.columns):
        if x % every == 0:
            parts.append(
                f'<text x="{left + cell * x + cell / 2}" y="{bottom}" text-anchor="middle">{escape(name)}</text>'
            )
    parts.append(f'<text class="axis" x="{left}" y="14">{escape(chart.column_axis)}</text>')
    parts += _key(left + cell * len(chart.columns) + 14, CELL * len(chart.rows), chart.scale, low, high)
    return "".join([*parts, "</svg>"])


def histogram(
    title: str, series: Mapping[str, Sequence[float]], *, limits: tuple[float, float] | None = None, bins: int = 40
) -> str:
    """Outlines of several distributions over one axis, each scaled to its own size; ``limits`` are the axis' ends."""
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in series.items()}
    every = [value for values in finite.values() for value in values]
    low, high = limits or ((min(every), max(every)) if every else (0.0, 1.0))
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    width, height, base = 560, 172, 150
    parts = [_open(width, height, title)]
    heights = {name: _counts(values, low, high, bins) for name, values in finite.items()}
    top = max((max(counts) for counts in heights.values()), default=0) or 1
    for place, (name, counts) in enumerate(heights.items()):
        points = [(10 + 540 * n / bins, base - 130 * count / top) for n, count in enumerate(counts)]
        step = 540 / bins
        line = " ".join(f"{x:.1f},{y:.1f} {x + step:.1f},{y:.1f}" for x, y in points)
        colour = SERIES[place % len(SERIES)]
        parts.append(
            f'<polygon points="10,{base} {line} 550,{base}" fill="{colour}" fill-opacity=".25" stroke="{colour}">'
            f"<title>{escape(name)}: {len(finite[name])} prompts</title></polygon>"
        )
        parts.append(f'<rect x="{10 + 140 * place}" y="2" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{24 + 140 * place}" y="12">{escape(name)}</text>')
    parts.append(f'<line class="rule" x1="10" y1="{base}" x2="550" y2="{base}"/>')
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        anchor = ("start", "middle", "end")[int(share * 2)]
        parts.append(f'<text x="{10 + 540 * share}" y="{base + 16}" text-anchor="{anchor}">{value:.3g}</text>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A rate with its interval, all between 0 and 1; ``series`` gives its colour."""

    label: str
    series: int
    value: float
    low: float
    high: float


def intervals(title: str, bars: Sequence[Bar], names: Sequence[str]) -> str:
    """Rates as dots with their intervals as lines, from 0 to 100 %."""
    left = max([LABEL_WIDTH, *(12 + CHARACTER * len(bar.label) for bar in bars)])
    step = max([150, *(24 + CHARACTER * len(name) for name in names)])
    width, height = left + max(420, step * len(names)), 30 + 20 * len(bars) + 24
    parts = [_open(width, height, title)]
    for place, name in enumerate(names):
        colour = SERIES[place % len(SERIES)]
        parts.append(f'<circle cx="{left + 6 + step * place:.1f}" cy="9" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 16 + step * place:.1f}" y="13">{escape(name)}</text>')
    for share in (0, 25, 50, 75, 100):
        x = left + 4 * share
        parts.append(f'<line class="rule" x1="{x}" y1="22" x2="{x}" y2="{30 + 20 * len(bars)}"/>')
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{share} %</text>')
    previous = ""
    for place, bar in enumerate(bars):
        y, colour = 38 + 20 * place, SERIES[bar.series % len(SERIES)]
        if bar.label != previous:
            if previous:
                parts.append(f'<line class="rule" x1="0" y1="{y - 10}" x2="{left + 400}" y2="{y - 10}"/>')
            parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(bar.label)}</text>')
        previous = bar.label
        if math.isnan(bar.value):
            continue
        what = f"{bar.label}, {names[bar.series]}: {bar.value:.1%} ({bar.low:.1%} to {bar.high:.1%})"
        parts.append(
            f'<g><title>{escape(what)}</title><line x1="{left + 400 * bar.low:.1f}" x2="{left + 400 * bar.high:.1f}" '
            f'y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3" stroke-opacity=".45"/>'
            f'<circle cx="{left + 400 * bar.value:.1f}" cy="{y}" r="4.5" fill="{colour}"/></g>'
        )
    return "".join([*parts, "</svg>"])


def lines(title: str, series: Mapping[str, Sequence[float]], names: Sequence[str], axis: str) -> str:
    """A line for each series over the same places, with zero marked; NaN is left out."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if high - low < 1e-12:
        high = low + 1.0
    width, left, top, base = 620, 52, 30, 210
    step = (width - left - 16) / max(1, len(names) - 1)

    def at(value: float) -> float:
        return base - (base - top) * (value - low) / (high - low)

    parts = [_open(width, base + 40, title)]
    for value in sorted({low, 0.0, high}):
        parts.append(f'<line class="rule" x1="{left}" y1="{at(value):.1f}" x2="{width - 10}" y2="{at(value):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{at(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    every = max(1, math.ceil((max(map(len, names)) + 1) * CHARACTER / step)) if names else 1
    for place, name in enumerate(names):
        if place % every == 0:
            parts.append(
                f'<text x="{left + step * place:.1f}" y="{base + 18}" text-anchor="middle">{escape(name)}</text>'
            )
    parts.append(f'<text class="axis" x="{left}" y="{base + 34}">{escape(axis)}</text>')
    legend = left
    for place, (name, values) in enumerate(series.items()):
        tint = SERIES[place % len(SERIES)]
        points = [
            (left + step * n, at(value), value, names[n]) for n, value in enumerate(values) if math.isfinite(value)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{tint}" stroke-width="2"/>')
        for x, y, value, where in points:
            said = escape(f"{name}, {axis} {where}: {value:.4g}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{tint}"><title>{said}</title></circle>')
        parts.append(f'<circle cx="{legend + 4}" cy="9" r="4" fill="{tint}"/>')
        parts.append(f'<text x="{legend + 14}" y="13">{escape(name)}</text>')
        legend += 30 + int(CHARACTER * len(name))
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point with what it is; ``series`` gives its colour."""

    label: str
    x: float
    y: float
    series: int = 0


def scatter(
    title: str, dots: Sequence[Dot], names: Sequence[str], axes: tuple[str, str], *, chosen: int | None = None
) -> str:
    """Points over two axes that begin at zero, the series of ``names`` one over the other; ``chosen`` has a ring."""
    width, left, top, base = 560, 52, 30, 250
    far, high = (max([value for value in values if value > 0], default=1.0) for values in (
        [dot.x for dot in dots], [dot.y for dot in dots],
    ))  # fmt: skip

    def at(dot: Dot) -> str:
        return f'cx="{left + (width - left - 16) * dot.x / far:.1f}" cy="{base - (base - top) * dot.y / high:.1f}"'

    parts = [_open(width, base + 40, title)]
    for share in (0.0, 0.5, 1.0):
        x, y = left + (width - left - 16) * share, base - (base - top) * share
        parts.append(f'<line class="rule" x1="{left}" y1="{y:.1f}" x2="{width - 10}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{high * share:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{far * share:.3g}</text>')
    parts.append(f'<text class="axis" x="{left}" y="{base + 34}">{escape(axes[0])}</text>')
    for place, name in enumerate(names):
        tint, x = SERIES[place % len(SERIES)], left + 180 * place
        parts.append(
            f'<circle cx="{x + 4}" cy="9" r="4" fill="{tint}"/><text x="{x + 14}" y="13">{escape(name)}</text>'
        )
        parts += [
            f'<circle {at(dot)} r="4.5" fill="{tint}" fill-opacity=".75"><title>{escape(dot.label)}</title></circle>'
            for dot in dots
            if dot.series == place
        ]
    if chosen is not None:
        parts.append(f'<circle {at(dots[chosen])} r="8" fill="none" stroke="currentColor" stroke-width="2"/>')
    parts.append(f'<text class="axis" x="{width - 10}" y="13" text-anchor="end">{escape(axes[1])}</text>')
    return "".join([*parts, "</svg>"])


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    axes: tuple[str, str],
    *,
    spans: Mapping[str, Sequence[tuple[tuple[float, float], tuple[float, float]]]] = MappingProxyType({}),
) -> str:
    """A line through named points ``(x, y, name)`` for each series, in the square of shares from 0 to 100 %.

    ``axes`` are the names of x and y.  Points that are not finite are left out.  ``spans`` are the intervals of
    points, in x and in y, which are drawn as crosses.
    """
    left, top, side = 52, 30, 300
    legend = max([0, *(30 + int(CHARACTER * len(name)) for name in series)])
    parts = [_open(left + side + 20 + legend, top + side + 46, title)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + side * share, top + side * (1 - share)
        parts.append(f'<line class="rule" x1="{left}" y1="{y:.1f}" x2="{left + side}" y2="{y:.1f}"/>')
        parts.append(f'<line class="rule" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + side}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text x="{x:.1f}" y="{top + side + 18}" text-anchor="middle">{share:.0%}</text>')
    parts.append(f'<text class="axis" x="{left}" y="{top + side + 36}">{escape(axes[0])}</text>')
    parts.append(f'<text class="axis" x="0" y="14">{escape(axes[1])}</text>')
    for place, (name, points) in enumerate(series.items()):
        tint = SERIES[place % len(SERIES)]
        finite = [
            (left + side * x, top + side * (1 - y), x, y, said)
            for x, y, said in points
            if math.isfinite(x) and math.isfinite(y)
        ]
        for (x, y, _), ((west, east), (south, north)) in zip(points, spans.get(name, ()), strict=False):
            ends = ((west, y, east, y), (x, south, x, north))
            parts += [
                f'<line x1="{left + side * x1:.1f}" y1="{top + side * (1 - y1):.1f}" x2="{left + side * x2:.1f}" '
                f'y2="{top + side * (1 - y2):.1f}" stroke="{tint}" stroke-opacity=".45"/>'
                for x1, y1, x2, y2 in ends
            ]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down, *_ in finite)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{tint}" stroke-width="2"/>')
        for across, down, x, y, said in finite:
            what = escape(f"{said}: {axes[0]} {x:.1%}, {axes[1]} {y:.1%}")
            parts.append(
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{tint}"><title>{what}</title></circle>'
            )
        beside, line = left + side + 20, top + 12 + 20 * place
        parts.append(f'<circle cx="{beside}" cy="{line - 4}" r="4" fill="{tint}"/>')
        parts.append(f'<text x="{beside + 10}" y="{line}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def colour(value: float, low: float, high: float, scale: Scale) -> str:
    """The colour of ``value`` between ``low`` and ``high``."""
    anchors = SEQUENTIAL if scale == "sequential" else DIVERGING
    share = 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    place = share * (len(anchors) - 1)
    first = min(int(place), len(anchors) - 2)
    mixed = (a + (b - a) * (place - first) for a, b in zip(anchors[first], anchors[first + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _range(chart: HeatMap) -> tuple[float, float]:
    found = [v for row in chart.values for v in row if v is not None and math.isfinite(v)]
    if not found:
        return 0.0, 1.0
    if chart.scale == "diverging":
        largest = max(map(abs, found)) or 1.0
        return -largest, largest
    return min(found), max(found)


def _cell(
    chart: HeatMap, x: int, y: int, value: float | None, left: int | float, limits: tuple[float, float]
) -> list[str]:
    at = f'x="{left + chart.cell_width * x:.1f}" y="{_y(y)}" width="{chart.cell_width - 1}" height="{CELL - 1}"'
    where = f"{chart.rows[y]}, {chart.column_axis} {chart.columns[x]}"
    if value is None or not math.isfinite(value):
        return [f'<rect class="empty" {at}><title>{escape(where)}: none</title></rect>']
    fill = colour(value, *limits, chart.scale)
    parts = [f'<rect {at} fill="{fill}"><title>{escape(where)}: {value:.4g}</title></rect>']
    if (y, x) in chart.struck:
        x0, y0 = left + chart.cell_width * x + 5, _y(y) + 5
        parts.append(
            f'<path d="M{x0:.1f} {y0} l11 11" stroke="#fff" stroke-width="2.5"/>'
            f'<path d="M{x0:.1f} {y0} l11 11" stroke="#000"/>'
        )
    if (y, x) == chart.chosen or (y, x) in chart.outlined:
        parts.append(f'<rect class="chosen" {at}/><rect class="chosen-inner" {at}/>')
    return parts


def _key(x: int | float, height: int, scale: Scale, low: float, high: float) -> list[str]:
    steps = 24
    tall = max(height, 3 * CELL)
    parts = [
        f'<rect x="{x}" y="{24 + tall * n / steps:.1f}" width="10" height="{tall / steps + 0.5:.1f}" '
        f'fill="{colour(high - (high - low) * n / (steps - 1), low, high, scale)}"/>'
        for n in range(steps)
    ]
    parts.append(f'<text x="{x + 15}" y="34">{high:.3g}</text>')
    parts.append(f'<text x="{x + 15}" y="{24 + tall:.1f}">{low:.3g}</text>')
    return parts


def _counts(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    counts = [0.0] * bins
    for value in values:
        counts[max(0, min(bins - 1, int((value - low) / (high - low) * bins)))] += 1 / len(values)
    return counts


def _y(row: int) -> int:
    return 22 + CELL * row


def _open(width: int | float, height: int | float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{escape(title)}">'
    )
