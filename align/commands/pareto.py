"""`align pareto`: what several RLUF runs traded for what."""

from __future__ import annotations

import argparse
from pathlib import Path

from align.output import add_dry_run, add_json, add_out, dry, give


def pareto(options: argparse.Namespace) -> int:
    """Write the table and the plot of several runs."""
    from align.reports.pareto import as_text, require_axes, write_pareto
    from align.reports.pareto import pareto as read_arms

    out = options.out or Path("pareto.html")
    if options.dry_run:
        require_axes(read_arms(options.runs), options.x, options.y)
        return dry(options, "compare", {"runs": options.runs, "out": str(out)})
    found = write_pareto(options.runs, out, x=options.x, y=options.y)
    return give(options, found, f"{as_text(found)}\npage: {found['page']}, plot: {found['plot']}")


def pareto_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align pareto`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of trainer rluf, an arm each")
    parser.add_argument("--x", metavar="NAME", help="the reward of the plot's x axis (default: the second)")
    parser.add_argument("--y", metavar="NAME", help="the reward of the plot's y axis (default: the first)")
    add_out(parser, "the page (default: pareto.html), with its plot as an SVG beside it")
    add_dry_run(parser)
    add_json(parser)
