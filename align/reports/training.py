"""The page of a training run: what improved, what it cost, and whether to believe it.

Reads the files of the run folder and nothing else, so it can be written at any time, anywhere, of a
run that is complete, stopped or dead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import AlignError, ConfigError
from align.guards import FIRST_RATIO_TOLERANCE
from align.reports.charts import Series, line_chart, stacked_chart
from align.reports.glossary import CHARTS, explain
from align.reports.page import Sheet, finite, load_sheet, percent, render
from align.reports.verdict import DIVERSITY_KEPT, judge, outcome
from align.textfiles import parse_yaml
from align.tracking import read_jsonl

SHEETS = 12
LEVELS = ("alarm", "warning", "note")
PHASES = ("rollout", "decode", "reward", "train", "optimizer", "log")

Row = dict[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder from the files there, and return its path.

    Raises:
        ConfigError: not a run folder.
    """
    files = read_run(run_dir)
    path = files.directory / "report.html"
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(render("training.html", _context(files)), encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


@dataclass
class RunFiles:
    """What a run folder holds, as far as it can be read; `notes` says what could not."""

    directory: Path
    record: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    warnings: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    config: list[Row] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(run_dir: str | Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ConfigError: no folder, or none of run.json, config.yaml and metrics.jsonl in it.
    """
    files = RunFiles(Path(run_dir))
    if not any((files.directory / name).is_file() for name in ("run.json", "config.yaml", "metrics.jsonl")):
        there = files.directory.is_dir()
        why = "it has no run.json, config.yaml or metrics.jsonl" if there else "there is no such folder"
        raise ConfigError("This is not a run folder", where=str(run_dir), why=why)
    files.record = _json(files, "run.json")
    files.summary = _json(files, "summary.json") if (files.directory / "summary.json").is_file() else {}
    files.metrics = _by_step(_jsonl(files, "metrics.jsonl"))
    files.evaluations = _by_step(_jsonl(files, "evaluation.jsonl"))
    files.warnings = [
        {**row, "level": row.get("level") if row.get("level") in LEVELS else "note"}
        for row in _jsonl(files, "warnings.jsonl")
    ]
    files.config = _config(files)
    files.sheets = _sheets(files)
    prompts = _json(files, "samples/prompts.json").get("prompts") if files.sheets else []
    files.prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    return files


def _json(files: RunFiles, name: str) -> Row:
    try:
        found = json.loads((files.directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        files.notes.append(f"{name} is missing or cannot be read.")
        return {}
    return found


def _jsonl(files: RunFiles, name: str) -> list[Row]:
    rows, bad = read_jsonl(files.directory / name)
    if bad:
        lines, verb = ("lines", "are") if bad > 1 else ("line", "is")
        files.notes.append(f"{bad} {lines} of {name} could not be read and {verb} left out.")
    return rows


def _by_step(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in order of their step; of two at one step the later."""
    found = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [found[step] for step in sorted(found)]


def _config(files: RunFiles) -> list[Row]:
    """Return key, value and origin of every leaf of config.yaml."""
    path = files.directory / "config.yaml"
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), "config.yaml")
    except (OSError, ValueError, AlignError):
        files.notes.append("config.yaml is missing or cannot be read.")
        return []
    return [
        {"key": key, "value": json.dumps(value, ensure_ascii=False), "origin": document.comments.get(key, "")}
        for key, value in _leaves(document.value, "")
    ]


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(str(i), part) for i, part in enumerate(value)]
    else:
        return [(key, value)]
    return [leaf for name, part in parts for leaf in _leaves(part, f"{key}.{name}" if key else name)]


def _sheets(files: RunFiles) -> list[Sheet]:
    """Return the contact sheets in order, thinned to `SHEETS`, first and last kept."""
    found = {}
    for path in (files.directory / "samples").glob("step_*.png"):
        if match := re.fullmatch(r"step_(\d+)\.png", path.name):
            found[int(match[1])] = path
    steps = sorted(found)
    if len(steps) > SHEETS:
        steps = [steps[round(i * (len(steps) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    loaded = [(step, load_sheet(found[step], step)) for step in steps]
    files.notes += [f"samples/{found[step].name} is not a readable image." for step, sheet in loaded if sheet is None]
    return [sheet for _, sheet in loaded if sheet is not None]


def _context(files: RunFiles) -> Row:
    last = files.metrics[-1] if files.metrics else {}
    found = outcome(files.summary, files.evaluations)
    cost = _cost(files)
    heldout = _described(files, "heldout_rewards")
    has_heldout = bool(heldout) or "heldout_rewards" not in files.record
    return {
        "files": files,
        "run": files.record,
        "name": str(files.record.get("name") or files.directory.resolve().name),
        "about": next((json.loads(r["value"]) for r in files.config if r["key"] == "about"), ""),
        "last": last,
        "outcome": found,
        "verdict": judge(found, files.warnings, files.record, cost, has_heldout=has_heldout),
        "cost": cost,
        "charts": _charts(files),
        "phases": _phases(files.metrics),
        "phase_chart": _phase_chart(files.metrics),
        "components": _components(files.evaluations),
        "ledger": _ledger(files, last),
        "rewards": _described(files, "rewards"),
        "heldout_rewards": heldout,
        "glossary": [{"key": key, "value": last[key], "text": explain(key)} for key in last],
        "levels": LEVELS,
        "long_prompts": any(len(prompt) > 60 for prompt in files.prompts),
    }


def _described(files: RunFiles, key: str) -> list[Row]:
    found = files.record.get(key)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _cost(files: RunFiles) -> Row:
    """Return what the whole run took; its summary, which counts the final evaluation, goes before the last step."""
    last, summary = files.metrics[-1] if files.metrics else {}, files.summary
    ledger = files.record.get("ledger")
    errors = [e for e in _column(files.metrics, "first_ratio_error") if e is not None]
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


def _column(rows: list[Row], key: str) -> list[float | None]:
    return [finite(row.get(key)) for row in rows]


def _curve(
    rows: list[Row], key: str, name: str = "", band: tuple[str, str] | None = None, colour: int | None = None
) -> Series:
    low, high = (_column(rows, band[0]), _column(rows, band[1])) if band else ((), ())
    return Series(name or key, [row["step"] for row in rows], _column(rows, key), low, high, colour=colour)


def _points(rows: list[Row], paths: Sequence[tuple[str, ...]], name: str, colour: int | None = None) -> Series:
    """A curve over evaluations: of the first of `paths` a row has, an estimate {mean, ci_low, ci_high} or a number."""
    found = [_estimate(next((v for path in paths if (v := _at(row, path)) is not None), None)) for row in rows]
    mean, low, high = ([finite(value.get(part)) for value in found] for part in ("mean", "ci_low", "ci_high"))
    return Series(name, [row["step"] for row in rows], mean, low, high, sparse=True, colour=colour)


def _at(row: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _estimate(value: Any) -> Row:
    return value if isinstance(value, dict) else {"mean": value}


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
    values = {row["key"]: json.loads(row["value"]) for row in files.config}
    dtype = values.get("model.dtype")
    dtype = dtype if dtype in FIRST_RATIO_TOLERANCE else "fp32"
    ledger = files.record.get("ledger")
    dim = finite(ledger.get("latent_dim")) if isinstance(ledger, dict) else None
    scale = dim if dim and values.get("objective.logprob_reduction") == "sum" else 1.0
    return FIRST_RATIO_TOLERANCE[dtype] * scale, f"tolerance in {dtype}"


def _least_diversity(evaluations: list[Row]) -> tuple[float, str] | None:
    base = finite(evaluations[0].get("diversity")) if evaluations and evaluations[0]["step"] == 0 else None
    return None if base is None else (DIVERSITY_KEPT * base, f"{percent(DIVERSITY_KEPT, 0)} of the base model's")


def _charts(files: RunFiles) -> list[Row]:
    """Return the charts that have something to draw, with the sentences of the glossary."""
    rows, evaluations = files.metrics, files.evaluations
    trained = [key for key in dict.fromkeys(k for row in rows for k in row) if re.fullmatch(r"reward/.+/mean", key)]
    reward_band = ("reward_ci_low", "reward_ci_high")
    ratio = _curve(rows, "first_ratio_error", "max |ratio − 1|")
    clipped = [_curve(rows, "clip_share_low", "low"), _curve(rows, "clip_share_high", "high")]
    accuracy = _points(evaluations, [("heldout_accuracy",), ("accuracy",)], "held-out accuracy", 6)
    spread = _points(evaluations or rows, [("diversity",)], "within-prompt pixel deviation", 3)
    heldout = [
        _points(evaluations, [("components", name)], name.removeprefix("heldout/"))
        for name in _component_names(evaluations, "heldout")
    ]
    drawn = {
        "Reward in training": line_chart(
            [
                _curve(rows, "reward", "rollouts", reward_band, 0),
                _points(evaluations, [("reward",)], "held-out prompts", 1),
            ]
        ),
        "Held-out reward": line_chart([_points(evaluations, [("heldout",)], "held-out reward", 2)]),
        "Trained rewards, one by one": line_chart([_curve(rows, key, key[7:-5]) for key in trained]),
        "Held-out rewards, one by one": line_chart(heldout),
        "Held-out accuracy": line_chart([accuracy], percent=True),
        "First ratio error": line_chart([ratio], log=True, reference=_tolerance(files)),
        "Clipped terms": line_chart(clipped, percent=True, from_zero=True),
        "Distance moved in a step": line_chart([_curve(rows, "approx_kl", "approximate KL", colour=4)], from_zero=True),
        "Gradient norm": line_chart([_curve(rows, "grad_norm", "gradient norm", colour=5)], from_zero=True),
        "Diversity": line_chart([spread], from_zero=True, reference=_least_diversity(evaluations)),
        "Image meters": line_chart(_meters(evaluations), reference=(1.0, "before training")),
    }
    return [{"title": title, "text": CHARTS[title], "svg": svg} for title, svg in drawn.items() if svg]


def _phases(rows: list[Row]) -> list[Row]:
    """Return seconds and share of the wall clock by phase, and what no phase accounts for."""
    total = sum(v for v in _column(rows, "seconds") if v is not None)
    sums = {name: sum(v for v in _column(rows, f"time/{name}") if v is not None) for name in PHASES}
    found: list[Row] = [
        {"name": name, "seconds": value, "text": explain(f"time/{name}")} for name, value in sums.items() if value
    ]
    rest = total - sum(sums.values())
    if found and total and rest > 0.001 * total:
        found.append({"name": "rest", "seconds": rest, "text": "Set-up, the evaluation before training, checkpoints."})
    whole = sum(row["seconds"] for row in found)
    return [{**row, "share": row["seconds"] / whole} for row in found]


def _phase_chart(rows: list[Row]) -> Any:
    series = [_curve(rows, f"time/{name}", name) for name in PHASES]
    return stacked_chart([s for s in series if any(s.y)], unit=" s")


def _components(evaluations: list[Row]) -> list[Row]:
    """Return before, after and change of every component measured at the first and the last evaluation."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for group, kind in (("heldout", "held out"), ("reward", "trained")):
        for name in _component_names(evaluations, group):
            before, after = (_at(e, ("components", name)) for e in (first, last))
            a, b = (finite(_estimate(e).get("mean")) for e in (before, after))
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
    samples = sum(v for v in _column(files.metrics, "samples") if v is not None)
    total = finite(last.get("feq_total"))
    times = [v for phase in ("rollout", "train") for v in _column(files.metrics, f"time/{phase}") if v is not None]
    rate = total / sum(times) if total and sum(times) else None
    terms = {
        "rollout": rollout,
        "trained": trained,
        "whole": whole,
        "k": k,
        "free": finite(ledger.get("free_forwards")),
    }
    return {**ledger, **terms, "samples": samples, "total": total, "rate": rate}
