"""The page of the demo: what happened from thumbs to receipt, a picture a chapter, and links to every report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from align.reports.charts import Series, line_chart
from align.reports.dots import Dot, Place, dot_chart, matrix_chart, scatter, share_bar
from align.reports.page import image_uri, load_sheet, render
from align.reports.runfiles import Row
from align.tracking import read_jsonl, replace_text

_ENLARGED = 64
_LEARNT = {"reward": "what is trained on", "heldout": "the jury and another judge of legibility"}


def write_index(folder: str | Path) -> Path:
    """Write `report.html` from `story.json`, `summary.json` and the images of a demo, and return its path."""
    folder = Path(folder)
    story, summary = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("story.json", "summary.json")
    )
    page = folder / "report.html"
    replace_text(page, render("demo.html", _context(folder, story, summary)))
    return page


def _context(folder: Path, story: Row, summary: Row) -> Row:
    evaluations = read_jsonl(folder / "run" / "evaluation.jsonl")[0]
    sheets = [load_sheet(folder / name / "grid.png", step) for step, name in enumerate(("before", "after"))]
    wins = story["win_rate"]
    return {
        "story": story,
        "summary": summary,
        "liked": {
            title: _strip([folder / path for path in story[key]])
            for title, key in (("most thumbs up", "most_liked"), ("most thumbs down", "least_liked"))
        },
        "reactions": share_bar(
            [
                ("said nothing", story["shown"] - story["thumbs"], 6),
                ("thumb up", story["up"], 2),
                ("thumb down", story["thumbs"] - story["up"], 5),
            ]
        ),
        "consistency": matrix_chart(story["consistency"]["matrix"], *(("equal", "first", "second"),) * 2),
        "learnt": scatter(
            [Place("", (x, None, None), (y, None, None)) for x, y in story["points"]],
            x_label="what people like, which is hidden (standard deviations)",
            y_label="what the reward says",
        ),
        "training": line_chart(
            [
                Series(
                    words,
                    [row["step"] for row in evaluations],
                    [row[key]["mean"] - evaluations[0][key]["mean"] for row in evaluations],
                    sparse=True,
                )
                for key, words in _LEARNT.items()
            ],
            from_zero=True,
        ),
        "sheets": sheets if all(sheets) else [],
        "wins": dot_chart(
            [
                Dot(
                    f"by {name}", wins[name]["rate"], *wins[name]["wilson"], note=f"{wins[name]['n']} prompts", colour=i
                )
                for i, name in enumerate(("ratings", "rankings"))
            ],
            low=0,
            high=1,
            share=True,
            reference=(0.5, "no difference"),
        ),
        "moved": dot_chart(_moved(story["sparsity"]), low=0, high=1, share=True, left=250),
        "judged": wins["ratings"]["n"],
    }


def _moved(receipt: Row) -> list[Dot]:
    rows = []
    for view in receipt.get("views") or []:
        form = view.get("compared_in") or view.get("dtype")
        for i, (key, words) in enumerate(
            (("bit_identical", "unchanged"), ("expected_bit_identical_if_dense", "if every weight had moved"))
        ):
            rows.append(Dot(f"{form}: {words}", view[key], colour=i))
    return rows


def _strip(files: Sequence[Path]) -> Markup:
    """Return images side by side, enlarged, as one picture."""
    from PIL import Image

    made = Image.new("RGB", (len(files) * (_ENLARGED + 4), _ENLARGED), "white")
    for i, file in enumerate(files):
        with Image.open(file) as opened:
            small = opened.convert("RGB").resize((_ENLARGED, _ENLARGED), Image.Resampling.NEAREST)
        made.paste(small, (i * (_ENLARGED + 4), 0))
    return Markup(f'<img src="{image_uri(made)}" alt="">')
