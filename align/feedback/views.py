"""Events as the arrays that statistics are computed on: answers of raters, joined protocols, comparisons, exposures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.aggregate import Comparisons
from align.feedback.agreement import Answers
from align.feedback.consistency import EQUAL, A, B, Joined, Merged, repeats
from align.feedback.events import FeedbackEvent, Item
from align.feedback.protocols import require_one_scale

ANSWERS = ("binary", "reaction", "ordinal", "pairwise", "ranking")
BOOKKEEPING = ".attempt"
"""Ending of the key under which an annotator's raw attempts are kept; they are no answers."""


def signals(events: Iterable[FeedbackEvent]) -> dict[tuple[str, str], int]:
    """Return how many answers each (key, kind) has, the most first."""
    found = Counter((e.key, e.kind) for e in events if e.kind in ANSWERS and not e.tombstone)
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def model_of(item: Item) -> str:
    """Return the model that made an item, as its metadata says (`model`, else `policy`); "" where it does not."""
    return str(item.metadata.get("model", item.metadata.get("policy", "")) or "")


def text_of(item: Item) -> str:
    """Return the text of a response: a text as it stands, the turns of a chat below one another."""
    if isinstance(item.response, str):
        return item.response
    return "\n".join(str(turn.get("content", "")) for turn in item.response)


def signed_pairs(event: FeedbackEvent) -> list[tuple[str, str, int]]:
    """Return (first, second, sign) of every pair that a pairwise answer or a ranking compares; 0 is a tie."""
    if event.kind == "pairwise":
        return [(event.items[0], event.items[1], {"a": 1, "b": -1}.get(event.value, 0))]
    if event.kind != "ranking":
        return []
    ranked = zip(event.items, event.value, strict=True)
    return [(a, b, (s > r) - (s < r)) for (a, r), (b, s) in combinations(ranked, 2)]


def of_key(event: FeedbackEvent, key: str | None, ratings_key: str | None = None) -> bool:
    """Whether an event is of the signal `key`, or a rating of `ratings_key` where ratings have another; None is any."""
    asked = key if ratings_key is None or event.kind != "ordinal" else ratings_key
    return asked is None or event.key == asked


def _in_time(events: Iterable[FeedbackEvent], kinds: Sequence[str], key: str | None) -> list[FeedbackEvent]:
    kept = (e for e in events if e.kind in kinds and not e.tombstone and of_key(e, key))
    return sorted(kept, key=lambda e: e.ts)


def rating_keys(events: Iterable[FeedbackEvent], key: str | None = None) -> dict[str, int]:
    """Return how many ratings each key has, in order of the keys; of `key` alone where it is given."""
    rated = (e for e in events if e.kind == "ordinal" and not e.tombstone and of_key(e, key))
    return dict(sorted(Counter(e.key for e in rated).items()))


def one_rating(
    events: Iterable[FeedbackEvent], key: str | None = None,
    do: str = "Choose one with --key, or with --ratings-key where rankings have another",
) -> list[FeedbackEvent]:  # fmt: skip
    """Return the ratings of one signal, in order of time.

    Args:
        do: what to do about several.

    Raises:
        DataError: they are of several keys, or on several scales.
    """
    rated = _in_time(events, ("ordinal",), key)
    keys = rating_keys(rated)
    if len(keys) > 1:
        raise DataError(
            "Ratings of several signals are not one rating",
            why=", ".join(f"{n} have the key {name}" for name, n in keys.items()), do=do,
        )  # fmt: skip
    require_one_scale({event.scale for event in rated if event.scale}, next(iter(keys), ""))
    return rated


# --- agreement --------------------------------------------------------------------------------------


def answers_of(events: Iterable[FeedbackEvent], items: Mapping[str, Item], key: str, kind: str) -> Answers:
    """Return who answered what about the signal (key, kind): the newest answer of each annotator to each unit.

    A unit is an item, or for "pairwise" and "ranking" a pair of items; its cluster is the prompt.

    Raises:
        DataError: ratings on different scales under one key.
    """
    said: dict[tuple[Any, str], Any] = {}
    scales: set[tuple[int, int]] = set()
    for event in _in_time(events, (kind,), key):
        if kind in ("pairwise", "ranking"):
            for a, b, sign in signed_pairs(event):
                unit, sign = ((a, b), sign) if a < b else ((b, a), -sign)
                both_bad = kind == "pairwise" and event.value == "both_bad"
                said[unit, event.annotator] = "both_bad" if both_bad else ("tie", "first", "second")[sign]
        else:
            said[event.items[0], event.annotator] = event.value
            scales |= {event.scale} if event.scale else set()
    require_one_scale(scales, key)
    if kind == "ordinal":
        low, high = next(iter(scales)) if scales else (1, 1)
        categories: tuple[Any, ...] = tuple(range(low, high + 1))
    elif kind in ("pairwise", "ranking"):
        categories = ("first", "tie", "second", *(("both_bad",) if "both_bad" in said.values() else ()))
    else:
        categories = (False, True) if kind == "binary" else tuple(sorted(set(said.values())))
    index = {category: i for i, category in enumerate(categories)}
    units = {unit: i for i, unit in enumerate(dict.fromkeys(unit for unit, _ in said))}
    raters = {rater: i for i, rater in enumerate(sorted({rater for _, rater in said}))}
    prompts = [items[u if isinstance(u, str) else u[0]].prompt_id if _known(u, items) else str(u) for u in units]
    clusters = np.unique(prompts, return_inverse=True)[1] if prompts else np.zeros(0, dtype=np.int64)
    columns = [(units[u], raters[r], index[v]) for (u, r), v in said.items()]
    unit, rater, code = np.array(columns, dtype=np.int64).reshape(-1, 3).T
    return Answers(unit, rater, code, tuple(raters), categories, len(units), clusters, kind == "ordinal")


def _known(unit: Any, items: Mapping[str, Item]) -> bool:
    return (unit if isinstance(unit, str) else unit[0]) in items


# --- both protocols ---------------------------------------------------------------------------------


def joined_of(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], *, key: str | None = None,
    ratings_key: str | None = None, within: bool | None = None, duplicates: str = "first",
) -> Joined:  # fmt: skip
    """Return every ranked pair with the ratings of its two items.

    Args:
        key: of the rankings, and of the ratings; None is any.
        ratings_key: of the ratings, where it is another.
        within: join answers of the same annotator only; or (false) everyone's rankings with mean ratings. None does
            the first where any annotator gave both.
        duplicates: what counts of the answers that one annotator gave to one question in several sessions: the first,
            the last, or the mean. Rankings without an annotator are nobody's repeats.

    Raises:
        DataError: ratings of several keys, or on several scales.
    """
    events = list(events)
    rated, ranked, swapped = Merged(duplicates), Merged(duplicates), Merged(duplicates)
    for event in one_rating(events, key if ratings_key is None else ratings_key):
        rated.add((event.annotator, event.items[0]), float(event.value), event.id)
    compared = _in_time(events, ("pairwise", "ranking"), key)
    if within is None:
        raters = {annotator for annotator, _ in rated.places}
        within = any(event.annotator in raters for event in compared)
    pooled: dict[str, list[float]] = {}
    for annotator, item in rated.places:
        pooled.setdefault(item, []).append(rated.get((annotator, item)))
    means = {item: float(np.mean(values)) for item, values in pooled.items()}
    ids: dict[str, int] = {}
    prompts: dict[str, int] = {}
    rows: list[tuple[float, ...]] = []
    across = 0
    for nth, event in enumerate(compared):
        for a, b, sign in signed_pairs(event):
            if a not in items or b not in items or items[a].prompt_id != items[b].prompt_id:
                across += 1
                continue
            question = (event.annotator or nth, event.key, a, b)
            ranked.add(question, float(sign), event.id)
            swapped.add(question, float(event.tie_origin == "position_swap"), event.id)
            if len(ranked.value) == len(rows):
                continue
            found = [rated.get((event.annotator, i)) if within else means.get(i, np.nan) for i in (a, b)]
            prompt = prompts.setdefault(items[a].prompt_id, len(prompts))
            rows.append((prompt, *(ids.setdefault(i, len(ids)) for i in (a, b)), *found))
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    prompt_N, a_N, b_N = (table[:, i].astype(np.int64) for i in range(3))
    sign_N = np.sign(np.array(ranked.value))
    ranking_N = np.where(sign_N > 0, A, np.where(sign_N < 0, B, EQUAL))
    joined_by = "annotator" if within else "mean rating of each item"
    notes = {
        "joined_by": joined_by, "ratings": len(rated.value), "outside_prompts": across, **repeats(rated, ranked)
    }  # fmt: skip
    swap_N = np.array(swapped.value) == 1
    return Joined(prompt_N, a_N, b_N, table[:, 3], table[:, 4], ranking_N, swap_N, notes)


def comparisons_of(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], *, key: str | None = None, by: str = "model"
) -> Comparisons:
    """Return pairwise answers and rankings as comparisons of models (`by="model"`) or of items (`by="item"`).

    Comparisons of a model with itself, or of items without a model, are left out.
    """
    names: dict[str, int] = {}
    prompts: dict[str, int] = {}
    raters: dict[str, int] = {}
    rows = []
    for event in _in_time(events, ("pairwise", "ranking"), key):
        for a, b, sign in signed_pairs(event):
            if a not in items or b not in items:
                continue
            left, right = (model_of(items[a]), model_of(items[b])) if by == "model" else (a, b)
            if not left or not right or left == right:
                continue
            pair = [names.setdefault(name, len(names)) for name in (left, right)]
            prompt = prompts.setdefault(items[a].prompt_id, len(prompts))
            rows.append((*pair, sign, prompt, raters.setdefault(event.annotator, len(raters))))
    i, j, outcome, cluster, rater = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    order = sorted(names)
    place = np.array([order.index(name) for name in names], dtype=np.int64)
    i, j = (place[i], place[j]) if rows else (i, j)
    return Comparisons(i, j, outcome, tuple(order), cluster, rater)


def wins_of(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], ours: str, theirs: str, *, key: str | None = None,
    ratings_key: str | None = None,
) -> tuple[dict[str, float], dict[str, float], set[str]]:  # fmt: skip
    """Return wins by ratings and wins by rankings for each prompt, and the models the answers are about.

    Args:
        ratings_key: of the ratings, where it is another than `key`.

    Raises:
        DataError: ratings of several keys, or on several scales.
    """
    events = list(events)
    scores: dict[tuple[str, str], list[float]] = {}
    ranked: dict[str, list[float]] = {}
    models: set[str] = set()
    given = one_rating(events, key if ratings_key is None else ratings_key)
    for event in [*given, *_in_time(events, ("pairwise", "ranking"), key)]:
        if any(item not in items for item in event.items):
            continue
        models.update(model_of(items[item]) for item in event.items)
        if event.kind == "ordinal":
            item = items[event.items[0]]
            scores.setdefault((item.prompt_id, model_of(item)), []).append(float(event.value))
        for a, b, sign in signed_pairs(event):
            pair = model_of(items[a]), model_of(items[b])
            if set(pair) == {ours, theirs}:
                won = (sign + 1) / 2
                ranked.setdefault(items[a].prompt_id, []).append(won if pair[0] == ours else 1 - won)
    from align.feedback.winrate import rating_wins

    rated = rating_wins({k: float(np.mean(v)) for k, v in scores.items()}, ours, theirs)
    return rated, {prompt: float(np.mean(v)) for prompt, v in ranked.items()}, models - {""}


# --- exposures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What was shown to whom, one entry a (user, item, session), and whether a signal came back.

    Args:
        value_N: the reaction as a number, positive 1 and negative 0 (a rating within [0, 1]); NaN where none came.
        position_N: place among those shown, -1 unknown.
        unknown: reactions to which no exposure is known; they enter no rate.
    """

    user_N: np.ndarray
    item_N: np.ndarray
    policy_N: np.ndarray
    position_N: np.ndarray
    ts_N: np.ndarray
    value_N: np.ndarray
    unknown: int

    @property
    def reacted_N(self) -> np.ndarray:
        """Whether a signal came back."""
        return np.isfinite(self.value_N)


def shown_of(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], key: str, kind: str, *, positive: str = ""
) -> Shown:
    """Return exposures with the answers (key, kind) that came back.

    An exposure counts for a signal of its own key, and for every signal where it carries the key "shown" or the answers
    do not have exposures of their own. An answer that says itself that its item was shown is an exposure too.

    Args:
        positive: of reactions, the name that counts; any other name is a reaction of another signal.
    """
    events = [e for e in events if not e.tombstone]
    shown = [e for e in events if e.kind == "exposure"]
    # A screen that asked for a comparison of its items did not ask for a thumb on each of them.
    compared = {(e.annotator, e.session, frozenset(e.items)) for e in events if e.kind in ("pairwise", "ranking")}
    own = [e for e in shown if e.key == key]
    shown = [e for e in shown if (e.annotator, e.session, frozenset(e.items)) not in compared]
    rows: dict[tuple[str, str, str], list[Any]] = {}
    for event in own or shown:
        for nth, item in enumerate(event.items):
            position = event.position if event.position is not None else (nth if len(event.items) > 1 else -1)
            rows[event.annotator, item, event.session] = [event.policy, position, event.ts, np.nan]
    unknown = 0
    by_user_item: dict[tuple[str, str], tuple[str, str, str]] = {place[:2]: place for place in rows}
    for event in _in_time(events, (kind,), key):
        value = _number(event, positive)
        if value is None:
            continue
        place = (event.annotator, event.items[0], event.session)
        other = by_user_item.get(place[:2], place)
        apart = event.exposure == "shown" and place[2] and other[2]  # two sessions, two showings
        place = place if place in rows or apart else other
        if place not in rows and event.exposure == "shown":
            position = -1 if event.position is None else event.position
            rows[place] = [event.policy, position, event.ts, np.nan]
        if place in rows:
            rows[place][3] = value
        else:
            unknown += 1
    user, item = (np.array([place[i] for place in rows], dtype=object) for i in (0, 1))
    said = [model_of(items[place[1]]) if place[1] in items else "" for place in rows]
    policy = np.array([row[0] or model for row, model in zip(rows.values(), said, strict=True)], dtype=object)
    columns = [np.array([row[i] for row in rows.values()]) for i in (1, 2, 3)]
    position_N, ts_N = columns[0].astype(np.int64), columns[1].astype(np.int64)
    return Shown(user, item, policy, position_N, ts_N, columns[2].astype(np.float64), unknown)


def _number(event: FeedbackEvent, positive: str) -> float | None:
    if event.kind == "binary":
        return float(event.value)
    if event.kind == "reaction":
        return 1.0 if not positive or event.value == positive else None
    if event.kind == "ordinal" and event.scale:
        return (event.value - event.scale[0]) / (event.scale[1] - event.scale[0])
    return None
