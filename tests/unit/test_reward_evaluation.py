"""Evaluation of rewards: the facts' values, parity with scikit-learn, and estimators against what they estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from align.errors import DataError
from align.types import Samples
from rewards import evaluate as ev
from rewards import probes
from rewards.base import FunctionReward, RewardCard, get_reward

SAID = np.array([1, -1, 0] * 3)
A = np.array([0.9, -0.7, 0.1, 0.8, -0.6, 0.2, 0.7, -0.5, 0.3])
B = np.array([0.1, -0.8, 0.5, 0.5, -0.3, 0.3, 0.4, -0.4, 0.4])
SCORES = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
SEEN = np.array([0, 0, 1, 0, 1, 1, 0, 1])


def test_accuracy_of_pairs_is_the_facts():
    found = ev.pair_accuracy(A - B, SAID)  # the scores of the first outputs less those of the second
    assert (found.without_ties, found.with_ties) == pytest.approx((0.8333, 0.6667), abs=5e-5)
    assert found.half_credit == pytest.approx((5 + 3 * 0.5) / 9)
    a, b = ev.pair_accuracy(A, SAID), ev.pair_accuracy(B, SAID)
    assert a.without_ties == 1 and a.with_ties == 1 and 0.3 <= a.threshold < 0.5
    assert (b.with_ties, b.ties, b.n) == (pytest.approx(2 / 3, abs=1e-4), 3, 9)
    pooled = ev.pair_accuracy(np.concatenate([A, B, [-1.0]]), np.concatenate([SAID, SAID, [1]]))
    assert pooled.without_ties == pytest.approx(12 / 13) and pooled.ci[0] < 12 / 13 < pooled.ci[1] + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([-1, 0, 1])), min_size=1, max_size=12))
def test_the_tie_threshold_is_the_best_of_all(pairs):
    delta, said = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    best = max(float(np.mean(np.where(np.abs(delta) <= at, 0, np.sign(delta)) == said)) for at in (0.0, *np.abs(delta)))
    found = ev.pair_accuracy(delta, said, draws=2)
    assert found.with_ties == pytest.approx(best)
    read = np.where(np.abs(delta) <= found.threshold, 0, np.sign(delta))
    assert float(np.mean(read == said)) == pytest.approx(best)


def test_discrimination_is_the_facts_and_scikit_learns():
    assert ev.auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == pytest.approx(0.75)
    assert ev.average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == pytest.approx(5 / 6)
    assert (ev.auroc(SCORES, SEEN), ev.average_precision(SCORES, SEEN)) == pytest.approx((0.75, 0.7708333333))
    rng = np.random.default_rng(0)
    s, y = rng.integers(0, 20, 500) / 20, rng.integers(0, 2, 500)
    assert ev.auroc(s, y) == pytest.approx(roc_auc_score(y, s))
    assert ev.average_precision(s, y) == pytest.approx(average_precision_score(y, s))
    assert np.isnan(ev.auroc(s, np.ones(500))) and np.isnan(ev.average_precision(s, np.zeros(500)))


def test_calibration_is_the_facts():
    found = ev.probability_report(SCORES, SEEN, bins=4, draws=20)
    assert found["ece"] == pytest.approx(0.25) and found["brier"] == pytest.approx(0.2)
    assert found["log_loss"] == pytest.approx(0.5782001864, abs=1e-10)
    assert found["base_rate"] == 0.5 and found["brier_of_base_rate"] == 0.25 and len(found["reliability"]) == 4


def test_the_debiased_error_does_not_see_what_is_not_there():
    rng = np.random.default_rng(1)
    plain, debiased = [], []
    for _ in range(40):
        p = rng.random(600)
        y = (rng.random(600) < p).astype(float)
        plain.append(ev.calibration_error(p, y))
        debiased.append(ev.debiased_calibration_error(p, y))
    assert np.mean(plain) > 0.04 > 0.02 > np.mean(debiased)
    p = rng.random(20_000) * 0.8
    y = (rng.random(20_000) < p + 0.1).astype(float)
    assert ev.debiased_calibration_error(p, y) == pytest.approx(0.1, abs=0.01)


def test_intervals_resample_clusters():
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(40), 50)
    p = np.full(2000, 0.5)
    y = (rng.random(40) < 0.5).astype(float)[user]  # each person says one thing
    by_user = ev.probability_report(p, y, user, draws=200)["debiased_ece_ci"]
    by_row = ev.probability_report(p, y, draws=200)["debiased_ece_ci"]
    assert by_user[1] - by_user[0] > 2 * (by_row[1] - by_row[0])


def test_what_is_no_number_is_refused():
    with pytest.raises(DataError, match="1 values are NaN"):
        ev.pair_accuracy(np.array([np.nan, 1]), np.array([1, 1]))
    with pytest.raises(DataError, match="no rows"):
        ev.probability_report(np.array([]), np.array([]))
    with pytest.raises(DataError, match="differ in number"):
        ev.calibration_error(np.array([0.5]), np.array([1.0, 0.0]))


def test_probes_see_length_brightness_and_prompts():
    texts = [f"{'word ' * n}" for n in range(1, 20)]
    assert probes.probe_length(np.arange(19.0), texts)["spearman"] == pytest.approx(1)
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.6
    samples = Samples([f"a handwritten {'seven' if i % 2 else 'two'}" for i in range(12)], images=images)
    ink = get_reward("digits/raw_ink")
    found = probes.probe_brightness(ink, samples)
    assert found["x0.8"] < -1 < 1 < found["x1.25"]
    blind = probes.probe_prompts(ink, samples)
    assert blind["changed"] == 0 and blind["lose"] == 0

    def reads(samples: Samples) -> list[float]:
        return [float(("seven" if i % 2 else "two") in p) for i, p in enumerate(samples.prompts)]

    seeing = probes.probe_prompts(FunctionReward(RewardCard("reads", "d", "0 or 1"), reads), samples)
    assert seeing["own"] == 1 > seeing["other"] and seeing["lose"] > 0.5
    with pytest.raises(DataError, match="two prompts"):
        probes.probe_prompts(ink, samples.select([0]))
    with pytest.raises(DataError, match="images"):
        probes.probe_brightness(ink, Samples(["a"], texts=["b"]))


def test_another_prompt_is_the_same_one_for_all_samples_of_a_prompt():
    samples = Samples(["a", "a", "b", "c", "b"], texts=list("vwxyz"))
    swapped = list(probes.swap_prompts(samples).prompts)
    assert all(x != y for x, y in zip(swapped, samples.prompts, strict=True))
    assert swapped[0] == swapped[1] and swapped[2] == swapped[4] and set(swapped) == {"a", "b", "c"}


def test_the_interval_of_a_calibrated_probability_holds_0():
    """A draw has the sampling of the data and its own: what each adds is taken off."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(20):
        p = rng.uniform(0.1, 0.9, 600)
        low, _ = ev.probability_report(p, (rng.random(600) < p).astype(float), draws=100, seed=seed)["debiased_ece_ci"]
        held += low == 0
    assert held >= 18
