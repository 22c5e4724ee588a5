"""Ratings, rankings, thumbs and pairs into one another: pure functions that count everything they lose.

Raw events are never converted in place: these functions read the current events and make rows for an export, each with
the ids of the events it stands on.

|              | pairs                                  | unpaired (thumbs)             | scores in [0, 1]        |
|--------------|----------------------------------------|-------------------------------|-------------------------|
| ratings      | higher wins, per annotator and prompt  | above or below the middle     | (value - low)/(high-low)|
| rankings     | the better rank wins                   | best up, worst down           | 1 the best, 0 the worst |
| pairwise     | as it stands                           | winner up, loser down         | winner 1, tie .5        |
| thumbs       | (none: a thumb compares nothing)       | as they stand                 | 1 or 0                  |

Pairs are made within a prompt only. A tie is dropped, split in two rows of half weight, or kept as one row that says so
(for models with ties, see `align.feedback.aggregate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Generic, TypeVar

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.registry import suggest

TIES = ("drop", "half", "keep")
DUPLICATES = ("first", "last", "mean")

T = TypeVar("T")


@dataclass
class Losses:
    """What a conversion met and what it lost: `seen` events, `used` of them, and how many of what by `reasons`."""

    seen: int = 0
    used: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-ready numbers."""
        return {"seen": self.seen, "used": self.used, **dict(sorted(self.reasons.items()))}


@dataclass(frozen=True)
class Converted(Generic[T]):
    """Rows of one form and what was lost on the way to them."""

    rows: list[T]
    losses: Losses


@dataclass(frozen=True)
class PairRow:
    """One comparison: `chosen` over `rejected`, or a tie of the two.

    Args:
        weight: 1, or .5 for each half of a tie.
        tie: whether the two were said to be equal.
        margin: by how much, in points of the rating, ranks, or standard deviations; None where nothing says.
        events: ids of the events it stands on.
    """

    chosen: str
    rejected: str
    annotator: str
    key: str
    kind: str
    events: tuple[str, ...]
    weight: float = 1.0
    tie: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class UnpairedRow:
    """One output with a thumb up or down."""

    item: str
    label: bool
    annotator: str
    key: str
    kind: str
    events: tuple[str, ...]


@dataclass(frozen=True)
class ScoreRow:
    """One output with a number: in [0, 1], or in standard deviations of its annotator after a z-score."""

    item: str
    score: float
    annotator: str
    key: str
    kind: str
    events: tuple[str, ...]


@dataclass(frozen=True)
class RankingRow:
    """Outputs of one prompt with their ranks, 1 the best, ties sharing a rank."""

    items: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str
    key: str
    kind: str
    events: tuple[str, ...]


# --- the four conversions ---------------------------------------------------------------------------


def to_pairs(
    events: Iterable[FeedbackEvent],
    items: Mapping[str, Item],
    *,
    ties: str = "drop",
    min_gap: float = 0.0,
    zscore: bool = False,
    duplicates: str = "",
    drop_identical: bool = False,
) -> Converted[PairRow]:
    """Return comparisons made of ratings, rankings and pairwise answers, each annotator for itself.

    Args:
        ties: "drop", "half" (a row each way at weight .5) or "keep" (one row with `tie`).
        min_gap: ratings closer than this, or ranks, give no pair; they are counted, not taken for ties.
        zscore: compare ratings in standard deviations of their annotator.
        duplicates: which answer counts where an annotator contradicts itself about the same items: "first", "last" or
            "mean". Empty refuses.
        drop_identical: leave out pairs whose two responses read the same up to spaces.

    Raises:
        DataError: a contradiction and no policy for it, ratings of one annotator on different scales, or a bad option.
    """
    _check(ties, TIES, "tie policy")
    losses, rows = Losses(), []
    for a, b, gap, about in _comparisons(events, items, losses, zscore, duplicates):
        if _same_text(items[a], items[b]):
            losses.reasons["identical responses, dropped" if drop_identical else "identical responses, kept"] += 1
            if drop_identical:
                continue
        graded = about["kind"] in ("ordinal", "ranking")
        if gap == 0:
            losses.reasons[
                f"ties, {'split in two' if ties == 'half' else 'kept' if ties == 'keep' else 'dropped'}"
            ] += 1
            margin = 0.0 if graded else None
            halves = {"drop": [], "half": [(a, b), (b, a)], "keep": [(a, b)]}[ties]
            weight = 0.5 if ties == "half" else 1.0
            rows += [PairRow(x, y, **about, weight=weight, tie=True, margin=margin) for x, y in halves]
        elif graded and abs(gap) < min_gap:
            losses.reasons["closer than the minimum gap"] += 1
        else:
            margin = abs(gap) if graded else None
            rows.append(PairRow(*((a, b) if gap > 0 else (b, a)), **about, margin=margin))
    return _counted(rows, losses)


def to_unpaired(
    events: Iterable[FeedbackEvent],
    items: Mapping[str, Item],
    *,
    up_from: float | None = None,
    down_to: float | None = None,
    up: Sequence[str] = (),
    down: Sequence[str] = (),
    duplicates: str = "",
) -> Converted[UnpairedRow]:
    """Return a thumb up or down for each output, from thumbs, reactions, ratings, rankings and pairwise answers.

    Args:
        up_from, down_to: ratings from and up to which a thumb is given; by default above and below the middle of the
            scale, the middle itself giving none.
        up, down: names of reactions that stand for a thumb; others are lost.
        duplicates: see `to_pairs`; "mean" goes by the majority, and an even split is lost.

    Raises:
        DataError: bounds for ratings on several scales.
    """
    events = list(events)
    if up_from is not None or down_to is not None:
        require_one_scale(e.scale for e in events if e.kind == "ordinal" and e.scale and not e.tombstone)

    def labels(event: FeedbackEvent) -> list[tuple[str, float]]:
        if event.kind == "binary":
            return [(event.items[0], float(event.value))]
        if event.kind == "reaction":
            said = {**dict.fromkeys(down, 0.0), **dict.fromkeys(up, 1.0)}.get(event.value)
            return [] if said is None else [(event.items[0], said)]
        if event.kind == "ordinal" and event.scale:
            middle = sum(event.scale) / 2
            if event.value >= up_from if up_from is not None else event.value > middle:
                return [(event.items[0], 1.0)]
            low = event.value <= down_to if down_to is not None else event.value < middle
            return [(event.items[0], 0.0)] if low else []
        if event.kind == "pairwise":
            told = {"a": (1.0, 0.0), "b": (0.0, 1.0), "both_bad": (0.0, 0.0)}.get(event.value, ())
            return list(zip(event.items, told, strict=False))
        best, worst = min(event.value), max(event.value)
        ranked = zip(event.items, event.value, strict=True)
        return [(i, float(r == best)) for i, r in ranked if r in (best, worst)] if best < worst else []

    found = _per_item(events, items, labels, duplicates, ("binary", "reaction", "ordinal", "ranking", "pairwise"))
    even = [row for row in found.rows if row.score == 0.5]
    if even:
        found.losses.reasons["an even split of up and down"] += len(even)
    rows = [
        UnpairedRow(r.item, r.score > 0.5, r.annotator, r.key, r.kind, r.events) for r in found.rows if r.score != 0.5
    ]
    return _counted(rows, found.losses)


def to_scores(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], *, zscore: bool = False, duplicates: str = ""
) -> Converted[ScoreRow]:
    """Return a score for each output and annotator: in [0, 1], or in standard deviations of the annotator's ratings.

    Args:
        zscore: `(s - mean) / std` over the ratings of one annotator and key; one with no spread scores 0, counted.
        duplicates: see `to_pairs`.
    """

    def scores(event: FeedbackEvent) -> list[tuple[str, float]]:
        if event.kind == "binary":
            return [(event.items[0], float(event.value))]
        if event.kind == "ordinal" and event.scale:
            low, high = event.scale
            return [(event.items[0], (event.value - low) / (high - low))]
        if event.kind == "pairwise":
            told = {"a": (1.0, 0.0), "b": (0.0, 1.0), "both_bad": (0.0, 0.0), "tie": (0.5, 0.5)}[event.value]
            return list(zip(event.items, told, strict=True))
        ranks, k = event.value, len(event.value)
        middle = [sum(r < mine for r in ranks) + (sum(r == mine for r in ranks) - 1) / 2 for mine in ranks]
        return [(item, 1 - place / (k - 1)) for item, place in zip(event.items, middle, strict=True)]

    found = _per_item(events, items, scores, duplicates, ("binary", "ordinal", "ranking", "pairwise"))
    if not zscore:
        return found
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in found.rows:
        groups.setdefault((row.annotator, row.key, row.kind), []).append(row.score)
    scale = {group: _moments(values) for group, values in groups.items()}
    found.losses.reasons["annotators without spread"] += sum(spread == 0 for _, spread in scale.values())
    rows = []
    for row in found.rows:
        mean, spread = scale[row.annotator, row.key, row.kind]
        score = (row.score - mean) / spread if spread else 0.0
        rows.append(ScoreRow(row.item, score, row.annotator, row.key, row.kind, row.events))
    return Converted(rows, found.losses)


def to_rankings(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], *, duplicates: str = ""
) -> Converted[RankingRow]:
    """Return each annotator's ranking of each prompt's outputs, from ratings, rankings and pairwise answers.

    Ratings rank by value. Pairwise answers rank by wins minus losses, and those that contradict the order this gives
    are counted. Rankings stand as they are.

    Args:
        duplicates: see `to_pairs`.
    """
    events, losses = list(events), Losses()
    by_group: dict[tuple[str, ...], list[tuple[str, str, float, tuple[str, ...]]]] = {}
    for a, b, gap, about in _comparisons(events, items, losses, False, duplicates):
        group = (items[a].prompt_id, about["annotator"], about["key"], about["kind"])
        by_group.setdefault(group, []).append((a, b, gap, about["events"]))
    rows = []
    for (_, annotator, key, kind), pairs in by_group.items():
        tally: dict[str, int] = {}
        for a, b, gap, _ in pairs:
            for item, won in ((a, (gap > 0) - (gap < 0)), (b, (gap < 0) - (gap > 0))):
                tally[item] = tally.get(item, 0) + won
        losses.reasons["comparisons against the order"] += sum(
            gap != 0 and (tally[a] - tally[b]) * gap <= 0 for a, b, gap, _ in pairs
        )
        missing = len(tally) * (len(tally) - 1) // 2 - len({frozenset(pair[:2]) for pair in pairs})
        losses.reasons["pairs of a ranking never compared"] += missing
        named = tuple(sorted(tally, key=lambda item: -tally[item]))
        ranks = tuple(1 + sum(tally[other] > tally[item] for other in named) for item in named)
        sources = tuple(dict.fromkeys(i for *_, ids in pairs for i in ids))
        rows.append(RankingRow(named, ranks, annotator, key, kind, sources))
    return _counted(rows, losses)


# --- shared -----------------------------------------------------------------------------------------


def require_one_scale(scales: Iterable[tuple[int, int]], where: str = "") -> None:
    """Refuse ratings on several scales where they are compared with one another, or with one bound.

    Raises:
        DataError: naming the scales.
    """
    found = sorted(set(scales))
    if len(found) > 1:
        raise DataError(
            "Ratings on different scales cannot be compared", where=where, why=f"found {found}",
            do="Give each scale a key of its own (import its file again with --default-key NAME, into another store), "
            "and choose one with --key",
        )  # fmt: skip


def _check(word: str, known: Sequence[str], what: str) -> None:
    if word not in known:
        raise DataError(f"Unknown {what} {word!r}", do=suggest(word, known))


def _counted(rows: list[T], losses: Losses) -> Converted[T]:
    losses.used = len({event for row in rows for event in row.events})
    losses.reasons = +losses.reasons
    return Converted(rows, losses)


def source_id(event: FeedbackEvent) -> str:
    """Return the id by which a row names an event: the store's, or its identifier before it was stored."""
    return event.id or event.identifier


def _wanted(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], losses: Losses, kinds: Sequence[str]
) -> Iterable[FeedbackEvent]:
    for event in events:
        losses.seen += 1
        if event.tombstone or event.kind not in kinds:
            losses.reasons["tombstones" if event.tombstone else f"kind {event.kind} does not say this"] += 1
        elif any(item not in items for item in event.items):
            losses.reasons["an unknown item"] += 1
        elif len({items[item].prompt_id for item in event.items}) > 1:
            losses.reasons["items of different prompts"] += 1
        else:
            yield event


def _resolve(
    values: list[tuple[float, str]], duplicates: str, what: str, who: str, losses: Losses
) -> tuple[float, tuple[str, ...]]:
    """Return the value that counts of several about one thing, and the events it stands on."""
    if len(values) == 1:
        return values[0][0], (values[0][1],)
    ids = tuple(dict.fromkeys(name for _, name in values))
    if len({value for value, _ in values}) == 1:
        losses.reasons["repeats of the same answer"] += len(values) - 1
        return values[0][0], ids
    if not duplicates:
        raise DataError(
            "An annotator contradicts itself", where=what, why=f"{who or 'one without a name'} gave both in events"
            f" {ids[0]} and {ids[1]}", do="Say which counts: first, last or mean",
        )  # fmt: skip
    _check(duplicates, DUPLICATES, "policy for duplicates")
    losses.reasons["contradictions of an annotator with itself"] += 1
    if duplicates == "mean":
        return fmean(value for value, _ in values), ids
    value, name = values[0] if duplicates == "first" else values[-1]
    return value, (name,)


def _per_item(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], read: Any, duplicates: str, kinds: Sequence[str]
) -> Converted[ScoreRow]:
    losses = Losses()
    said: dict[tuple[str, str, str, str], list[tuple[float, str]]] = {}
    # A pairwise answer or a ranking is about the items it stands among, so several about one item are no contradiction.
    for event in sorted(_wanted(events, items, losses, kinds), key=lambda e: e.ts):
        found = read(event)
        if not found:
            losses.reasons["no side taken"] += 1
        for item, value in found:
            among = "" if len(event.items) == 1 else "+".join(sorted(event.items))
            said.setdefault((item, event.annotator, event.key, f"{event.kind}\n{among}"), []).append(
                (value, source_id(event))
            )
    rows = []
    for (item, annotator, key, kind), values in said.items():
        value, ids = _resolve(values, duplicates, f"item {item}, {key}", annotator, losses)
        rows.append(ScoreRow(item, value, annotator, key, kind.partition("\n")[0], ids))
    return _counted(rows, losses)


def _comparisons(
    events: Iterable[FeedbackEvent], items: Mapping[str, Item], losses: Losses, zscore: bool, duplicates: str
) -> Iterable[tuple[str, str, float, dict[str, Any]]]:
    """Yield (a, b, by how much a is better, what to write beside it) of every comparison made by one annotator."""
    kinds = ("ordinal", "ranking", "pairwise")
    wanted = sorted(_wanted(events, items, losses, kinds), key=lambda e: e.ts)
    yield from _rated(items, [e for e in wanted if e.kind == "ordinal"], losses, zscore, duplicates)
    said: dict[tuple[str, str, str, str, str], list[tuple[float, str]]] = {}
    for event in wanted:
        if event.kind == "pairwise":
            losses.reasons["both bad, taken for ties"] += event.value == "both_bad"
            losses.reasons["ties of two orders that contradict"] += event.tie_origin == "position_swap"
            pairs = [(*event.items, {"a": 1.0, "b": -1.0}.get(event.value, 0.0))]
        elif event.kind == "ranking":
            ranked = zip(event.items, event.value, strict=True)
            pairs = [(a, b, float(s - r)) for (a, r), (b, s) in combinations(ranked, 2)]
        else:
            continue
        for a, b, gap in pairs:
            a, b, gap = (a, b, gap) if a < b else (b, a, -gap)
            said.setdefault((a, b, event.annotator, event.key, event.kind), []).append((gap, source_id(event)))
    for (a, b, annotator, key, kind), values in said.items():
        if len({(v > 0) - (v < 0) for v, _ in values}) == 1 and len(values) > 1:
            values = [(values[0][0], name) for _, name in values]
        gap, ids = _resolve(values, duplicates, f"items {a} and {b}, {key}", annotator, losses)
        yield a, b, gap, {"annotator": annotator, "key": key, "kind": kind, "events": ids}


def _rated(
    items: Mapping[str, Item], events: Sequence[FeedbackEvent], losses: Losses, zscore: bool, duplicates: str
) -> Iterable[tuple[str, str, float, dict[str, Any]]]:
    said: dict[tuple[str, str], dict[str, list[tuple[float, str]]]] = {}
    scales: dict[tuple[str, str], set[Any]] = {}
    for event in events:
        group = (event.annotator, event.key)
        scales.setdefault(group, set()).update([event.scale] if event.scale else [])
        said.setdefault(group, {}).setdefault(event.items[0], []).append((float(event.value), source_id(event)))
    for (annotator, key), found in scales.items():
        require_one_scale(found, f"{annotator}, {key}")
    for (annotator, key), by_item in said.items():
        known = {
            item: _resolve(values, duplicates, f"item {item}, {key}", annotator, losses)
            for item, values in by_item.items()
        }
        spread = 1.0
        if zscore:
            spread = _moments([value for value, _ in known.values()])[1]
            losses.reasons["annotators without spread"] += spread == 0
        prompts: dict[str, list[str]] = {}
        for item in known:
            prompts.setdefault(items[item].prompt_id, []).append(item)
        losses.reasons["ratings alone under their prompt"] += sum(len(named) == 1 for named in prompts.values())
        for named in prompts.values():
            for a, b in combinations(named, 2):
                gap = (known[a][0] - known[b][0]) / spread if spread else 0.0
                ids = (*known[a][1], *known[b][1])
                yield a, b, gap, {"annotator": annotator, "key": key, "kind": "ordinal", "events": ids}


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1), a spread of 0 for fewer than two."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _same_text(a: Item, b: Item) -> bool:
    left, right = a.response, b.response
    return left == right or (isinstance(left, str) and isinstance(right, str) and left.split() == right.split())
