"""Line charts as inline SVG that keep their text size at any width, each with a data table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .model import MEMORY, TWIN, Curve
from .text import esc, is_binary, number, raw, short_count

MAX_POINTS = 80
_THIN_ABOVE = 100
_COLOURS = 6
_DASHES = ("", "7 4", "2 4", "10 3 2 3", "4 3", "1 3")
_MARKS = (
    "M4 0A4 4 0 1 1-4 0 4 4 0 1 1 4 0z",
    "M-3.6-3.6H3.6V3.6H-3.6z",
    "M0-5 5 0 0 5-5 0z",
    "M0-4.8 4.6 3.6H-4.6z",
    "M0 4.8 4.6-3.6H-4.6z",
    "M-4-1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4z",
)
_FEW = 16


@dataclass(frozen=True)
class LineChart:
    """What to draw: curves over a linear or log x axis; `y_range` fixes the y axis, else the data do."""

    ident: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    summary: str = ""
    log_x: bool = False
    y_range: tuple[float, float] | None = None
    height: int = 300
    reference: tuple[float, str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Axes:
    """The ranges of both axes and the height in pixels."""

    x0: float
    x1: float
    y0: float
    y1: float
    log_x: bool
    height: int

    def across(self, x: float) -> float:
        """Return the place of x from 0 (left) to 1 (right)."""
        if self.log_x:
            return math.log(x / self.x0) / math.log(self.x1 / self.x0)
        return (x - self.x0) / (self.x1 - self.x0)

    def down(self, y: float) -> float:
        """Return the distance of y from the top in pixels."""
        return self.height * (1 - (y - self.y0) / (self.y1 - self.y0))


def render_chart(chart: LineChart) -> str:
    """Return a figure with the caption, legend, SVG and visually hidden table of a chart."""
    slots = curve_slots(chart.curves)
    curves = [thin(curve) for curve in chart.curves]
    if not any(math.isfinite(y) for curve in curves for y in curve.y):
        return f'<p class="absent">{esc(chart.title)}: not measured in this run.</p>'
    axes, y_ticks = _axes(chart, curves)
    x_ticks = _x_ticks(axes, curves)
    gutter = _gutter(chart, curves)
    name = esc(chart.ident)
    body = "".join(_curve(curve, slot, axes) for curve, slot in zip(curves, slots, strict=True))
    description = chart.summary or _describe(chart, curves)
    notes = [*chart.notes, *_thinned(chart.curves, curves)]
    paragraphs = "".join(f'<p class="note">{esc(note)}</p>' for note in notes)
    unit = "; 1K = 1,024" if any(is_binary(tick) for tick, _ in x_ticks) else ""
    return (
        f'<figure class="chart" id="{name}"><figcaption>{esc(chart.title)}</figcaption>'
        f"{_legend(curves, slots)}"
        f'<p class="ylabel" aria-hidden="true">{esc(chart.y_label)}</p>'
        f'<div class="plot" style="--gutter:{gutter}px">'
        f'<svg role="img" width="100%" height="{chart.height}" aria-labelledby="{name}-t {name}-d" '
        f'data-from="{axes.x0!r}" data-to="{axes.x1!r}" data-log="{int(axes.log_x)}">'
        f'<title id="{name}-t">{esc(chart.title)}</title><desc id="{name}-d">{esc(description)}</desc>'
        f"{_grid(axes, x_ticks, y_ticks)}{_reference(chart, axes)}{body}{_ends(curves, slots, axes, gutter)}"
        f'</svg></div><p class="xlabel" aria-hidden="true">{esc(chart.x_label)}{unit}</p>'
        f'<div class="vh data">{_table(chart, curves)}</div>'
        f"{paragraphs}</figure>"
    )


def curve_slots(curves: Sequence[Curve]) -> list[int]:
    """Return the colour, dash and mark number of each curve: memory 0, twin 1, others the next free."""
    fixed = {MEMORY: 0, TWIN: 1}
    first = {role: next((i for i, c in enumerate(curves) if c.role == role), None) for role in fixed}
    owners = {index: fixed[role] for role, index in first.items() if index is not None}
    free = iter(range(2 if owners else 0, 2 + len(curves)))
    return [owners[i] if i in owners else next(free) % _COLOURS for i in range(len(curves))]


def thin(curve: Curve) -> Curve:
    """Keep about MAX_POINTS of the points, evenly picked, with the first, last, lowest and highest."""
    n = len(curve.x)
    if n <= _THIN_ABOVE:
        return curve
    kept = {round(i * (n - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)}
    known = [i for i in range(n) if math.isfinite(curve.y[i])]
    if known:
        kept |= {min(known, key=lambda i: curve.y[i]), max(known, key=lambda i: curve.y[i])}
    rows = sorted(kept)
    pick = {
        label: [getattr(curve, label)[i] for i in rows] if getattr(curve, label) else []
        for label in ("x", "y", "low", "high", "counts")
    }
    return Curve(name=curve.name, role=curve.role, **pick)


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about `n` round numbers whose first and last enclose the range from low to high."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _axes(chart: LineChart, curves: list[Curve]) -> tuple[_Axes, list[float]]:
    """Fit both axes to the curves and return them with the y ticks."""
    xs = [x for c in curves for x in c.x]
    ys = [v for c in curves for column in (c.y, c.low, c.high) for v in column if math.isfinite(v)]
    if chart.reference:
        ys.append(chart.reference[0])
    y_ticks = nice_ticks(*(chart.y_range or (min(ys), max(ys))), n=max(3, chart.height // 60))
    log_x = chart.log_x and min(xs) > 0
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = (x0 / 2, x1 * 2) if log_x else (x0 - 1, x1 + 1)
    return _Axes(x0, x1, y_ticks[0], y_ticks[-1], log_x, chart.height), y_ticks


def _x_ticks(axes: _Axes, curves: list[Curve]) -> list[tuple[float, bool]]:
    """Return the x ticks, each with whether a narrow screen leaves out its label."""
    if not axes.log_x:
        ticks = [t for t in nice_ticks(axes.x0, axes.x1) if axes.x0 <= t <= axes.x1]
        return [(t, len(ticks) > 4 and i % 2 == 1) for i, t in enumerate(ticks)]
    own = sorted({x for curve in curves for x in curve.x})
    if len(own) <= 12:
        return [(x, (len(own) - 1 - i) % 2 == 1 and len(own) > 4) for i, x in enumerate(own)]
    decades = range(math.floor(math.log10(axes.x0)), math.ceil(math.log10(axes.x1)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [m * 10.0**d for d in decades for m in steps if axes.x0 <= m * 10.0**d <= axes.x1]
    return [(t, len(ticks) > 4 and not math.log10(t).is_integer()) for t in ticks]


def _grid(axes: _Axes, x_ticks: list[tuple[float, bool]], y_ticks: list[float]) -> str:
    """Return the grid lines and tick labels."""
    parts = []
    for tick in y_ticks:
        y = axes.down(tick)
        parts.append(f'<line class="gl" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tk" x="-8" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick, minor in x_ticks:
        place = f"{100 * axes.across(tick):.2f}%"
        parts.append(
            f'<line class="gl" x1="{place}" x2="{place}" y1="{axes.height}" y2="{axes.height + 5}"/>'
        )
        parts.append(
            f'<text class="tk{" wide" if minor else ""}" x="{place}" y="{axes.height + 20}" '
            f'text-anchor="middle">{short_count(tick)}</text>'
        )
    return "".join(parts)


def _reference(chart: LineChart, axes: _Axes) -> str:
    """Return the dashed reference line with its label, if there is one."""
    if not chart.reference:
        return ""
    value, label = chart.reference
    y = axes.down(value)
    return (
        f'<line class="ref" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tk" x="6" y="{y - 6:.1f}">{esc(label)}</text>'
    )


def _curve(curve: Curve, slot: int, axes: _Axes) -> str:
    """Return the line of a curve, with a band for many points or marks and error bars for few."""
    places = [
        (1000 * axes.across(x), axes.down(y)) if math.isfinite(y) else None
        for x, y in zip(curve.x, curve.y, strict=True)
    ]
    few = len(curve.x) <= _FEW
    shapes = "" if few or not curve.low else _band(curve, axes)
    dash = f' stroke-dasharray="{_DASHES[slot]}"' if _DASHES[slot] else ""
    shapes += f'<path class="ln" d="{_path(places)}"{dash}/>'
    parts = [
        f'<svg width="100%" height="{axes.height}" viewBox="0 0 1000 {axes.height}" '
        f'preserveAspectRatio="none" overflow="visible">{shapes}</svg>'
    ]
    if few:
        parts += [_point(curve, i, place, slot, axes) for i, place in enumerate(places) if place]
    return f'<g class="s{slot}">{"".join(parts)}</g>'


def _point(curve: Curve, index: int, place: tuple[float, float], slot: int, axes: _Axes) -> str:
    """Return the mark of one point and its error bar."""
    x = f"{place[0] / 10:.2f}%"
    bar = ""
    if curve.low and math.isfinite(curve.low[index]) and math.isfinite(curve.high[index]):
        top, bottom = axes.down(curve.high[index]), axes.down(curve.low[index])
        bar = (
            f'<path class="eb" d="M0 {top:.1f}V{bottom:.1f}M-4 {top:.1f}H4M-4 {bottom:.1f}H4"/>'
            if bottom - top > 0.5
            else ""
        )
    mark = f'<path class="mk" transform="translate(0 {place[1]:.1f})" d="{_MARKS[slot]}"/>'
    return f'<svg x="{x}" overflow="visible" width="1" height="1">{bar}{mark}</svg>'


def _band(curve: Curve, axes: _Axes) -> str:
    """Return the area between low and high."""
    rows = [
        (1000 * axes.across(x), axes.down(low), axes.down(high))
        for x, low, high in zip(curve.x, curve.low, curve.high, strict=True)
        if math.isfinite(low) and math.isfinite(high)
    ]
    if not rows:
        return ""
    upper = [(x, high) for x, _, high in rows]
    lower = [(x, low) for x, low, _ in reversed(rows)]
    return f'<path class="bd" d="{_path([*upper, *lower])}z"/>'


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """Return SVG path data through the places, starting anew after each gap."""
    parts = []
    pen_up = True
    for place in places:
        if place:
            parts.append(f"{'M' if pen_up else 'L'}{place[0]:.1f} {place[1]:.1f}")
        pen_up = place is None
    return "".join(parts)


def _ends(curves: list[Curve], slots: list[int], axes: _Axes, gutter: int) -> str:
    """Return the direct labels at the right end of the lines, moved apart where they would overlap."""
    if gutter < 40:
        return ""
    ends = []
    for curve, slot in zip(curves, slots, strict=True):
        known = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        if known:
            ends.append([axes.down(known[-1][1]), slot, curve.name])
    ends.sort(key=lambda end: end[0])
    for above, below in pairwise(ends):
        below[0] = max(below[0], above[0] + 16)
    overflow = max(0.0, ends[-1][0] - axes.height) if ends else 0.0
    return "".join(
        f'<text class="end s{slot}" x="100%" dx="12" y="{y - overflow + 4:.1f}">{esc(_clip(label))}</text>'
        for y, slot, label in ends
    )


def _gutter(chart: LineChart, curves: list[Curve]) -> int:
    """Return the room in pixels right of the plot for the end labels; small charts carry none."""
    if len(curves) < 2:
        return 16
    return 24 + round(7.7 * max(len(_clip(c.name)) for c in curves))


def _clip(label: str) -> str:
    """Shorten a label to fit beside the plot."""
    return label if len(label) <= 28 else label[:27].rstrip() + "…"


def _legend(curves: list[Curve], slots: list[int]) -> str:
    """Return the legend, left out for a single curve."""
    if len(curves) < 2:
        return ""
    items = []
    for curve, slot in zip(curves, slots, strict=True):
        few = len(curve.x) <= _FEW
        mark = f'<path class="mk" transform="translate(14 6)" d="{_MARKS[slot]}"/>' if few else ""
        dash = f' stroke-dasharray="{_DASHES[slot]}"' if _DASHES[slot] else ""
        items.append(
            f'<li><svg class="s{slot}" width="28" height="12" aria-hidden="true">'
            f'<path class="ln" d="M0 6H28"{dash}/>{mark}</svg>{esc(curve.name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _table(chart: LineChart, curves: list[Curve]) -> str:
    """Return the drawn numbers as a table with one row for each x and one column for each curve."""
    rows: dict[float, list[str]] = {}
    for column, curve in enumerate(curves):
        for index, x in enumerate(curve.x):
            rows.setdefault(x, [""] * len(curves))[column] = _cell(curve, index)
    heads = "".join(f'<th scope="col">{esc(curve.name)}</th>' for curve in curves)
    body = "".join(
        f"<tr><th scope=row>{raw(x)}</th>{''.join(f'<td>{cell}</td>' for cell in rows[x])}</tr>"
        for x in sorted(rows)
    )
    return (
        f"<table><caption>{esc(chart.title)}: {esc(chart.y_label)}</caption>"
        f'<thead><tr><th scope="col">{esc(chart.x_label)}</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _cell(curve: Curve, index: int) -> str:
    """Return one value with its interval and number of trials."""
    if not math.isfinite(curve.y[index]):
        return "not measured"
    extra = []
    if curve.low and math.isfinite(curve.low[index]) and math.isfinite(curve.high[index]):
        extra.append(f"{raw(curve.low[index], 4)} to {raw(curve.high[index], 4)}")
    if curve.counts:
        extra.append(f"n = {curve.counts[index]}")
    return raw(curve.y[index]) + (f" ({', '.join(extra)})" if extra else "")


def _describe(chart: LineChart, curves: list[Curve]) -> str:
    """Say in words where each curve starts and ends and how far it ranges."""
    parts = [f"{chart.y_label} over {chart.x_label}{', log scale' if chart.log_x else ''}."]
    for curve in curves:
        known = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        if known:
            ys = [y for _, y in known]
            parts.append(
                f"{curve.name}: from {number(ys[0])} at {number(known[0][0])} to {number(ys[-1])} at "
                f"{number(known[-1][0])}, between {number(min(ys))} and {number(max(ys))}."
            )
    return " ".join(parts)


def _thinned(full: list[Curve], drawn: list[Curve]) -> list[str]:
    """Say how many of the points are drawn where a curve was thinned."""
    longest = max(range(len(full)), key=lambda i: len(full[i].x))
    if len(drawn[longest].x) == len(full[longest].x):
        return []
    return [f"{len(drawn[longest].x):,} of {len(full[longest].x):,} points are drawn for each line."]
