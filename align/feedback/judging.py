"""The judge card: how far an AI annotator may stand in for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.feedback.agreement import classification_report, kappa_of_matrix, majority
from align.feedback.annotators import parse_choice
from align.feedback.bias import choice_bias, spearman
from align.feedback.events import FeedbackEvent, Item
from align.feedback.resampling import wilson
from align.feedback.views import BOOKKEEPING, answers_of, signed_pairs, text_of


def judge_card(
    events: Sequence[FeedbackEvent], items: Mapping[str, Item], judge: str, *, key: str = "quality", seed: int = 0
) -> dict[str, Any]:
    """Return what is known about one annotator as a judge, against the majority of all others who are no AI.

    Returns:
        pairs: n, agreement with the human majority (exact, three categories) and its Wilson interval, kappa, accuracy
        report; bias: share of pairs where the judge's most common answer is not the majority; variance: share of its
        repeated answers that differ from its own most common one (NaN without repeats); ratings: n, Spearman and mean
        difference to the mean human rating; choices: P(longer), P(lists) and more of `choice_bias`; p_first over both
        orders asked; swap_tie_rate; attempts by outcome, and coverage.
    """
    people = [e for e in events if e.annotator != judge and e.source in ("human", "user")]
    mine = [e for e in events if e.annotator == judge]
    card: dict[str, Any] = {"judge": judge, "key": key}
    card["pairs"] = _pairs(mine, people, items, judge, key)
    card["ratings"] = _ratings(mine, people, key)
    verdicts = [e for e in mine if e.key == key and e.kind in ("pairwise", "ranking")]
    rows = [
        (text_of(items[a]), text_of(items[b]), sign, items[a].prompt_id)
        for e in verdicts
        for a, b, sign in signed_pairs(e)
        if a in items and b in items
    ]
    card["choices"] = choice_bias(rows, seed=seed)
    attempts = [e for e in mine if e.key == key + BOOKKEEPING]
    outcome = Counter(str(e.value).partition(":")[0] for e in attempts)
    chosen = [
        choice for e in attempts if e.value == "valid" and len(e.items) == 2 and (choice := parse_choice(e.reply))
    ]
    first = chosen.count("a")
    swaps = sum(e.tie_origin == "position_swap" for e in verdicts)
    asked = {e.items for e in attempts}
    valid = {e.items for e in attempts if e.value == "valid"}
    card |= {
        "attempts": dict(outcome),
        "coverage": len(valid) / len(asked) if asked else float("nan"),
        "swap_tie_rate": swaps / len(verdicts) if verdicts else float("nan"),
        "p_first": {"n": len(chosen), "share": first / len(chosen) if chosen else float("nan"),
                    "ci": list(wilson(first, len(chosen)))},
    }  # fmt: skip
    return card


def _pairs(
    mine: Sequence[FeedbackEvent], people: Sequence[FeedbackEvent], items: Mapping[str, Item], judge: str, key: str
) -> dict[str, Any]:
    answers = answers_of([*mine, *people], items, key, "pairwise")
    size = len(answers.categories)
    if judge not in answers.raters:
        return {"n": 0}
    guess = answers.column(answers.raters.index(judge))
    counts = answers.counts()
    counts[np.flatnonzero(guess >= 0), guess[guess >= 0]] -= 1
    truth = majority(counts)
    report = classification_report(truth, guess, size)
    n, same = report["n"], round(report["accuracy"] * report["n"]) if report["n"] else 0
    kappa = float(kappa_of_matrix(np.array(report["matrix"])))
    repeats, differ, wrong_mode, compared = 0, 0, 0, 0
    by_pair: dict[tuple[str, str], list[int]] = {}
    for event in mine:
        if event.kind == "pairwise" and event.key == key:
            a, b, sign = signed_pairs(event)[0]
            by_pair.setdefault((min(a, b), max(a, b)), []).append(sign if a < b else -sign)
    human = _human_mode(people, key)
    for pair, signs in by_pair.items():
        mode = Counter(signs).most_common(1)[0][0]
        if len(signs) > 1:
            repeats += len(signs)
            differ += sum(sign != mode for sign in signs)
        if pair in human:
            compared += 1
            wrong_mode += mode != human[pair]
    return {
        "n": n, "agreement": report["accuracy"], "ci": list(wilson(same, n)), "kappa": kappa, "report": report,
        "bias": wrong_mode / compared if compared else float("nan"),
        "variance": differ / repeats if repeats else float("nan"),
    }  # fmt: skip


def _human_mode(people: Sequence[FeedbackEvent], key: str) -> dict[tuple[str, str], int]:
    votes: dict[tuple[str, str], Counter[int]] = {}
    for event in people:
        if event.kind == "pairwise" and event.key == key:
            a, b, sign = signed_pairs(event)[0]
            votes.setdefault((min(a, b), max(a, b)), Counter())[sign if a < b else -sign] += 1
    found = {}
    for pair, counts in votes.items():
        ranked = counts.most_common(2)
        if len(ranked) == 1 or ranked[0][1] > ranked[1][1]:
            found[pair] = ranked[0][0]
    return found


def _ratings(mine: Sequence[FeedbackEvent], people: Sequence[FeedbackEvent], key: str) -> dict[str, Any]:
    said: dict[str, list[float]] = {}
    for event in people:
        if event.kind == "ordinal" and event.key == key:
            said.setdefault(event.items[0], []).append(float(event.value))
    rows = [
        (float(e.value), float(np.mean(said[e.items[0]])))
        for e in mine
        if e.kind == "ordinal" and e.key == key and e.items[0] in said
    ]
    if not rows:
        return {"n": 0}
    judge, human = np.array(rows).T
    return {"n": len(rows), "spearman": spearman(judge, human), "mean_difference": float((judge - human).mean())}
