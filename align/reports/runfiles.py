"""A run folder as far as it can be read, and its columns as curves: what the pages of all trainers start from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.checkpoint import not_a_run
from align.config_sources import leaves
from align.errors import AlignError
from align.reports.charts import Series
from align.reports.glossary import explain
from align.reports.page import Sheet, finite, load_sheet
from align.textfiles import parse_yaml
from align.tracking import read_jsonl

SHEETS = 12
LEVELS = ("alarm", "warning", "note")

Row = dict[str, Any]


@dataclass
class RunFiles:
    """What a run folder holds, as far as it can be read; `notes` says what could not."""

    directory: Path
    record: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    generations: list[Row] = field(default_factory=list)
    warnings: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    sparsity: Row = field(default_factory=dict)
    config: list[Row] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    videos: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(run_dir: str | Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ConfigError: no folder, or none of run.json, config.yaml and metrics.jsonl in it.
    """
    files = RunFiles(Path(run_dir))
    if not any((files.directory / name).is_file() for name in ("run.json", "config.yaml", "metrics.jsonl")):
        raise not_a_run(run_dir, "it has no run.json, config.yaml or metrics.jsonl")
    files.record = _json(files, "run.json")
    files.summary = _json(files, "summary.json") if (files.directory / "summary.json").is_file() else {}
    files.sparsity = _json(files, "sparsity.json") if (files.directory / "sparsity.json").is_file() else {}
    files.metrics = _by_step(_jsonl(files, "metrics.jsonl"))
    files.evaluations = _by_step(_jsonl(files, "evaluation.jsonl"))
    files.generations = _jsonl(files, "generations.jsonl")
    files.warnings = [
        {**row, "level": row.get("level") if row.get("level") in LEVELS else "note"}
        for row in _jsonl(files, "warnings.jsonl")
    ]
    files.config = _config(files)
    files.sheets = _sheets(files)
    prompts = _json(files, "samples/prompts.json").get("prompts") if files.sheets else []
    files.prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    files.videos = _videos(files)
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
        for key, value in leaves(document.value)
    ]


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


def _videos(files: RunFiles) -> list[list[str]]:
    """Return for each prompt its video at the first and the last contact sheet, as paths in the run folder."""
    ends = [sheet.step for sheet in (files.sheets[:1] + files.sheets[1:][-1:])]
    rows = [[f"samples/step_{step:06d}_{i:02d}.mp4" for step in ends] for i in range(len(files.prompts))]
    return rows if rows and all((files.directory / path).is_file() for row in rows for path in row) else []


def column(rows: list[Row], key: str) -> list[float | None]:
    """Return a key of every row, None where it is no finite number."""
    return [finite(row.get(key)) for row in rows]


def curve(
    rows: list[Row], key: str, name: str = "", band: tuple[str, str] | None = None, colour: int | None = None
) -> Series:
    """Return a curve of a key over the step, with the keys of its band's ends."""
    low, high = (column(rows, band[0]), column(rows, band[1])) if band else ((), ())
    return Series(name or key, [row["step"] for row in rows], column(rows, key), low, high, colour=colour)


def points(rows: list[Row], paths: Sequence[tuple[str, ...]], name: str, colour: int | None = None) -> Series:
    """Return a curve over evaluations: of the first of `paths` a row has, an estimate or a number."""
    found = [as_estimate(next((v for path in paths if (v := at(row, path)) is not None), None)) for row in rows]
    mean, low, high = ([finite(value.get(part)) for value in found] for part in ("mean", "ci_low", "ci_high"))
    return Series(name, [row["step"] for row in rows], mean, low, high, sparse=True, colour=colour)


def at(row: Any, path: tuple[str, ...]) -> Any:
    """Return what stands at a path of nested keys, None when nothing does."""
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row


def as_estimate(value: Any) -> Row:
    """Return an estimate as it is, a number as an estimate without an interval."""
    return value if isinstance(value, dict) else {"mean": value}


def trainer_of(files: RunFiles) -> str:
    """Return the training loop that made the run: what run.json says, else config.yaml, else nothing."""
    found = files.record.get("trainer") or setting(files, "trainer")
    return found if isinstance(found, str) else ""


def setting(files: RunFiles, key: str) -> Any:
    """Return a value of config.yaml, None when it has none of that key."""
    return next((json.loads(row["value"]) for row in files.config if row["key"] == key), None)


def page_context(files: RunFiles) -> Row:
    """Return what the page of every run shows: its name, its record, and each number of the last step explained."""
    last, trainer = files.metrics[-1] if files.metrics else {}, trainer_of(files)
    return {
        "files": files,
        "run": files.record,
        "name": str(files.record.get("name") or files.directory.resolve().name),
        "about": setting(files, "about") or "",
        "last": last,
        "glossary": [{"key": key, "value": last[key], "text": explain(key, trainer)} for key in last],
        "levels": LEVELS,
    }


def charts(drawn: Mapping[str, Markup], texts: Mapping[str, str]) -> list[Row]:
    """Return the charts that have something to draw, each with its sentences."""
    return [{"title": title, "text": texts[title], "svg": svg} for title, svg in drawn.items() if svg]
