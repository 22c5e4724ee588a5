"""Losses of fitting: the facts' values, closed forms, and what must hold for every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import DataError
from align.feedback.aggregate import probabilities
from rewards import fit_losses as fl


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_with_margin_and_soft_labels():
    assert fl.bradley_terry(t(1.2, 0.3) - t(0.2, 0.9)).mean().item() == pytest.approx(0.6753748190, abs=1e-10)
    assert fl.bradley_terry(t(2.0), 1.0, 0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    q, d = 0.7, 0.4
    p = 1 / (1 + math.exp(-d))
    assert fl.bradley_terry(t(d), q).item() == pytest.approx(-q * math.log(p) - (1 - q) * math.log(1 - p))
    with pytest.raises(DataError, match="within 0 to 1"):
        fl.bradley_terry(t(0.0), 1.5)


def test_a_soft_label_is_learned_as_log_odds():
    d = t(0.0).requires_grad_(True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(fl.bradley_terry(d, 0.8).sum(), d)
        d = (d - 2 * gradient).detach().requires_grad_(True)
    assert d.item() == pytest.approx(math.log(4), abs=1e-6)


def test_pick_costs_nothing_where_it_agrees():
    assert fl.pick(t(0.0), 0.5).item() == pytest.approx(0, abs=1e-12)
    assert fl.pick(t(1.0), 0.5).item() == pytest.approx(math.log(math.cosh(0.5)))  # log 2 cosh(d/2) - log 2
    assert fl.pick(t(1.0), 1.0).item() == pytest.approx(fl.bradley_terry(t(1.0)).item())


def test_rao_kupper_is_the_facts():
    delta, theta = t(-2, 0, 1, 3), math.log(5)
    win = fl.rao_kupper(delta, torch.ones(4), theta)
    tie = fl.rao_kupper(delta, torch.zeros(4), theta)
    assert win.tolist() == pytest.approx([3.6361, 1.7918, 1.0436, 0.2223], abs=5e-5)
    assert tie.tolist() == pytest.approx([0.9749, 0.4055, 0.5460, 1.6636], abs=5e-5)
    loss = fl.rao_kupper(delta, -torch.ones(4), theta)
    assert (win.neg().exp() + tie.neg().exp() + loss.neg().exp()).tolist() == pytest.approx([1.0] * 4)
    with pytest.raises(DataError, match="above 1"):
        fl.rao_kupper(delta, torch.ones(4), 0.0)


@pytest.mark.parametrize(
    ("model", "value", "expected"),
    [
        ("davidson", 1.1, (0.45731407, 0.33720147, 0.20548446)),
        ("rao_kupper", 0.5, (0.57444252, 0.21139247, 0.21416502)),
    ],
)
def test_ties_are_the_facts_and_those_of_the_aggregates(model, value, expected):
    parameter = math.log(value) if model == "davidson" else value
    found = [fl.COMPARISONS[model](t(0.8), t(o), parameter).neg().exp().item() for o in (1, 0, -1)]
    assert found == pytest.approx(expected, abs=1e-8)
    assert found == pytest.approx(probabilities(model, 0.8, value))


def test_plackett_luce_by_hand():
    e = [math.exp(x) for x in (1.0, 0.5, -1.0)]
    by_hand = -math.log(e[0] / sum(e)) - math.log(e[1] / (e[1] + e[2]))
    assert fl.plackett_luce(t(1.0, 0.5, -1.0)[None], torch.tensor([[1, 2, 3]])).item() == pytest.approx(by_hand)
    padded = fl.plackett_luce(t(9.0, 1.0, 0.5, -1.0)[None], torch.tensor([[0, 1, 2, 3]]))
    assert padded.item() == pytest.approx(by_hand)
    two = fl.plackett_luce(t(0.3, 1.0)[None], torch.tensor([[2, 1]]))
    assert two.item() == pytest.approx(fl.bradley_terry(t(0.7)).item())


def test_a_ranking_of_equals_costs_least_where_scores_agree():
    score = t(0.5, -0.3, 0.1)[None].requires_grad_(True)
    rank = torch.tensor([[1, 1, 1]])
    (gradient,) = torch.autograd.grad(fl.plackett_luce(score, rank).sum(), score)
    assert gradient[0, 0] > 0 > gradient[0, 1]
    equal = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (flat,) = torch.autograd.grad(fl.plackett_luce(equal, rank).sum(), equal)
    assert flat.abs().max() < 1e-12


def test_gradients_of_padded_rankings_are_finite():
    score = torch.zeros(2, 3, requires_grad=True)
    loss = fl.plackett_luce(score, torch.tensor([[1, 2, 0], [1, 0, 0]])).sum()
    (gradient,) = torch.autograd.grad(loss, score)
    assert bool(gradient.isfinite().all()) and float(gradient[:, 2].abs().sum()) == 0


def test_prior_shift_and_subsampling_are_the_facts():
    shifted = fl.shift_prior(t(0.0), 0.5, 0.1)
    assert shifted.item() == pytest.approx(-2.1972, abs=5e-5) and shifted.sigmoid().item() == pytest.approx(0.1)
    for share, p, expected in ((0.05, 0.5, 0.0476190476), (0.1, 0.9, 0.4736842105)):
        logit = t(math.log(p / (1 - p)))
        assert fl.unsubsample(logit, share).sigmoid().item() == pytest.approx(expected, abs=1e-10)
    # Fitting with the shift or undoing it afterwards is the same.
    assert fl.binary(fl.unsubsample(t(0.4), 0.2), t(1.0), -math.log(0.2)).item() == pytest.approx(
        fl.binary(t(0.4), t(1.0)).item()
    )
    for wrong in (0.0, 1.0):
        with pytest.raises(DataError):
            fl.shift_prior(t(0.0), wrong, 0.5)
    with pytest.raises(DataError):
        fl.unsubsample(t(0.0), 0.0)


def test_ordinal_is_the_facts():
    thresholds = t(-1, 0.2, 1.5)
    nll = [fl.ordinal(t(0.4), torch.tensor([k]), thresholds).item() for k in range(4)]
    pmf = [0.19781611, 0.25234989, 0.30009410, 0.24973989]
    assert [math.exp(-x) for x in nll] == pytest.approx(pmf, abs=1e-8)
    assert nll[1] == pytest.approx(1.3769386972, abs=1e-10)
    assert sum(k * math.exp(-x) for k, x in enumerate(nll, 1)) == pytest.approx(2.60175778, abs=1e-8)
    with pytest.raises(DataError, match="4 levels"):
        fl.ordinal(t(0.4), torch.tensor([4]), thresholds)


def test_differences_of_sigmoids_do_not_cancel():
    assert fl.log_sigmoid_difference(t(0.3), t(-1.2)).item() == pytest.approx(-1.0701201707, abs=1e-10)
    assert fl.log_sigmoid_difference(t(30.0), t(29.0)).item() == pytest.approx(-29.4586751454, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(-5, 5), st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_thresholds_rise_and_levels_add_up(first, gaps):
    thresholds = fl.ordered(t(first), t(*gaps))
    assert bool((thresholds.diff() > 0).all())
    levels = torch.arange(len(thresholds) + 1)
    total = fl.ordinal(torch.full((len(levels),), 0.7, dtype=torch.float64), levels, thresholds).neg().exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-9)


def test_centre_and_squared():
    assert fl.centre(t(1.0), t(0.5), 0.01).item() == pytest.approx(0.0225)
    assert fl.squared(t(1.0), t(0.25)).item() == pytest.approx(0.5625)


def test_the_squared_error_of_a_sigmoid_is_the_facts():
    ratings = (t(1, 4, 7) - 1) / 6
    assert fl.sigmoid_squared(t(-1, 0, 2), ratings).mean().item() == pytest.approx(0.0288462749, abs=1e-10)
