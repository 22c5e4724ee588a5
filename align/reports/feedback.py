"""The page of a feedback store: who said what, whether they agree, what else decides, and what to do next.

Reads the store's file and nothing else, so it can be written at any time, also while people annotate.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.feedback.overview import FEWEST_SHARED, overview, telling_pairs
from align.feedback.store import Store
from align.reports.advice import advise
from align.reports.dots import Dot, dot_chart, interval_of, matrix_chart, share_bar
from align.reports.page import count, percent, render

Row = dict[str, Any]

LEVELS = {"krippendorff_nominal": "alpha, nominal", "krippendorff_ordinal": "alpha, ordinal"}
LEVELS |= {"krippendorff_interval": "alpha, interval", "fleiss": "Fleiss' kappa"}

BIASES = {
    "p_longer": "the longer one",
    "p_first": "the first shown",
    "p_list": "the one with a list",
    "p_emoji": "the one with emoji",
}


def page_of(store: str | Path, out: str | Path | None = None) -> Path:
    """Return where the page goes: `out`, or beside the store under its name."""
    return Path(out) if out else Path(store).with_suffix(".html")


def write_report(
    store: str | Path, out: str | Path | None = None, *, draws: int = 1000, seed: int = 0, **options: Any
) -> tuple[Path, Row]:
    """Write one self-contained page about a store, and return its path and the numbers on it.

    Args:
        out: the page's file; by default beside the store.
        options: `quality` and `outcome`, see `align.feedback.overview.audit`.

    Raises:
        DataError: no store there, or one that cannot be read.
    """
    path = page_of(store, out)
    with Store.open(store, create=False) as opened:
        events, items = list(opened.current()), opened.items()
    found = overview(events, items, draws=draws, seed=seed, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(render("feedback.html", context(found, Path(store).name)), encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path, found


def context(found: Row, name: str) -> Row:
    """Return what the template shows of an `overview`."""
    return {
        "name": name,
        "found": found,
        "who": found["who"],
        "period": _period(found["who"]),
        "advice": advise(found),
        "tiles": _tiles(found),
        "signals": [_signal(row) for row in found["who"]["signals"]],
        "agreement": [_agreement(signal, entry) for signal, entry in found["agreement"].items()],
        "consistencies": [
            {**one, "key": key}
            for key, compared in {"": found["consistency"], **found["consistency_by_key"]}.items()
            if (one := _consistency(compared))
        ],
        "strengths": _strengths(found["strengths"]),
        "bias": _bias(found["bias"]),
        "exposures": [_exposure(signal, entry) for signal, entry in found["exposures"].items()],
        "people": _people(found["people"]),
        "judges": [_judge(card) for card in found["judges"]],
    }


def _period(who: Row) -> str:
    if who["first_ms"] is None:
        return ""
    days = [
        datetime.datetime.fromtimestamp(who[k] / 1000, datetime.UTC).strftime("%Y-%m-%d")
        for k in ("first_ms", "last_ms")
    ]
    return days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"


def _tiles(found: Row) -> list[Row]:
    who, compared = found["who"], found["consistency"]
    tiles = [
        {"what": "Answers", "big": count(who["answers"]), "note": f"about {count(who['items'])} items"},
        {"what": "Annotators", "big": count(who["annotators"]), "note": f"{count(who['prompts'])} prompts"},
    ]
    first = next(iter(found["agreement"].items()), None)
    if first:
        name, entry = first
        coefficients = entry["coefficients"]
        key = "krippendorff_ordinal" if "krippendorff_ordinal" in coefficients else "krippendorff_nominal"
        value = coefficients[key]["value"]
        tiles.append(
            {"what": "Agreement", "big": "–" if value is None else f"{value:.2f}", "note": f"{LEVELS[key]}, {name}"}
        )
    if compared.get("n"):
        note = f"{count(compared['flips'])} of them contradictions"
        tiles.append({"what": "Inconsistent pairs", "big": percent(compared["inconsistency"]), "note": note})
    for name, entry in list(found["exposures"].items())[:1]:
        rate = entry["coverage"]["coverage"]
        tiles.append({"what": "Reacted", "big": percent(rate), "note": f"of what was shown, {name}"})
    longer = found["bias"]["comparisons"].get("p_longer", {})
    if longer.get("n"):
        tiles.append({"what": "The longer wins", "big": percent(longer["share"]), "note": "50 % would be even"})
    return tiles[:6]


def _signal(row: Row) -> Row:
    values = sorted(row["values"].items(), key=lambda entry: (not _is_number(entry[0]), _number(entry[0]), entry[0]))
    bar = share_bar([(name, n, i % 7) for i, (name, n) in enumerate(values)])
    sources = ", ".join(f"{name} {count(n)}" for name, n in row["sources"].items())
    return {**row, "bar": bar, "sources": sources}


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()


def _number(text: str) -> int:
    return int(text) if _is_number(text) else 0


def _agreement(signal: str, entry: Row) -> Row:
    coefficients = entry["coefficients"]
    told, left = telling_pairs(coefficients)
    pairs = [n for n in told if n.startswith("cohen:") and coefficients[n]["n_items"] >= FEWEST_SHARED]
    rows = []
    for name in (*(name for name in coefficients if ":" not in name), *pairs):
        c, raters = coefficients[name], name.partition(":")[2]
        label = LEVELS.get(name, raters.replace(":", " · "))
        rows.append(Dot(label, c["value"], *c["ci"], f"n {count(c['n_items'])}", int(bool(raters))))
    reasons = [
        f"{LEVELS.get(name, name)}: {c['reason']}"
        for name, c in entry["coefficients"].items()
        if c.get("reason") and ":" not in name
    ]
    return {
        "name": signal,
        "n": entry["n_items"], "shared": entry["n_items_shared"], "raters": entry["n_raters"], "reasons": reasons,
        "chart": dot_chart(rows, low=0.0, high=1.0, reference=(0.0, "chance")),
        "hidden": left,
        "majority": share_bar(
            [(k, n, 6 if k == "none" else i % 6) for i, (k, n) in enumerate(entry["majority"].items())]
        ),
    }  # fmt: skip


def _consistency(found: Row) -> Row:
    if not found.get("n"):
        return {}
    same = found["consistent"]
    parts = [
        ("consistent", same, 2),
        ("rating tie, strict ranking", found["rating_tie_strict_ranking"], 6),
        ("strict rating, ranking tie", found["strict_rating_ranking_tie"], 1),
        ("contradiction", found["flips"], 5),
    ]
    rows = found["by_gap"]
    gaps = [
        Dot(
            f"{row['gap']} point{'' if row['gap'] == 1 else 's'} apart",
            row["share"],
            *row["ci"],
            f"n {count(row['n'])}",
            2,
        )
        for row in rows
    ]
    return {
        **found,
        "bar": share_bar(parts),
        "matrix_chart": matrix_chart(found["matrix"], ("rated equal", "rated a", "rated b"), ("equal", "a", "b")),
        "gap_chart": dot_chart(gaps, low=0.0, high=1.0, share=True),
    }


def _strengths(found: Row) -> Row:
    if "items" not in found:
        return found
    dots = [
        Dot(row["name"], row["strength"], row["strength"] - 1.96 * row["error"], row["strength"] + 1.96 * row["error"])
        for row in found["items"][:25]
    ]
    reference = next(row["name"] for row in found["items"] if row["error"] == 0)
    return {**found, "chart": dot_chart(dots, reference=(0.0, reference)), "reference": reference}


def _bias(found: Row) -> Row:
    main = found["comparisons"]
    dots = [
        Dot(text, *interval_of(main.get(name)), f"n {count((main.get(name) or {}).get('n'))}")
        for name, text in BIASES.items()
    ]
    people = [
        {"name": name, **row} for name, row in found["by_annotator"].items() if row.get("n") or row.get("n_ratings")
    ]
    return {
        **found,
        "chart": dot_chart(dots, low=0.0, high=1.0, share=True, reference=(0.5, "even"), left=190),
        "people": people,
    }


def _exposure(signal: str, entry: Row) -> Row:
    def rows(groups: Sequence[Row], label: Any = str) -> list[Dot]:
        return [Dot(label(g["group"]), g["coverage"], *g["coverage_ci"], f"n {count(g['n_shown'])}") for g in groups]

    by, silence = entry["by"], entry.get("silence", {})
    place, when = (lambda g: f"place {g + 1}"), (lambda ms: _moment(ms))
    charts: list[tuple[str, Markup]] = []
    for title, key, label in (
        ("By place shown", "position", place),
        ("By model", "policy", str),
        ("Over time", "time", when),
    ):
        if len(by[key]) > 1:
            charts.append((title, dot_chart(rows(by[key][:12], label), low=0.0, share=True)))
    if bins := silence.get("bins"):
        names = [f"quality {b['quality']:.2g}" for b in bins]
        sign = [
            Dot(name, b["positive_share"], *b["positive_share_ci"], f"n {count(b['n_reacted'])}", 1)
            for name, b in zip(names, bins, strict=True)
        ]
        rate = [
            Dot(n, b["coverage"], *b["coverage_ci"], f"n {count(b['n_shown'])}")
            for n, b in zip(names, bins, strict=True)
        ]
        charts.append(("Reacting, by quality of what was shown", dot_chart(rate, low=0.0, share=True)))
        charts.append(("Positive among the reactions, by quality", dot_chart(sign, low=0.0, high=1.0, share=True)))
    return {"name": signal, **entry, "charts": [{"title": t, "svg": svg} for t, svg in charts if svg]}


def _moment(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%m-%d %H:%M")


def _people(found: Row) -> Row:
    tables = []
    for signal, rows in found["annotators"].items():
        rated = [row for row in rows if row.get("severity") is not None]
        dots = [
            Dot(row["annotator"], row["severity"], *_around(row["severity"], row["severity_error"]),
                f"n {count(row['n_shared'])}", 5 if row["flags"] else 0)
            for row in sorted(rated, key=lambda r: r["severity"])
        ]  # fmt: skip
        flagged = [row for row in rows if row["flags"]]
        shown = dots if len(dots) <= 24 else [*dots[:12], *dots[-12:]]
        chart = dot_chart(shown, reference=(0.0, "as the others"))
        tables.append(
            {"name": signal, "chart": chart, "flagged": flagged[:20], "n": len(rows), "n_flagged": len(flagged)}
        )
    return {**found, "tables": tables}


def _around(value: float, error: float | None) -> tuple[float | None, float | None]:
    return (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)


def _judge(card: Mapping[str, Any]) -> Row:
    pairs, choices = card["pairs"], card["choices"]
    dots = [
        Dot("agrees with people", *interval_of(pairs, "agreement"), f"n {count(pairs['n'])}", 2),
        Dot("picks the first shown", *interval_of(card["p_first"]), f"n {count(card['p_first']['n'])}", 1),
        Dot(
            "picks the longer",
            *interval_of(choices.get("p_longer")),
            f"n {count((choices.get('p_longer') or {}).get('n'))}",
            1,
        ),
    ]
    return {**card, "chart": dot_chart(dots, low=0.0, high=1.0, share=True, reference=(0.5, "even"))}
