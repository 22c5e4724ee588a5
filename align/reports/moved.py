"""Which weights a run moved: its receipt and the curves of what was measured while it went on."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from align.reports.charts import line_chart
from align.reports.page import finite
from align.reports.runfiles import Row, RunFiles, curve

MOVED_CHARTS = {
    "Weights that stand still": (
        "Share of the weights with the same bits as before: over one update, over the steps between two measures, and "
        "since the beginning. The last curve is what a dense update of the norm so far would have left: only a share "
        "well above it says that the update was sparse."
    ),
    "Stand still, by the learning rate alone": (
        "What AdamW's steps are to leave since the beginning, a step being about the learning rate: where steps of one "
        "weight cancel and where they agree. Most runs lie between; a lower rate alone raises both."
    ),
}


def moved_charts(rows: list[Row]) -> dict[str, Markup]:
    """Return the drawings by title, empty where nothing was measured while training."""
    measured = [row for row in rows if finite(row.get("sparsity/step")) is not None]

    def share(key: str, name: str, colour: int, **how: Any) -> Any:
        return curve(measured, f"sparsity/{key}", name, colour=colour, **how)

    return {
        "Weights that stand still": line_chart(
            [
                share("step", "one update", 3),
                share("window", "between measures", 2),
                share("cumulative", "since the beginning", 0),
                share("if_dense", "if dense", 1),
            ],
            percent=True,
        ),
        "Stand still, by the learning rate alone": line_chart(
            [
                share("cumulative", "measured", 0),
                share("predicted_cancelling", "if steps cancel", 2),
                share("predicted_agreeing", "if steps agree", 1),
            ],
            percent=True,
        )
        if any("sparsity/predicted_step" in row for row in measured)
        else Markup(""),
    }


def moved_context(files: RunFiles) -> Row:
    """Return what the section on the weights shows: nothing of a run without a receipt."""
    found = files.sparsity
    views = [view for view in _list(found.get("views")) if isinstance(view, dict)]
    if not found or found.get("status") != "measured" or not views:
        return {"why": str(found["why"])} if isinstance(found.get("why"), str) else {}
    predicted = _list(found.get("predicted"))
    rows = []
    for i, view in enumerate(views):
        said = predicted[i] if i < len(predicted) and isinstance(predicted[i], dict) else {}
        rows.append({
            "as": f"{view.get('compared_in') or view.get('dtype')}{'' if view.get('compared_in') else ', as stored'}",
            "view": view, "predicted": said,
        })  # fmt: skip
    modules = views[0].get("modules")
    second = views[1].get("modules") if len(views) > 1 else None
    return {
        "rows": rows, "adapted": found.get("trained") == "adapters", "sentence": str(found.get("sentence") or ""),
        "modules": _modules(modules, second), "other": str(views[-1].get("compared_in") or ""),
        "notes": [str(note) for note in _list(views[0].get("notes"))], "masked": found.get("mask"),
    }  # fmt: skip


def _modules(first: Any, second: Any) -> list[Row]:
    if not isinstance(first, dict):
        return []
    other = second if isinstance(second, dict) else {}
    rows = [{"name": name, "own": row, "other": other.get(name) or {}} for name, row in first.items()
            if isinstance(row, dict)]  # fmt: skip
    return sorted(rows, key=lambda row: -(finite(row["own"].get("parameters")) or 0))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
