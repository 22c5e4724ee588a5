"""Statistics of groups under a validity mask: mean, std, z-score, and clustered bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.errors import DataError


def masked_mean(values: np.ndarray, valid: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the mean over valid entries, NaN where there is none."""
    count = valid.sum(axis=axis)
    total = np.where(valid, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def masked_std(values: np.ndarray, valid: np.ndarray, axis: int | None = None, ddof: int = 1) -> np.ndarray:
    """Return `sqrt(sum (r - mean)^2 / (n - ddof))` over valid entries, NaN where n <= ddof."""
    mean = masked_mean(values, valid, axis)
    centred = values - (mean if axis is None else np.expand_dims(mean, axis))
    count = valid.sum(axis=axis) - ddof
    total = (np.where(valid, centred, 0.0) ** 2).sum(axis=axis)
    return np.sqrt(np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0))


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the number of values behind it."""

    mean: float
    ci_low: float
    ci_high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the fields as JSON-ready numbers."""
        return {"mean": self.mean, "ci_low": self.ci_low, "ci_high": self.ci_high, "n": self.n}


def standard_error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Return the standard error of a mean of N values, `sqrt(I / (I - 1) sum over I clusters of S^2) / N`.

    S is a cluster's sum of `v - mean v`: values of one cluster (a prompt, a user) are not independent. NaN with one.
    """
    _, index = np.unique(clusters, return_inverse=True)
    if not len(values) or index.max() == 0:
        return float("nan")
    sums = np.bincount(index, weights=values - np.mean(values))
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values))


def bootstrap_mean(
    values: np.ndarray, clusters: np.ndarray | None = None, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Estimate a mean with a percentile bootstrap interval that resamples whole clusters.

    Values of one cluster (a prompt, a user) are not independent; resampling clusters keeps that in the
    interval. Without `clusters` every value is its own. Missing values (NaN) are left out.

    Raises:
        DataError: values and clusters of different lengths.
    """
    values = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(values):
        raise DataError("A bootstrap needs one cluster label a value", why=f"got {len(labels)} for {len(values)}")
    present = np.isfinite(values)
    if not present.any():
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    values, (_, index) = values[present], np.unique(labels[present], return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    picks = np.random.default_rng(seed).integers(0, len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high), len(values))
