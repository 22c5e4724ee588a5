"""The page of a table of scores: how each reward spreads, its best and its worst, and what is missing and why.

Reads the table that `align score` wrote, its journal for what the rewards are, and the images it names.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.images import FORMATS, MOST_PIXELS
from align.reports.charts import histogram
from align.reports.page import image_uri, render
from align.scoretable import components_of, read_scores
from align.tracking import read_jsonl

Row = dict[str, Any]
SIDE = 256
"""Longest side of a thumbnail, in pixels."""
SMALL = 96
"""Images up to this side are shown pixel by pixel."""
MOST_MISSING = 100


@dataclass(frozen=True)
class Thumbnail:
    """An image ready for the page; pixelated when it is small."""

    uri: str
    width: int
    height: int
    pixelated: bool


def write_contact_sheet(scores: str | Path, path: str | Path | None = None, *, count: int = 12) -> Path:
    """Write the page of a table of scores and return its path, by default `<scores>.html`.

    Args:
        count: best and worst samples shown of each component.

    Raises:
        DataError: no table of scores.
    """
    scores = Path(scores)
    rows = read_scores(scores)
    path = Path(f"{scores}.html") if path is None else Path(path)
    thumbnails: dict[str, Thumbnail | None] = {}
    rewards = _rewards(scores, rows)
    panels = [_panel(name, rows, rewards.get(name, {}), count, thumbnails) for name in components_of(rows)]
    missing = [row for row in rows if not row.get("valid")]
    context = {
        "name": scores.name, "kind": "images" if any(row.get("image") for row in rows) else "texts", "rows": len(rows),
        "truncated": sum(bool(row.get("truncated")) for row in rows), "panels": panels,
        "missing": missing[:MOST_MISSING], "missing_count": len(missing),
        "reasons": Counter(str(row.get("error")) for row in missing).most_common(8),
        "rewards": list({r["identity"]: r for r in rewards.values()}.values()),
    }  # fmt: skip
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(render("scores.html", context), encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def _rewards(scores: Path, rows: Sequence[Row]) -> dict[str, Row]:
    """Return what the journal says of the reward behind each component, of those whose identity the table has."""
    used = {part for row in rows for part in str(row.get("identity") or "").split("+")}
    noted = [row["reward"] for row in read_jsonl(f"{scores}.journal.jsonl")[0] if isinstance(row.get("reward"), dict)]
    found = [reward for reward in noted if reward.get("identity") in used]
    return {name: reward for reward in found for name in reward.get("components") or ()}


def _panel(
    name: str, rows: Sequence[Row], reward: Row, count: int, thumbnails: dict[str, Thumbnail | None]
) -> dict[str, Any]:
    """Return what the page shows of one component."""
    ranked = sorted((row for row in rows if row.get(name) is not None), key=lambda row: -row[name])
    values = [row[name] for row in ranked]
    best, worst = ranked[:count], ranked[len(ranked) - count :][::-1]
    whole = len(ranked) <= 2 * count
    judged = reward.get("direction", "higher") != "none"
    words = ("Best", "Worst") if judged else ("Highest", "Lowest")
    groups = [("All, the highest first", ranked)] if whole else [(words[0], best), (words[1], worst)]
    others = [other for other in components_of(rows) if other != name]
    return {
        "name": name, "reward": reward, "n": len(values), "missing": len(rows) - len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values) if values else None,
        "low": values[-1] if values else None, "high": values[0] if values else None,
        "chart": histogram(values, marks=[("median", statistics.median(values))] if values else []),
        "groups": [
            (title, [_card(row, name, others, thumbnails, rank(i)) for i, row in enumerate(part)])
            for title, part, rank in _ranks(groups, len(ranked)) if part
        ],
    }  # fmt: skip


def _ranks(groups: Sequence[tuple[str, Sequence[Row]]], total: int) -> list[tuple[str, Sequence[Row], Any]]:
    """Say what place each row of a group has: from the top in the first, from the bottom in the second."""
    steps = [lambda i: i + 1, lambda i: total - i]
    return [(title, part, step) for (title, part), step in zip(groups, steps, strict=False)]


def _card(
    row: Row, name: str, others: Sequence[str], thumbnails: dict[str, Thumbnail | None], rank: int
) -> dict[str, Any]:
    image = row.get("image")
    if image and image not in thumbnails:
        thumbnails[image] = thumbnail(Path(image))
    return {
        "rank": rank, "score": row[name], "prompt": row.get("prompt"), "completion": row.get("completion"),
        "file": Path(image).name if image else "", "image": thumbnails[image] if image else None,
        "others": [(other, row.get(other)) for other in others], "truncated": row.get("truncated"),
    }  # fmt: skip


def thumbnail(path: Path) -> Thumbnail | None:
    """Return a small copy of an image, None when it can no longer be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                return None
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    pixelated = max(image.size) <= SMALL
    image.thumbnail((SIDE, SIDE))
    return Thumbnail(image_uri(image, largest_png=20_000), image.width, image.height, pixelated)
