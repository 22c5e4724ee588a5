"""The page of a selection: what the best of n is worth to the reward and to its judges, and what was kept and mined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.reports.charts import Series, line_chart
from align.reports.page import render
from align.reports.scores import thumbnail
from align.tracking import replace_text

Row = dict[str, Any]
FEW = 20
"""Prompts below which a bootstrap of them is too narrow."""


def write_page(folder: str | Path) -> Path:
    """Write `report.html` into a folder that `align select` filled, and return its path.

    Raises:
        ConfigError: not such a folder.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("This is no folder of `align select`", where=str(folder), why=str(error)) from error
    points = found["curve"]["points"]
    charts = [("The reward that ranks", found["by"], best_of_chart(points, [(found["by"], None)]))]
    for name in found["curve"]["judges"]:
        charts.append(("A judge of the same candidates", name, best_of_chart(points, [(name, name)], colour=1)))
    images = found["kind"] == "images"
    for row in found["examples"]:
        both = [(word, row[word]) for word in ("best", "worst")]
        row["shown"] = [(word, it, thumbnail(Path(it["output"])) if images else None) for word, it in both]
    context = {**found, "name": folder.name, "charts": charts, "reading": reading(found)}
    path = folder / "report.html"
    replace_text(path, render("selection.html", context))
    return path


def best_of_chart(points: Sequence[Row], lines: Sequence[tuple[str, str | None]], *, colour: int | None = None) -> Any:
    """Draw expected scores of the best of n over n; a line is its name and the judge it is of, None the reward."""
    series = []
    for i, (label, judge) in enumerate(lines):
        values = [p["reward"] if judge is None else p["judges"][judge] for p in points]
        columns = ([v[key] for v in values] for key in ("mean", "ci_low", "ci_high"))
        hue = i if colour is None else colour
        series.append(Series(label, [p["n"] for p in points], *columns, sparse=True, colour=hue))
    return line_chart(series, x_label="best of n")


def reading(found: Row) -> list[str]:
    """Return what the numbers say, in sentences."""
    curve, said, most = found["curve"], [], found["curve"]["n_max"]
    if most > 1:
        first, last = (curve["points"][i]["reward"]["mean"] for i in (0, -1))
        said.append(
            f"The best of {most} scores {last:.4g} on average, one candidate {first:.4g}, at a distance of at most "
            f"{curve['points'][-1]['kl_bound']:.2f} nats from the model."
        )
    said += [_verdict(name, verdict, most) for name, verdict in curve["judges"].items() if most > 1]
    if not curve["judges"]:
        said.append(
            "No judge looked on. Name one with --judge or heldout_rewards: the reward's own rise proves nothing."
        )
    elif curve["prompts"] < FEW:
        said.append(f"{curve['prompts']} prompts are few: intervals of fewer than {FEW} are too narrow to rely on.")
    if found["missing"]:
        said.append(f"{found['missing']} candidates have no score; none of them was kept, and none counts as low.")
    if shared := found["prompts_whose_best_is_shared"]:
        said.append(f"For {shared} prompts several candidates share the highest score; the first is taken.")
    if len(found["policies"]) > 1:
        said.append(f"Candidates of {', '.join(found['policies'])} are ranked together: the KL is of none of them.")
    return said


def _verdict(name: str, verdict: Row, most: int) -> str:
    gain = verdict["gain"]
    told = f"{gain['mean']:+.3g} ({gain['ci_low']:+.3g} to {gain['ci_high']:+.3g})"
    if gain["ci_high"] < 0:
        return f"{name} falls from one candidate to the best of {most}: {told}. Do not select by this reward."
    if verdict["over_optimised"]:
        return (
            f"{name} is highest at the best of {verdict['peak']} and falls by {-verdict['after_peak']['mean']:.3g} "
            f"from there to the best of {most}: beyond it the reward is selected against the judge. Sample no more."
        )
    if gain["ci_low"] > 0:
        return f"{name}, which did not rank, rises with it: {told} from one candidate to the best of {most}."
    return f"Whether {name} gains cannot be told: {told}. More prompts would tell."
