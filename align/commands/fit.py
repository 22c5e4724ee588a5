"""`align fit`: a reward from what people said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.commands.dry import would
from align.commands.engines import add_engine, end, how_it_ended, launch, require_engine
from align.output import add_config, add_dry_run, add_json, add_out, add_overwrite, add_seed, give, table


def fit(options: argparse.Namespace) -> int:
    """Fit a reward as a config says, or go on with an unfinished fit of the same config."""
    from align.checks import require_valid
    from align.config import load_config
    from align.fit_config import FitConfig

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed], kind=FitConfig)
    out = options.out or Path("runs") / config.name
    again = ["fit", options.config, *options.overrides, *seed, "--out", str(out)]
    again += ["--overwrite"] if options.overwrite else []
    if options.dry_run:
        return would(
            options, config, again, out, f"fit {config.model.backbone} into {out}", overwrite=options.overwrite
        )
    require_valid(config)
    return fit_into(options, config, out, again, overwrite=options.overwrite)


def fit_into(
    options: argparse.Namespace, config: Any, out: Path, again: Sequence[str], *, overwrite: bool = False
) -> int:
    """Fit a reward into a folder, or go on with the one that is there, and write its page.

    Args:
        again: the arguments that do so, for the processes of a launch.
    """
    from align.run import require_directory
    from rewards.fit import fit_reward

    settings = require_engine(options, config)
    if options.launch:
        require_directory(out, config, overwrite=overwrite)
        return launch(options, again, settings, out)
    result = fit_reward(config, out, overwrite=overwrite, deepspeed=options.deepspeed, fsdp=options.fsdp)
    return end(result, lambda: _say(options, result))


def _say(options: argparse.Namespace, result: Any) -> None:
    found: dict[str, Any] = {"directory": str(result.directory), "status": result.status}
    if result.status == "stopped":
        give(options, found, how_it_ended(result))
        return
    from align.reports.training import write_report

    for warning in result.card["warnings"]:
        sys.stderr.write(f"align: Warning: {warning}.\n")
    report = write_report(result.directory)
    found |= {"reward": str(result.directory / "reward"), "report": str(report), "card": result.card}
    give(options, found, _card_text(result.card, result.directory, report))


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align fit`."""
    add_engine(parser)
    add_config(parser, "model.head=mlp steps=500")
    add_overwrite(parser, "start again, replacing the fit in the folder")
    add_out(parser, "the run folder (default: runs/NAME); an unfinished fit there is resumed")
    add_seed(parser)
    add_dry_run(parser)
    add_json(parser)


def plan_fit(config: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what a fit would learn from, and the same as people read it."""
    from align.feedback.overview import plain
    from rewards.fit_data import gate_notes, load_data
    from rewards.fit_split import parts_of
    from rewards.outputs import require_images

    data = load_data(config.data.paths, config.data)
    data, parts, dropped = parts_of(config, data)
    named = {name for rows in parts.values() for row in rows for name in row.items}
    require_images([data.items[name] for name in named], data.folders)
    found: dict[str, Any] = {
        "observations": data.counts(), "parts": {name: len(rows) for name, rows in parts.items()},
        "signals": plain([report.as_dict() for report in data.signals]),
    }  # fmt: skip
    rows = [(kind, str(n)) for kind, n in found["observations"].items()]
    rows += [(name, f"{n} rows") for name, n in found["parts"].items()]
    rows += [("warning", text) for text in gate_notes(data.signals)]
    return {**found, "between_parts": dropped}, rows


def _card_text(card: Mapping[str, Any], directory: Path, report: Path) -> str:
    from align.reports.fit import worth

    return table([*worth(card), ("reward", str(directory / "reward")), ("report", str(report))])
