"""What several RLUF runs traded for what: rewards, judges, length and distance of each arm, and which none other beats.

An arm is on the front where no other arm is at least as good in every reward and in the share that passes all judges,
and better in one of them. That compares means; where intervals overlap, the front may be chance. Length and distance
are shown and decide nothing. Reads the files of run folders and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.registry import suggest
from align.reports.dots import Place, scatter
from align.reports.fit import standalone
from align.reports.page import finite, number, render
from align.reports.runfiles import Row, RunFiles, as_estimate, read_run, setting
from align.tracking import replace_text

PASSES = "judge/all"
_SAME = ("data.path", "data.heldout_fraction", "data.heldout_path", "seed", "evaluation.prompts",
         "evaluation.max_new_tokens", "evaluation.temperature", "model.path")  # fmt: skip
"""Keys of the configuration in which arms must agree, for their held-out answers to be comparable."""


def pareto(runs: Sequence[str | Path]) -> dict[str, Any]:
    """Return the table of arms of runs: the model before training, and the last evaluation of each run.

    Args:
        runs: run folders.

    Returns:
        rewards and judges, the names of the columns; arms, each with name, step, weights, `values` (estimates by
        key of evaluation.jsonl) and front; warnings on what makes them incomparable.

    Raises:
        ConfigError: a folder that is no RLUF run, or one without an evaluation.
    """
    files = [read_run(run) for run in runs]
    for run in files:
        if not run.evaluations or not any(key.startswith("reward/") for key in run.evaluations[-1]):
            raise ConfigError(
                "This run has no evaluation of rewards", where=str(run.directory),
                why="its evaluation.jsonl says nothing of them" if run.evaluations else "it has no evaluation yet",
                do="Give folders of `align train` with trainer: rluf and evaluation.prompts above 0",
            )  # fmt: skip
    keys = list(dict.fromkeys(key for run in files for key in run.evaluations[-1]))
    rewards = [key.partition("/")[2] for key in keys if key.startswith("reward/")]
    judges = [key.partition("/")[2] for key in keys if key.startswith("judge/") and key != PASSES]
    first = files[0].evaluations[0]
    arms = [_arm("before training", first, {})] if first.get("step") == 0 else []
    arms += [_arm(_name(run, files), run.evaluations[-1], _weights(run)) for run in files]
    objectives = [*(f"reward/{name}" for name in rewards), PASSES]
    for arm in arms:
        arm["front"] = not any(_beats(other, arm, objectives) for other in arms if other is not arm)
    return {"rewards": rewards, "judges": judges, "arms": arms, "warnings": _differences(files)}


def _arm(name: str, row: Row, weights: Row) -> dict[str, Any]:
    values = {key: as_estimate(value) for key, value in row.items() if key not in ("step", "n", "seconds")}
    return {"name": name, "step": row.get("step"), "weights": weights, "values": values}


def _name(run: RunFiles, files: Sequence[RunFiles]) -> str:
    name = run.directory.resolve().name
    same = sum(other.directory.resolve().name == name for other in files)
    return name if same == 1 else str(run.directory)


def _weights(run: RunFiles) -> Row:
    rewards = run.record.get("rewards")
    found = rewards.items() if isinstance(rewards, dict) else ()
    return {name: said.get("weight") for name, said in found if isinstance(said, dict) and said.get("role") != "gate"}


def _beats(one: Row, other: Row, keys: Sequence[str]) -> bool:
    """Whether `one` is at least as good in every key and better in one; what is not measured beats nothing."""
    pairs = [(_mean(one, key), _mean(other, key)) for key in keys]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return len(known) == len(pairs) and all(a >= b for a, b in known) and any(a > b for a, b in known)


def _mean(arm: Row, key: str) -> float | None:
    return finite(arm["values"].get(key, {}).get("mean"))


def _differences(files: Sequence[RunFiles]) -> list[str]:
    """Return a sentence on everything that keeps the arms from being compared."""
    found, first = [], files[0]
    for run in files:
        if run.record.get("status") not in ("complete", None):
            found.append(f"{run.directory} is {run.record.get('status')}: its last evaluation stands for it.")
        for key in _SAME:
            if (there := setting(run, key)) != (here := setting(first, key)):
                found.append(f"{run.directory} has {key} {there!r}, and {first.directory} has {here!r}.")
        if _identities(run) != _identities(first):
            found.append(f"{run.directory} was judged by other rewards than {first.directory}.")
    return found


def _identities(run: RunFiles) -> dict[str, Any]:
    rewards = run.record.get("rewards")
    return {name: said.get("identity") for name, said in rewards.items()} if isinstance(rewards, dict) else {}


def columns(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (key of evaluation.jsonl, heading) of the table's columns."""
    rewards = [(f"reward/{name}", name) for name in found["rewards"]]
    judges = [(f"judge/{name}", name) for name in found["judges"]]
    return [*rewards, *judges, (PASSES, "all judges"), ("answer_tokens", "tokens"), ("kl", "KL")]


def as_text(found: dict[str, Any]) -> str:
    """Return the table as text, a star before what is on the front."""
    wanted = columns(found)
    rows = [["", "arm", *(heading for _, heading in wanted)]]
    rows += [
        ["*" if arm["front"] else "", arm["name"], *(number(_mean(arm, key)) for key, _ in wanted)]
        for arm in found["arms"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [(cell.ljust if i < 2 else cell.rjust)(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(f"warning: {text}" for text in found["warnings"])])


def require_axes(found: Mapping[str, Any], x: str | None, y: str | None) -> list[str]:
    """Return the rewards of the plot's y and x axis: those asked for, or the first two.

    Raises:
        ConfigError: one that is no reward of the runs.
    """
    names = found["rewards"]
    axes = [y or names[0], x or names[min(1, len(names) - 1)]]
    for name in axes:
        if name not in names:
            raise ConfigError(f"The runs have no reward {name!r}", where="axis", do=suggest(name, names))
    return axes


def write_pareto(
    runs: Sequence[str | Path], out: str | Path = "pareto.html", *, x: str | None = None, y: str | None = None
) -> dict[str, Any]:
    """Write the page of several runs to `out`, and its plot as an SVG beside it; return the table of `pareto`.

    Args:
        runs: run folders.
        out: the page.
        x, y: the rewards of the plot's axes; the second and the first when None.

    Raises:
        ConfigError: see `pareto`; or an axis that is no reward of the runs.
    """
    found = pareto(runs)
    axes = require_axes(found, x, y)
    plot = scatter(_places(found, *axes), x_label=axes[1], y_label=axes[0])
    wanted, page, drawing = columns(found), Path(out), Path(out).with_suffix(".svg")
    page.parent.mkdir(parents=True, exist_ok=True)
    table = [{**arm, "cells": [arm["values"].get(key, {}) for key, _ in wanted]} for arm in found["arms"]]
    headings = [heading for _, heading in wanted]
    context = {**found, "arms": table, "headings": headings, "plot": plot}
    replace_text(page, render("pareto.html", context))
    if plot:
        replace_text(drawing, standalone(plot))
    return {**found, "page": str(page), "plot": str(drawing)}


def _places(found: dict[str, Any], y: str, x: str) -> list[Place]:
    places = []
    for arm in found["arms"]:
        parts = []
        for key in (f"reward/{x}", f"reward/{y}"):
            value = arm["values"].get(key, {})
            mean = finite(value.get("mean"))
            parts.append(None if mean is None else (mean, finite(value.get("ci_low")), finite(value.get("ci_high"))))
        if parts[0] is not None and parts[1] is not None:
            places.append(Place(arm["name"], parts[0], parts[1], arm["front"]))
    return places
