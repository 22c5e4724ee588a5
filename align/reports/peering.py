"""The page of `align peering`: how far ratings and rankings agree, what each reward knows of both, who wins where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.reports.charts import Series, line_chart
from align.reports.dots import Dot, dot_chart, matrix_chart, share_bar
from align.reports.page import percent, render
from align.tracking import replace_text

Row = dict[str, Any]
PROTOCOLS = ("ratings", "rankings")
WHO = {"ratings": "reward of ratings", "rankings": "reward of rankings", "random": "at random"}
COLOURS = {"ratings": 0, "rankings": 1, "random": 6}


def write_page(folder: str | Path) -> Path:
    """Write `report.html` into a folder that `align peering` filled, and return its path.

    Raises:
        ConfigError: not such a folder.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / "peering.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("This is no folder of `align peering`", where=str(folder), why=str(error)) from error
    path = folder / "report.html"
    replace_text(path, render("peering.html", _context(found)))
    return path


def _context(found: Row) -> Row:
    consistency, selection = found["consistency"], found["selection"]
    table = selection["against_baseline"]
    wins = {
        protocol: dot_chart(
            [_dot(WHO[who], row[protocol], COLOURS[who]) for who, row in table.items()],
            low=0.0, high=1.0, share=True, reference=(0.5, "no better than the baseline"), left=130,
        )
        for protocol in PROTOCOLS
    }  # fmt: skip
    accuracy = {
        protocol: dot_chart(
            [
                Dot(WHO[kind], right["without_ties"], *right["ci"], percent(right["without_ties"]), COLOURS[kind])
                for kind, right in ((kind, row[protocol]) for kind, row in found["accuracy"].items())
            ],
            low=0.4, high=1.0, share=True, reference=(0.5, "chance"), left=130,
        )
        for protocol in PROTOCOLS
    }  # fmt: skip
    names = ("equal", "a", "b")
    return {
        **found, "matrix_chart": matrix_chart(consistency["matrix"], names, names), "bar": _bar(consistency),
        "wins": wins, "accuracy_charts": accuracy, "table": table, "who": WHO, "protocols": PROTOCOLS,
        "curves": [(WHO[kind], _curve(kind, selection["curves"])) for kind in PROTOCOLS], "reading": reading(found),
    }  # fmt: skip


def _dot(label: str, rate: Row, colour: int) -> Dot:
    return Dot(label, rate["rate"], *rate["wilson"], f"n {rate['n']}", colour)


def _bar(c: Row) -> Any:
    return share_bar([
        ("the same", c["consistent"], 2),
        ("rated equal, ranked apart", c["rating_tie_strict_ranking"], 6),
        ("rated apart, ranked equal", c["strict_rating_ranking_tie"], 3),
        ("contradictions", c["flips"], 5),
    ])  # fmt: skip


def _curve(kind: str, curves: Row) -> Any:
    """Draw what each reward gains by the best of n of one of them, as a share of what it gains by its own."""
    points = curves[kind]["points"]
    if len(points) < 2:
        return ""
    series = []
    for name in PROTOCOLS:
        own = [p["reward"]["mean"] for p in curves[name]["points"]]
        seen = [(p["reward"] if name == kind else p["judges"][name])["mean"] for p in points]
        whole = own[-1] - own[0]
        share = [(v - seen[0]) / whole if whole else None for v in seen]
        series.append(Series(f"seen by the {WHO[name]}", [p["n"] for p in points], share, sparse=True))
    return line_chart(series, percent=True, from_zero=True, x_label="best of n")


def reading(found: Row) -> list[str]:
    """Return what the numbers say, in sentences."""
    c, selection = found["consistency"], found["selection"]
    ties = c["rating_tie_strict_ranking"] + c["strict_rating_ranking_tie"]
    said = []
    if c["n"]:
        said.append(
            f"On {c['n']} pairs that were rated and ranked, the two say different things of {_pct(c['inconsistency'])} "
            f"({_pct(c['ci_cluster'][0])} to {_pct(c['ci_cluster'][1])}): {ties} times one of them calls a tie where "
            f"the other does not, which is resolution lost, and {c['flips']} times they contradict one another, "
            f"{_pct(c['flip_rate'])} of the pairs on which both are strict."
        )
    for kind, row in found["accuracy"].items():
        own, other = row[kind], row[_other(kind)]
        ends = own["ci"][0], other["ci"][1]
        apart = None not in ends and ends[0] > ends[1]
        said.append(
            f"The {WHO[kind]} is right about {_pct(own['without_ties'])} of held-out pairs of its own protocol and "
            f"{_pct(other['without_ties'])} of the other's{': it has learnt its protocol' if apart else ''}."
        )
    table = selection["against_baseline"]
    for protocol in PROTOCOLS:
        rates = {who: row[protocol] for who, row in table.items()}
        if not rates["random"]["n"] or not all(rates[k]["n"] for k in PROTOCOLS):
            said.append(f"Nobody has answered under {protocol} yet: picks.jsonl holds what is to be asked.")
            continue
        gains = {kind: table[kind]["beyond_random"][protocol] for kind in PROTOCOLS}
        told = "; ".join(
            f"the {WHO[kind]} wins {_pct(rates[kind]['rate'])} of {rates[kind]['n']}, {_points(gains[kind])}"
            for kind in PROTOCOLS
        )
        said.append(f"Judged by {protocol}: {told}. At random: {_pct(rates['random']['rate'])}.")
    for protocol in PROTOCOLS:
        duel = selection["ratings_against_rankings"][protocol]
        if duel["n"]:
            low, high = duel["wilson"]
            winner = "ratings" if low > 0.5 else "rankings" if high < 0.5 else ""
            end = f"the {WHO[winner]} wins" if winner else "neither wins"
            said.append(
                f"Where the two rewards choose differently, {end} under {protocol}: the {WHO['ratings']} takes "
                f"{_pct(duel['rate'])} of {duel['n']} ({_pct(low)} to {_pct(high)})."
            )
    return said + _conclusion(selection["ratings_against_rankings"])


def _conclusion(duel: Row) -> list[str]:
    sides = []
    for protocol in PROTOCOLS:
        low, high = duel[protocol]["wilson"]
        if not duel[protocol]["n"] or low is None:
            return []
        sides.append("ratings" if low > 0.5 else "rankings" if high < 0.5 else "")
    if sides == list(PROTOCOLS):
        return [
            "Each reward wins under the protocol it was fitted to and loses under the other: which of them is better "
            "is a question about whom you believe, not about the rewards. Report both."
        ]
    if sides[0] and sides[0] == sides[1]:
        return [f"The {WHO[sides[0]]} wins under both protocols: prefer it."]
    return ["The two protocols do not both tell the rewards apart: more prompts, or more answers, would."]


def _other(kind: str) -> str:
    return PROTOCOLS[1 - PROTOCOLS.index(kind)]


def _pct(value: float | None) -> str:
    return percent(value, 0).replace("\u00a0", " ")


def _points(gain: Row) -> str:
    low, high = 100 * gain["ci_low"], 100 * gain["ci_high"]
    return f"{100 * gain['mean']:+.0f} points beyond random ({low:+.0f} to {high:+.0f})"
