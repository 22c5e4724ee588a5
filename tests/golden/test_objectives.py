"""The clipped objective against hand-worked numbers and its closed-form gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.errors import ConfigError
from trainers.objectives import adapt_clip, clip_bounds, gaussian_kl, grpo_clip, velocity_distance


def loss_at(ratio: float, advantage: float, clip: float = 1e-4):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    terms = grpo_clip(
        logp,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=clip,
        clip_high=clip,
    )
    terms.loss.sum().backward()
    return terms.loss.item(), logp.grad.item(), {k: v.item() for k, v in terms.stats.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.0, -2.0, 2.0, 2.0, 0, 0),
        (1.1, 1.0, -1.05, 0.0, 0, 1),
        (1.1, -1.0, 1.1, 1.1, 0, 0),
        (0.9, -1.0, 0.95, 0.0, 1, 0),
        (0.9, 1.0, -0.9, -0.9, 0, 0),
    ],
)
def test_clip_table(ratio, advantage, loss, gradient, low, high):
    got, grad, stats = loss_at(ratio, advantage, clip=0.05)
    assert got == pytest.approx(loss) and grad == pytest.approx(gradient, abs=1e-12)
    assert (stats["clip_share_low"], stats["clip_share_high"]) == (low, high)
    assert stats["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))


def test_t8_first_gradient_is_minus_advantage_times_score():
    logp = torch.randn(6, requires_grad=True)
    advantage = torch.randn(6)
    grpo_clip(logp, logp.detach(), advantage, clip_low=1e-4, clip_high=1e-4).loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantage)


def test_t10_one_clip_of_the_sum_is_not_a_sum_of_clips():
    """A = (1.5, -1) at rho = 1 +- 5e-4, clip 1e-4: per-reward clipping has the wrong gradient."""

    def slope(ratio: float, *advantages: float) -> float:
        return sum(-loss_at(ratio, a)[1] / ratio for a in advantages)

    assert slope(1.0, 1.5, -1.0) == pytest.approx(0.5) == slope(1.0, 0.5)
    assert slope(1.0 + 5e-4, 1.5, -1.0) == pytest.approx(-1.0) and slope(1.0 + 5e-4, 0.5) == pytest.approx(0.0)
    assert slope(1.0 - 5e-4, 1.5, -1.0) == pytest.approx(1.5) and slope(1.0 - 5e-4, 0.5) == pytest.approx(0.5)


def test_shapes_are_checked():
    with pytest.raises(ConfigError, match="one log-prob"):
        grpo_clip(torch.zeros(3), torch.zeros(3), torch.zeros(2), clip_low=1e-4, clip_high=1e-4)


@pytest.mark.parametrize(("dim", "nats"), [(16_384, 1.6384), (129_600, 12.96), (896_000, 89.6)])
def test_t22_a_ratio_clip_grows_with_the_latent_and_a_clip_in_nats_does_not(dim, nats):
    low, high = clip_bounds(1e-4, None, unit="ratio", reduction="mean", dim=dim)
    assert (low * dim, high * dim) == pytest.approx((nats, nats))
    low, high = clip_bounds(2.0, None, unit="nats", reduction="mean", dim=dim)
    assert (low * dim, high * dim) == pytest.approx((2.0, 2.0))
    assert clip_bounds(0.2, 0.4, unit="nats", reduction="sum", dim=dim) == pytest.approx((0.2, 0.4))
    with pytest.raises(ConfigError, match="ratio or nats"):
        clip_bounds(1.0, None, unit="bits", reduction="mean", dim=dim)


def test_t22_sum_and_mean_log_probs_clip_the_same_terms_at_the_same_nats():
    torch.manual_seed(0)
    dim, shift = 1000, torch.linspace(-3e-3, 3e-3, 41, dtype=torch.float64)
    advantage = torch.where(torch.arange(41) % 2 == 0, 1.0, -1.0).double()
    shares = []
    for reduction, logp in (("mean", shift), ("sum", shift * dim)):
        low, high = clip_bounds(0.5, 0.9, unit="nats", reduction=reduction, dim=dim)
        stats = grpo_clip(logp, torch.zeros_like(logp), advantage, clip_low=low, clip_high=high).stats
        shares.append((float(stats["clip_share_low"].mean()), float(stats["clip_share_high"].mean())))
    # ratios differ from 1 + log ratio by second order only, so all but terms on the edge agree
    assert shares[0] == pytest.approx(shares[1], abs=3 / 41) and min(shares[0]) > 0


def test_asymmetric_bounds_clip_where_they_say():
    logp = torch.log(torch.tensor([0.75, 0.85, 1.25, 1.35], dtype=torch.float64)).requires_grad_()
    advantage = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    terms = grpo_clip(logp, torch.zeros(4, dtype=torch.float64), advantage, clip_low=0.2, clip_high=0.3)
    terms.loss.sum().backward()
    assert (logp.grad == 0).tolist() == [True, False, False, True]


def test_an_adaptive_clip_settles_where_its_target_is_clipped():
    errors = np.random.default_rng(0).normal(0, 1e-4, 20_000)  # log ratios of a policy that moves by 1e-4
    scale = 1.0
    for _ in range(100):
        scale = adapt_clip(scale, float((np.abs(errors) > 1e-5 * scale).mean()), target=0.2)
    assert float((np.abs(errors) > 1e-5 * scale).mean()) == pytest.approx(0.2, abs=0.06)
    assert adapt_clip(2.0, float("nan"), 0.2) == 2.0 and adapt_clip(1e3, 1.0, 0.2) == 1e3


def test_t21_distances_to_the_reference_are_zero_at_it_and_true_to_their_closed_forms():
    torch.manual_seed(0)
    reference = torch.randn(3, 2, 4, dtype=torch.float64)
    output = reference.clone().requires_grad_()
    velocity_distance(output, reference).sum().backward()
    assert not output.grad.any()
    output = (reference + torch.randn_like(reference)).requires_grad_()
    assert velocity_distance(output, reference).tolist() == pytest.approx(
        ((output - reference) ** 2).mean((1, 2)).tolist()
    )
    assert torch.autograd.gradcheck(lambda o: velocity_distance(o, reference), output)

    mean_v, std = torch.tensor([-0.15, -0.2, 0.3]).double(), torch.tensor([0.1, 0.4, 0.5]).double()
    steps = [
        torch.distributions.Normal(mean_v[:, None, None] * v, std[:, None, None].expand_as(v))
        for v in (output.detach(), reference)
    ]
    expected = torch.distributions.kl_divergence(*steps).mean((1, 2))
    torch.testing.assert_close(gaussian_kl(output, reference, mean_v, std).detach(), expected)
    assert torch.autograd.gradcheck(lambda o: gaussian_kl(o, reference, mean_v, std), output)
