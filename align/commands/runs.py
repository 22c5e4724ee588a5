"""`align train`, `resume` and `report`: runs in their folders."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.commands.dry import would
from align.commands.engines import add_engine, end, how_it_ended, launch, leads, require_engine
from align.commands.fit import fit_into
from align.commands.peering import peer_into
from align.errors import ConfigError
from align.output import add_config, add_dry_run, add_json, add_out, add_overwrite, add_seed, dry, give, sentence


def train(options: argparse.Namespace) -> int:
    """Train as a config says, or go on with an unfinished run of the same config."""
    from align.checks import require_valid
    from align.config import load_config
    from align.run import require_directory

    if (Path(options.config) / "config.yaml").is_file():
        run = shlex.quote(options.config)
        raise ConfigError("This is a run", where=options.config, do=f"`align resume {run}` goes on with it")
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed])
    if config.trainer in ("fit", "peering"):
        what, verb = "fits a reward" if config.trainer == "fit" else "compares protocols", config.trainer
        raise ConfigError(f"This config {what}", where=options.config, do=f"Run `align {verb} {options.config}`")
    out = options.out or Path("runs") / config.name
    how = {name: getattr(options, name) for name in ("overwrite", "fork")}
    switches = [f"--{name}" for name, given in how.items() if given]
    again = ["train", options.config, *options.overrides, *seed, "--out", str(out), *switches]
    if options.dry_run:
        return would(options, config, again, out, f"train into {out}", **how)
    findings = require_valid(config)
    settings = require_engine(options, config)
    if options.launch:
        require_directory(out, config, **how)
        return launch(options, again, settings, out)
    for finding in findings if leads() else ():
        if finding.level == "warning":
            sys.stderr.write(f"align: Warning: {finding.message}. {sentence(finding.do)}\n")
    return _train_into(options, config, out, **how)


def resume(options: argparse.Namespace) -> int:
    """Go on with an unfinished run, of whatever trainer, as its folder says."""
    folder = options.run_folder
    config, again = run_config(folder), ["resume", str(folder)]
    if options.dry_run:
        end = f" up to step {config.steps}" if getattr(config, "steps", None) else ""
        return would(options, config, again, folder, f"resume {folder}{end}")
    if config.trainer == "fit":
        return fit_into(options, config, folder, again)
    settings = require_engine(options, config)
    if config.trainer == "peering":
        return peer_into(options, config, folder)
    if options.launch:
        return launch(options, again, settings, folder)
    return _train_into(options, config, folder)


def _train_into(options: argparse.Namespace, config: Any, out: Path, **how: bool) -> int:
    from trainers import trainer_for

    engine = {"deepspeed": options.deepspeed, **({"fsdp": True} if options.fsdp else {})}
    result = trainer_for(config, out=out, **how, **engine).train()
    return end(result, lambda: _say(options, result))


def _say(options: argparse.Namespace, result: Any) -> None:
    from align.reports.training import write_report

    report = write_report(result.directory)
    found = {
        "directory": str(result.directory),
        "status": result.status,
        "report": str(report),
        "summary": result.summary,
    }
    moved = (result.summary.get("sparsity") or {}).get("sentence", "")
    give(options, found, "\n".join(filter(None, (how_it_ended(result), moved, f"report: {report}"))))


def report(options: argparse.Namespace) -> int:
    """Write the page of a run again."""
    config = run_config(options.run_folder)
    if options.dry_run:
        return dry(options, "report", {"run": str(options.run_folder)})
    if config.trainer == "peering":
        from align.reports.peering import write_page as write_report
    else:
        from align.reports.training import write_report

    path = write_report(options.run_folder)
    return give(options, {"report": str(path)}, str(path))


def run_config(folder: Path, overrides: Sequence[str] = ()) -> Any:
    """Return the configuration of a run folder, with changes.

    Raises:
        ConfigError: it is none.
    """
    from align.checkpoint import not_a_run
    from align.config import load_config

    if not (folder / "config.yaml").is_file():
        raise not_a_run(folder, "it has no config.yaml")
    return load_config(folder / "config.yaml", overrides)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align train`."""
    add_config(parser, "sampler.eta=0.2 rewards.0.weight=2")
    add_overwrite(parser, "start again, replacing the run in the folder")
    parser.add_argument(
        "--fork", action="store_true", help="go on with the run in the folder under this, changed, configuration"
    )
    add_engine(parser)
    add_out(parser, "the run folder (default: runs/NAME); an unfinished run there is resumed")
    add_seed(parser)
    add_dry_run(parser)
    add_json(parser)


def resume_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align resume`."""
    add_engine(parser)
    report_arguments(parser)


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align report`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    add_dry_run(parser)
    add_json(parser)
