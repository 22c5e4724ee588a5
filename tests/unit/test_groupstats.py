from __future__ import annotations

import numpy as np
import pytest

from align.errors import DataError
from align.groupstats import bootstrap_mean, masked_mean, masked_std


def test_masked_statistics_equal_numpy_on_what_is_valid():
    rng = np.random.default_rng(0)
    values, valid = rng.normal(size=(4, 9)), rng.random((4, 9)) > 0.3
    values = np.where(valid, values, np.nan)
    for row, mask, mean, std in zip(
        values, valid, masked_mean(values, valid, 1), masked_std(values, valid, 1), strict=True
    ):
        assert mean == pytest.approx(row[mask].mean()) and std == pytest.approx(row[mask].std(ddof=1))
    assert masked_mean(values, valid) == pytest.approx(np.nanmean(values))
    assert np.isnan(masked_mean(values, np.zeros_like(valid), 1)).all()
    assert np.isnan(masked_std(np.ones((1, 3)), np.array([[True, False, False]]), 1)).all()


def test_bootstrap_covers_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        clusters = np.repeat(np.arange(30), 4)
        values = np.repeat(rng.normal(size=30), 4) + 0.3 * rng.normal(size=120)
        got = bootstrap_mean(values, clusters, draws=400, seed=trial)
        hits += got.ci_low <= 0 <= got.ci_high
    assert 270 <= hits <= 296


def test_clusters_widen_the_interval():
    values = np.repeat(np.random.default_rng(2).normal(size=20), 25)
    naive, honest = bootstrap_mean(values), bootstrap_mean(values, np.repeat(np.arange(20), 25))
    assert honest.ci_high - honest.ci_low > 3 * (naive.ci_high - naive.ci_low)


def test_missing_values_are_left_out_and_none_left_is_said():
    got = bootstrap_mean(np.array([1.0, np.nan, 3.0]))
    assert got.mean == 2.0 and got.n == 2
    assert bootstrap_mean(np.array([np.nan])).n == 0
    with pytest.raises(DataError, match="cluster label"):
        bootstrap_mean(np.zeros(3), np.zeros(2))
