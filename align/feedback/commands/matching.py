"""`align feedback match-prompts`: weights of thumbs down that make their prompts look like those of thumbs up."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.output import (
    add_dry_run,
    add_json,
    add_out,
    add_overwrite,
    add_seed,
    dry,
    finite,
    give,
    number,
    positive,
    table,
)  # fmt: skip

EXAMPLES = """examples:
  align feedback match-prompts thumbs.jsonl --out matched.jsonl
  align feedback match-prompts thumbs.parquet --out matched.parquet --model models/encoder --seed 1"""


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `match-prompts`."""
    parser = actions.add_parser(
        "match-prompts", help="weigh thumbs down so that their prompts match those of thumbs up", epilog=EXAMPLES,
        description="Add the column udm_weight to a file of thumbs, and write a receipt beside it.",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="DATA", help="JSONL, CSV or Parquet that kto and bco train on")
    add_out(parser, "the rows, in the same format", required=True)
    parser.add_argument(
        "--model", metavar="MODEL", help="embed prompts with this transformers model (default: bags of words)"
    )
    parser.add_argument(
        "--sample", type=positive, default=1024, metavar="N", help="rows of each class to fit on (default: 1024)"
    )
    parser.add_argument("--low", type=number, default=0.5, metavar="W", help="least weight (default: 0.5)")
    parser.add_argument("--high", type=number, default=10.0, metavar="W", help="largest weight (default: 10)")
    parser.add_argument(
        "--score-threshold", type=finite, metavar="X", help="rows with a score and no label are up from here on"
    )
    add_seed(parser, 0)
    add_overwrite(parser, "replace the file")
    add_dry_run(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, match: Callable[..., dict[str, Any]] | None = None) -> int:
    """Match, write, and say what the weights are worth.

    Args:
        match: does it, or with `only_check` says what it would do. The command line gives it: this room knows no
            models.
    """
    if match is None:
        raise ConfigError("Matching needs the trainers", do="Use `align feedback match-prompts`")
    call = {
        "model": options.model, "sample": options.sample, "low": options.low, "high": options.high,
        "score_threshold": options.score_threshold, "seed": options.seed, "overwrite": options.overwrite,
    }  # fmt: skip
    found = match(options.source, options.out, **call, only_check=options.dry_run)
    if options.dry_run:
        return dry(options, "match", found)
    return give(options, found, table(_text(found)))


def _text(found: dict[str, Any]) -> list[tuple[str, str]]:
    fitted = found["fitted_on"]
    rows = [
        ("wrote", f"{found['file']}, receipt {found['receipt']}"),
        ("rows", f"{found['rows']} with {found['prompts']} prompts: {found['up']} up, {found['down']} down"),
        ("classifier", f"of {found['embedding']}, fitted on {fitted['up']} up and {fitted['down']} down"),
        ("AUC", f"{found['auc']:.3f} on all rows, {found['auc_heldout']:.3f} on prompts it was not fitted on"),
        (
            "weights",
            f"mean {found['mean_weight']:.3g}, {found['clamped']:.1%} at {found['low']:g} or {found['high']:g}",
        ),
        ("effective", f"{found['effective_rows']:.1f} of {found['down']} rows down"),
    ]
    if found["auc_heldout"] < 0.55:
        rows.append(("note", "up and down have much the same prompts, as far as this tells; matching changes little"))
    return rows
