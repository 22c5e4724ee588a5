"""What a reward is worth: agreement with pairs, ratings and rankings, discrimination and calibration.

Everything takes arrays of scores, so that scores of a file, of a reward and of a fit are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.bias import spearman
from align.feedback.resampling import DRAWS, bootstrap_sums, percentile_interval, wilson
from align.seeding import uniform
from rewards.fit_data import Observation
from rewards.plove import fit_temperature

BINS = 15

# --- pairs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairAccuracy:
    """How often a reward agrees with comparisons.

    Args:
        without_ties: correct / (correct + wrong) over pairs that people told apart; a score tie counts half.
        half_credit: the same with people's ties in, half a point each.
        with_ties: share of all pairs on which people's answer equals that of the reward, where differences up to
            `threshold` are read as ties; the threshold is the one that maximises it.
        ci: of `without_ties`, resampling clusters.
    """

    n: int
    ties: int
    without_ties: float
    half_credit: float
    with_ties: float
    threshold: float
    ci: tuple[float, float]


def pair_accuracy(
    delta_N: np.ndarray, said_N: np.ndarray, cluster_N: Sequence[Any] | None = None, *, draws: int = DRAWS,
    seed: int = 0,
) -> PairAccuracy:  # fmt: skip
    """Return how often the sign of a difference of scores is what people said.

    Args:
        delta_N: score of the first less that of the second.
        said_N: 1 where the first was preferred, -1 the second, 0 a tie.
        cluster_N: what pairs share, such as the prompt, for the interval.

    Raises:
        DataError: no pairs, or a difference that is no number.

    Source: Deutsch et al. (arXiv 2305.14324), pairwise accuracy with tie calibration.
    """
    delta, said = np.asarray(delta_N, dtype=np.float64), np.sign(np.asarray(said_N, dtype=np.float64))
    _require_numbers(delta, said)
    told = said != 0
    right = np.where(delta == 0, 0.5, (np.sign(delta) == said).astype(float))
    without = float(right[told].mean()) if told.any() else float("nan")
    half = float(np.where(told, right, 0.5).mean())
    threshold, best = _tie_threshold(delta, said)
    clusters = np.arange(len(said)) if cluster_N is None else np.unique(np.asarray(cluster_N), return_inverse=True)[1]
    interval = _share_interval(right[told], clusters[told], draws, seed)
    return PairAccuracy(len(said), int((~told).sum()), without, half, best, threshold, interval)


def _tie_threshold(delta: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    size = np.abs(delta)
    order = np.argsort(size, kind="stable")
    hit = np.sign(delta) == said
    tied = np.concatenate([[0], np.cumsum(said[order] == 0)])
    kept = np.concatenate([[0], np.cumsum(hit[order] & (size[order] > 0))])
    # At the k-th threshold the k smallest differences are ties; only ends of runs of equal sizes can be thresholds.
    whole = hit.sum() - (hit & (size == 0)).sum()
    ends = np.concatenate([[not (size == 0).any()], np.append(np.diff(size[order]) > 0, True)])
    right = np.where(ends, tied + whole - kept, -1)
    k = int(np.argmax(right))
    return (float(size[order][k - 1]) if k else 0.0), float(right[k] / len(delta))


def _share_interval(values: np.ndarray, clusters: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    index = np.unique(clusters, return_inverse=True)[1]
    total, count = np.bincount(index, weights=values), np.bincount(index)
    picks = np.random.default_rng(seed).integers(len(count), size=(draws, len(count)))
    return percentile_interval(total[picks].sum(1) / count[picks].sum(1))


# --- probabilities ----------------------------------------------------------------------------------


def auroc(score_N: np.ndarray, seen_N: np.ndarray) -> float:
    """Return the chance that a positive scores above a negative, ties half; NaN with one class."""
    score, seen = np.asarray(score_N, dtype=np.float64), np.asarray(seen_N) > 0.5
    up, down = int(seen.sum()), int((~seen).sum())
    if not up or not down:
        return float("nan")
    _, index, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[index]
    return float((rank[seen].sum() - up * (up + 1) / 2) / (up * down))


def average_precision(score_N: np.ndarray, seen_N: np.ndarray) -> float:
    """Return `sum_k (recall_k - recall_{k-1}) precision_k` over the distinct scores, the highest first."""
    score, seen = np.asarray(score_N, dtype=np.float64), np.asarray(seen_N) > 0.5
    if not seen.any():
        return float("nan")
    _, index = np.unique(-score, return_inverse=True)
    hits = np.cumsum(np.bincount(index, weights=seen))
    shown = np.cumsum(np.bincount(index))
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / shown))


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability curve: rows, mean probability, share seen, and Wilson's interval of that share."""

    n: int
    predicted: float
    seen: float
    low: float
    high: float


def reliability(probability_N: np.ndarray, seen_N: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Return the reliability curve over bins of (nearly) as many rows each, the lowest probabilities first."""
    found = []
    for p, y in _equal_mass(probability_N, seen_N, bins):
        low, high = wilson(float(y.sum()), len(y))
        found.append(Bin(len(y), float(p.mean()), float(y.mean()), low, high))
    return found


def calibration_error(probability_N: np.ndarray, seen_N: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error `sum_b n_b / n |mean p - mean y|` over equal-mass bins."""
    parts = _equal_mass(probability_N, seen_N, bins)
    return float(sum(len(y) * abs(p.mean() - y.mean()) for p, y in parts) / sum(len(y) for _, y in parts))


def debiased_calibration_error(
    probability_N: np.ndarray, seen_N: np.ndarray, bins: int = BINS, *, times: float = 1.0
) -> float:
    """Return the calibration error less what sampling alone would make of a calibrated model's.

        sum_b n_b / n (mean p - mean y)^2 - v_b,   v_b = mean y (1 - mean y) / (n_b - 1),   then the root, from 0

    It is in the units of a probability, and near 0 for a calibrated model at any number of rows.

    Args:
        times: how often v_b is taken off: twice in a bootstrap draw, which has the sampling of the data and its own.

    Source: Kumar et al. (arXiv 1909.10155), the debiased estimator of the squared error.
    """
    parts = _equal_mass(probability_N, seen_N, bins)
    n, total = sum(len(y) for _, y in parts), 0.0
    for p, y in parts:
        spread = y.mean() * (1 - y.mean()) / max(1, len(y) - 1)
        total += len(y) / n * ((p.mean() - y.mean()) ** 2 - times * spread)
    return float(np.sqrt(max(0.0, total)))


def _equal_mass(probability_N: np.ndarray, seen_N: np.ndarray, bins: int) -> list[tuple[np.ndarray, np.ndarray]]:
    p, y = np.asarray(probability_N, dtype=np.float64), np.asarray(seen_N, dtype=np.float64)
    _require_numbers(p, y)
    order = np.argsort(p, kind="stable")
    return [(p[part], y[part]) for part in np.array_split(order, min(bins, len(p)))]


def probability_report(
    probability_N: np.ndarray, seen_N: np.ndarray, cluster_N: Sequence[Any] | None = None, *, bins: int = BINS,
    draws: int = 400, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return what a probability is worth: n, base rate, AUROC, AUPRC, Brier (and that of the base rate), log-loss,
    ECE, debiased ECE with its interval over clusters, and the reliability curve.

    Raises:
        DataError: no rows, or values that are no numbers.
    """
    p, y = np.asarray(probability_N, dtype=np.float64), np.asarray(seen_N, dtype=np.float64)
    _require_numbers(p, y)
    base, inside = float(y.mean()), np.clip(p, 1e-12, 1 - 1e-12)
    index = np.arange(len(y)) if cluster_N is None else np.unique(np.asarray(cluster_N), return_inverse=True)[1]
    found = [debiased_calibration_error(p[rows], y[rows], bins, times=2) for rows in _resampled(index, draws, seed)]
    return {
        "n": len(y), "clusters": int(index.max()) + 1, "base_rate": base, "mean_probability": float(p.mean()),
        "auroc": auroc(p, y), "auprc": average_precision(p, y),
        "brier": float(np.mean((p - y) ** 2)), "brier_of_base_rate": base * (1 - base),
        "log_loss": float(-np.mean(y * np.log(inside) + (1 - y) * np.log1p(-inside))),
        "ece": calibration_error(p, y, bins), "debiased_ece": debiased_calibration_error(p, y, bins),
        "debiased_ece_ci": list(percentile_interval(np.array(found))),
        # A share of fewer than ten rows says nothing, and many of them draw a zigzag.
        "reliability": [vars(b) for b in reliability(p, y, min(bins, max(5, len(p) // 10)))],
    }  # fmt: skip


# --- ratings and rankings ---------------------------------------------------------------------------


def kendall(score_M: Sequence[float], rank_M: Sequence[float]) -> float:
    """Return how far scores follow a ranking, 1 the best rank; NaN where a side does not tell its outputs apart.

        tau_b = (C - D) / sqrt((n - n_score) (n - n_rank)),   n pairs, n_score and n_rank of them tied on that side

    Source: Kendall (1945).
    """
    score, rank = np.asarray(score_M, dtype=np.float64), np.asarray(rank_M, dtype=np.float64)
    i, j = np.triu_indices(len(score), 1)
    a, b = np.sign(score[i] - score[j]), np.sign(rank[j] - rank[i])
    told = float(np.sqrt((a != 0).sum() * (b != 0).sum()))
    return float((a * b).sum() / told) if told else float("nan")


def rank_correlation(
    score_N: np.ndarray, level_N: np.ndarray, prompt_N: Sequence[Any], *, draws: int = 400, seed: int = 0
) -> dict[str, Any]:
    """Return Spearman's correlation of scores with ratings, its interval over prompts, and that within prompts.

    Within prompts both sides are centred: what a reward adds to all outputs of a prompt, such as a Bradley-Terry
    score's unknown constant, does not enter. It is NaN where no prompt has two ratings.

    Raises:
        DataError: no rows, or values that are no numbers.
    """
    score, level = np.asarray(score_N, dtype=np.float64), np.asarray(level_N, dtype=np.float64)
    _require_numbers(score, level)
    index = np.unique(np.asarray(prompt_N), return_inverse=True)[1]
    rows = _resampled(index, draws, seed)
    count = np.bincount(index)
    mean = [np.bincount(index, weights=side) / count for side in (score, level)]
    several = count[index] > 1
    within = [(side - m[index])[several] for side, m in zip((score, level), mean, strict=True)]
    return {
        "n": len(score), "spearman": spearman(score, level),
        "spearman_ci": list(percentile_interval(np.array([spearman(score[r], level[r]) for r in rows]))),
        "spearman_within_prompts": spearman(*within) if several.any() else float("nan"),
    }  # fmt: skip


def mean_interval(
    value_N: Sequence[float], cluster_N: Sequence[Any], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the mean of what is a number, and its interval over clusters."""
    value, cluster = np.asarray(value_N, dtype=np.float64), np.asarray(cluster_N)
    kept = np.isfinite(value)
    if not kept.any():
        return float("nan"), (float("nan"), float("nan"))
    return float(value[kept].mean()), _share_interval(value[kept], cluster[kept], draws, seed)


def cross_calibrated(score_N: np.ndarray, seen_N: np.ndarray, cluster_N: Sequence[Any], seed: int = 0) -> np.ndarray:
    """Return probabilities `sigmoid(a score + b)`, a and b of each half of the clusters fitted on the other half.

    It is what a score is worth as a probability where it is none; no row calibrates itself.

    Raises:
        DataError: a half with one class only.
    """
    score, seen = np.asarray(score_N, dtype=np.float64), np.asarray(seen_N, dtype=np.float64)
    half = {name: uniform(seed, "calibrate", str(name)) < 0.5 for name in set(cluster_N)}
    first = np.array([half[name] for name in cluster_N])
    found = np.empty(len(score))
    for part in (first, ~first):
        if not 0 < seen[~part].sum() < (~part).sum():
            raise DataError("A calibration needs both classes in both halves", why=f"{len(half)} clusters")
        a, b = fit_temperature(score[~part], seen[~part])
        found[part] = np.exp(-np.logaddexp(0, -(a * score[part] + b)))
    return found


def signed_pairs(rows: Sequence[Observation]) -> dict[str, list[tuple[str, str, float, str]]]:
    """Return pairs `(a, b, sign, prompt)` that people told apart or tied, by protocol: sign 1 where a is the better.

    ratings     two outputs of a prompt that one person rated: the higher is better, equal ones tie
    rankings    comparisons, and all pairs of a ranking

    A person's several ratings of one output are averaged; rows that name nobody are one person.
    """
    rated: dict[tuple[str, str], dict[str, list[float]]] = {}
    found: dict[str, list[tuple[str, str, float, str]]] = {"ratings": [], "rankings": []}
    for row in rows:
        if row.kind == "rating":
            rated.setdefault((row.prompt, row.user), {}).setdefault(row.items[0], []).append(float(row.value[0]))
        elif row.kind in ("comparison", "ranking"):
            ranks = row.value if row.kind == "ranking" else (1 - row.value, row.value)
            for (a, r), (b, s) in combinations(zip(row.items, ranks, strict=True), 2):
                found["rankings"].append((a, b, float(np.sign(s - r)), row.prompt))
    for (prompt, _), said in rated.items():
        for (a, x), (b, y) in combinations(((item, float(np.mean(v))) for item, v in said.items()), 2):
            found["ratings"].append((a, b, float(np.sign(x - y)), prompt))
    return found


def compare_under_protocols(
    scores: Mapping[str, Mapping[str, float]], rows: Sequence[Observation], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Return how well rewards agree with ratings and with rankings of the same outputs: rewards x protocols.

    A reward that was fitted to one protocol may win under it and lose under the other. All are measured on the pairs
    of which all have scores, and intervals resample prompts.

        difference    accuracy of the first reward less that of another one, under each protocol
        interaction   the difference under ratings less that under rankings: above 0 where each is the better one
                      under its own protocol, the first reward's being ratings

    Args:
        scores: of outputs by their ids, by reward.
        rows: with ratings and with comparisons or rankings; see `signed_pairs` and `rewards.fit_data.load_data`.

    Returns:
        table (see `PairAccuracy`), and for every reward but the first `difference` by protocol, with ci, and
        `interaction`, with ci; shared: pairs that both protocols speak of, and how often they agree; missing: pairs
        without a score.

    Raises:
        DataError: less than two rewards, or no pair under a protocol.

    Source: Bansal, Dang and Grover (arXiv 2308.15812).
    """
    if len(scores) < 2:
        raise DataError("Comparing rewards under both protocols needs two rewards", why=f"got {len(scores)}")
    names, missing, kept = list(scores), 0, {}
    for protocol, pairs in signed_pairs(rows).items():
        whole = [p for p in pairs if all(np.isfinite(scores[n].get(i, np.nan)) for n in names for i in p[:2])]
        missing += len(pairs) - len(whole)
        if not whole:
            raise DataError(
                f"No two outputs of a prompt are told apart by {protocol}", why=f"{len(pairs)} pairs, none with scores",
                do="Give data with ratings and with comparisons or rankings of the same prompts",
            )  # fmt: skip
        kept[protocol] = whole
    table = {
        name: {
            protocol: vars(pair_accuracy(
                np.array([scores[name][a] - scores[name][b] for a, b, _, _ in pairs]),
                np.array([sign for *_, sign, _ in pairs]), [p[3] for p in pairs], draws=draws, seed=seed,
            ))
            for protocol, pairs in kept.items()
        }
        for name in names
    }  # fmt: skip
    against = {name: _paired(scores[names[0]], scores[name], kept, draws, seed) for name in names[1:]}
    return {"table": table, "against": against, "shared": _shared_pairs(kept), "missing": missing}


def _paired(
    one: Mapping[str, float], other: Mapping[str, float], kept: Mapping[str, list[tuple[str, str, float, str]]],
    draws: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The difference of two rewards' accuracies under each protocol, and the difference of the differences."""
    units, clusters = [], []
    for column, protocol in enumerate(kept):
        for a, b, sign, prompt in kept[protocol]:
            if sign:
                unit = np.zeros(4)
                right = [(1 + np.sign((s[a] - s[b]) * sign)) / 2 for s in (one, other)]
                unit[2 * column : 2 * column + 2] = right[0] - right[1], 1
                units.append(unit)
                clusters.append(prompt)
    if not units:
        return {}
    table, cluster = np.stack(units), np.array(clusters)

    def share(sums: np.ndarray, column: int) -> np.ndarray:
        n = sums[:, 2 * column + 1]
        return np.divide(sums[:, 2 * column], n, out=np.full(len(n), np.nan), where=n > 0)

    def estimate(statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        ci = bootstrap_sums(table, statistic, cluster, draws=draws, seed=seed)
        return {"mean": float(statistic(table.sum(0)[None])[0]), "ci": list(ci)}

    return {
        "difference": {name: estimate(partial(share, column=column)) for column, name in enumerate(kept)},
        "interaction": estimate(lambda sums: share(sums, 0) - share(sums, 1)),
    }


def _shared_pairs(kept: Mapping[str, list[tuple[str, str, float, str]]]) -> dict[str, Any]:
    """How often the two protocols say the same of a pair, over the pairs that both speak of; ties apart from flips."""
    signs: list[dict[tuple[str, str], list[float]]] = []
    for pairs in kept.values():
        said: dict[tuple[str, str], list[float]] = {}
        for a, b, sign, _ in pairs:
            said.setdefault((min(a, b), max(a, b)), []).append(sign if a < b else -sign)
        signs.append(said)
    both = [tuple(float(np.sign(np.mean(said[pair]))) for said in signs) for pair in signs[0].keys() & signs[1].keys()]
    n = len(both)
    return {
        "n": n, "agree": sum(x == y for x, y in both) / n if n else float("nan"),
        "flips": sum(x * y < 0 for x, y in both), "ties_on_one_side": sum((x == 0) != (y == 0) for x, y in both),
    }  # fmt: skip


def _resampled(index_N: np.ndarray, draws: int, seed: int) -> list[np.ndarray]:
    """Rows of whole clusters, drawn with replacement."""
    rows = np.argsort(index_N, kind="stable")
    starts = np.searchsorted(index_N[rows], np.arange(index_N.max() + 2))
    rng, clusters = np.random.default_rng(seed), len(starts) - 1
    return [
        np.concatenate([rows[starts[c] : starts[c + 1]] for c in rng.integers(clusters, size=clusters)])
        for _ in range(draws)
    ]


def _require_numbers(*columns: np.ndarray) -> None:
    if not len(columns[0]):
        raise DataError("There is nothing to evaluate", why="no rows")
    if len({len(column) for column in columns}) > 1:
        raise DataError("Scores and answers differ in number", why=" and ".join(str(len(c)) for c in columns))
    if bad := sum(int((~np.isfinite(column)).sum()) for column in columns):
        raise DataError(
            "Scores that are no numbers cannot be evaluated", why=f"{bad} values are NaN or infinite",
            do="Leave out samples without a score, and say how many",
        )  # fmt: skip
