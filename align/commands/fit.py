"""`align fit`: a reward from what people said."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.output import INTERRUPTED, add_dry_run, add_json, add_out, add_seed, give, table


def fit(options: argparse.Namespace, launch: Callable[..., int]) -> int:
    """Fit a reward as a config says; `launch` runs `align` in several processes."""
    from align.checks import require_valid
    from align.commands.dry import require_ready
    from align.config import load_config
    from align.fit_config import FitConfig

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed], kind=FitConfig)
    require_valid(config)
    out = options.out or Path("runs") / config.name
    if options.dry_run:
        require_ready(config)
        if options.launch:
            from rewards.fit import require_launchable

            require_launchable(config, options.nproc)
        return give(options, _plan(config, out), _plan_text(config, out))
    again = ["fit", options.config, *options.overrides, *seed, "--out", str(out)]
    again += ["--overwrite"] if options.overwrite else []
    return fit_into(options, config, out, again, launch, overwrite=options.overwrite)


def fit_into(
    options: argparse.Namespace, config: Any, out: Path, again: Sequence[str], launch: Callable[..., int], *,
    overwrite: bool = False,
) -> int:  # fmt: skip
    """Fit a reward into a folder, or go on with the one that is there, and write its page.

    Args:
        again: the arguments that do so, for the processes that `launch` starts.
    """
    from align.launch import leave_world, require_launcher, supervised
    from align.reports.training import write_report
    from align.run import require_directory
    from rewards.fit import fit_reward, require_launchable

    if options.launch:
        require_launcher(options.launch)
        require_launchable(config, options.nproc)
        require_directory(out, config, overwrite=overwrite)
        return launch(options, list(again), out, config)
    result = fit_reward(config, out, overwrite=overwrite, deepspeed=options.deepspeed, fsdp=options.fsdp)
    found: dict[str, Any] = {"directory": str(result.directory), "status": result.status}
    if os.environ.get("RANK", "0") != "0":
        leave_world()  # waits for the process that still writes
        return 0 if supervised() or result.status != "stopped" else INTERRUPTED
    if result.status == "stopped":
        # Who asked a launch to stop reads how it went in run.json; a launcher takes any other code than 0 for a crash.
        give(options, found, f"stopped; `align resume {result.directory}` goes on")
        leave_world()
        return 0 if supervised() else INTERRUPTED
    for warning in result.card["warnings"]:
        sys.stderr.write(f"align: Warning: {warning}.\n")
    report = write_report(result.directory)
    found |= {"reward": str(result.directory / "reward"), "report": str(report), "card": result.card}
    give(options, found, _card_text(result.card, result.directory, report))
    leave_world()
    return 0


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align fit`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe that `align configs list` shows")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change a value, e.g. model.head=mlp steps=500"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing the fit in the folder")
    add_out(parser, "the run folder (default: runs/NAME); an unfinished fit there is resumed")
    add_seed(parser)
    add_dry_run(parser)
    add_json(parser)


def _plan(config: Any, out: Path) -> dict[str, Any]:
    from rewards.fit_data import load_data, split_rows

    data = load_data(config.data.paths, config.data)
    parts, dropped = split_rows(data.rows, config.split, config.seed)
    return {
        "out": str(out), "observations": data.counts(), "parts": {name: len(rows) for name, rows in parts.items()},
        "between_parts": dropped,
    }  # fmt: skip


def _plan_text(config: Any, out: Path) -> str:
    found = _plan(config, out)
    rows = [(kind, str(n)) for kind, n in found["observations"].items()]
    rows += [(name, f"{n} rows") for name, n in found["parts"].items()]
    return f"{table(rows)}\nwould fit {config.model.backbone} into {out}"


def _card_text(card: Mapping[str, Any], directory: Path, report: Path) -> str:
    from align.reports.fit import worth

    return table([*worth(card), ("reward", str(directory / "reward")), ("report", str(report))])
