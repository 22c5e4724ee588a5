"""`align score`: scores of images or texts of files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.output import (
    add_batch_size,
    add_dry_run,
    add_json,
    add_out,
    add_overwrite,
    add_rewards,
    dry,
    give,
    named_rewards,
    table,
)


def score(options: argparse.Namespace) -> int:
    """Score images or texts of files."""
    from align.commands.dry import require_rewards
    from rewards.scoring import plan_scores, score_files

    rewards = named_rewards(options)
    call = {"prompts": options.prompts, "images": options.images, "image_column": options.image_column}
    call |= {"completion_column": options.completion_column, "overwrite": options.overwrite}
    out = options.out or Path("scores.parquet")
    if options.dry_run:
        require_rewards(rewards)
        return dry(options, "score", plan_scores(rewards, out, **call)[0])
    from align.reports.scores import write_contact_sheet

    found = score_files(rewards, out, **call, batch_size=options.batch_size, progress=True)
    found["page"] = str(write_contact_sheet(out))
    return give(options, found, _scores_text(found))


def _scores_text(found: dict[str, Any]) -> str:
    rows = [("scores", found["out"]), ("page", found["page"])]
    rows.append(("rows", f"{found['rows']}, {found['new_scores']} scores new, {found['seconds']:.3g} s"))
    if found["missing"]:
        rows.append(("missing", f"{found['missing']}, see the column error; the same command tries them again"))
    if found["truncated"]:
        rows.append(("cut short", f"{found['truncated']} prompts or texts are longer than the model reads"))
    for name, e in found["components"].items():
        spread = "no score" if not e["n"] else "{mean:.4g}, from {min:.4g} to {max:.4g}, n {n}".format(**e)
        rows.append((name, spread))
    return table(rows)


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align score`."""
    add_rewards(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help="a txt, JSONL, CSV or Parquet file: a row an image, or completions"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="the images, in the natural order of their names (2 before 10) unless named"
    )
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the prompt table that names them (default: image, if any)"
    )
    parser.add_argument(
        "--completion-column", default="completion", metavar="NAME",
        help="column of the texts, or lists of turns, that text rewards score (default: completion)",
    )  # fmt: skip
    add_batch_size(parser)
    add_overwrite(parser, "start again, forgetting what was scored")
    add_out(parser, "the table: Parquet, CSV or JSONL by its ending (default: scores.parquet), with PATH.html")
    add_dry_run(parser)
    add_json(parser)
