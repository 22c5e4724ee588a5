"""`align peering`: ratings against rankings, from what people said to who wins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.commands.dry import would
from align.commands.engines import end, how_it_ended
from align.output import add_config, add_dry_run, add_json, add_out, add_overwrite, add_seed, give


def peering(options: argparse.Namespace) -> int:
    """Fit a reward to ratings and one to rankings, select with both, and judge both under both protocols."""
    from align.checks import require_valid
    from align.config import load_config
    from align.peering_config import PeeringConfig

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed], kind=PeeringConfig)
    out = options.out or Path("runs") / config.name
    again = ["peering", options.config, *options.overrides, *seed, "--out", str(out)]
    again += ["--overwrite"] if options.overwrite else []
    if options.dry_run:
        return would(options, config, again, out, f"write into {out}", overwrite=options.overwrite)
    require_valid(config)
    return peer_into(options, config, out, overwrite=options.overwrite)


def peer_into(options: argparse.Namespace, config: Any, out: Path, *, overwrite: bool = False) -> int:
    """Compare the protocols in a folder, or go on with what is there, and write its page."""
    from trainers.peering import peer

    result = peer(config, out, overwrite=overwrite, progress=True)
    return end(result, lambda: _say(options, result))


def _say(options: argparse.Namespace, result: Any) -> None:
    found: dict[str, Any] = {"directory": str(result.directory), "status": result.status, **result.found}
    if result.status == "stopped":
        give(options, found, how_it_ended(result))
        return
    from align.reports.peering import reading, write_page

    found["report"] = str(write_page(result.directory))
    give(options, found, "\n".join([*reading(result.found), "", f"report: {found['report']}"]))


def plan_peering(config: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what is compared, and the same as people read it."""
    from align.peering_config import SIMULATED

    found = {"answers": ", ".join(config.data.paths)}
    found["candidates"] = config.selection.candidates or "held-out outputs"
    if config.data.paths == (SIMULATED,):
        found["candidates"] = f"{config.world.candidates} each for {config.world.selected_prompts} new prompts"
    else:
        from trainers.peering import split_prompts

        train, heldout = split_prompts(config, config.data.paths)
        found["prompts"] = f"{len(train)} fitted to, {len(heldout)} held out"
    return found, list(found.items())


def peering_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align peering`, which has no engine to choose."""
    parser.set_defaults(launch=None, deepspeed=None, fsdp=False)
    add_config(parser, "data.paths.0=feedback.db")
    add_overwrite(parser, "start again, replacing what is in the folder")
    add_out(parser, "the run folder (default: runs/NAME); an unfinished one goes on")
    add_seed(parser)
    add_dry_run(parser)
    add_json(parser)
