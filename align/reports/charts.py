"""Line and stacked charts as inline SVG, coloured by the page's CSS variables --c0 to --c6.

A chart is readable without scripts; the page's tooltip script reads the points from `data-chart`. `sheet` makes one
SVG of charts that stands alone, with colours of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38
COLOURS = 7
INKS = ("#2f6fde", "#e07b00", "#0f9d76", "#b9479d", "#7a5af0", "#b4531f", "#3a93b5")
"""The colours of a sheet, which has no page around it."""
SHEET_STYLE = """
text{font:11.5px sans-serif;fill:#5b6472}.key{font-size:12px}
.head{font-size:13px;font-weight:600;fill:#16191f}
.grid{stroke:#e1e5eb;fill:none}.axis{stroke:#8b94a3;fill:none}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.ref{stroke:#b3261e;stroke-dasharray:5 4;fill:none}.reftext{fill:#b3261e;font-size:11px}.dot{stroke:#fff}
.band{opacity:.17}.whisker{fill:none;stroke-width:1.3;opacity:.75}
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """One curve: y over x, None or NaN where there is no value, with an optional band [low, high].

    Args:
        sparse: draw the points, for a curve with few of them.
        colour: index of the page's CSS colour; None takes the position in the chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    sparse: bool = False
    colour: int | None = None

    @property
    def present(self) -> bool:
        """Whether any value is there to draw."""
        return any(_finite(v) for v in self.y)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels of the drawing, linearly or by log10 with everything at or below `floor` at its foot."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.log:
            value = math.log10(max(value, 10**self.low))
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Return about `count` round values with their labels."""
        if self.log:
            stride = max(1, math.ceil((self.high - self.low) / count))
            exponents = range(round(self.low) + stride, round(self.high) + 1, stride)
            return [(0.0, "0"), *((10.0**e, _power(e)) for e in exponents)]
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        values = [(first + i) * step for i in range(int((self.high - first * step) / step + 1e-9) + 1)]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(v, _tick(v, digits)) for v in values]


def line_chart(
    series: Iterable[Series],
    *,
    log: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    reference: tuple[float, str] | None = None,
    x_label: str = "training step",
) -> Markup:
    """Draw curves over the training step, or over what `x_label` says, each with its band.

    Args:
        log: a log10 axis; a value of 0 stands on its foot, which is labelled 0.
        percent: values are shares, labelled as percentages.
        from_zero: the axis begins at 0.
        reference: a dashed line at a value, with its label.

    Returns:
        an empty Markup when there is nothing to draw.
    """
    shown = [replace(s, colour=i if s.colour is None else s.colour) for i, s in enumerate(series) if s.present]
    if not shown:
        return Markup()
    if percent:
        shown = [replace(s, y=_times(s.y, 100), low=_times(s.low, 100), high=_times(s.high, 100)) for s in shown]
    values = [v for s in shown for part in (s.y, s.low, s.high) for v in part if v is not None and math.isfinite(v)]
    values += [reference[0]] if reference else []
    x, y = _x_axis(shown), (_log_axis(values) if log else _linear_axis(values, from_zero))
    body = [_frame(x, y, "%" if percent else "", x_label)]
    body += [_band(s, x, y) for s in shown if len(s.low) == len(s.x) == len(s.high)]
    if reference:
        at = y(reference[0])
        body.append(f'<path class="ref" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        body.append(_text("reftext", WIDTH - RIGHT - 2, at - 4, "end", escape(reference[1])))
    body += [_curve(s, x, y) for s in shown]
    return _figure(body, shown, "%" if percent else "", x)


def stacked_chart(series: Iterable[Series], *, unit: str = "") -> Markup:
    """Draw non-negative curves over a common x as areas on top of one another."""
    shown = [replace(s, colour=i) for i, s in enumerate(series) if s.present]
    if not shown:
        return Markup()
    steps = shown[0].x
    sums = [0.0] * len(steps)
    layers: list[tuple[Series, list[float], list[float]]] = []
    for s in shown:
        below = sums
        sums = [b + (v if v is not None and math.isfinite(v) else 0.0) for b, v in zip(below, s.y, strict=True)]
        layers.append((s, below, sums))
    x, y = _x_axis(shown), _linear_axis(sums, from_zero=True)
    body = [_frame(x, y, unit)]
    for s, below, above in layers:
        forth = " ".join(f"{x(a):.1f},{y(v):.1f}" for a, v in zip(steps, above, strict=True))
        back = " ".join(f"{x(a):.1f},{y(v):.1f}" for a, v in reversed(list(zip(steps, below, strict=True))))
        body.append(f'<polygon class="area c{_colour(s)}" points="{forth} {back}"/>')
    return _figure(body, shown, unit, x)


def histogram(values: Sequence[float], *, marks: Sequence[tuple[str, float]] = ()) -> Markup:
    """Draw how many values lie where, in bins of one round width.

    Args:
        marks: labelled values, a dashed line each.

    Returns:
        an empty Markup when there is no value.
    """
    if not values:
        return Markup()
    low, high = min(values), max(values)
    spread = high - low
    width = _round_step(spread / min(36, max(6, math.isqrt(len(values)) * 2))) if spread else abs(low) or 1.0
    first = math.floor(low / width + 1e-9) if spread else 0
    start = first * width if spread else low - width / 2
    counts = [0] * max(1, math.ceil((high - start) / width - 1e-9))
    for value in values:
        counts[min(len(counts) - 1, math.floor((value - start) / width + 1e-9))] += 1
    x = Axis(start, start + width * len(counts), LEFT, WIDTH - RIGHT)
    y = Axis(0, max(counts) * 1.12, HEIGHT - BOTTOM, TOP + 6)
    body = []
    for value, text in y.ticks(4):
        if abs(value - round(value)) < 1e-9:
            body.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
            body.append(_text("tick", LEFT - 7, y(value) + 4, "end", text))
    for i, number in enumerate(counts):
        if number:
            a, b, top = x(start + i * width) + 0.7, x(start + (i + 1) * width) - 0.7, y(number)
            title = f"{start + i * width:.4g} to {start + (i + 1) * width:.4g}: {number}"
            shape = f'x="{a:.1f}" y="{top:.1f}" width="{max(1.0, b - a):.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
            body.append(f'<rect class="bar" {shape} rx="1.5"><title>{title}</title></rect>')
    body += [_text("tick", x(value), HEIGHT - BOTTOM + 17, "middle", text) for value, text in x.ticks(6)]
    body.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for label, value in marks:
        at, side = x(value), "start" if x(value) < WIDTH * 0.7 else "end"
        body.append(f'<path class="mark" d="M{at:.1f} {TOP - 4}V{HEIGHT - BOTTOM}"/>')
        text = f"{escape(label)} {value:.4g}".replace("-", "−")
        body.append(_text("marktext", at + (5 if side == "start" else -5), TOP + 5, side, text))
    about = escape(f"{len(values)} values from {low:.4g} to {high:.4g}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">{"".join(body)}</svg>'
    return Markup(f'<div class="hist">{svg}</div>')


def sheet(panels: Sequence[tuple[str, Markup]], columns: int = 2) -> str:
    """Return line charts as one SVG that stands alone, row by row, each below its title and its curves' names.

    Args:
        panels: title and drawing; an empty drawing leaves its place empty.
    """
    inks = "".join(
        f".line.c{i},.whisker.c{i}{{stroke:{ink}}}.dot.c{i},.key.c{i},.band.c{i}{{fill:{ink}}}"
        for i, ink in enumerate(INKS)
    )
    body, y = [], 0
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        keys = [_keys(drawn) for _, drawn in row]
        head = 26 + 16 * max(1 + at for found in keys for *_, at in found or [(0, "", 0, -1)])
        for place, (title, drawn) in enumerate(row):
            svg = re.search(r"<svg[^>]*>(.*)</svg>", drawn, re.DOTALL)
            names = "".join(
                f'<text class="key c{c}" x="{x}" y="{38 + 16 * at}">{name}</text>' for c, name, x, at in keys[place]
            )
            body.append(
                f'<g transform="translate({(WIDTH + 20) * place} {y})"><text class="head" x="{LEFT}" y="18">'
                f'{escape(title)}</text>{names}<g transform="translate(0 {head})">{svg[1] if svg else ""}</g></g>'
            )
        y += head + HEIGHT + 10
    width = (WIDTH + 20) * min(columns, len(panels)) - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}"><style>{SHEET_STYLE}{inks}</style>'
        f'<rect width="{width}" height="{y}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _keys(drawn: Markup) -> list[tuple[int, str, int, int]]:
    """Return colour, name, x and line of every name in a chart's legend."""
    found, x, line = [], LEFT, 0
    for colour, name in re.findall(r'class="key"><i class="c(\d)"></i>(.*?)</span>', drawn):
        wide = 7 * len(name) + 18
        if x > LEFT and x + wide > WIDTH:
            x, line = LEFT, line + 1
        found.append((int(colour), name, x, line))
        x += wide
    return found


def _figure(body: list[str], shown: Sequence[Series], unit: str, x: Axis) -> Markup:
    keys = [f'<span class="key"><i class="c{_colour(s)}"></i>{escape(s.name)}</span>' for s in shown]
    legend = f'<div class="legend">{"".join(keys)}</div>' if len(shown) > 1 else ""
    points: list[dict[str, Any]] = []
    for s in shown:
        there = [(a, v) for a, v in zip(s.x, s.y, strict=True) if _finite(v)]
        points.append({"name": s.name, "c": _colour(s), "p": [[a, round(x(a), 2), v] for a, v in there]})
    ends = [f"{s['name']} from {s['p'][0][2]:.4g}{unit} to {s['p'][-1][2]:.4g}{unit}" for s in points]
    return Markup(
        f'{legend}<div class="plot" data-chart="{escape(json.dumps({"unit": unit, "series": points}))}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape("; ".join(ends))}">{"".join(body)}'
        '<path class="cursor" d=""/></svg><div class="tip" hidden></div></div>'
    )


def _frame(x: Axis, y: Axis, unit: str, x_label: str = "training step") -> str:
    parts = []
    for value, text in y.ticks():
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text("tick", LEFT - 7, at + 4, "end", text + unit))
    for value, _ in x.ticks(6):
        if abs(value - round(value)) < 1e-9:
            parts.append(_text("tick", x(value), HEIGHT - BOTTOM + 17, "middle", _tick(value, 0)))
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text("tick", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle", x_label))
    return "".join(parts)


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _curve(s: Series, x: Axis, y: Axis) -> str:
    runs = _runs([(x(a), y(v)) if v is not None and math.isfinite(v) else None for a, v in zip(s.x, s.y, strict=True)])
    path = "".join("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in run) for run in (_joined(runs) if s.sparse else runs))
    dots = [p for run in runs for p in run] if s.sparse else [run[0] for run in runs if len(run) == 1]
    circles = "".join(f'<circle class="dot c{_colour(s)}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>' for a, b in dots)
    return f'<path class="line c{_colour(s)}" d="{path}"/>{circles}'


def _band(s: Series, x: Axis, y: Axis) -> str:
    rows = list(zip(s.x, s.low, s.high, strict=True))
    pairs = [(x(a), y(u), y(v)) if _finite(u) and _finite(v) else None for a, u, v in rows]
    if s.sparse:
        ends = [(a, u, v) for run in _runs(pairs) for a, u, v in run]
        bars = "".join(f"M{a:.1f} {u:.1f}V{v:.1f}M{a - 3:.1f} {u:.1f}h6M{a - 3:.1f} {v:.1f}h6" for a, u, v in ends)
        return f'<path class="whisker c{_colour(s)}" d="{bars}"/>'
    polygons = []
    for run in _runs(pairs):
        outline = [(a, v) for a, _, v in run] + [(a, u) for a, u, _ in reversed(run)]
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline)
        polygons.append(f'<polygon class="band c{_colour(s)}" points="{corners}"/>')
    return "".join(polygons)


def _runs(points: Iterable[T | None]) -> list[list[T]]:
    """Split at the missing values."""
    runs: list[list[T]] = [[]]
    for point in points:
        if point is not None:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _joined(runs: list[list[T]]) -> list[list[T]]:
    return [[point for run in runs for point in run]] if runs else []


def _x_axis(shown: Sequence[Series]) -> Axis:
    values = [float(v) for s in shown for v in s.x]
    low, high = min(0.0, *values), max(values)
    return Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _linear_axis(values: Sequence[float], from_zero: bool) -> Axis:
    low, high = min(values), max(values)
    low = min(0.0, low) if from_zero else low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    top = high + margin
    return Axis(low if from_zero and low == 0 else low - margin, top, HEIGHT - BOTTOM, TOP)


def _log_axis(values: Sequence[float]) -> Axis:
    positive = [v for v in values if v > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))) - 1, math.ceil(math.log10(max(positive)) + 0.01)
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m, most in ((1, 1.5), (2, 3.2), (5, 7.1), (10, 10)) if raw <= most * power * 1.0001)


def _tick(value: float, digits: int) -> str:
    if digits > 4 or abs(value) >= 1e6:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−") if value else "0"
    return f"{0.0 if abs(value) < 1e-12 else value:,.{digits}f}".replace("-", "−")


def _power(exponent: int) -> str:
    return f'10<tspan dy="-4" font-size="8">{str(exponent).replace("-", "−")}</tspan>'


def _times(values: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if v is None else v * factor for v in values]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _colour(s: Series) -> int:
    return (s.colour or 0) % COLOURS
