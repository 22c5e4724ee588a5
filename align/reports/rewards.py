"""The page of an evaluation of rewards: on feedback, or on a benchmark's scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.reports.fit import reliability_plot
from align.reports.page import render


def write_evaluation(found: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of what `align evaluate` found of rewards, and return its path.

    Args:
        found: of `rewards.on_feedback.evaluate_rewards` or of `rewards.rewardbench`.
    """
    path = Path(path)
    plots = {}
    for reward in found.get("rewards", ()):
        bins = reward.get("thumbs", {}).get("reliability")
        plots[reward["name"]] = reliability_plot(bins) if bins else Markup()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(render("rewards.html", {"found": found, "plots": plots}), encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path
