"""Do ratings and rankings of the same outputs say the same? Matrix, ties and flips apart, gaps, intervals, cycles.

A pair is compared twice: the ratings of its two responses infer "a", "b" or "equal", and the ranking says one of
them. Consistency is the trace of that 3x3 matrix over its total (Bansal, Dang, Grover 2024, "Peering Through
Preferences"). A bare inconsistency mixes two things, so they are counted apart: loss of resolution (a tie on one side
against a strict preference on the other) and contradiction (a flip).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.agreement import kappa_of_matrix
from align.feedback.columns import Row, cell, is_empty, number_cell, read_rows, text_cell
from align.feedback.events import content_id
from align.feedback.resampling import DRAWS, bootstrap_sums, wilson
from align.registry import suggest

EQUAL, A, B = 0, 1, 2
NAMES = ("equal", "a", "b")
DUPLICATES = ("first", "last", "mean")
LARGEST_PROMPT = 60
"""Responses of one prompt above which its triads are not searched."""

_WORDS = {
    **dict.fromkeys(("a", "(a)", "1", "output (a)"), A),
    **dict.fromkeys(("b", "(b)", "2", "output (b)"), B),
    **dict.fromkeys(("tie", "equal", "0", "both_bad"), EQUAL),
}
_UNREAD = ("invalid", "garbage")


def read_preference(value: Any, place: str, name: str = "preference") -> int | None:
    """Return EQUAL, A or B of "a", "(a)", 1, "b", "(b)", 2, "tie", "equal", 0; None where there is no answer.

    Raises:
        DataError: anything else.
    """
    if is_empty(value):
        return None
    word = str(value).strip().casefold()
    word = word.removesuffix(".0") if not isinstance(value, bool) else "?"
    if word in _UNREAD:
        return None
    if word not in _WORDS:
        raise DataError(
            "A preference cannot be read", where=f"{place}:{name}", why=f"found {str(value)[:60]!r}",
            do="Write a, b or tie; (a), (b) or equal; or 1, 2 or 0",
        )  # fmt: skip
    return _WORDS[word]


# --- joining two files ------------------------------------------------------------------------------


@dataclass
class Joined:
    """Pairs that were ranked, with the ratings of their responses: one entry a comparison.

    Args:
        prompt_N, a_N, b_N: index of the prompt and of the two responses.
        rating_a_N, rating_b_N: their ratings, NaN where there is none.
        ranking_N: EQUAL, A or B.
        swap_N: whether a tie came from two orders that contradict each other, where it is known.
        notes: duplicates, conflicts, identical responses, unread preferences: everything the join met.
    """

    prompt_N: np.ndarray
    a_N: np.ndarray
    b_N: np.ndarray
    rating_a_N: np.ndarray
    rating_b_N: np.ndarray
    ranking_N: np.ndarray
    swap_N: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    notes: dict[str, Any] = field(default_factory=dict)


class Merged:
    """Values under a key with a policy for repeats: the first, the last, or the mean of them."""

    def __init__(self, policy: str) -> None:
        if policy not in DUPLICATES:
            raise DataError(f"Unknown policy {policy!r} for duplicates", do=suggest(policy, DUPLICATES))
        self.policy, self.places = policy, {}
        self.first, self.value, self.count = array("d"), array("d"), array("l")
        self.duplicates, self.clashed, self.examples = 0, set(), []

    def add(self, key: Any, value: float, place: str) -> None:
        """Take one more value under a key, and where it stands."""
        at = self.places.setdefault(key, len(self.value))
        if at == len(self.value):
            for column, entry in ((self.first, value), (self.value, value), (self.count, 1)):
                column.append(entry)
            return
        self.duplicates += 1
        if value != self.first[at] and at not in self.clashed:
            self.clashed.add(at)
            if len(self.examples) < 5:
                self.examples.append(place)
        self.count[at] += 1
        if self.policy == "last":
            self.value[at] = value
        elif self.policy == "mean":
            self.value[at] += (value - self.value[at]) / self.count[at]

    def get(self, key: Any) -> float:
        """Return what counts under a key, NaN where there is nothing."""
        return self.value[self.places[key]] if key in self.places else float("nan")


def repeats(rated: Merged, ranked: Merged) -> dict[str, Any]:
    """Return the notes of a join on ratings and rankings that were given again."""
    return {
        "duplicate_ratings": rated.duplicates, "conflicting_ratings": len(rated.clashed),
        "duplicate_rankings": ranked.duplicates, "conflicting_rankings": len(ranked.clashed),
        "conflicts": rated.examples + ranked.examples, "duplicates_policy": rated.policy,
    }  # fmt: skip


def join_files(
    ratings: str | Path,
    rankings: str | Path,
    *,
    ratings_columns: Sequence[str] = (),
    rankings_columns: Sequence[str] = (),
    duplicates: str = "first",
) -> Joined:
    """Return the ranked pairs of a rankings file with the ratings of a ratings file; see `join_rows`."""
    return join_rows(read_rows(ratings, ratings_columns), read_rows(rankings, rankings_columns), duplicates=duplicates)


def join_rows(ratings: Iterable[Row], rankings: Iterable[Row], *, duplicates: str = "first") -> Joined:
    """Return the ranked pairs with the ratings of their responses, joined by hash of (prompt, input, response).

    Ratings are streams of rows with prompt, response, rating and perhaps input; rankings of rows with prompt,
    response_a, response_b, preference and perhaps input. Of repeated answers the first counts, or as `duplicates` says
    the last or the mean (of the signs, for rankings); those that conflict are counted.

    Raises:
        DataError: a row without one of these fields, or a cell that cannot be read.
    """
    rated, missing = Merged(duplicates), 0
    for place, row in ratings:
        value = number_cell(cell(row, "rating", place), "rating", place)
        if np.isnan(value):
            missing += 1
            continue
        rated.add(_key(row, "response", place), value, place)
    ranked, items, prompts = Merged(duplicates), {}, {}
    about: list[array[Any]] = [array("l") for _ in range(3)]
    keys: list[str] = []
    unread = 0
    for place, row in rankings:
        choice = read_preference(cell(row, "preference", place), place)
        if choice is None:
            unread += 1
            continue
        prompt = _digest(text_cell(cell(row, "prompt", place)), text_cell(row.get("input")))
        a, b = (_key(row, name, place) for name in ("response_a", "response_b"))
        for key in (a, b):
            if items.setdefault(key, len(items)) == len(keys):
                keys.append(key)
        entry = (prompts.setdefault(prompt, len(prompts)), items[a], items[b])
        before = len(ranked.value)
        ranked.add((items[a], items[b]), {A: 1.0, B: -1.0, EQUAL: 0.0}[choice], place)
        if len(ranked.value) > before:
            for column, index in zip(about, entry, strict=True):
                column.append(index)
    prompt_N, a_N, b_N = (np.frombuffer(column, dtype=np.int_).copy() for column in about)
    known = np.array([rated.get(k) for k in keys] or [0.0])
    sign = np.sign(np.array(ranked.value))
    both = _both_orders(a_N, b_N, sign)
    notes = {
        "ratings": len(rated.value), "ratings_missing": missing, "preferences_missing": unread,
        **repeats(rated, ranked), "identical_pairs": int((a_N == b_N).sum()), **both,
    }  # fmt: skip
    ranking = np.where(sign > 0, A, np.where(sign < 0, B, EQUAL))
    return Joined(prompt_N, a_N, b_N, known[a_N], known[b_N], ranking, notes=notes)


def _key(row: Mapping[str, Any], response: str, place: str) -> str:
    prompt, answer = cell(row, "prompt", place), cell(row, response, place)
    return _digest(text_cell(prompt), text_cell(row.get("input")), text_cell(answer))


# Rows about one prompt stand together in most files, so that its few texts are hashed once.
_recent = lru_cache(maxsize=256)(content_id)


def _digest(*parts: Any) -> str:
    return _recent(*parts) if all(isinstance(part, str) for part in parts) else content_id(*parts)


def _both_orders(a_N: np.ndarray, b_N: np.ndarray, sign_N: np.ndarray) -> dict[str, int]:
    """Count the pairs that were asked in both orders as separate rows, and those where the two contradict."""
    there = {(a, b): s for a, b, s in zip(a_N.tolist(), b_N.tolist(), sign_N.tolist(), strict=True)}
    twice = [(s, there[b, a]) for (a, b), s in there.items() if a < b and (b, a) in there]
    return {"both_orders": len(twice), "orders_contradict": sum(s != -t for s, t in twice)}


# --- the report -------------------------------------------------------------------------------------


def consistency(
    joined: Joined,
    *,
    tie_band: float = 0.0,
    drop_identical: bool = False,
    elicitation: str = "unknown",
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the consistency report of ratings against rankings.

    Args:
        tie_band: ratings this close or closer infer a tie.
        drop_identical: leave pairs of two identical responses out.
        elicitation: "same_screen" where both were asked side by side, a lower bound of what separate sessions show,
            or "separate"; the two are never to be compared.

    Returns:
        n (compared pairs), skipped (a rating is missing), consistent (a count), matrix (rows rating-inferred equal,
        a, b; columns ranking equal, a, b), inconsistency with ci (Wilson) and ci_cluster (bootstrap of prompts),
        kappa (3-class Cohen, unweighted) with kappa_ci, both_strict, flips, flip_rate with its interval,
        rating_tie_strict_ranking, strict_rating_ranking_tie, decisive_ratings, ranking_ties_dropped, by_gap,
        transitivity, and notes of the join.
    """
    if tie_band < 0:
        raise DataError("A tie band is a gap of ratings from 0", why=f"got {tie_band:g}")
    kept = joined.a_N != joined.b_N if drop_identical else np.ones(len(joined.a_N), dtype=bool)
    present = kept & np.isfinite(joined.rating_a_N) & np.isfinite(joined.rating_b_N)
    gap = (joined.rating_a_N - joined.rating_b_N)[present]
    inferred = np.where(np.abs(gap) <= tie_band + 1e-9, EQUAL, np.where(gap > 0, A, B))
    ranked, prompts = joined.ranking_N[present], joined.prompt_N[present]
    tables = np.zeros((len(gap), 9))
    tables[np.arange(len(gap)), 3 * inferred + ranked] = 1
    matrix = tables.sum(0).reshape(3, 3).astype(int)
    report = {"n": len(gap), "skipped": int((kept & ~present).sum()), **_counts(matrix)}
    options: dict[str, Any] = {"draws": draws, "seed": seed}
    report["ci"] = list(wilson(report["n"] - report["consistent"], report["n"]))
    report["ci_cluster"] = list(bootstrap_sums(tables, _inconsistency, prompts, **options))
    kappa = float(kappa_of_matrix(matrix))
    report["kappa"] = kappa
    if np.isfinite(kappa):
        draw = bootstrap_sums(tables, lambda s: kappa_of_matrix(s.reshape(-1, 3, 3)), prompts, **options)
        report["kappa_ci"] = list(draw)
    else:
        report["kappa_reason"] = "both sides used one and the same answer" if len(gap) else "no pair was compared"
    report["n_prompts"] = len(np.unique(prompts))
    report["by_gap"] = _by_gap(gap, inferred, ranked)
    report["transitivity"] = transitivity(joined)
    if len(joined.swap_N):
        report["ranking_ties_by_position_swap"] = int((joined.swap_N[present] & (ranked == EQUAL)).sum())
    return {**report, "elicitation": elicitation, "tie_band": tie_band, "notes": dict(joined.notes)}


def _counts(matrix: np.ndarray) -> dict[str, Any]:
    n, strict = int(matrix.sum()), matrix[1:, 1:]
    consistent, both_strict = int(np.trace(matrix)), int(strict.sum())
    flips, decisive, no_ties = both_strict - int(np.trace(strict)), matrix[1:].sum(), matrix[:, 1:].sum()

    def share(part: float, whole: float) -> float:
        return float(part / whole) if whole else float("nan")

    return {
        "consistent": consistent,
        "consistency": share(consistent, n),
        "inconsistency": share(n - consistent, n),
        "matrix": matrix.tolist(),
        "both_strict": both_strict,
        "flips": flips,
        "flip_rate": share(flips, both_strict),
        "flip_rate_ci": list(wilson(flips, both_strict)),
        "rating_tie_strict_ranking": int(matrix[0, 1:].sum()),
        "strict_rating_ranking_tie": int(matrix[1:, 0].sum()),
        "decisive_ratings": {"n": int(decisive), "consistency": share(np.trace(strict), decisive)},
        "ranking_ties_dropped": {"n": int(no_ties), "consistency": share(np.trace(strict), no_ties)},
    }


def _inconsistency(sums: np.ndarray) -> np.ndarray:
    n = sums.sum(1)
    return 1 - np.divide(sums[:, 0] + sums[:, 4] + sums[:, 8], n, out=np.full(len(n), np.nan), where=n > 0)


def _by_gap(gap: np.ndarray, inferred: np.ndarray, ranked: np.ndarray) -> list[dict[str, Any]]:
    """Return agreement by |rating gap|, rounded to whole points."""
    rows, size = [], np.floor(np.abs(gap) + 0.5)
    for value in np.unique(size):
        at = size == value
        same, strict = int((inferred[at] == ranked[at]).sum()), (inferred[at] > 0) & (ranked[at] > 0)
        flips, n = int((strict & (inferred[at] != ranked[at])).sum()), int(at.sum())
        row = {"gap": int(value), "n": n, "consistent": same, "share": same / n, "ci": list(wilson(same, n))}
        ties = int((ranked[at] == EQUAL).sum())
        rows.append({**row, "flips": flips, "both_strict": int(strict.sum()), "ranking_ties": ties})
    return rows


def transitivity(joined: Joined) -> dict[str, int]:
    """Count the triads of responses whose three pairs were all ranked, and those that are no order.

    `intransitive` triads run in a circle of strict preferences; `tie_violations` have a tie that the other two pairs
    contradict (a = b, b = c, a > c; or a > b, b > c, a = c). Answers to the two orders of a pair are added up.
    """
    signs: dict[int, dict[tuple[int, int], int]] = {}
    columns = (joined.prompt_N, joined.a_N, joined.b_N, joined.ranking_N)
    for prompt, a, b, ranked in zip(*(column.tolist() for column in columns), strict=True):
        if a == b:
            continue
        low, sign = (min(a, b), max(a, b)), {EQUAL: 0, A: 1, B: -1}[ranked]
        pairs = signs.setdefault(prompt, {})
        pairs[low] = pairs.get(low, 0) + (sign if a < b else -sign)
    found = {"triads": 0, "intransitive": 0, "tie_violations": 0, "prompts_too_large": 0}
    for pairs in signs.values():
        names = sorted({name for pair in pairs for name in pair})
        if len(names) > LARGEST_PROMPT:
            found["prompts_too_large"] += 1
            continue
        for x, y, z in combinations(names, 3):
            if not ((x, y) in pairs and (y, z) in pairs and (x, z) in pairs):
                continue
            found["triads"] += 1
            steps = [int(np.sign(s)) for s in (pairs[x, y], pairs[y, z], -pairs[x, z])]
            if 0 not in steps:
                found["intransitive"] += abs(sum(steps)) == 3
            else:
                found["tie_violations"] += abs(sum(steps)) == 2 or steps.count(0) == 2
    return found
