"""Ratings, rankings, thumbs and pairs into one another: nothing invented, nothing lost uncounted."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.protocols import to_pairs, to_rankings, to_scores, to_unpaired

P = [Item("p", word) for word in ("one", "two", "three", "four")]
Q = [Item("q", word) for word in ("one", "two")]
ITEMS = {item.id: item for item in (*P, *Q)}
NAMES = {item.id: item.response for item in P}


def rate(item: Item, value: int, **more: Any) -> FeedbackEvent:
    more = {"annotator": "ann", "scale": (1, 7), **more}
    return FeedbackEvent("ordinal", (item.id,), value, **more)


def compare(a: Item, b: Item, value: str, **more: Any) -> FeedbackEvent:
    return FeedbackEvent("pairwise", (a.id, b.id), value, **{"annotator": "ann", **more})


def rank(ranks: tuple[int, ...], **more: Any) -> FeedbackEvent:
    ids = tuple(item.id for item in P[: len(ranks)])
    return FeedbackEvent("ranking", ids, ranks, **{"annotator": "ann", **more})


def won(found: Any) -> list[tuple[str, str]]:
    return sorted((NAMES.get(r.chosen, "q"), NAMES.get(r.rejected, "q")) for r in found.rows)


RATINGS = [rate(P[0], 6), rate(P[1], 4), rate(P[2], 4), rate(Q[0], 7), rate(Q[1], 1)]


def test_ratings_make_pairs_within_prompts_only():
    found = to_pairs(RATINGS, ITEMS)
    assert won(found) == [("one", "three"), ("one", "two"), ("q", "q")]
    assert sorted(r.margin for r in found.rows) == [2, 2, 6]
    assert found.losses.as_dict() == {"seen": 5, "used": 5, "ties, dropped": 1}
    assert found.rows[0].events == (RATINGS[0].identifier, RATINGS[1].identifier)


@pytest.mark.parametrize(("ties", "rows", "weight"), [("drop", 0, 0), ("half", 2, 0.5), ("keep", 1, 1.0)])
def test_tie_policies(ties: str, rows: int, weight: float):
    found = to_pairs([rate(P[0], 4), rate(P[1], 4)], ITEMS, ties=ties)
    assert [r.weight for r in found.rows] == [weight] * rows and all(r.tie for r in found.rows)
    assert sum(found.losses.reasons.values()) == 1
    if ties == "half":
        assert {(r.chosen, r.rejected) for r in found.rows} == {(P[0].id, P[1].id), (P[1].id, P[0].id)}


def test_minimum_gap_is_counted_and_makes_no_tie():
    found = to_pairs([rate(P[0], 6), rate(P[1], 5), rate(P[2], 2)], ITEMS, min_gap=2, ties="keep")
    assert won(found) == [("one", "three"), ("two", "three")]
    assert found.losses.reasons == {"closer than the minimum gap": 1}


def test_z_scores_compare_within_an_annotator_and_a_flat_one_says_nothing():
    flat = [rate(item, 4, annotator="flat") for item in P[:2]]
    found = to_pairs([rate(P[0], 7), rate(P[1], 5), rate(P[2], 3), *flat], ITEMS, zscore=True)
    assert sorted(r.margin for r in found.rows) == pytest.approx([1, 1, 2])
    assert found.losses.reasons == {"annotators without spread": 1, "ties, dropped": 1}


def test_rankings_and_pairwise_make_pairs():
    found = to_pairs([rank((1, 2, 2)), compare(P[3], P[0], "b", key="other")], ITEMS)
    assert won(found) == [("one", "four"), ("one", "three"), ("one", "two")]
    assert [r.margin for r in found.rows] == [1, 1, None]


def test_ties_remember_where_they_come_from():
    events = [compare(P[0], P[1], "both_bad"), compare(P[1], P[2], "tie", tie_origin="position_swap")]
    assert to_pairs(events, ITEMS).losses.reasons == {
        "both bad, taken for ties": 1,
        "ties of two orders that contradict": 1,
        "ties, dropped": 2,
    }


def test_what_cannot_be_compared_is_counted():
    stranger = Item("elsewhere", "x")
    tombstone = FeedbackEvent("ordinal", (P[0].id,), None, tombstone=True)
    thumb = FeedbackEvent("binary", (P[0].id,), True)
    events = [compare(P[0], Q[0], "a"), rate(stranger, 3), tombstone, thumb, rate(Q[0], 3)]
    assert to_pairs(events, ITEMS).losses.as_dict() == {
        "seen": 5,
        "used": 0,
        "an unknown item": 1,
        "items of different prompts": 1,
        "kind binary does not say this": 1,
        "ratings alone under their prompt": 1,
        "tombstones": 1,
    }


def test_identical_responses_are_counted_and_dropped_when_asked():
    spaced = Item("p", "one ")
    items = {**ITEMS, spaced.id: spaced}
    events = [compare(P[0], spaced, "a")]
    kept, dropped = to_pairs(events, items), to_pairs(events, items, drop_identical=True)
    assert len(kept.rows) == 1 and kept.losses.reasons == {"identical responses, kept": 1}
    assert not dropped.rows and dropped.losses.reasons == {"identical responses, dropped": 1}


@pytest.mark.parametrize(("policy", "label"), [("first", True), ("last", False), ("mean", True)])
def test_contradictions_need_a_policy(policy: str, label: bool):
    events = [compare(P[0], P[1], value, session=str(n), ts=n + 1) for n, value in enumerate("aab")]
    with pytest.raises(DataError, match="An annotator contradicts itself .*ann gave both .*first, last or mean"):
        to_pairs(events, ITEMS)
    (row,) = to_pairs(events, ITEMS, duplicates=policy).rows
    assert (row.chosen == P[0].id) is label
    assert len(row.events) == (3 if policy == "mean" else 1)
    assert len(to_pairs(events[:2], ITEMS).rows) == 1


def test_the_order_of_events_is_their_time():
    events = [compare(P[0], P[1], "a", session="x", ts=5), compare(P[0], P[1], "b", session="y", ts=2)]
    assert to_pairs(events, ITEMS, duplicates="first").rows[0].chosen == P[1].id


def test_two_scales_are_not_mixed():
    mixed = [rate(P[0], 3), rate(P[1], 3, scale=(1, 5))]
    with pytest.raises(DataError, match=r"different scales .*\(1, 5\), \(1, 7\).*again with --default-key NAME"):
        to_pairs(mixed, ITEMS)
    for bound in ({"up_from": 3}, {"down_to": 3}):
        with pytest.raises(DataError, match=r"different scales .*\(1, 5\), \(1, 7\).*--default-key"):
            to_unpaired(mixed, ITEMS, **bound)
    assert [row.label for row in to_unpaired([mixed[0], rate(P[1], 4, scale=(1, 5))], ITEMS).rows] == [False, True]


def test_unpaired():
    thumb = FeedbackEvent("binary", (P[3].id,), False, annotator="ann")
    heart = FeedbackEvent("reaction", (P[0].id,), "love", annotator="ann")
    other = FeedbackEvent("reaction", (P[1].id,), "wow", annotator="ann")
    found = to_unpaired([*RATINGS[:2], thumb, heart, other], ITEMS, up=["love"], down=["sad"])
    assert [(NAMES[r.item], r.label, r.kind) for r in found.rows] == [
        ("one", True, "ordinal"), ("four", False, "binary"), ("one", True, "reaction"),
    ]  # fmt: skip
    assert found.losses.reasons == {"no side taken": 2}


def test_unpaired_thresholds_and_comparisons():
    found = to_unpaired([rate(item, v) for item, v in zip(P, (7, 6, 5, 2), strict=True)], ITEMS, up_from=6, down_to=2)
    assert [r.label for r in found.rows] == [True, True, False]
    events = [compare(P[0], P[1], "both_bad"), compare(P[2], P[3], "b"), rank((1, 2, 3), key="r")]
    labels = {(NAMES[r.item], r.kind): r.label for r in to_unpaired(events, ITEMS).rows}
    assert labels == {
        ("one", "pairwise"): False, ("two", "pairwise"): False, ("three", "pairwise"): False,
        ("four", "pairwise"): True, ("one", "ranking"): True, ("three", "ranking"): False,
    }  # fmt: skip


def test_scores():
    scores = {(NAMES[r.item], r.kind): r.score for r in to_scores([rate(P[0], 6), rank((2, 1, 2))], ITEMS).rows}
    assert scores == {
        ("one", "ordinal"): pytest.approx(5 / 6), ("one", "ranking"): 0.25, ("two", "ranking"): 1.0,
        ("three", "ranking"): 0.25,
    }  # fmt: skip
    z = to_scores([rate(P[0], 7), rate(P[1], 5), rate(P[2], 3)], ITEMS, zscore=True)
    assert [r.score for r in z.rows] == pytest.approx([1, 0, -1])


def test_rankings():
    (row,) = to_rankings(RATINGS[:3], ITEMS).rows
    assert [NAMES[i] for i in row.items] == ["one", "two", "three"] and row.ranks == (1, 2, 2)
    circle = [compare(P[0], P[1], "a"), compare(P[1], P[2], "a"), compare(P[2], P[0], "a")]
    found = to_rankings(circle, ITEMS)
    assert found.rows[0].ranks == (1, 1, 1) and found.losses.reasons == {"comparisons against the order": 3}
    chain = to_rankings(circle[:2], ITEMS)
    assert chain.losses.reasons == {"pairs of a ranking never compared": 1}


values = st.lists(st.integers(1, 7), min_size=4, max_size=4)


@settings(max_examples=100, deadline=None)
@given(values, st.sampled_from(["drop", "half", "keep"]), st.integers(0, 4))
def test_every_pair_is_a_row_or_a_loss(ratings: list[int], ties: str, gap: int):
    found = to_pairs([rate(i, v) for i, v in zip(P, ratings, strict=True)], ITEMS, ties=ties, min_gap=gap)
    equal = sum(a == b for a, b in combinations(ratings, 2))
    close = sum(0 < abs(a - b) < gap for a, b in combinations(ratings, 2))
    assert sum(not r.tie for r in found.rows) == 6 - equal - close
    assert sum(r.weight for r in found.rows if r.tie) == (0 if ties == "drop" else equal)
    assert found.losses.reasons["closer than the minimum gap"] == close
    for row in found.rows:
        assert row.tie or ratings[P.index(ITEMS[row.chosen])] > ratings[P.index(ITEMS[row.rejected])]


@settings(max_examples=100, deadline=None)
@given(values)
def test_a_ranking_of_ratings_gives_the_same_pairs(ratings: list[int]):
    direct = to_pairs([rate(i, v) for i, v in zip(P, ratings, strict=True)], ITEMS, ties="keep")
    (row,) = to_rankings([rate(i, v) for i, v in zip(P, ratings, strict=True)], ITEMS).rows
    ranked = FeedbackEvent("ranking", row.items, row.ranks, annotator="ann")
    again = to_pairs([ranked], ITEMS, ties="keep")
    strict = [Counter((r.chosen, r.rejected) for r in found.rows if not r.tie) for found in (direct, again)]
    assert strict[0] == strict[1] and len(direct.rows) == len(again.rows) == 6
