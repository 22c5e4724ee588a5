"""Agreement, correlations and strengths against independent implementations, to 1e-9 where both are exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score, precision_recall_fscore_support

from align.feedback.aggregate import Comparisons, fit
from align.feedback.agreement import classification_report, cohen_kappa, fleiss_kappa, krippendorff_alpha
from align.feedback.bias import pearson, spearman

labels = st.integers(0, 4)
pairs = st.lists(st.tuples(labels, labels), min_size=2, max_size=40)


def brute_alpha(units: list[list[int | None]], level: str) -> float:
    """Krippendorff's alpha by its definition: observed over expected disagreement of pairs of values."""
    kept = [[v for v in unit if v is not None] for unit in units]
    kept = [unit for unit in kept if len(unit) > 1]
    values = [v for unit in kept for v in unit]
    count = {v: values.count(v) for v in values}

    def distance(a: int, b: int) -> float:
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return float((a - b) ** 2)
        low, high = min(a, b), max(a, b)
        between = sum(n for v, n in count.items() if low <= v <= high)
        return (between - (count[a] + count[b]) / 2) ** 2 if a != b else 0.0

    n = len(values)
    observed = sum(distance(a, b) / (len(u) - 1) for u in kept for a, b in itertools.permutations(u, 2)) / n
    expected = sum(distance(a, b) for a, b in itertools.permutations(values, 2)) / (n * (n - 1))
    return 1 - observed / expected if expected else math.nan


def brute_fleiss(units: list[list[int]]) -> float:
    agree = [sum(a == b for a, b in itertools.combinations(unit, 2)) / math.comb(len(unit), 2) for unit in units]
    values = [v for unit in units for v in unit]
    chance = sum((values.count(v) / len(values)) ** 2 for v in set(values))
    return (sum(agree) / len(agree) - chance) / (1 - chance) if chance < 1 else math.nan


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) < 1e-9


@settings(max_examples=150, deadline=None)
@given(pairs, st.sampled_from(["none", "linear", "quadratic"]))
def test_cohen(rows: list[tuple[int, int]], weights: str):
    a, b = zip(*rows, strict=True)
    if len({*a, *b}) == 1:
        return
    expected = cohen_kappa_score(a, b, labels=range(5), weights=None if weights == "none" else weights)
    assert same(cohen_kappa(a, b, list(range(5)), weights=weights, draws=0).value, float(expected))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.none(), labels), min_size=4, max_size=4), min_size=2, max_size=15),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
def test_krippendorff(units: list[list[int | None]], level: str):
    if not any(sum(v is not None for v in unit) > 1 for unit in units):
        return
    assert same(krippendorff_alpha(units, level, draws=0).value, brute_alpha(units, level))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(labels, min_size=3, max_size=3), min_size=2, max_size=15))
def test_fleiss(units: list[list[int]]):
    counts = [[unit.count(c) for c in range(5)] for unit in units]
    assert same(fleiss_kappa(counts, draws=0).value, brute_fleiss(units))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(labels, labels), min_size=3, max_size=30))
def test_correlations(rows: list[tuple[int, int]]):
    x, y = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(pearson(x, y)) and math.isnan(spearman(x, y))
        return
    assert same(pearson(x, y), float(pearsonr(x, y)[0])) and same(spearman(x, y), float(spearmanr(x, y)[0]))


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_judge_report(rows: list[tuple[int, int]]):
    truth, guess = (np.array(side) for side in zip(*rows, strict=True))
    found = classification_report(truth, guess, 5)
    expected = precision_recall_fscore_support(truth, guess, average="macro", zero_division=0)
    ours = found["macro_precision"], found["macro_recall"], found["macro_f1"]
    assert same(found["accuracy"], accuracy_score(truth, guess))
    assert all(same(a, b) for a, b in zip(ours, expected[:3], strict=True))


def test_bradley_terry_is_a_logistic_regression():
    rng, size = np.random.default_rng(1), 400
    i = rng.integers(0, 5, size)
    j = (i + rng.integers(1, 5, size)) % 5
    won = rng.random(size) < 1 / (1 + np.exp(-0.7 * (i - j) - 0.4))
    design = np.zeros((size, 5))
    design[np.arange(size), i] += 1
    design[np.arange(size), j] -= 1
    model = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(design[:, 1:], won)
    found = fit(Comparisons(i, j, np.where(won, 1, -1), tuple("ABCDE")), position=True)
    assert found.strengths[1:] == pytest.approx(model.coef_[0], abs=1e-5)
    assert found.intercept == pytest.approx(model.intercept_[0], abs=1e-5)
