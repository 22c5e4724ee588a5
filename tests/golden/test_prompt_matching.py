"""Matching the prompts of the two classes: an independent fit, and a density ratio that is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from align.errors import DataError
from trainers.prompt_matching import fit_balanced_logistic, match_prompts


def two_gaussians(up=3000, down=3000, seed=0):
    """Prompts N(+m, 1) of thumbs up and N(-m, 1) of thumbs down: the log density ratio is 2 m . x."""
    draw, m = np.random.default_rng(seed), np.array([0.5, 0.0, -0.25])
    x = np.concatenate([draw.normal(size=(up, 3)) + m, draw.normal(size=(down, 3)) - m])
    return x, np.arange(up + down) < up, np.exp(2 * x @ m), m


@pytest.mark.parametrize("balance", [(300, 300), (900, 100)])
def test_the_fit_is_scikit_learns(balance):
    from sklearn.linear_model import LogisticRegression

    x, label, _, _ = two_gaussians(*balance)
    theirs = LogisticRegression(class_weight="balanced", C=1.0, tol=1e-10, max_iter=10_000).fit(x, label)
    w, b = fit_balanced_logistic(torch.from_numpy(x), torch.from_numpy(label))
    np.testing.assert_allclose(w, theirs.coef_[0], atol=1e-6)
    assert b == pytest.approx(theirs.intercept_[0], abs=1e-6)


def test_weights_recover_a_known_density_ratio_and_move_the_mean():
    x, label, ratio, m = two_gaussians()
    found = match_prompts(x, label)
    down = ~label
    assert spearmanr(found.weights[down], ratio[down]).statistic > 0.95
    assert (found.weights[label] == 1).all()
    before, after = x[down].mean(0), np.average(x[down], axis=0, weights=found.weights[down])
    assert np.linalg.norm(after - m) < 0.35 * np.linalg.norm(before - m)
    assert 0 < found.effective_rows < down.sum() and found.auc > 0.75
    assert set(json.loads(json.dumps(found.describe()))) >= {"auc", "effective_rows", "clamped", "coefficients"}


def test_uneven_classes_do_not_tilt_the_weights():
    """The classifier is balanced: nine times as many thumbs up leave the odds where they were."""
    x, label, ratio, _ = two_gaussians(9000, 1000, seed=1)
    w = match_prompts(x, label, sample=1000).weights[~label]
    inside = (ratio[~label] > 0.6) & (ratio[~label] < 8)
    assert np.median(w[inside] / ratio[~label][inside]) == pytest.approx(1.0, abs=0.15)


def test_bounds_are_hit_exactly_and_counted():
    x, label, _, _ = two_gaussians()
    found = match_prompts(x, label)
    down = found.weights[~label]
    assert (down.min(), down.max()) == (0.5, 10.0)
    assert found.clamped == ((down == 0.5) | (down == 10.0)).mean() > 0.3


def test_the_same_prompts_need_no_matching():
    draw = np.random.default_rng(0)
    found = match_prompts(draw.normal(size=(4000, 2)), np.arange(4000) % 2 == 0)
    assert abs(found.auc - 0.5) < 0.05 and found.effective_rows > 1900 and found.clamped == 0


def test_one_class_and_broken_features_are_refused():
    with pytest.raises(DataError, match="both classes"):
        match_prompts(np.zeros((3, 1)), np.ones(3, bool))
    with pytest.raises(DataError, match="finite numbers"):
        match_prompts(np.full((3, 1), np.nan), np.arange(3) > 1)
