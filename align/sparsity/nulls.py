"""What rounding alone would show: a dense update of the same norm, seen through the format of the weights.

Of an update N(0, s^2) of every weight, an entry whose neighbours are u apart shows

    aligned: W0 is a value of the format
        P = erfc(u / (2 sqrt2 s)),   E[e^2] = u^2 sum_k (2k - 1) erfc((k - 1/2) u / (sqrt2 s))
    un-aligned: a finer master is rounded each time
        P = erfc(u / (sqrt2 s)) + (s/u) sqrt(2/pi) (1 - exp(-u^2 / 2 s^2)),   E[e^2] = s^2 + u^2 E[f (1 - f)]

with u = ulp(w) by the exponent of w, and f the fractional part of the update in units of u. s is chosen so that
the predicted norm of what is visible equals the observed one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_LOW, _HIGH = -8.0, 24.0  # log2 of s/u: below nothing is visible (un-aligned: a line), above everything is


@functools.lru_cache(maxsize=2)
def _table(aligned: bool) -> tuple[Array, Array, Array]:
    """Return log2(s/u), the visible share, and E[e^2]/u^2 on a grid."""
    grid = np.linspace(_LOW, _HIGH, 2049)
    shares, energies = [], []
    for ratio in np.exp2(grid).tolist():
        inverse = 1 / (math.sqrt(2) * ratio)
        if aligned:
            shares.append(math.erfc(inverse / 2))
            terms = range(1, min(int(9 / inverse) + 2, 60))
            energies.append(
                sum((2 * k - 1) * math.erfc((k - 0.5) * inverse) for k in terms) if ratio < 4 else ratio**2 + 1 / 12
            )
        else:
            shares.append(math.erfc(inverse) + ratio * math.sqrt(2 / math.pi) * -math.expm1(-(inverse**2)))
            if ratio < 0.12:
                energies.append(ratio * math.sqrt(2 / math.pi))
            else:
                waves = sum(math.exp(-2 * (math.pi * k * ratio) ** 2) / (math.pi * k) ** 2 for k in range(1, 20))
                energies.append(ratio**2 + 1 / 6 - waves)
    return grid, np.array(shares), np.array(energies)


def visible_share(scale: float, spacing: Array, *, aligned: bool) -> Array:
    """Return P(an entry changes) by the spacing u of its values, of an update N(0, scale^2)."""
    grid, shares, _ = _table(aligned)
    return _look_up(scale, spacing, grid, shares, aligned)


def _look_up(scale: float, spacing: Array, grid: Array, column: Array, aligned: bool) -> Array:
    if scale <= 0:
        return np.zeros_like(spacing)
    ratio = np.log2(scale / spacing)
    found = np.interp(ratio, grid, column)
    below = column[0] * np.exp2(ratio - _LOW) if not aligned else 0.0
    return np.where(ratio < _LOW, below, found)


def visible_energy(scale: float, histogram: NDArray[np.int64], spacing: Array, *, aligned: bool) -> float:
    """Return E||E||_F^2, of what is visible of an update N(0, scale^2) of all entries."""
    grid, _, energies = _table(aligned)
    ratio = np.log2(scale / spacing) if scale > 0 else np.full_like(spacing, _LOW - 1)
    per_entry = spacing**2 * _look_up(scale, spacing, grid, energies, aligned)
    return float(np.sum(histogram * np.where(ratio > _HIGH, scale**2, per_entry)))


def matching_scale(energy: float, histogram: NDArray[np.int64], spacing: Array, *, aligned: bool) -> float:
    """Return the s whose predicted visible energy is `energy`, by bisection; 0 where nothing is visible."""
    held = histogram > 0
    histogram, spacing = histogram[held], spacing[held]
    if energy <= 0 or not len(histogram) or not math.isfinite(energy):
        return 0.0
    low, high = float(spacing.min()) * 2**-9, math.sqrt(energy) * 4 + float(spacing.max())
    for _ in range(64):
        middle = math.sqrt(low * high)
        if visible_energy(middle, histogram, spacing, aligned=aligned) < energy:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def expected_identical(energy: float, histogram: NDArray[np.int64], spacing: Array, *, aligned: bool) -> float:
    """Return how many entries a dense update of the same visible norm would leave bit-identical.

    Args:
        energy: observed ||E||_F^2.
        histogram: entries of W0 by biased exponent.
        spacing: ulp by biased exponent.
    """
    return identical_at(
        matching_scale(energy, histogram, spacing, aligned=aligned), histogram, spacing, aligned=aligned
    )


def identical_at(scale: float, histogram: NDArray[np.int64], spacing: Array, *, aligned: bool) -> float:
    """Return how many entries an update N(0, scale^2) of all of them would leave bit-identical."""
    return float(np.sum(histogram * (1 - visible_share(scale, spacing, aligned=aligned))))


def visible_after_sign_step(rate: float, histogram: NDArray[np.int64], spacing: Array, *, aligned: bool) -> float:
    """Return the share of entries that one step of +-rate changes: rate > u/2 when aligned, else min(1, rate/u)."""
    seen = (rate > spacing / 2).astype(np.float64) if aligned else np.minimum(1.0, rate / spacing)
    return float(np.sum(histogram * seen) / max(int(histogram.sum()), 1))


def visible_after_steps(
    path: float, spread: float, histogram: NDArray[np.int64], spacing: Array, *, aligned: bool
) -> tuple[float, float]:
    """Return the share of entries that AdamW's steps change, where they cancel and where they agree.

    A step moves a weight by about its learning rate. Steps of random signs add up to N(0, spread^2), steps of one sign
    to +-path; an entry that is pushed about evenly often both ways shows the first, one with a steady gradient the
    second.

    Args:
        path: the sum of the learning rates of all steps.
        spread: the root of the sum of their squares.
    """
    many = max(int(histogram.sum()), 1)
    cancelling = float(np.sum(histogram * visible_share(spread, spacing, aligned=aligned)) / many)
    return cancelling, visible_after_sign_step(path, histogram, spacing, aligned=aligned)


def overlap_null(
    strata: Iterable[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[float, float]:
    """Return mean and variance of |I1 n I2| were the two masks independent within each stratum.

        E = sum_j n1 n2 / n,   Var = sum_j n1 n2 (n - n1) (n - n2) / (n^2 (n - 1))       (hypergeometric)

    Args:
        strata: n, n1 and n2 of groups of strata, as arrays.
    """
    mean = variance = 0.0
    for n, n1, n2 in strata:
        a, b, c = (np.asarray(x, np.float64) for x in (n, n1, n2))
        held = a > 0
        a, b, c = a[held], b[held], c[held]
        mean += float(np.sum(b * c / a))
        variance += float(np.sum(b * c * (a - b) * (a - c) / (a**2 * np.maximum(a - 1, 1))))
    return mean, variance
