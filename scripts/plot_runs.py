"""Draw charts of runs' pages as one SVG, as the pictures in docs/ are made.

    python scripts/plot_runs.py RUN [RUN ...] PICTURE.svg [--chart TITLE ...]

One run's charts stand in two columns; several runs have a column each, and the same chart in a row. Nothing is drawn
but what the run folders hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from markupsafe import Markup

from align.reports.charts import sheet
from align.reports.training import charts_of, read_run


def picture(runs: list[Path], titles: list[str]) -> str:
    """Return the SVG of these charts; all of them where no title is given.

    Raises:
        SystemExit: a title that none of the runs has a chart of.
    """
    drawn = [(run.absolute().name, {c["title"]: c["svg"] for c in charts_of(read_run(run))}) for run in runs]
    known = list(dict.fromkeys(title for _, found in drawn for title in found))
    if unknown := [title for title in titles if title not in known]:
        raise SystemExit(f"No run has a chart {unknown[0]!r}; there are: {', '.join(known)}")
    several = len(runs) > 1
    panels = [
        (f"{name}: {title}" if several else title, found.get(title, Markup()))
        for title in titles or known
        for name, found in drawn
    ]
    return sheet(panels, columns=len(runs) if several else min(2, len(panels)))


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("--chart", action="append", default=[], metavar="TITLE", help="as the page of a run has it")
    options = parser.parse_args()
    options.picture.write_text(picture(options.runs, options.chart), encoding="utf-8")


if __name__ == "__main__":
    main()
