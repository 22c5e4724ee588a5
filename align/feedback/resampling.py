"""Intervals: Wilson's for a share, and a bootstrap of anything that is a function of sums over clusters; many tests.

Every statistic of this room that gets a bootstrap interval (a kappa, an alpha, an inconsistency) is a function of a
sum over units of small integer tables. Resampling clusters is then drawing how often each table enters the sum, and
clusters with the same table are drawn together, so a million units cost no more than their distinct tables.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from align.errors import DataError

DRAWS = 1000
LEVEL = 0.95

Interval = tuple[float, float]
NO_INTERVAL: Interval = (float("nan"), float("nan"))


def wilson(successes: float, n: float, level: float = LEVEL) -> Interval:
    """Return Wilson's interval of a share, for `successes` (halves allowed) of `n`; NaN when n is 0.

    `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)` (Wilson 1927).
    """
    if n <= 0:
        return NO_INTERVAL
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return 0.0 if successes <= 0 else max(0.0, low), 1.0 if successes >= n else min(1.0, high)


def percentile_interval(draws: np.ndarray, level: float = LEVEL) -> Interval:
    """Return the percentile interval of bootstrap draws, those that are not finite left out; NaN below two draws."""
    kept = draws[np.isfinite(draws)]
    if len(kept) < 2:
        return NO_INTERVAL
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def grouped(tables_UD: np.ndarray, clusters_U: np.ndarray | None) -> np.ndarray:
    """Return the sums `[clusters, D]` of unit tables over their clusters; without clusters each unit is its own.

    Raises:
        DataError: not one cluster label a unit.
    """
    if clusters_U is None:
        return tables_UD
    labels = np.asarray(clusters_U)
    if len(labels) != len(tables_UD):
        raise DataError("A bootstrap needs one cluster label a unit", why=f"got {len(labels)} for {len(tables_UD)}")
    _, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((index.max(initial=-1) + 1, tables_UD.shape[1]))
    np.add.at(sums, index, tables_UD)
    return sums


def bootstrap_sums(
    tables_UD: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters_U: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of `statistic(sum of unit tables)` over units or whole clusters.

    Args:
        tables_UD: what each unit adds to the sums, `[units, D]`.
        statistic: maps sums `[draws, D]` to values `[draws]`, NaN where it is undefined.
        clusters_U: label of each unit; units of one label are drawn together.

    Raises:
        DataError: not one cluster label a unit.
    """
    sums = grouped(np.asarray(tables_UD, dtype=np.float64), clusters_U)
    if len(sums) < 2 or draws < 2:
        return NO_INTERVAL
    distinct, counts = np.unique(sums, axis=0, return_counts=True)
    rng, found = np.random.default_rng(seed), []
    chunk = max(1, 4_000_000 // len(distinct))
    for start in range(0, draws, chunk):
        weights = rng.multinomial(len(sums), counts / len(sums), size=min(chunk, draws - start))
        found.append(statistic(weights @ distinct))
    return percentile_interval(np.concatenate(found), level)


def benjamini_hochberg(p_U: np.ndarray, rate: float) -> np.ndarray:
    """Return which hypotheses are rejected: those up to the largest k with `p_(k) <= rate k / U`.

    Source: Benjamini and Hochberg (1995).
    """
    order = np.argsort(p_U, kind="stable")
    below = np.flatnonzero(p_U[order] <= rate * np.arange(1, len(p_U) + 1) / max(1, len(p_U)))
    return order[: below[-1] + 1] if len(below) else order[:0]
