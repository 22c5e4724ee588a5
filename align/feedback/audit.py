"""Is this feedback to be believed? Coverage, base rates, silence that is not random, annotators and abuse.

Everything here describes; nothing is removed. What a number means and when to worry is in docs/feedback.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from align.feedback.agreement import Answers
from align.feedback.events import FeedbackEvent, Item
from align.feedback.resampling import benjamini_hochberg, wilson
from align.feedback.views import ANSWERS, Shown, answers_of, signals

PERMUTATIONS = 2000


@dataclass(frozen=True)
class AuditConfig:
    """Thresholds of the audit, ours: each flag of a report prints the one it crossed.

    Args:
        min_answers: an annotator with fewer answers is not judged.
        constant_share: share of one and the same answer from which a responder is called constant.
        chance: how unlikely a run of constant or copied answers must be under everybody's answers.
        burst_ms, burst_length: so many answers in a row, each within this time of the one before, are a burst.
        copy_units: units two annotators must share before they are compared.
        severity: distance from the others' ratings of the same items, in their standard error, that is flagged.
        most: more than this share of the other raters must be that far from a flagged one, on the same side.
    """

    min_answers: int = 20
    constant_share: float = 0.95
    chance: float = 1e-4
    burst_ms: int = 1000
    burst_length: int = 10
    copy_units: int = 20
    severity: float = 4.0
    most: float = 0.75


# --- coverage and rates -----------------------------------------------------------------------------


def coverage(shown: Shown) -> dict[str, Any]:
    """Return how much of what was shown got a reaction, and what the reactions said.

    Returns:
        n_shown, n_reacted, coverage = n_reacted / n_shown, base_rate = positives / n_shown, positive_share = positives
        / n_reacted, each with a Wilson interval, users, top_user_share (share of the reactions of the most active 1 %
        of users, at least one), and unknown (reactions without an exposure, in no rate).
    """
    reacted, n = shown.reacted_N, len(shown.value_N)
    positive = float(np.nansum(shown.value_N)) if n else 0.0
    count = int(reacted.sum())
    return {
        "n_shown": n, "n_reacted": count, **_share("coverage", count, n), **_share("base_rate", positive, n),
        **_share("positive_share", positive, count), "users": len(set(shown.user_N.tolist())),
        "top_user_share": concentration(shown.user_N[reacted]), "unknown": shown.unknown,
    }  # fmt: skip


def _share(name: str, part: float, whole: float) -> dict[str, Any]:
    return {name: part / whole if whole else float("nan"), f"{name}_ci": list(wilson(part, whole))}


def concentration(users_N: Sequence[Any] | np.ndarray, top: float = 0.01) -> float:
    """Return the share of entries that the most active `top` of users made (at least one user)."""
    counts = sorted(Counter(list(users_N)).values(), reverse=True)
    return sum(counts[: max(1, int(top * len(counts)))]) / sum(counts) if counts else float("nan")


def rates_by(shown: Shown, by: str, *, buckets: int = 8, most: int = 50) -> list[dict[str, Any]]:
    """Return coverage and positive share by "user", "position", "policy" or "time" (equal shares of the period).

    Users and policies are the `most` with the most exposures; what was shown at an unknown time is in no period.
    """
    if by == "time":
        timed = shown.ts_N[shown.ts_N > 0]
        if not len(timed) or timed.max() == timed.min():
            return []
        low, high = int(timed.min()), int(timed.max())
        slot = np.minimum((shown.ts_N - low) * buckets // (high - low), buckets - 1)
        labels = np.array([low + int(s) * (high - low) // buckets if s >= 0 else -1 for s in slot], dtype=object)
    else:
        labels = {"user": shown.user_N, "position": shown.position_N, "policy": shown.policy_N}[by].astype(object)
    groups = Counter(labels.tolist())
    names = [name for name, _ in groups.most_common(most) if name not in ("", -1)]
    rows = []
    for name in sorted(names, key=lambda v: (isinstance(v, str), v)):
        at = labels == name
        count, n, positive = int(shown.reacted_N[at].sum()), int(at.sum()), float(np.nansum(shown.value_N[at]))
        share = _share("positive_share", positive, count)
        rows.append({"group": name, "n_shown": n, "n_reacted": count, **_share("coverage", count, n), **share})
    return rows


def missing_not_at_random(
    shown: Shown, quality_N: np.ndarray, *, bins: int = 5, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, Any]:
    """Test whether silence depends on quality, against an independent quality label of what was shown.

    Items are put into `bins` of equal numbers by quality. `chi2 = sum (reacted - expected)^2 / expected` over the bins,
    reacted or not, is compared with its distribution when quality labels are shuffled among items: items stay whole, so
    repeated exposures of one do not count as evidence. The signature of a signal that is missing not at random and
    still informative is a share of positive reactions that rises with quality while the rate of reacting does not.

    Args:
        quality_N: of each entry of `shown`, NaN where unknown.

    Returns:
        p (permutation), chi2, bins (quality, n_shown, coverage and positive_share with intervals), monotone_sign,
        monotone_rate, and verdict: "missing not at random", "no evidence", or "insufficient".
    """
    present = np.isfinite(quality_N)
    _, item = np.unique(shown.item_N[present].astype(str), return_inverse=True)
    reacted, value = shown.reacted_N[present], shown.value_N[present]
    quality = np.zeros(item.max(initial=-1) + 1)
    quality[item] = quality_N[present]
    n_by_item, r_by_item = np.bincount(item), np.bincount(item, weights=reacted)
    edges = np.unique(np.quantile(quality, np.linspace(0, 1, bins + 1)[1:-1])) if len(quality) else np.zeros(0)
    where = np.searchsorted(edges, quality, side="left")
    size = int(where.max(initial=-1)) + 1
    total = float(reacted.sum())
    if size < 2 or total < 20 or total > len(reacted) - 20:
        return {"verdict": "insufficient", "n_items": len(quality), "n_shown": len(reacted), "n_reacted": int(total)}
    rate = total / len(reacted)

    def statistic(bin_of_item: np.ndarray) -> float:
        n = np.bincount(bin_of_item, weights=n_by_item, minlength=size)
        r = np.bincount(bin_of_item, weights=r_by_item, minlength=size)
        expected = n * rate
        return float((((r - expected) ** 2) / np.maximum(n * rate * (1 - rate), 1e-12)).sum())

    rng, found = np.random.default_rng(seed), statistic(where)
    above = sum(statistic(rng.permutation(where)) >= found - 1e-9 for _ in range(permutations))
    p, rows = (1 + above) / (1 + permutations), []
    for b in range(size):
        at = where[item] == b
        count, n, positive = int(reacted[at].sum()), int(at.sum()), float(np.nansum(value[at]))
        share = {**_share("coverage", count, n), **_share("positive_share", positive, count)}
        rows.append({"quality": float(quality[where == b].mean()), "n_shown": n, "n_reacted": count, **share})
    sign = [row["positive_share"] for row in rows]
    rates = [row["coverage"] for row in rows]
    return {
        "p": p, "chi2": found, "bins": rows, "n_items": len(quality), "n_shown": len(reacted), "n_reacted": int(total),
        "monotone_sign": _monotone(sign), "monotone_rate": _monotone(rates),
        "verdict": "missing not at random" if p < 0.05 else "no evidence",
    }  # fmt: skip


def _monotone(values: Sequence[float]) -> bool:
    steps = np.diff([v for v in values if np.isfinite(v)])
    return bool(len(steps) and ((steps >= 0).all() or (steps <= 0).all()))


# --- annotators -------------------------------------------------------------------------------------


def annotator_table(answers: Answers, config: AuditConfig | None = None) -> list[dict[str, Any]]:
    """Return a row an annotator: answers, the most common one, severity against others on the same units, and flags.

    Severity is the mean difference to the mean of the other raters of the same units, in points of the scale, with its
    standard error; who is flagged is also that far from most other raters, as one outlier moves a mean. A constant
    responder gives one answer nearly always where everybody's answers make that unlikely.
    """
    config = config or AuditConfig()
    counts = answers.counts()
    m, size = counts.sum(1), len(answers.categories)
    pool = counts.sum(0) / max(1, counts.sum())
    numbers = not any(isinstance(c, str) for c in answers.categories)
    values = np.array([float(c) for c in answers.categories]) if numbers else np.zeros(size)
    total = counts @ values
    rows = []
    for r, name in enumerate(answers.raters):
        mine = answers.rater_N == r
        unit, code = answers.unit_N[mine], answers.code_N[mine]
        shares = np.bincount(code, minlength=size) / max(1, len(code))
        top = int(shares.argmax())
        row: dict[str, Any] = {"annotator": name, "n": len(code), "top_answer": str(answers.categories[top])}
        row |= {"top_share": float(shares[top]), "flags": []}
        shared = m[unit] > 1
        if numbers and answers.ordered and shared.any():
            others = (total[unit] - values[code])[shared] / (m[unit][shared] - 1)
            gap = values[code][shared] - others
            error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else float("nan")
            row |= {"severity": float(gap.mean()), "severity_error": error, "n_shared": len(gap)}
            row["mean"] = float(values[code].mean())
        if len(code) >= config.min_answers and shares[top] >= config.constant_share:
            misses = round(len(code) * (1 - shares[top]))
            if _tail(len(code), misses, float(pool[top])) < config.chance:
                row["flags"].append("constant")
        rows.append(row)
    _flag_severity([row for row in rows if row.get("n_shared", 0) >= config.min_answers], config)
    return rows


def _flag_severity(rows: Sequence[dict[str, Any]], config: AuditConfig) -> None:
    """Flag who is far from the mean of the others and, on the same side, from most of the other judged raters.

        |s_r| > c e_r   and   #{q != r: sign(s_r) (s_r - s_q) > c e_r} > most (R - 1)

    One outlier moves the mean that everybody is compared with, but not most raters; two camps are no outliers
    of one another unless one has fewer than about a quarter of the raters.
    """
    severity_R = np.array([row["severity"] for row in rows])
    for row in rows:
        far, side = config.severity * max(row["severity_error"], 1e-9), np.sign(row["severity"])
        beyond = int((side * (row["severity"] - severity_R) > far).sum())  # never itself: far is above 0
        if abs(row["severity"]) > far and (beyond > config.most * (len(rows) - 1) or len(rows) == 1):
            row["flags"].insert(0, "severe" if side < 0 else "lenient")


def _tail(n: int, misses: int, p: float) -> float:
    """Return the probability of at most `misses` other answers among n when each is this one with probability p."""
    return sum(_choose(n, k) * (1 - p) ** k * p ** (n - k) for k in range(misses + 1))


def _choose(n: int, k: int) -> float:
    from math import comb

    return float(comb(n, k))


def coordinated(answers: Answers, config: AuditConfig | None = None, *, busiest: int = 200) -> list[dict[str, Any]]:
    """Return pairs of annotators who agree far more than annotators do on the units they share.

    What is to be expected is how often the two agree with the other raters of the same units, so that raters of an easy
    task are not suspected; units without a third rater say nothing. A pair is listed when it agrees on `constant_share`
    of at least `copy_units` such units and its excess over that is beyond 4 standard deviations.
    """
    config = config or AuditConfig()
    counts = answers.counts().astype(float)
    m = counts.sum(1)
    answered = np.bincount(answers.rater_N, minlength=len(answers.raters))
    enough = [r for r in np.argsort(-answered)[:busiest].tolist() if answered[r] >= config.copy_units]
    columns, found = {r: answers.column(r) for r in sorted(enough)}, []
    for a, b in combinations(sorted(enough), 2):
        both = (columns[a] >= 0) & (columns[b] >= 0) & (m > 2)
        n = int(both.sum())
        if n < config.copy_units:
            continue
        same = columns[a][both] == columns[b][both]
        if same.mean() < config.constant_share:
            continue
        rest, rows = counts[both].copy(), np.arange(n)
        for rater in (a, b):
            rest[rows, columns[rater][both]] -= 1
        own = (rest[rows, columns[a][both]] + rest[rows, columns[b][both]]) / (2 * rest.sum(1))
        expected, spread = own.mean(), np.sqrt((own * (1 - own)).sum() + 0.25) / n
        z = float((same.mean() - expected) / spread)
        if z > 4:
            pair = [answers.raters[a], answers.raters[b]]
            found.append(
                {"annotators": pair, "n": n, "agreement": float(same.mean()), "expected": float(expected), "z": z}
            )
    return sorted(found, key=lambda row: -row["z"])


@dataclass(frozen=True)
class Together:
    """Of each account: the chance of sharing so many items with another, the closest one, how many, and its group."""

    p_U: np.ndarray
    closest_U: np.ndarray
    shared_U: np.ndarray
    group_U: np.ndarray

    def groups(self) -> list[list[int]]:
        """Return the accounts of each group, a lone account being one of its own."""
        return [np.flatnonzero(self.group_U == g).tolist() for g in np.unique(self.group_U)]


def answered_together(
    user_N: np.ndarray, item_N: np.ndarray, *, users: int, least: int = 10, busiest: int = 2000, chance: float = 0.05
) -> Together:
    """Compare what accounts answered, whatever they said of it.

        expected_uv = sum_i p_ui p_vi,   p_ui = min(1, n_u d_i / D)
        p_uv        = P(Poisson(expected_uv) >= items that both answered)
        p_u         = min_k (U - 1) p_u(k) / k,   p_u(k) the k-th smallest of u's p_uv (Simes 1986)

    n_u are the items u answered, d_i the accounts that answered i, D all answers: an account may be busy and an item
    popular. Pairs that Benjamini and Hochberg's rule keeps at the rate `chance` are linked; a group is what links
    connect. People who are shown the same things are linked too, so a link alone is no accusation.

    Args:
        user_N, item_N: of each answer, index of who and of what, from 0.
        users: how many accounts there are.
        least, busiest: accounts with fewer answers are left alone, and so are all but so many of the busiest.
    """
    import torch

    pairs = np.unique(np.stack([user_N, item_N], 1).astype(np.int64), axis=0)
    count = np.bincount(pairs[:, 0], minlength=users)
    kept = np.sort(np.argsort(-count, kind="stable")[:busiest])
    kept = kept[count[kept] >= least]
    p, shared, closest, group = np.ones(users), np.zeros(users, int), np.arange(users), np.arange(users)
    if len(kept) < 2:
        return Together(p, closest, shared, group)
    place = np.full(users, -1)
    place[kept] = np.arange(len(kept))
    popular = np.bincount(pairs[:, 1])
    both = np.zeros((len(kept), len(kept)))
    expected = np.zeros_like(both)
    row, column = place[pairs[:, 0]], pairs[:, 1]
    for start in range(0, len(popular), 4096):
        width = min(4096, len(popular) - start)
        inside = (row >= 0) & (column >= start) & (column < start + width)
        said = np.zeros((len(kept), width), dtype=np.float32)
        said[row[inside], column[inside] - start] = 1
        chances = np.minimum(1, np.outer(count[kept], popular[start : start + width]) / len(pairs)).astype(np.float32)
        both += said @ said.T
        expected += chances @ chances.T
    tail = torch.special.gammainc(torch.from_numpy(both).clamp(min=1), torch.from_numpy(expected)).numpy()
    tail = np.where(both >= 1, tail, 1.0)
    np.fill_diagonal(tail, 1.0)
    near = tail.argmin(1)
    ranked = np.sort(tail, 1)[:, :-1] * (len(kept) - 1) / np.arange(1, len(kept))
    p[kept] = np.minimum(1, ranked.min(1))
    closest[kept], shared[kept] = kept[near], both[np.arange(len(kept)), near].astype(int)
    first, second = np.triu_indices(len(kept), 1)
    pairs_linked = benjamini_hochberg(tail[first, second], chance)
    linked = np.zeros(tail.shape, dtype=bool)
    linked[first[pairs_linked], second[pairs_linked]] = linked[second[pairs_linked], first[pairs_linked]] = True
    label = np.arange(len(kept))
    while True:
        least_near = np.minimum(label, np.where(linked, label[None], len(kept)).min(1))
        if (least_near == label).all():
            break
        label = least_near
    group[kept] = kept[label]
    return Together(p, closest, shared, group)


def bursts(events: Iterable[FeedbackEvent], config: AuditConfig | None = None) -> list[dict[str, Any]]:
    """Return runs of answers that came faster than a person answers, by the time between one and the next.

    Several answers of one moment (a rating of several dimensions is sent at once) count as one; answers without a time
    are none.
    """
    config = config or AuditConfig()
    times: dict[str, set[int]] = defaultdict(set)
    for event in events:
        if event.kind in ANSWERS and event.ts > 0 and event.source in ("user", "human"):
            times[event.annotator].add(event.ts)
    found = []
    for annotator, moments in times.items():
        ts = np.array(sorted(moments))
        quick = np.concatenate([[False], np.diff(ts) <= config.burst_ms, [False]])
        starts = np.flatnonzero(~quick[:-1] & quick[1:])
        ends = np.flatnonzero(quick[:-1] & ~quick[1:])
        for start, end in zip(starts, ends, strict=True):
            if end - start + 1 >= config.burst_length:
                gaps = np.diff(ts[start : end + 1])
                found.append({
                    "annotator": annotator, "n": int(end - start + 1), "start_ms": int(ts[start]),
                    "median_gap_ms": float(np.median(gaps)), "share": float((end - start + 1) / len(ts)),
                })  # fmt: skip
    return sorted(found, key=lambda row: -row["n"])


def duplicate_texts(events: Iterable[FeedbackEvent], least: int = 3) -> list[dict[str, Any]]:
    """Return comments that several annotators wrote word for word, up to case and spaces."""
    who: dict[str, list[str]] = defaultdict(list)
    for event in events:
        if event.kind == "text" and event.source in ("user", "human"):
            who[" ".join(str(event.value).split()).casefold()].append(event.annotator)
    rows = [{"text": t[:120], "n": len(names), "annotators": len(set(names))} for t, names in who.items() if len(t) > 8]
    return sorted((row for row in rows if row["n"] >= least), key=lambda row: -row["n"])


def audit_annotators(
    events: Sequence[FeedbackEvent], items: Mapping[str, Item], config: AuditConfig | None = None
) -> dict[str, Any]:
    """Return annotators, coordination, bursts and copied comments of a whole log."""
    config = config or AuditConfig()
    tables, pairs = {}, []
    for key, kind in signals(events):
        answers = answers_of(events, items, key, kind)
        tables[f"{key}/{kind}"] = annotator_table(answers, config)
        pairs += [{"signal": f"{key}/{kind}", **row} for row in coordinated(answers, config)]
    by_user = [e.annotator for e in events if e.kind in ANSWERS]
    return {
        "annotators": tables, "coordinated": pairs, "bursts": bursts(events, config),
        "duplicate_texts": duplicate_texts(events), "top_annotator_share": concentration(by_user),
        "n_annotators": len(set(by_user)),
    }  # fmt: skip
