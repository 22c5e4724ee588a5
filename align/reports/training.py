"""The page of a training run: what improved, what it cost, and whether to believe it.

Reads the files of the run folder and nothing else, so it can be written at any time, anywhere, of a
run that is complete, stopped or dead.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from align.guards import FIRST_RATIO_TOLERANCE
from align.reports.charts import Series, line_chart, stacked_chart
from align.reports.fit import fit_page
from align.reports.glossary import CHARTS, LANGUAGE_TRAINERS, explain
from align.reports.language import language_context, language_verdict
from align.reports.moved import MOVED_CHARTS, moved_charts, moved_context
from align.reports.page import finite, percent, render
from align.reports.runfiles import (
    Row,
    RunFiles,
    as_estimate,
    at,
    charts,
    column,
    curve,
    page_context,
    points,
    read_run,
    setting,
    trainer_of,
)
from align.reports.verdict import DIVERSITY_KEPT, Verdict, judge, outcome

__all__ = ["charts_of", "read_run", "verdict_of", "write_report"]

PHASES = ("rollout", "decode", "reward", "train", "optimizer", "log")


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder from the files there, and return its path.

    Raises:
        ConfigError: not a run folder.
    """
    files = read_run(run_dir)
    path = files.directory / "report.html"
    temporary = path.with_name(path.name + ".writing")
    trainer = trainer_of(files)
    if trainer == "fit":
        page = fit_page(files)
    elif trainer in LANGUAGE_TRAINERS:
        page = render("language.html", language_context(files))
    else:
        page = render("training.html", _context(files))
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def charts_of(files: RunFiles) -> list[Row]:
    """Return the charts of a run's page that have something to draw: title, text, and the drawing as svg."""
    context = language_context if trainer_of(files) in LANGUAGE_TRAINERS else _context
    found: list[Row] = context(files)["charts"]
    return found


def verdict_of(files: RunFiles) -> Verdict:
    """Return what a run came to: of a language model by its held-out rows, else by its held-out reward."""
    if trainer_of(files) in LANGUAGE_TRAINERS:
        return language_verdict(files)
    has_heldout = bool(_described(files, "heldout_rewards")) or "heldout_rewards" not in files.record
    found = outcome(files.summary, files.evaluations)
    return judge(found, files.warnings, files.record, _cost(files), has_heldout=has_heldout)


def _context(files: RunFiles) -> Row:
    page = page_context(files)
    heldout = _described(files, "heldout_rewards")
    return {
        **page,
        "outcome": outcome(files.summary, files.evaluations),
        "verdict": verdict_of(files),
        "cost": _cost(files),
        "charts": _charts(files),
        "moved": moved_context(files),
        "phases": _phases(files.metrics),
        "phase_chart": _phase_chart(files.metrics),
        "components": _components(files.evaluations),
        "ledger": _ledger(files, page["last"]),
        "rewards": _described(files, "rewards"),
        "heldout_rewards": heldout,
        "long_prompts": any(len(prompt) > 60 for prompt in files.prompts),
    }


def _described(files: RunFiles, key: str) -> list[Row]:
    found = files.record.get(key)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _cost(files: RunFiles) -> Row:
    """Return what the whole run took; its summary, which counts the final evaluation, goes before the last step."""
    last, summary = files.metrics[-1] if files.metrics else {}, files.summary
    ledger = files.record.get("ledger")
    errors = [e for e in column(files.metrics, "first_ratio_error") if e is not None]
    sources = (summary, last, ledger if isinstance(ledger, dict) else {})

    def first(*names: str) -> float | None:
        found = (finite(source.get(name)) for source, name in zip(sources, names, strict=False))
        return next((value for value in found if value is not None), None)

    return {
        "step": last.get("step", 0),
        "first_ratio": max([*errors, *filter(None, [finite(summary.get("first_ratio_error_max"))])], default=None),
        "feq": first("feq_per_sample", "feq_per_sample", "feq_per_sample"),
        "feq_total": finite(last.get("feq_total")),
        "seconds": first("seconds", "seconds_total"),
        "cpu_seconds": first("cpu_seconds", "cpu_seconds_total"),
        "memory": first("peak_memory_mb", "peak_memory_mb"),
    }


def _component_names(rows: list[Row], group: str) -> list[str]:
    found = [row["components"] for row in rows if isinstance(row.get("components"), dict)]
    names = dict.fromkeys(name for components in found for name in components)
    picked = [name for name in names if name.startswith(group + "/")]
    return picked or ([] if group == "reward" else [n for n in names if not n.startswith("reward/")])


def _meters(evaluations: list[Row]) -> list[Series]:
    """Return the mean of every image meter over the steps, in multiples of the first evaluation's."""
    steps = [row["step"] for row in evaluations]
    found = [row["meters"] if isinstance(row.get("meters"), dict) else {} for row in evaluations]
    curves = []
    for name in dict.fromkeys(name for row in found for name in row):
        values = [finite(row.get(name)) for row in found]
        if values[0]:
            relative = [None if v is None else v / values[0] for v in values]
            curves.append(Series(name, steps, relative, (), (), sparse=True))
    return curves


def _tolerance(files: RunFiles) -> tuple[float, str]:
    dtype = setting(files, "model.dtype")
    dtype = dtype if dtype in FIRST_RATIO_TOLERANCE else "fp32"
    ledger = files.record.get("ledger")
    dim = finite(ledger.get("latent_dim")) if isinstance(ledger, dict) else None
    scale = dim if dim and setting(files, "objective.logprob_reduction") == "sum" else 1.0
    return FIRST_RATIO_TOLERANCE[dtype] * scale, f"tolerance in {dtype}"


def _least_diversity(evaluations: list[Row]) -> tuple[float, str] | None:
    base = finite(evaluations[0].get("diversity")) if evaluations and evaluations[0]["step"] == 0 else None
    return None if base is None else (DIVERSITY_KEPT * base, f"{percent(DIVERSITY_KEPT, 0)} of the base model's")


def _charts(files: RunFiles) -> list[Row]:
    """Return the charts that have something to draw, with the sentences of the glossary."""
    rows, evaluations = files.metrics, files.evaluations
    trained = [key for key in dict.fromkeys(k for row in rows for k in row) if re.fullmatch(r"reward/.+/mean", key)]
    reward_band = ("reward_ci_low", "reward_ci_high")
    replayed = rows if trainer_of(files) != "offline" else []
    ratio = curve(replayed, "first_ratio_error", "max |ratio − 1|")
    clipped = [curve(rows, "clip_share_low", "low"), curve(rows, "clip_share_high", "high")]
    accuracy = points(evaluations, [("heldout_accuracy",), ("accuracy",)], "held-out accuracy", 6)
    spread = points(evaluations or rows, [("diversity",)], "within-prompt pixel deviation", 3)
    heldout = [
        points(evaluations, [("components", name)], name.removeprefix("heldout/"))
        for name in _component_names(evaluations, "heldout")
    ]
    drawn = {
        "Reward in training": line_chart(
            [
                curve(rows, "reward", "rollouts", reward_band, 0),
                points(evaluations, [("reward",)], "held-out prompts", 1),
            ]
        ),
        "Held-out reward": line_chart([points(evaluations, [("heldout",)], "held-out reward", 2)]),
        "Held-out rows told apart": line_chart(
            [curve(rows, "correct", "rows in training"), points(evaluations, [("implicit",)], "held-out rows", 1)],
            percent=True,
            reference=(50.0, "chance"),
        ),
        "Errors gained on the reference": line_chart([curve(rows, "error_gain", "all rows"), curve(rows, "z", "z")]),
        "Trained rewards, one by one": line_chart([curve(rows, key, key[7:-5]) for key in trained]),
        "Held-out rewards, one by one": line_chart(heldout),
        "Held-out accuracy": line_chart([accuracy], percent=True),
        "First ratio error": line_chart([ratio], log=True, reference=_tolerance(files)),
        "Clipped terms": line_chart(clipped, percent=True, from_zero=True),
        "Distance moved in a step": line_chart([curve(rows, "approx_kl", "approximate KL", colour=4)], from_zero=True),
        "Gradient norm": line_chart([curve(rows, "grad_norm", "gradient norm", colour=5)], from_zero=True),
        "Diversity": line_chart([spread], from_zero=True, reference=_least_diversity(evaluations)),
        "Hack monitor": line_chart(
            [points(evaluations, [("monitor", "win_rate")], "judge's win rate", 2)],
            percent=True,
            reference=(50.0, "as before training"),
        ),
        "Image meters": line_chart(_meters(evaluations), reference=(1.0, "before training")),
        **moved_charts(rows),
    }
    return charts(drawn, {**CHARTS, **MOVED_CHARTS})


def _phases(rows: list[Row]) -> list[Row]:
    """Return seconds and share of the wall clock by phase, and what no phase accounts for."""
    total = sum(v for v in column(rows, "seconds") if v is not None)
    sums = {name: sum(v for v in column(rows, f"time/{name}") if v is not None) for name in PHASES}
    found: list[Row] = [
        {"name": name, "seconds": value, "text": explain(f"time/{name}")} for name, value in sums.items() if value
    ]
    rest = total - sum(sums.values())
    if found and total and rest > 0.001 * total:
        found.append({"name": "rest", "seconds": rest, "text": "Set-up, the evaluation before training, checkpoints."})
    whole = sum(row["seconds"] for row in found)
    return [{**row, "share": row["seconds"] / whole} for row in found]


def _phase_chart(rows: list[Row]) -> Any:
    series = [curve(rows, f"time/{name}", name) for name in PHASES]
    return stacked_chart([s for s in series if any(s.y)], unit=" s")


def _components(evaluations: list[Row]) -> list[Row]:
    """Return before, after and change of every component measured at the first and the last evaluation."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for group, kind in (("heldout", "held out"), ("reward", "trained")):
        for name in _component_names(evaluations, group):
            before, after = (at(e, ("components", name)) for e in (first, last))
            a, b = (finite(as_estimate(e).get("mean")) for e in (before, after))
            if a is not None and b is not None:
                name = name.removeprefix(group + "/")
                rows.append({"name": name, "kind": kind, "before": before, "after": after, "change": b - a})
    return rows


def _ledger(files: RunFiles, last: Row) -> Row:
    """Return the terms of `F_eq per sample = rollout forwards + trained forwards x k + forwards without gradient`."""
    ledger = files.record.get("ledger")
    if not isinstance(ledger, dict):
        return {}
    rollout, trained, whole = (finite(ledger.get(k)) for k in ("rollout_forwards", "train_forwards", "feq_per_sample"))
    k = finite(ledger.get("k"))
    if k is None and trained and rollout is not None and whole is not None:
        k = (whole - rollout) / trained
    samples = sum(v for v in column(files.metrics, "samples") if v is not None)
    total = finite(last.get("feq_total"))
    times = [v for phase in ("rollout", "train") for v in column(files.metrics, f"time/{phase}") if v is not None]
    rate = total / sum(times) if total and sum(times) else None
    terms = {
        "rollout": rollout,
        "trained": trained,
        "whole": whole,
        "k": k,
        "free": finite(ledger.get("free_forwards")),
    }
    return {**ledger, **terms, "samples": samples, "total": total, "rate": rate}
