"""P[Love]: the facts' values, and that what a synthetic log is made of is recovered from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.errors import ConfigError, DataError
from align.feedback.bias import spearman
from rewards import plove
from rewards.campaigns import find_campaigns
from rewards.compose import build_transforms
from rewards.evaluate import auroc, debiased_calibration_error
from rewards.fit_losses import binary

P, U, N = torch.tensor([2.0, 1, -0.5]), torch.tensor([0.5, -1, -2, 1.5]), torch.tensor([-1.0, 0.2])
P, U, N = P.double(), U.double(), N.double()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_nnpu_is_the_facts():
    risk, _ = plove.nnpu(P, U, 0.3)
    assert risk.item() == pytest.approx(0.1010603675 + 0.2581049052, abs=1e-10)
    z = P.clone().requires_grad_(True)
    risk, objective = plove.nnpu(z, U, 0.9)
    assert risk.item() == pytest.approx(0.3031811024, abs=1e-10)
    assert objective.item() == pytest.approx(0.1397743599, abs=1e-10), "the gradient is of minus the negative part"
    assert plove.nnpu(P, U, 0.3, loss=plove.logistic_loss)[0].item() == pytest.approx(0.5289199902, abs=1e-10)
    total, _ = plove.pnu(P, U, N, 0.3)
    assert total.item() == pytest.approx(0.5296684266, abs=1e-9)
    assert plove.pnu(P, U, N, 0.3, eta=0.0)[0].item() == pytest.approx(0.5304168632, abs=1e-9), "R_PN alone"
    with pytest.raises(DataError, match="0 silent"):
        plove.nnpu(P, U[:0], 0.3)
    with pytest.raises(ConfigError):
        plove.nnpu(P, U, 1.0)


def test_mistakes_are_the_facts():
    p = torch.tensor([0.3], dtype=torch.float64)
    loss = plove.forward_corrected(torch.logit(p), torch.ones(1), 0.8, 0.02)
    assert loss.neg().exp().item() == pytest.approx(0.074, abs=1e-12)
    z = torch.tensor([0.7], dtype=torch.float64)
    one, zero = (plove.unbiased_corrected(z, torch.tensor([y], dtype=torch.float64), 0.3, 0.05).item() for y in (1, 0))
    assert (one, zero) == pytest.approx((0.0801091258, 1.1570322027), abs=1e-10)
    assert 0.7 * one + 0.3 * zero == pytest.approx(0.4031860489, abs=1e-10)
    assert 0.05 * one + 0.95 * zero == pytest.approx(1.1031860489, abs=1e-10)
    with pytest.raises(ConfigError, match="below 1 together"):
        plove.forward_corrected(z, z, 0.6, 0.4)


def test_effects_start_at_the_facts():
    found = plove.start_effects(np.array([8]), np.array([0.75]), 0.2, 5.0)
    assert found[0] == pytest.approx(1.5291733229, abs=1e-10)


def test_effects_and_their_variance_are_recovered():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.8, 400)
    user = np.repeat(np.arange(400), 60)
    offset = rng.normal(-1, 1, len(user))
    seen = (rng.random(len(user)) < sigmoid(offset + effect[user])).astype(float)
    found, variance = plove.fit_effects(offset, seen, user)
    assert variance == pytest.approx(0.64, rel=0.15)
    assert np.corrcoef(found, effect)[0, 1] > 0.9
    none, small = plove.fit_effects(offset, (rng.random(len(user)) < sigmoid(offset)).astype(float), user)
    assert small < 0.03 and np.abs(none).max() < 0.5


def test_negatives_are_kept_by_their_key_alone():
    keys = [f"{i}" for i in range(4000)]
    kept = plove.keep_negatives(keys, 0.25, 3)
    assert 0.22 < kept.mean() < 0.28
    assert (plove.keep_negatives(keys[::-1], 0.25, 3)[::-1] == kept).all()
    assert plove.keep_negatives(keys, 1.0, 3).all()
    with pytest.raises(ConfigError):
        plove.keep_negatives(keys, 0.0, 3)


def fitted(x: np.ndarray, loss, steps: int = 300) -> np.ndarray:
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    features = torch.from_numpy(x)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(features @ weight[:-1] + weight[-1]).backward()
        optimizer.step()
    return weight.detach().numpy()


def test_forward_correction_recovers_what_mistakes_hide():
    rng = np.random.default_rng(1)
    x, true = rng.normal(size=(20_000, 3)), np.array([1.5, -1.0, 0.5])
    truth = rng.random(len(x)) < sigmoid(x @ true - 0.5)
    seen = np.where(truth, rng.random(len(x)) > 0.3, rng.random(len(x)) < 0.05).astype(float)
    y = torch.from_numpy(seen)
    naive = fitted(x, lambda z: binary(z, y).mean())
    corrected = fitted(x, lambda z: plove.forward_corrected(z, y, 0.3, 0.05).mean())
    assert corrected[:3] == pytest.approx(true, abs=0.15)
    assert np.abs(naive[:3]).max() < 1.1, "without it the slopes are too flat"


def test_rates_of_mistakes_are_fitted_where_the_reward_is_sure():
    """The slopes and the rates come back together; where there are no mistakes none are found."""
    rng = np.random.default_rng(6)
    x, true = rng.normal(size=(10_000, 2)), np.array([3.0, -2.0])
    truth = rng.random(len(x)) < sigmoid(x @ true - 0.5)
    features = torch.from_numpy(x)

    def joint(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            at[3:] = -3
        optimizer = torch.optim.LBFGS([at], max_iter=60, line_search_fn="strong_wolfe")
        y = torch.from_numpy(seen.astype(float))

        def closure():
            optimizer.zero_grad()
            rates = plove.mistake_rates(at[3:])
            loss = plove.forward_corrected(features @ at[:2] + at[2], y, rates[0], rates[1]).sum()
            loss = loss + plove.mistake_prior(rates)
            loss.backward()
            return loss

        optimizer.step(closure)
        return at[:2].detach().numpy(), plove.mistake_rates(at[3:]).detach().numpy()

    slopes, rates = joint(np.where(truth, rng.random(len(x)) > 0.2, rng.random(len(x)) < 0.05))
    assert slopes == pytest.approx(true, abs=0.4) and rates == pytest.approx([0.2, 0.05], abs=0.03)
    slopes, rates = joint(truth)
    assert slopes == pytest.approx(true, abs=0.2) and rates.max() < 0.01
    assert plove.mistake_rates(torch.zeros(2)).tolist() == [0.25, 0.25]


def test_effects_free_the_reward_of_who_was_shown_what():
    """Lenient people are shown the worse outputs: without effects the order of the outputs is theirs."""
    rng = np.random.default_rng(8)
    items, users = 60, 120
    quality, effect = rng.normal(0, 1, items), rng.normal(0, 1.5, users)
    user = np.repeat(np.arange(users), 40)
    chance = np.exp(-1.2 * quality[None] * effect[:, None])
    item = np.concatenate([rng.choice(items, 40, p=row / row.sum()) for row in chance])
    seen = torch.from_numpy((rng.random(len(user)) < sigmoid(quality[item] + effect[user])).astype(float))
    start, variance = plove.fit_effects(np.zeros(len(user)), seen.numpy(), user)
    who, what = torch.from_numpy(user), torch.from_numpy(item)

    def fit(effects: bool) -> np.ndarray:
        value = torch.zeros(items, dtype=torch.float64, requires_grad=True)
        own = torch.from_numpy(start * effects).requires_grad_(effects)
        optimizer = torch.optim.LBFGS([value, own] if effects else [value], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = binary(value[what] + own[who], seen).sum() + value.square().sum() / 2
            loss = loss + own.square().sum() / (2 * variance)
            loss.backward()
            return loss

        optimizer.step(closure)
        return value.detach().numpy()

    naive, mixed = spearman(fit(False), quality), spearman(fit(True), quality)
    assert mixed > 0.85 and mixed > naive + 0.03


def test_negatives_that_were_not_drawn_are_undone():
    """Slope and intercept of all rows come back from a tenth of the negatives; without the shift the rate does not."""
    rng = np.random.default_rng(9)
    x = rng.normal(size=(30_000, 2))
    seen = rng.random(len(x)) < sigmoid(x @ np.array([1.0, -0.5]) - 3)
    kept = seen | plove.keep_negatives([str(i) for i in range(len(x))], 0.1, 0)
    y = torch.from_numpy(seen[kept].astype(float))
    undone = fitted(x[kept], lambda z: binary(z, y, -np.log(0.1)).mean(), 400)
    naive = fitted(x[kept], lambda z: binary(z, y).mean(), 400)
    assert undone == pytest.approx([1.0, -0.5, -3.0], abs=0.12)
    assert naive[2] == pytest.approx(-3 - np.log(0.1), abs=0.15)


def test_trimming_gives_the_order_back_that_a_campaign_took():
    rng = np.random.default_rng(10)
    users, each, items = 120, 25, 80
    quality = rng.normal(size=items)
    user = np.repeat(np.arange(users), each)
    item = rng.integers(0, items, len(user))
    bad = np.argsort(quality)[:each]  # six accounts, all for the worst outputs
    campaign = user < 6
    item[campaign] = np.tile(bad, 6)
    seen = np.where(campaign, 1.0, rng.random(len(user)) < sigmoid(2 * quality[item]))
    logit, _ = plove.out_of_fold(torch.eye(items), torch.from_numpy(seen), user % 5, item_N=item)
    found = find_campaigns(logit.numpy(), seen, user, item, [f"{u:03d}" for u in range(users)])
    assert [row.account for row in sorted(found, key=lambda row: row.account)] == [f"{u:03d}" for u in range(6)]

    def order(rows: np.ndarray) -> float:
        up = np.bincount(item[rows], weights=seen[rows], minlength=items)
        return spearman((up + 1) / (np.bincount(item[rows], minlength=items) + 2), quality)

    assert order(~campaign) > order(np.full(len(user), True)) + 0.03


def test_nnpu_recovers_a_classifier_from_positives_and_silence():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6000, 2))
    truth = x[:, 0] + 0.5 * x[:, 1] + rng.normal(0, 0.3, len(x)) > 0.6
    prior = float(truth[:5000].mean())
    labelled = truth & (rng.random(len(x)) < 0.15) & (np.arange(len(x)) < 5000)
    up, silent = torch.from_numpy(labelled[:5000]), torch.from_numpy(~labelled[:5000])
    pu = fitted(x[:5000], lambda z: plove.nnpu(z[up], z[silent], prior)[1], 400)
    naive = fitted(x[:5000], lambda z: binary(z, up.double()).mean(), 400)

    def accuracy(w: np.ndarray) -> float:
        return float(((x[5000:] @ w[:2] + w[2] > 0) == truth[5000:]).mean())

    assert accuracy(pu) > 0.9 > 0.8 > accuracy(naive)


def test_coordinated_users_are_found_by_models_of_the_others():
    rng = np.random.default_rng(3)
    users, each = 200, 40
    user = np.repeat(np.arange(users), each)
    x = rng.normal(size=(len(user), 4))
    logit = x @ np.array([2.0, -1.5, 1.0, 0.0])
    liars = np.arange(6)  # they thumb against what is good
    seen = (rng.random(len(user)) < sigmoid(np.where(np.isin(user, liars), -logit, logit))).astype(float)
    _, loss = plove.out_of_fold(torch.from_numpy(x), torch.from_numpy(seen), user % 3)
    found = plove.trim_users(loss.numpy(), user, 0.03)
    assert set(found.users) == set(liars)
    assert not len(plove.trim_users(loss.numpy(), user, 0.0).users)
    with pytest.raises(ConfigError, match="below .5"):
        plove.trim_users(loss.numpy(), user, 0.5)
    with pytest.raises(DataError, match="two folds"):
        plove.out_of_fold(torch.from_numpy(x), torch.from_numpy(seen), user * 0)


def test_a_temperature_is_recovered_and_calibrates():
    rng = np.random.default_rng(4)
    z = rng.normal(0, 2, 30_000)
    seen = (rng.random(len(z)) < sigmoid(0.4 * z - 1.2)).astype(float)
    a, b = plove.fit_temperature(z[:15_000], seen[:15_000])
    assert (a, b) == pytest.approx((0.4, -1.2), abs=0.05)
    after = sigmoid(a * z[15_000:] + b)
    assert debiased_calibration_error(after, seen[15_000:]) < 0.015
    assert debiased_calibration_error(sigmoid(z[15_000:]), seen[15_000:]) > 0.1
    with pytest.raises(DataError, match="both classes"):
        plove.fit_temperature(z, np.ones(len(z)))


def test_isotonic_pools_violators_and_is_a_transform():
    found = plove.fit_isotonic(np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 0, 1]))
    assert found["y"] == pytest.approx([0, 0.5, 1]) and found["x"] == pytest.approx([0, 1.5, 3])
    rng = np.random.default_rng(5)
    z = rng.normal(0, 2, 20_000)
    seen = (rng.random(len(z)) < 0.1 + 0.8 * (z > 0.5)).astype(float)
    table = plove.fit_isotonic(z[:10_000], seen[:10_000])
    assert build_transforms([{"isotonic": table}]), "the transform takes it as it is"
    p = np.interp(z[10_000:], table["x"], table["y"])
    assert debiased_calibration_error(p, seen[10_000:]) < 0.03
    assert auroc(p, seen[10_000:]) > auroc(z[10_000:], seen[10_000:]) - 0.01
