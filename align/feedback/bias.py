"""What else decides who wins: length, place, lists, emoji, and models that say their name.

A judge or a crowd that prefers the longer answer two times in three may still be right: longer answers may be better.
So these shares are signs to look into, and comparable between annotators of the same pairs, not verdicts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from align.feedback.events import FeedbackEvent, Item
from align.feedback.resampling import bootstrap_sums, wilson
from align.feedback.views import signed_pairs, text_of

LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.M)
EMOJI = re.compile("[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55]")
IDENTITY = re.compile(
    r"\b(?:as an? (?:ai|large) (?:language )?model|i am (?:an? ai|chatgpt|claude|gemini|bard|llama|alpaca|vicuna)"
    r"|(?:developed|created|trained) by (?:openai|anthropic|google|meta|deepmind))\b", re.I,
)  # fmt: skip


def has_list(text: str) -> bool:
    """Whether a text has a bulleted or numbered list of two entries or more."""
    return len(LIST.findall(text)) >= 2


def has_emoji(text: str) -> bool:
    """Whether a text has an emoji."""
    return bool(EMOJI.search(text))


def says_its_name(text: str) -> bool:
    """Whether a response gives away which model wrote it, or that one did."""
    return bool(IDENTITY.search(text))


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, ties sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation, NaN where a side does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-300 else float("nan")


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Return Spearman's rank correlation with ties at their mean rank."""
    return pearson(ranks_of(np.asarray(x)), ranks_of(np.asarray(y)))


def choice_bias(pairs: Iterable[tuple[str, str, int, str]], *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return what winners have that losers do not.

    Args:
        pairs: (text shown first, text shown second, sign, cluster): sign 1 where the first won, 0 a tie, -1 else.

    Returns:
        n, ties, tie_rate; p_longer: P(the longer wins), ties counting half, over pairs of unequal length; p_first:
        P(the first wins | strict); p_list and p_emoji: P(the one with a list, an emoji, wins) over pairs where exactly
        one has it, ties half; each a share with n and an interval (bootstrap of clusters, Wilson for p_first); mean
        length of winners and losers, and list and emoji rates of both.
    """
    rows = list(pairs)
    signs = np.array([row[2] for row in rows], dtype=np.int64)
    clusters = np.array([row[3] for row in rows], dtype=object).astype(str)
    first, second = ([row[i] for row in rows] for i in (0, 1))
    lengths = np.array([[len(a), len(b)] for a, b in zip(first, second, strict=True)], dtype=float).reshape(-1, 2)
    strict = signs != 0
    n, ties = len(rows), int((~strict).sum())
    found: dict[str, Any] = {"n": n, "ties": ties, "tie_rate": ties / n if n else float("nan")}
    traits = {
        "p_longer": np.sign(lengths[:, 0] - lengths[:, 1]),
        "p_list": np.array([has_list(a) - has_list(b) for a, b in zip(first, second, strict=True)], dtype=float),
        "p_emoji": np.array([has_emoji(a) - has_emoji(b) for a, b in zip(first, second, strict=True)], dtype=float),
    }
    for name, lead in traits.items():
        at = lead != 0
        found[name] = _preference((lead[at] * signs[at] + 1) / 2, clusters[at], draws, seed)
    wins = int((signs[strict] > 0).sum())
    total = int(strict.sum())
    found["p_first"] = {"n": total, "share": wins / total if total else float("nan"), "ci": list(wilson(wins, total))}
    if total:
        won = np.where(signs[strict] > 0, lengths[strict, 0], lengths[strict, 1])
        lost = np.where(signs[strict] > 0, lengths[strict, 1], lengths[strict, 0])
        found |= {"winner_length": float(won.mean()), "loser_length": float(lost.mean())}
        sides = [(a, b) if s > 0 else (b, a) for a, b, s, _ in rows if s]
        for name, test in (("list", has_list), ("emoji", has_emoji)):
            found[f"winner_{name}_rate"] = sum(test(w) for w, _ in sides) / total
            found[f"loser_{name}_rate"] = sum(test(x) for _, x in sides) / total
    return found


def _preference(wins: np.ndarray, clusters: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    n = len(wins)
    if not n:
        return {"n": 0, "share": float("nan"), "ci": [float("nan")] * 2}

    def share(sums: np.ndarray) -> np.ndarray:
        return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)

    ci = bootstrap_sums(np.column_stack([wins, np.ones(n)]), share, clusters, draws=draws, seed=seed)
    return {"n": n, "share": float(wins.mean()), "ci": list(ci)}


def bias_report(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], *, draws: int = 1000, seed: int = 0, most: int = 20
) -> dict[str, Any]:
    """Return biases of comparisons and of ratings, overall and by annotator, and responses that say their name.

    Comparisons go by the order in which items were shown. Ratings inferred into pairs are not mixed in: their length
    bias is `length_rating`, Spearman's correlation of length and rating within a prompt's centre.
    """
    pairs: dict[str, list[tuple[str, str, int, str]]] = defaultdict(list)
    ratings: dict[str, list[tuple[float, float]]] = defaultdict(list)
    texts = {name: text_of(item) for name, item in items.items() if item.media in ("text", "chat")}
    for event in events:
        if event.tombstone or any(i not in texts for i in event.items):
            continue
        if event.kind == "ordinal":
            ratings[event.annotator].append((len(texts[event.items[0]]), float(event.value)))
        for a, b, sign in signed_pairs(event):
            pairs[event.annotator].append((texts[a], texts[b], sign, items[a].prompt_id))
    every = [row for rows in pairs.values() for row in rows]
    rated = np.array([row for rows in ratings.values() for row in rows], dtype=float).reshape(-1, 2)
    people = sorted({*pairs, *ratings}, key=lambda name: -len(pairs[name]) - len(ratings[name]))[:most]
    by_annotator = {}
    for name in people:
        mine = np.array(ratings[name], dtype=float).reshape(-1, 2)
        row: dict[str, Any] = {"n_ratings": len(mine), "length_rating": spearman(mine[:, 0], mine[:, 1])}
        row["mean_rating"] = float(mine[:, 1].mean()) if len(mine) else float("nan")
        by_annotator[name] = {**row, **choice_bias(pairs[name], draws=0)}
    named = [name for name, text in texts.items() if says_its_name(text)]
    return {
        "comparisons": choice_bias(every, draws=draws, seed=seed),
        "length_rating": {"n": len(rated), "spearman": spearman(rated[:, 0], rated[:, 1])},
        "by_annotator": by_annotator,
        "identity": {"n": len(named), "of": len(texts), "examples": named[:5]},
    }
