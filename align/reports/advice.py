"""What to do next about a feedback store: each sentence says what was found, and the step that follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.reports.page import count, percent

Row = dict[str, Any]

TENTATIVE, RELIABLE = 0.667, 0.8
"""Krippendorff's customary bounds of alpha, below which conclusions are not, or only tentatively, drawn."""


def advise(found: Row) -> Row:
    """Return kind ("good", "mixed", "bad" or "open"), title, sentence, and items [{level, text}], the gravest first."""
    items = list(_all(found))
    items.sort(key=lambda item: ("bad", "mixed", "open", "good").index(item["level"]))
    levels = [item["level"] for item in items]
    who = found["who"]
    if not who["answers"]:
        return {"kind": "open", "title": "Nothing has been said yet", "sentence": _empty(who), "items": items}
    kind = "bad" if "bad" in levels else "mixed" if "mixed" in levels else "open" if "open" in levels else "good"
    titles = {
        "bad": "Mend this before training on it", "mixed": "Usable with care", "open": "Too early to tell",
        "good": "Ready to convert and train on",
    }  # fmt: skip
    people = f"{count(who['annotators'])} annotator{'' if who['annotators'] == 1 else 's'}"
    sentence = f"{count(who['answers'])} answers of {people} about {count(who['items'])} items."
    return {"kind": kind, "title": titles[kind], "sentence": sentence, "items": items}


def _empty(who: Row) -> str:
    return f"There are {count(who['items'])} items and {count(who['exposures'])} exposures, and no answer."


def _item(level: str, text: str) -> Row:
    return {"level": level, "text": text}


def _all(found: Row) -> Iterator[Row]:
    yield from _abuse(found["people"])
    yield from _agreement(found)
    for key, compared in {"": found["consistency"], **found["consistency_by_key"]}.items():
        yield from _consistency(compared, key)
    yield from _bias(found["bias"])
    yield from _exposures(found)
    yield from _judges(found["judges"])


def _abuse(people: Row) -> Iterator[Row]:
    flags = [
        (row["annotator"], flag) for rows in people["annotators"].values() for row in rows for flag in row["flags"]
    ]
    if constant := sorted({name for name, flag in flags if flag == "constant"}):
        who = _people(len(constant), "gives", "give")
        yield _item("bad", f"{who} one answer nearly always ({', '.join(constant[:5])}): look at what was shown, and"
                    " leave these out.")  # fmt: skip
    if pairs := people["coordinated"]:
        names, n = " and ".join(pairs[0]["annotators"]), count(pairs[0]["n"])
        told = f"{names} agree on {percent(pairs[0]['agreement'])} of {n} answers"
        yield _item("bad", f"{told}, where {percent(pairs[0]['expected'])} was to be expected: count them as one, or"
                    " find out why.")  # fmt: skip
    if fast := people["bursts"]:
        who = _people(len({row["annotator"] for row in fast}), "answers", "answer")
        most = f"{fast[0]['annotator']}: {count(fast[0]['n'])} in a row"
        yield _item(
            "mixed", f"{who} in bursts faster than people read ({most}): set a minimum time, or leave these out."
        )
    if copied := people["duplicate_texts"]:
        yield _item("mixed", f"A comment was written {count(copied[0]['n'])} times word for word: look for a script.")
    if severe := {name for name, flag in flags if flag in ("severe", "lenient")}:
        who = _people(len(severe), "rates", "rate")
        yield _item("mixed", f"{who} more severely or leniently than the others: compare within annotators, or convert"
                    " with --zscore.")  # fmt: skip


def _people(n: int, one: str, many: str) -> str:
    return f"One annotator {one}" if n == 1 else f"{count(n)} annotators {many}"


def _agreement(found: Row) -> Iterator[Row]:
    if not found["agreement"] and found["who"]["answers"]:
        yield _item("open", "Nothing was answered by two people, so nobody knows how far they agree: ask for an"
                    " overlap of two or three on a tenth of the items.")  # fmt: skip
    low, few = [], []
    for signal, entry in found["agreement"].items():
        coefficients, shared = entry["coefficients"], entry["n_items_shared"]
        alpha = coefficients.get("krippendorff_ordinal") or coefficients["krippendorff_nominal"]
        value, least = alpha["value"], alpha["ci"][0]
        if value is None:
            continue
        if shared < 30:
            few.append(f"{signal} {value:.2f} on {count(shared)}")
        elif value < TENTATIVE:
            low.append(f"{signal} {value:.2f}")
        elif least is not None and value >= RELIABLE and least >= TENTATIVE:
            yield _item("good", f"Alpha of {signal} is {value:.2f} (at least {least:.2f}): people agree.")
    if low:
        yield _item("mixed", f"Alpha is low ({', '.join(low)}): people see this differently. Sharpen the instructions"
                    " with examples, or take several answers an item and their majority.")  # fmt: skip
    if few:
        yield _item("open", f"Too few shared answers to read alpha ({', '.join(few)}): collect more overlap.")


def _consistency(found: Row, key: str) -> Iterator[Row]:
    if not found.get("n"):
        return
    level = "mixed" if (found["flip_rate"] or 0) > 0.2 or found["inconsistency"] > 0.4 else "good"
    what = f"Ratings of {key}" if key else "Ratings"
    told = f"{what} and rankings differ on {percent(found['inconsistency'])} of {count(found['n'])} pairs"
    split = f"{percent(found['flips'] / found['n'])} contradict, the others are ties on one side"
    yield _item(level, f"{told}: {split}. Choose one protocol to train on, and report win rates under both.")


def _bias(found: Row) -> Iterator[Row]:
    for name, what, do in (
        ("p_first", "What is shown first wins", "show each pair in both orders, or fit a position intercept"),
        ("p_longer", "The longer response wins", "compare at equal length before calling it quality"),
    ):
        entry = found["comparisons"].get(name) or {}
        low, high = entry.get("ci") or (None, None)
        if entry.get("n", 0) < 30 or low is None:
            continue
        if low > 0.55:
            yield _item("mixed", f"{what} {percent(entry['share'])} of the time: {do}.")
        elif high < 0.45 and name == "p_first":
            yield _item("mixed", f"What is shown last wins {percent(1 - entry['share'])} of the time: {do}.")
    if named := found["identity"]["n"]:
        yield _item(
            "mixed", f"{count(named)} responses say which model wrote them: leave them out of blind comparisons."
        )


def _exposures(found: Row) -> Iterator[Row]:
    kinds = {row["signal"].rpartition("/")[2] for row in found["who"]["signals"]}
    if not found["exposures"] and kinds & {"binary", "reaction"}:
        yield _item("mixed", "There are reactions and no exposures: without what was shown and left unanswered no"
                    " rate can be computed. Log exposures.")  # fmt: skip
    for signal, entry in found["exposures"].items():
        if unknown := entry["coverage"]["unknown"]:
            yield _item("mixed", f"{count(unknown)} answers of {signal} have no exposure and enter no rate: log every"
                        " item that is shown.")  # fmt: skip
        silence = entry.get("silence", {})
        if silence.get("verdict") == "missing not at random":
            yield _item("mixed", f"Whether people react to {signal} depends on how good the item is (p"
                        f" {silence['p']:.2g}): silence is not missing at random, and it is no dislike.")  # fmt: skip
        selection = entry["selection"]
        failed = [gate["gate"].replace("_", " ") for gate in selection["gates"] if gate["holds"] is False]
        if selection["verdict"] == "fail":
            yield _item("mixed", f"{signal} does not pass the gates of a training signal ({', '.join(failed)}): audit"
                        " it, do not train on it.")  # fmt: skip
        elif selection["verdict"] == "unproven" and not signal.endswith("/ordinal"):
            yield _item("open", f"{signal} was not compared with a delayed outcome: name one with --outcome before"
                        " training on it.")  # fmt: skip


def _judges(cards: list[Row]) -> Iterator[Row]:
    for card in cards:
        name, coverage, swaps, pairs = card["judge"], card["coverage"], card["swap_tie_rate"], card["pairs"]
        if coverage is not None and coverage < 0.9:
            yield _item("mixed", f"{name} answered {percent(coverage)} of what it was asked: read its invalid"
                        " replies, and run `align feedback annotate` again.")  # fmt: skip
        if swaps is not None and swaps > 0.2:
            yield _item("mixed", f"{name} contradicts itself on {percent(swaps)} of the pairs when they are"
                        " exchanged: such ties say nothing about the responses.")  # fmt: skip
        if pairs["n"] and pairs["agreement"] is not None:
            level = "good" if (pairs["ci"][0] or 0) > 0.6 else "mixed"
            yield _item(
                level, f"{name} agrees with people on {percent(pairs['agreement'])} of {count(pairs['n'])} pairs."
            )
        elif not pairs["n"] and not card["ratings"]["n"]:
            yield _item("open", f"{name} judged nothing that people judged: have people answer some of its items.")
