"""Actions of `align feedback` that need rooms above its own: reports, judges, and models' prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.output import dry, give


def feedback(options: argparse.Namespace) -> int:
    """Refuse `align feedback` without an action."""
    raise ConfigError("`align feedback` needs an action", do="See `align feedback --help`")


def _report(options: argparse.Namespace) -> int:
    from align.feedback.store import Store
    from align.reports.feedback import page_of, write_report

    if options.dry_run:
        Store.open(options.store, create=False).close()
        return dry(options, "report", {"store": str(options.store), "page": str(page_of(options.store, options.out))})
    path, found = write_report(
        options.store, options.out, quality=options.quality, outcome=options.outcome, draws=options.draws,
        seed=options.seed,
    )  # fmt: skip
    return give(options, {"report": str(path), **found}, str(path))


def _annotate(options: argparse.Namespace) -> int:
    from align.feedback.commands.annotate import run

    return run(options, _local_judge)


def _match(options: argparse.Namespace) -> int:
    from align.feedback.commands.matching import run
    from trainers.prompt_matching import match_file

    return run(options, match_file)


def _local_judge(options: argparse.Namespace) -> tuple[Any, str]:
    """Return the judge of --model and its identity; only look at the folder with --dry-run."""
    try:
        from rewards.judge import LocalJudge, read_judge
        from rewards.placement import Placement
    except ModuleNotFoundError as error:
        raise ConfigError("A local model needs more packages", why=str(error)) from error
    if options.dry_run:
        Placement(dtype=options.dtype)
        if Path(options.model).expanduser().is_dir():  # anything else would be fetched
            read_judge(options.model)
        return None, ""
    judge = LocalJudge(options.model, dtype=options.dtype, max_new_tokens=options.max_new_tokens)
    return judge, judge.identity()


def feedback_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `align feedback`."""
    from align.feedback.commands import add_commands

    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    add_commands(actions)
    actions.choices["report"].set_defaults(run=_report)
    actions.choices["annotate"].set_defaults(run=_annotate)
    actions.choices["match-prompts"].set_defaults(run=_match)
