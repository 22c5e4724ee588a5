"""Everything the statistics say about one log, as JSON-ready values: what `audit` and the report page show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.aggregate import MODELS, fit
from align.feedback.agreement import all_coefficients, majority_counts
from align.feedback.audit import AuditConfig, audit_annotators, coverage, missing_not_at_random, rates_by
from align.feedback.bias import bias_report
from align.feedback.consistency import consistency
from align.feedback.events import FeedbackEvent, Item
from align.feedback.judging import judge_card
from align.feedback.signals import SignalGates, select_signal
from align.feedback.views import ANSWERS, answers_of, comparisons_of, joined_of, rating_keys, shown_of, signals

FEWEST_SHARED = 5
"""Units that two raters must share for their kappa to be worth reading."""

GROUPS = ("user", "position", "policy", "time")
RATED = ("binary", "reaction", "ordinal")


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: numpy numbers as numbers, NaN and infinities as null, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def people_of(events: Sequence[FeedbackEvent]) -> Sequence[FeedbackEvent]:
    """Return what people said, or everything where no person said anything.

    AI annotators are measured against people (`judge_card`), not mixed into how far people agree.
    """
    return [e for e in events if e.source != "ai"] or events


def agreement_of(
    events: Sequence[FeedbackEvent],
    items: Mapping[str, Item],
    *,
    with_ai: bool = False,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return coefficients and majorities of every signal with answers of two annotators to one thing."""
    events, found = events if with_ai else people_of(events), {}
    for key, kind in signals(events):
        answers = answers_of(events, items, key, kind)
        if len(answers.raters) < 2:
            continue
        counts = answers.counts().sum(1)
        coefficients = all_coefficients(answers, draws=draws, seed=seed)
        found[f"{key}/{kind}"] = {
            "coefficients": {name: c.as_dict() for name, c in coefficients.items()},
            "majority": majority_counts(answers),
            "n_items": len(counts), "n_items_shared": int((counts >= 2).sum()), "n_raters": len(answers.raters),
            "categories": list(answers.categories),
        }  # fmt: skip
    return found


def telling_pairs(coefficients: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], int]:
    """Return the names of the kappas of two raters that are worth reading, and how many are left out.

    All of them where three raters or fewer make them; else, of the unweighted ones of raters who share `FEWEST_SHARED`
    units, the four highest and the four lowest.
    """
    names = [name for name in coefficients if ":" in name]
    if len({name.partition(":")[2] for name in names}) <= 3:
        return names, 0
    told = [n for n in names if n.startswith("cohen:") and coefficients[n]["n_items"] >= FEWEST_SHARED]
    told.sort(key=lambda name: -(coefficients[name]["value"] or 0))
    shown = told if len(told) <= 8 else [*told[:4], *told[-4:]]
    return shown, len(names) - len(shown)


def exposures_of(
    events: Sequence[FeedbackEvent],
    items: Mapping[str, Item],
    *,
    quality: str = "",
    outcome: str = "",
    gates: SignalGates | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return coverage, rates, the test of silence and the selection verdict of every signal about single items.

    Args:
        quality: key of the ratings that are the independent quality label; the most rated one where it is empty.
        outcome: key of a signal that is the delayed outcome of its annotator, such as a session score.
    """
    label = _quality(events, quality)
    outcomes = _outcomes(events, outcome)
    found = {}
    if not any(e.kind == "exposure" or e.exposure == "shown" for e in events):
        return found
    for name, key, kind, positive in _single_signals(events, skip=outcome):
        shown = shown_of(events, items, key, kind, positive=positive)
        # Exposures of other signals: nothing of this one was ever known to be shown.
        if not len(shown.value_N) or (shown.unknown and not shown.reacted_N.any()):
            continue
        entry: dict[str, Any] = {"coverage": coverage(shown), "by": {by: rates_by(shown, by) for by in GROUPS}}
        if kind != "ordinal" and label:
            values = np.array([label.get(item, np.nan) for item in shown.item_N])
            entry["silence"] = missing_not_at_random(shown, values, seed=seed)
        entry["selection"] = select_signal(name, shown, outcome=outcomes, gates=gates, seed=seed).as_dict()
        found[name] = entry
    return found


def _single_signals(events: Sequence[FeedbackEvent], skip: str) -> list[tuple[str, str, str, str]]:
    found = []
    for key, kind in signals(events):
        if kind not in RATED or (skip and key == skip):
            continue
        if kind == "reaction":
            names = Counter(e.value for e in events if e.kind == kind and e.key == key)
            found += [(f"{key}:{name}", key, kind, name) for name, _ in names.most_common(12)]
        else:
            found.append((f"{key}/{kind}", key, kind, ""))
    return found


def _quality(events: Sequence[FeedbackEvent], key: str) -> dict[str, float]:
    counts = Counter(e.key for e in events if e.kind == "ordinal" and e.source in ("human", "ai", "code"))
    if key and key not in counts:
        raise DataError(f"No rating has the key {key!r}", why="it is to be the independent quality label")
    key = key or next((name for name, _ in counts.most_common(1)), "")
    said: dict[str, list[float]] = {}
    for event in events:
        if event.kind == "ordinal" and event.key == key and event.source in ("human", "ai", "code"):
            said.setdefault(event.items[0], []).append(float(event.value))
    return {item: float(np.mean(values)) for item, values in said.items()}


def _outcomes(events: Sequence[FeedbackEvent], key: str) -> dict[str, float]:
    if not key:
        return {}
    said: dict[str, list[float]] = {}
    for event in events:
        if event.key == key and event.kind in ("ordinal", "binary"):
            said.setdefault(event.annotator, []).append(float(event.value))
    if not said:
        raise DataError(f"No rating or thumb has the key {key!r}", why="it is to be the delayed outcome")
    return {user: float(np.mean(values)) for user, values in said.items()}


def strengths_of(
    events: Sequence[FeedbackEvent],
    items: Mapping[str, Item],
    *,
    key: str | None = None,
    model: str = "",
    position: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the strengths of the models behind pairwise answers and rankings, or why there are none.

    Without a `model`, Davidson where there are ties and Bradley-Terry where there are none.
    """
    comparisons = comparisons_of(people_of(events), items, key=key)
    if len(comparisons.names) < 2:
        return {
            "reason": "no comparison is between two named models (item metadata `model` or `policy`; import the columns"
            " model_a and model_b, or policy_a and policy_b)"
        }
    model = model or (MODELS[1] if (comparisons.outcome_N == 0).any() else MODELS[0])
    try:
        return fit(comparisons, model, position=position, bootstrap=bootstrap, seed=seed).as_dict()
    except DataError as problem:
        return {"reason": str(problem), "model": model}


def who_said_what(events: Sequence[FeedbackEvent], items: Mapping[str, Item]) -> dict[str, Any]:
    """Return counts of items, prompts, events by kind, source and signal, and the period."""
    answers = [e for e in events if e.kind in ANSWERS]
    times = [e.ts for e in events if e.ts > 0]
    rows = []
    for (key, kind), n in signals(events).items():
        mine = [e for e in answers if (e.key, e.kind) == (key, kind)]
        rows.append({
            "signal": f"{key}/{kind}", "n": n, "annotators": len({e.annotator for e in mine}),
            "items": len({i for e in mine for i in e.items}), "sources": dict(Counter(e.source for e in mine)),
            "values": {str(v): c for v, c in Counter(e.value for e in mine).most_common(12)}
            if kind != "ranking" else {},
        })  # fmt: skip
    return {
        "items": len(items), "prompts": len({item.prompt_id for item in items.values()}), "answers": len(answers),
        "exposures": sum(e.kind == "exposure" for e in events), "texts": sum(e.kind == "text" for e in events),
        "annotators": len({e.annotator for e in answers}), "signals": rows,
        "first_ms": min(times, default=None), "last_ms": max(times, default=None),
    }  # fmt: skip


def audit(
    events: Sequence[FeedbackEvent],
    items: Mapping[str, Item],
    *,
    quality: str = "",
    outcome: str = "",
    gates: SignalGates | None = None,
    config: AuditConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return exposures, bias, annotators, abuse and judge cards of a log."""
    judges = sorted({e.annotator for e in events if e.source == "ai"})
    return {
        "exposures": exposures_of(events, items, quality=quality, outcome=outcome, gates=gates, seed=seed),
        "bias": bias_report(people_of(events), items, seed=seed),
        "people": audit_annotators(events, items, config),
        "judges": [
            judge_card(events, items, judge, key=key, seed=seed) for judge in judges for key in _keys(events, judge)
        ],
    }


def _keys(events: Sequence[FeedbackEvent], judge: str) -> list[str]:
    return sorted({e.key for e in events if e.annotator == judge and e.kind in ANSWERS})


def overview(
    events: Sequence[FeedbackEvent], items: Mapping[str, Item], *, draws: int = 1000, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Return all of it: who said what, agreement, consistency, strengths, and the audit (whose options these are).

    Ratings of several keys are several ratings: then `consistency` is empty, and `consistency_by_key` has each.
    """
    keys: list[Any] = [key for key in rating_keys(events) if key != options.get("outcome")] or [None]
    compared = {key: _consistency(events, items, key, draws, seed, alone=len(keys) == 1) for key in keys}
    return plain({
        "who": who_said_what(events, items),
        "agreement": agreement_of(events, items, draws=draws, seed=seed),
        "consistency": compared[keys[0]] if len(keys) == 1 else {},
        "consistency_by_key": compared if len(keys) > 1 else {},
        "strengths": strengths_of(events, items, bootstrap=0, seed=seed),
        **audit(events, items, seed=seed, **options),
    })  # fmt: skip


def _consistency(
    events: Sequence[FeedbackEvent], items: Mapping[str, Item], key: str | None, draws: int, seed: int, *, alone: bool
) -> dict[str, Any]:
    """Return how far the ratings of a key agree with its rankings; with all where it is `alone`, or has none."""
    own = not alone and any(e.kind in ("pairwise", "ranking") and e.key == key for e in events)
    how: dict[str, Any] = {"key": key if own else None, "ratings_key": key}
    joined = joined_of(people_of(events), items, **how)
    joined = joined if np.isfinite(joined.rating_a_N + joined.rating_b_N).any() else joined_of(events, items, **how)
    return consistency(joined, draws=draws, seed=seed) if len(joined.a_N) else {}
