"""`align peering`: ratings against rankings, from what people said to who wins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.output import INTERRUPTED, add_dry_run, add_json, add_out, add_seed, give, table


def peering(options: argparse.Namespace) -> int:
    """Fit a reward to ratings and one to rankings, select with both, and judge both under both protocols."""
    from align.checks import require_valid
    from align.config import load_config
    from align.peering_config import SIMULATED, PeeringConfig

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed], kind=PeeringConfig)
    require_valid(config)
    out = options.out or Path("runs") / config.name
    if options.dry_run:
        rows = {"answers": ", ".join(config.data.paths)}
        rows["candidates"] = config.selection.candidates or "held-out outputs"
        if config.data.paths == (SIMULATED,):
            rows["candidates"] = f"{config.world.candidates} each for {config.world.selected_prompts} new prompts"
        else:
            from trainers.peering import split_prompts

            train, heldout = split_prompts(config, config.data.paths)
            rows["prompts"] = f"{len(train)} fitted to, {len(heldout)} held out"
        return give(options, {**rows, "out": str(out)}, f"{table(list(rows.items()))}\nwould write into {out}")
    return peer_into(options, config, out, overwrite=options.overwrite)


def peer_into(options: argparse.Namespace, config: Any, out: Path, *, overwrite: bool = False) -> int:
    """Compare the protocols in a folder, or go on with what is there, and write its page."""
    from align.reports.peering import reading, write_page
    from trainers.peering import peer

    result = peer(config, out, overwrite=overwrite, progress=True)
    found: dict[str, Any] = {"directory": str(result.directory), "status": result.status, **result.found}
    if result.status == "stopped":
        give(options, found, f"stopped; `align resume {result.directory}` goes on")
        return INTERRUPTED
    found["report"] = str(write_page(result.directory))
    return give(options, found, "\n".join([*reading(result.found), "", f"report: {found['report']}"]))


def peering_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align peering`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe that `align configs list` shows")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change a value, e.g. data.paths.0=feedback.db"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing what is in the folder")
    add_out(parser, "the run folder (default: runs/NAME); an unfinished one goes on")
    add_seed(parser)
    add_dry_run(parser)
    add_json(parser)
