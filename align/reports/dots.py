"""Charts of estimates as inline SVG: a dot and its interval a row, a matrix shaded by its counts, a bar of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from align.reports.charts import Axis
from align.reports.page import count, finite, percent

WIDTH, ROW, TOP, BOTTOM = 520, 25, 8, 30
LETTER, WIDEST = 6.5, 300
"""Pixels of a letter of a label, and of the widest column of labels."""


@dataclass(frozen=True)
class Dot:
    """One row: a label, a value with its interval, and a note at the right end."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    colour: int = 0


def dot_chart(
    rows: Sequence[Dot],
    *,
    low: float | None = None,
    high: float | None = None,
    share: bool = False,
    reference: tuple[float, str] | None = None,
    left: int = 170,
) -> Markup:
    """Draw a row for every estimate that there is.

    Args:
        low, high: ends of the axis; by default what the intervals need.
        share: values are shares, labelled in percent.
        reference: a dashed line at a value, with its label.
        left: pixels for the labels; more where they need it, up to `WIDEST`.

    Returns:
        an empty Markup when there is nothing to draw.
    """
    shown = [row for row in rows if finite(row.value) is not None]
    if not shown:
        return Markup()
    ends = [v for row in shown for v in (row.value, row.low, row.high) if finite(v) is not None]
    ends += [reference[0]] if reference else []
    least, most = min(ends), max(ends)
    margin = 0.06 * (most - least) or 0.1
    start, stop = least - margin if low is None else min(low, least), most + margin if high is None else max(high, most)
    right, longest = 66, max(len(row.label) for row in shown)
    left = max(left, min(WIDEST, math.ceil(12 + LETTER * longest)))
    x = Axis(start, stop, left, WIDTH - right)
    foot = TOP + ROW * len(shown)
    body = []
    for value, text in x.ticks(5):
        at = x(value)
        label = percent(value, 0) if share else text
        body.append(f'<path class="grid" d="M{at:.1f} {TOP}V{foot}"/>')
        body.append(f'<text class="tick" x="{at:.1f}" y="{foot + 16}" text-anchor="middle">{label}</text>')
    if reference:
        at = x(reference[0])
        body.append(f'<path class="ref" d="M{at:.1f} {TOP}V{foot}"/>')
        text = escape(reference[1])
        body.append(f'<text class="reftext" x="{at:.1f}" y="{foot + 28}" text-anchor="middle">{text}</text>')
    for i, row in enumerate(shown):
        body.append(_row(row, x, TOP + ROW * (i + 0.5), left))
    words = "; ".join(f"{row.label} {row.value:.3g}" for row in shown if row.value is not None)
    height = foot + BOTTOM + 4
    return Markup(
        f'<div class="dots"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(words)}">'
        f"{''.join(map(str, body))}</svg></div>"
    )


def _row(row: Dot, x: Axis, y: float, left: int) -> str:
    room = int((left - 12) / LETTER)
    label = escape(row.label)
    if len(row.label) > room:
        label = Markup(f"{escape(row.label[: room - 1])}…<title>{label}</title>")
    parts = [f'<text class="name" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{label}</text>']
    a, b = finite(row.low), finite(row.high)
    if a is not None and b is not None:
        d = f"M{x(a):.1f} {y:.1f}H{x(b):.1f}M{x(a):.1f} {y - 4:.1f}v8M{x(b):.1f} {y - 4:.1f}v8"
        parts.append(f'<path class="whisker c{row.colour}" d="{d}"/>')
    if row.value is not None:
        parts.append(f'<circle class="dot c{row.colour}" cx="{x(row.value):.1f}" cy="{y:.1f}" r="4.2"/>')
    note = f'<text class="tick" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{escape(row.note)}</text>'
    return "".join([*parts, note if row.note else ""])


def matrix_chart(
    matrix: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], *, agree: int = 2, differ: int = 5
) -> Markup:
    """Draw a square matrix of counts: the diagonal in one colour, the rest in another, darker where there are more."""
    total = sum(map(sum, matrix)) or 1
    most = max(max(row) for row in matrix) or 1
    size, wide, left, top = 74, 112, 96, 30
    body = []
    for j, name in enumerate(columns):
        middle = left + wide * (j + 0.5)
        body.append(f'<text class="name" x="{middle}" y="{top - 10}" text-anchor="middle">{escape(name)}</text>')
    for i, values in enumerate(matrix):
        y = top + size * i
        body.append(
            f'<text class="name" x="{left - 12}" y="{y + size / 2 + 4}" text-anchor="end">{escape(rows[i])}</text>'
        )
        for j, value in enumerate(values):
            colour, shade = agree if i == j else differ, 0.08 + 0.62 * math.sqrt(value / most)
            x = left + wide * j
            body.append(
                f'<rect class="cell c{colour}" x="{x + 1.5}" y="{y + 1.5}" width="{wide - 3}" height="{size - 3}"'
                f' rx="5" style="fill-opacity:{shade if value else 0.03:.2f}"/>'
                f'<text class="cellbig" x="{x + wide / 2}" y="{y + size / 2 + 1}" text-anchor="middle">'
                f"{count(value)}</text>"
                f'<text class="cellsmall" x="{x + wide / 2}" y="{y + size / 2 + 18}" text-anchor="middle">'
                f"{percent(value / total)}</text>"
            )
    height, width = top + size * len(matrix) + 6, left + wide * len(columns) + 4
    words = "; ".join(f"{rows[i]} and {columns[j]}: {v}" for i, row in enumerate(matrix) for j, v in enumerate(row))
    return Markup(
        f'<div class="dots"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">'
        f"{''.join(map(str, body))}</svg></div>"
    )


def share_bar(parts: Sequence[tuple[str, float, int]]) -> Markup:
    """Draw one bar cut into parts (name, number, colour), with a legend; parts of nothing are left out."""
    total = sum(number for _, number, _ in parts)
    if not total:
        return Markup()
    cells, keys = [], []
    for name, number, colour in parts:
        if not number:
            continue
        share = number / total
        cells.append(f'<i class="c{colour}" style="flex:{number} 0 0" title="{escape(name)}: {count(number)}"></i>')
        told = f"{count(number)} ({percent(share)})"
        keys.append(f'<span class="key"><i class="c{colour}"></i>{escape(name)} <b>{told}</b></span>')
    return Markup(f'<div class="sharebar">{"".join(cells)}</div><div class="legend">{"".join(keys)}</div>')


def interval_of(entry: Any, name: str = "share") -> tuple[float | None, float | None, float | None]:
    """Return (value, low, high) of a mapping with `name` and `ci`, None where missing."""
    if not isinstance(entry, dict):
        return None, None, None
    ends = entry.get("ci") or [None, None]
    return finite(entry.get(name)), finite(ends[0]), finite(ends[1])


@dataclass(frozen=True)
class Place:
    """A labelled point with an interval in both directions, `(mean, low, high)` each; a full dot or an open one."""

    label: str
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]
    full: bool = True


def scatter(places: Sequence[Place], *, x_label: str, y_label: str) -> Markup:
    """Draw points over two axes with their intervals and labels.

    Returns:
        an empty Markup when there is no point.
    """
    if not places:
        return Markup()
    width, height, left, right, top, bottom = 560, 380, 64, 24, 18, 44
    axes = []
    for start, end, values in (
        (left, width - right, [v for p in places for v in p.x if v is not None]),
        (height - bottom, top, [v for p in places for v in p.y if v is not None]),
    ):
        low, high = min(values), max(values)
        margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        axes.append(Axis(low - margin, high + margin, start, end))
    x, y = axes
    body = []
    for value, text in y.ticks(5):
        body.append(f'<path class="grid" d="M{left} {y(value):.1f}H{width - right}"/>')
        body.append(f'<text class="tick" x="{left - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in x.ticks(6):
        body.append(f'<path class="grid" d="M{x(value):.1f} {top}V{height - bottom}"/>')
        body.append(
            f'<text class="tick" x="{x(value):.1f}" y="{height - bottom + 17}" text-anchor="middle">{text}</text>'
        )
    body.append(f'<path class="axis" d="M{left} {height - bottom}H{width - right}M{left} {top}V{height - bottom}"/>')
    middle = (left + width - right) / 2
    body.append(f'<text class="tick" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'x="0" y="0" transform="translate(14 {(top + height - bottom) / 2:.1f}) rotate(-90)"'
    body.append(f'<text class="tick" {turned} text-anchor="middle">{escape(y_label)}</text>')
    for p in places:
        a, b, colour = x(p.x[0]), y(p.y[0]), "c0" if p.full else "c1"
        bars = "".join(
            f"M{x(low):.1f} {b:.1f}H{x(high):.1f}" for low, high in [p.x[1:]] if low is not None and high is not None
        )
        bars += "".join(
            f"M{a:.1f} {y(low):.1f}V{y(high):.1f}" for low, high in [p.y[1:]] if low is not None and high is not None
        )
        body.append(f'<path class="whisker {colour}" d="{bars}"/>')
        body.append(f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>')
        side, shift = ("start", 8) if a < 0.7 * width else ("end", -8)
        at = f'x="{a + shift:.1f}" y="{b - 8 if p.full else b + 16:.1f}" text-anchor="{side}"'
        body.append(f'<text class="tick" {at}>{escape(p.label)}</text>')
    about = escape("; ".join(f"{p.label}: {x_label} {p.x[0]:.4g}, {y_label} {p.y[0]:.4g}" for p in places))
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{about}">{"".join(body)}</svg>'
    return Markup(f'<div class="plot">{svg}</div>')
