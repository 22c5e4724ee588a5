"""The clipped objective against hand-worked numbers and its closed-form gradient."""

from __future__ import annotations

import math

import pytest
import torch

from align.errors import ConfigError
from trainers.objectives import grpo_clip


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
