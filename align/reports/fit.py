"""The page of a fitted reward: what it is worth on held-out answers, how it was calibrated, and where it fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from align.reports.charts import Series, line_chart
from align.reports.markdown import code, front_matter, made_by, plain
from align.reports.page import finite, render
from align.reports.runfiles import RunFiles, curve, page_context
from align.tracking import replace_text

_SVG_STYLE = (
    "svg{background:#fff;font-family:sans-serif}.c0{--k:#2f6fde}.c1{--k:#8a93a3}"
    ".grid{stroke:#e3e6ea;fill:none}.axis{stroke:#9aa3af;fill:none}.tick{fill:#5b6472;font-size:11.5px}"
    ".line{stroke:var(--k);fill:none;stroke-width:2}.dot{fill:var(--k)}.whisker{stroke:var(--k);fill:none}"
)


def fit_page(files: RunFiles) -> str:
    """Return the page of a run of `align fit`, and write its reliability plot and its card beside the artefact.

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
    if card:
        replace_text(path.with_name("README.md"), reward_card(artefact, files))
    loss = line_chart([curve(files.metrics, "loss", "loss")]) if files.metrics else Markup()
    rows, said = (rows_of(card), dict(worth(card))) if card else ("", {})
    context = {**page_context(files), "artefact": artefact, "card": card, "rows": rows, "plot": plot, "loss": loss}
    context["calibration"] = said.get("calibration", "")
    return render("fit.html", context)


NO_BETTER = "as a probability it is no better than the base rate alone"


def worth(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a card says of a reward on held-out answers, a row of name and text for each kind of them."""
    heldout, rows = card.get("heldout", {}), []
    if thumbs := heldout.get("thumbs"):
        rows.append(("thumbs", f"{thumbs['n']} held out, {thumbs['base_rate']:.1%} up; AUROC {_show(thumbs['auroc'])}"))
        low, high = thumbs["debiased_ece_ci"]
        rows.append((
            "calibration",
            f"debiased ECE {_show(thumbs['debiased_ece'])} ({_show(low)} to {_show(high)}); Brier "
            f"{_show(thumbs['brier'])}, that of the base rate {_show(thumbs['brier_of_base_rate'])}"
            + (f": {NO_BETTER}" if thumbs["brier"] >= thumbs["brier_of_base_rate"] else ""),
        ))  # fmt: skip
    for kind in ("comparisons", "rankings"):
        if pairs := heldout.get(kind):
            low, high = pairs["ci"]
            rows.append(
                (kind, f"{pairs['n']} pairs, {_show(pairs['without_ties'])} right ({_show(low)} to {_show(high)})")
            )
    if rated := heldout.get("ratings"):
        rows.append(("ratings", f"{rated['n']}, Spearman {_show(rated['spearman'])}"))
    if card.get("sparsity", {}).get("status") == "measured":
        rows.append(("weights", card["sparsity"]["sentence"]))
    return rows


def rows_of(card: Mapping[str, Any]) -> str:
    """Return what became of every row that was read.

    read = trained on + held out for the calibration + held out + left out, for one reason each
    """
    calibration, heldout = (card["split"][part]["rows"] for part in ("calibration", "heldout"))
    left = "; ".join(f"{n:,} {what}" for what, n in card["left_out"].items())
    return (
        f"Rows read: {card['read']:,}. Trained on: {card['trained_on']:,}. Held out for the calibration: "
        f"{calibration:,}. Held out: {heldout:,}. Left out: {left or 'none'}."
    )


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def reward_card(artefact: Mapping[str, Any], files: RunFiles) -> str:
    """Return the README.md of a fitted reward: how it is loaded, what it is worth, its origins, where it fails."""
    card, model, name = artefact["card"], artefact["model"], artefact["name"]
    tags = ["align", "reward-model", str(artefact["media"])]
    samples = 'Samples(prompts=["a cat"], images=torch.rand(1, 3, 16, 16))'
    if artefact["media"] == "text":
        samples = 'Samples(prompts=["Say hello."], texts=["Hello."])'
    snippet = [*(["import torch"] if artefact["media"] != "text" else []), "from align.types import Samples"]
    snippet += ["from rewards.fitted import Fitted", "", 'reward = Fitted(".")  # the folder of this card']
    backbone = f"{code(model['backbone'])}" + (f" of {code(model['path'])}" if model.get("path") else "")
    seen = ", ".join(f"{n:,} {kind}" for kind, n in card["data"]["observations"].items())
    calibration = (artefact["calibration"] or {}).get("kind", "none")
    lines = [
        front_matter({"license": "unknown", "tags": tags}) + f"# {plain(name)}", "",
        f"A reward that `align fit` fitted to what people said. It reads {plain(artefact['media'])} through {backbone} "
        f"with a {plain(model['head'])} head; calibration {plain(calibration)}.", "",
        "## Use", "", f"This needs the Python package align: {code('pip install .')} in its source folder.", "",
        "```python", *snippet, f"print(reward.score({samples}).values)", "```", "",
        "## What it is worth on held-out answers", "",
        *([f"- {plain(kind)}: {plain(text)}" for kind, text in worth(card)] or ["- nothing was measured"]), "",
        "## What it was made of", "",
        *(f"- {code(file)}, sha256 {code(digest)}" for file, digest in card["data"]["hashes"].items()),
        f"- Observations: {plain(seen)}.", f"- {plain(rows_of(card))}",
        *made_by(files), "- Licence: that of its data and backbone, which align does not know.", "",
        "## Where it fails", "", *(f"- {plain(mode)}" for mode in card["known_failure_modes"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


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
