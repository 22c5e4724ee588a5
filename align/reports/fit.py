"""The page of a fitted reward: what it is worth on held-out answers, how it was calibrated, and where it fails."""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from align.reports.charts import Series, line_chart
from align.reports.page import finite, render
from align.reports.runfiles import RunFiles, curve, page_context
from align.tracking import replace_text

_SVG_STYLE = (
    "svg{background:#fff;font-family:sans-serif}.c0{--k:#2f6fde}.c1{--k:#8a93a3}"
    ".grid{stroke:#e3e6ea;fill:none}.axis{stroke:#9aa3af;fill:none}.tick{fill:#5b6472;font-size:11.5px}"
    ".line{stroke:var(--k);fill:none;stroke-width:2}.dot{fill:var(--k)}.whisker{stroke:var(--k);fill:none}"
)


def fit_page(files: RunFiles) -> str:
    """Return the page of a run of `align fit`, and write its reliability plot beside the artefact.

    A run that is not finished has no card: the page then shows its loss alone.
    """
    path = files.directory / "reward" / "reward.json"
    try:
        artefact = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        artefact = {}
    card = artefact.get("card") or {}
    thumbs = card.get("heldout", {}).get("thumbs")
    plot = reliability_plot(thumbs["reliability"]) if thumbs else Markup()
    if plot:
        replace_text(path.with_name("reliability.svg"), standalone(plot))
    loss = line_chart([curve(files.metrics, "loss", "loss")]) if files.metrics else Markup()
    context = {**page_context(files), "artefact": artefact, "card": card, "plot": plot, "loss": loss}
    return render("fit.html", context)


def reliability_plot(bins: list[dict[str, Any]]) -> Markup:
    """Draw the share that was seen over the probability that was said, in percent, with Wilson's intervals."""
    x = [100 * row["predicted"] for row in bins]
    top = max([*x, *(100 * (finite(row["high"]) or 0.0) for row in bins)])
    seen = Series(
        "seen",
        x,
        [row["seen"] for row in bins],
        [row["low"] for row in bins],
        [row["high"] for row in bins],
        sparse=True,
    )
    diagonal = Series("calibrated", [0.0, top], [0.0, top / 100])
    return line_chart([seen, diagonal], percent=True, from_zero=True, x_label="probability, %")


def standalone(chart: Markup) -> str:
    """Return the SVG of a chart as a file of its own."""
    text = str(chart)
    svg = text[text.index("<svg ") : text.index("</svg>") + len("</svg>")]
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{_SVG_STYLE}</style>", 1
    )
