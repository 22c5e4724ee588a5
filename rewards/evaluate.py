"""What a reward is worth: agreement with pairs, discrimination and calibration of a probability, and bias probes.

Everything takes arrays of scores, so that scores of a file, of a reward and of a fit are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.bias import pearson, spearman
from align.feedback.resampling import DRAWS, percentile_interval, wilson
from align.types import Samples
from rewards.base import Reward, score_safely

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


def debiased_calibration_error(probability_N: np.ndarray, seen_N: np.ndarray, bins: int = BINS) -> float:
    """Return the calibration error less what sampling alone would make of a calibrated model's.

        sum_b n_b / n (mean p - mean y)^2 - v_b,   v_b = mean y (1 - mean y) / (n_b - 1),   then the root, from 0

    It is in the units of a probability, and near 0 for a calibrated model at any number of rows.

    Source: Kumar et al. (arXiv 1909.10155), the debiased estimator of the squared error.
    """
    parts = _equal_mass(probability_N, seen_N, bins)
    n, total = sum(len(y) for _, y in parts), 0.0
    for p, y in parts:
        spread = y.mean() * (1 - y.mean()) / max(1, len(y) - 1)
        total += len(y) / n * ((p.mean() - y.mean()) ** 2 - spread)
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
    rows = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[rows], np.arange(index.max() + 2))
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = rng.integers(len(starts) - 1, size=len(starts) - 1)
        picked = np.concatenate([rows[starts[c] : starts[c + 1]] for c in chosen])
        found.append(debiased_calibration_error(p[picked], y[picked], bins))
    return {
        "n": len(y), "clusters": len(starts) - 1, "base_rate": base, "mean_probability": float(p.mean()),
        "auroc": auroc(p, y), "auprc": average_precision(p, y),
        "brier": float(np.mean((p - y) ** 2)), "brier_of_base_rate": base * (1 - base),
        "log_loss": float(-np.mean(y * np.log(inside) + (1 - y) * np.log1p(-inside))),
        "ece": calibration_error(p, y, bins), "debiased_ece": debiased_calibration_error(p, y, bins),
        "debiased_ece_ci": list(percentile_interval(np.array(found))),
        "reliability": [vars(b) for b in reliability(p, y, bins)],
    }  # fmt: skip


# --- probes -----------------------------------------------------------------------------------------


def probe_length(scores_B: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
    """Return how a reward of texts goes with their length: Spearman and Pearson over samples that have a score."""
    length = np.array([len(text) for text in texts], dtype=np.float64)
    kept = np.isfinite(scores_B)
    return {
        "n": int(kept.sum()), "spearman": spearman(scores_B[kept], length[kept]),
        "pearson": pearson(scores_B[kept], length[kept]),
    }  # fmt: skip


def probe_brightness(reward: Reward, samples: Samples, factors: Sequence[float] = (0.8, 1.25)) -> dict[str, float]:
    """Return by how much a reward of images changes when their pixels are multiplied, in its standard deviations.

    Raises:
        DataError: samples that are no images.
    """
    if samples.images is None:
        raise DataError("Brightness is a matter of images", why=f"got {samples.media}")
    plain = _column(reward, samples)
    spread = float(np.nanstd(plain)) or 1.0
    found = {}
    for factor in factors:
        images = [(image * factor).clamp(0, 1) for image in samples.images]
        changed = _column(reward, replace(samples, images=images))
        found[f"x{factor:g}"] = float(np.nanmean(changed - plain)) / spread
    return found


def probe_prompts(reward: Reward, samples: Samples, seed: int = 0) -> dict[str, float]:
    """Return the mean score under the prompts and under each other's prompts, and the share of samples that lose.

    A reward that does not read the prompt loses nothing: `changed` is 0.
    """
    own = _column(reward, samples)
    order = _derangement(len(samples), seed)
    other = _column(reward, replace(samples, prompts=[samples.prompts[i] for i in order]))
    both = np.isfinite(own) & np.isfinite(other)
    return {
        "n": int(both.sum()), "own": float(own[both].mean()), "other": float(other[both].mean()),
        "changed": float((own[both] != other[both]).mean()),
        "lose": float(np.mean(np.where(own[both] == other[both], 0.5, own[both] > other[both]))),
    }  # fmt: skip


def _derangement(count: int, seed: int) -> np.ndarray:
    """A random cyclic order: nobody keeps their own place."""
    if count < 2:
        raise DataError("Shuffling prompts needs two samples", why=f"got {count}")
    cycle = np.random.default_rng(seed).permutation(count)
    order = np.empty(count, dtype=np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order


def _column(reward: Reward, samples: Samples) -> np.ndarray:
    scores = score_safely(reward, samples)
    return np.where(scores.valid[:, 0], scores.values[:, 0], np.nan)


def compare_protocols(scores: dict[str, np.ndarray], pairs: dict[str, tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """Return the pair accuracy of every reward under every protocol, such as pairs of ratings and of rankings.

    Args:
        scores: of the same items, by reward.
        pairs: by protocol, `(first_N, second_N, said_N, cluster_N)`, indices of items and what was said.
    """
    measure: Callable[..., PairAccuracy] = pair_accuracy
    return {
        name: {
            protocol: vars(measure(column[a] - column[b], said, cluster))
            for protocol, (a, b, said, cluster) in pairs.items()
        }
        for name, column in scores.items()
    }


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
