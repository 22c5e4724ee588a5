"""The drawings of the sparsity page as inline SVG: a heat map, bars, and the curve over tolerances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from align.reports.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, line_chart

ROW, MOST_LAYERS = 17, 120


def heat_map(cells: Mapping[str, Mapping[str, tuple[float, str]]]) -> Markup:
    """Draw one cell a tensor, layers down and modules across, the darker the more of it changed.

    Args:
        cells: share and words by layer and module.

    Returns:
        an empty Markup where no tensor lies in a numbered layer.
    """
    layers = [layer for layer in cells if len(cells) == 1 or layer != "(outside layers)"]
    if not layers:
        return Markup()
    layers = sorted(layers, key=_natural)[:MOST_LAYERS]
    columns = list(dict.fromkeys(module for layer in layers for module in cells[layer]))
    most = max((cells[layer][m][0] for layer in layers for m in cells[layer]), default=0.0) or 1.0
    left, width = 150, 900
    top = 24 + min(88, 4 * max(len(module) for module in columns))  # room for the names, which stand aslant
    across = (width - left) / len(columns)
    body = []
    for j, module in enumerate(columns):
        x = left + (j + 0.5) * across
        body.append(
            f'<text class="tick" x="{x:.1f}" y="{top - 8}" transform="rotate(-38 {x:.1f} {top - 8})">'
            f"{escape(_short(module, 26))}</text>"
        )
    for i, layer in enumerate(layers):
        y = top + i * ROW
        body.append(
            f'<text class="tick" x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(_short(layer, 24))}</text>'
        )
        for j, module in enumerate(columns):
            if module in cells[layer]:
                share, words = cells[layer][module]
                body.append(
                    f'<rect class="cell" x="{left + j * across:.1f}" y="{y}" width="{max(across - 1.5, 1):.1f}" '
                    f'height="{ROW - 1.5}" rx="2" '
                    f'fill-opacity="{0.04 + 0.96 * share / most:.3f}"><title>{escape(words)}</title></rect>'
                )
    about = (
        f"share of changed entries of {len(layers)} layers by {len(columns)} modules; the darkest is {100 * most:.1f} %"
    )
    box = f"0 0 {width + 60} {top + len(layers) * ROW + 6}"
    svg = f'<svg viewBox="{box}" role="img" aria-label="{about}">{"".join(body)}</svg>'
    key = f'<div class="scale"><span>0 %</span><i></i><span>{100 * most:.1f} %</span></div>'
    return Markup(f'{key}<div class="heat">{svg}</div>')


def bars(counts: Mapping[str, int]) -> Markup:
    """Draw counts as labelled bars."""
    most = max(counts.values(), default=0) or 1
    y = Axis(0, most * 1.1, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(len(counts), 1)
    body = []
    for value, _ in y.ticks(4):
        body.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        body.append(_label(LEFT - 7, y(value) + 4, _compact(value), "end"))
    total = sum(counts.values()) or 1
    for i, (name, value) in enumerate(counts.items()):
        x, at = LEFT + i * step, y(value)
        words = f"{name}: {value:,} ({100 * value / total:.2f} % of what changed)"
        body.append(
            f'<rect class="bar" x="{x + 2:.1f}" y="{at:.1f}" width="{step - 4:.1f}" '
            f'height="{HEIGHT - BOTTOM - at:.1f}" rx="1.5">'
            f"<title>{escape(words)}</title></rect>"
        )
        body.append(
            _label(
                x + step / 2,
                HEIGHT - BOTTOM + 15,
                escape({"zero_sign": "±0", "nan": "NaN", ">=129": "≥129"}.get(name, name)),
                "middle",
            )
        )
    body.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    body.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "steps between neighbouring values", "middle"))
    return Markup(
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="changed entries by steps between codes">{"".join(body)}</svg></div>'
    )


def tolerance_chart(result: Mapping[str, Any]) -> Markup:
    """Draw the share of entries within a tolerance, and of weights too finely spaced to show one step above it."""
    rows = result["tolerance_curve"]
    x = Axis(math.log2(rows[0]["tolerance"]), math.log2(rows[-1]["tolerance"]), LEFT, WIDTH - RIGHT)
    y = Axis(0.0, 1.04, HEIGHT - BOTTOM, TOP)
    body = []
    for i in range(6):
        body.append(f'<path class="grid" d="M{LEFT} {y(i / 5):.1f}H{WIDTH - RIGHT}"/>')
        body.append(_label(LEFT - 7, y(i / 5) + 4, f"{20 * i}%", "end"))
    for power in range(-9, 1, 2):
        at = x(math.log2(10.0**power))
        body.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">10'
            f'<tspan dy="-4" font-size="8">{str(power).replace("-", "−")}</tspan></text>'
        )
    at = x(math.log2(1e-5))
    body.append(f'<path class="ref" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    body.append(f'<text class="reftext" x="{at - 4:.1f}" y="{TOP + 24}" text-anchor="end">1e−5</text>')
    for colour, key in enumerate(("within", "blind")):
        points = " L".join(f"{x(math.log2(row['tolerance'])):.1f} {y(row[key]):.1f}" for row in rows)
        body.append(f'<path class="line c{colour}" d="M{points}"/>')
        body += [
            f'<circle class="dot c{colour}" cx="{x(math.log2(row["tolerance"])):.1f}" cy="{y(row[key]):.1f}" r="2.6">'
            f"<title>2^{round(math.log2(row['tolerance']))}: {100 * row[key]:.2f} %</title></circle>"
            for row in rows
        ]
    body.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    body.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "tolerance", "middle"))
    names = ("entries that moved no more than the tolerance", "weights whose neighbours are no further apart than it")
    keys = "".join(f'<span class="key"><i class="c{i}"></i>{name}</span>' for i, name in enumerate(names))
    return Markup(
        f'<div class="legend">{keys}</div><div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="share of entries within a tolerance">{"".join(body)}</svg></div>'
    )


def spectrum_chart(rows: Sequence[Mapping[str, Any]], most: int = 4) -> Markup:
    """Draw singular values over the noise edge, of some matrices from the one that rises highest to the lowest.

    Args:
        rows: of `align.sparsity.ranks.rank`, the highest first.
    """
    there = [row for row in rows if row.get("singular_values")]
    places = sorted({round(i * (len(there) - 1) / max(most - 1, 1)) for i in range(most)}) if there else []
    series = [
        Series(
            _short(row["name"], 44),
            [i for i, _ in row["singular_values"]],
            [v / row["noise_edge"] for _, v in row["singular_values"]],
        )
        for row in (there[i] for i in places)
    ]
    label = "index of the singular value"
    return line_chart(series, log=True, reference=(1.0, "edge of rounding noise"), x_label=label)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _compact(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-most + 1 :]


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Order 9 before 10."""
    parts = text.replace("/", ".").split(".")
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]
