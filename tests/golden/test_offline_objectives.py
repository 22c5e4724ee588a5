"""Diffusion-DPO and Diffusion-KTO against numbers worked by hand, closed forms, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from align.errors import ConfigError
from trainers.offline_objectives import diffusion_dpo, diffusion_kto, gain_sums, reference_point


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def dpo(beta, w=0.10, w_ref=0.1001, l=0.20, l_ref=0.1999):  # noqa: E741
    return float(diffusion_dpo(row(w), row(w_ref), row(l), row(l_ref), beta=beta).loss)


def kto(label, utility="sigmoid", error=0.10, reference=0.101, z=0.0002, beta=1000.0, **weights):
    terms = diffusion_kto(row(error), row(reference), row(label), z, beta=beta, utility=utility, **weights)
    return float(terms.loss)


def test_dpo_golden():
    assert dpo(2000) == pytest.approx(0.598139, abs=1e-6)
    assert dpo(5000) == pytest.approx(0.474077, abs=1e-6)
    assert dpo(2000, w=0.1001, l=0.1999) == pytest.approx(math.log(2), abs=1e-12)


def test_kto_golden():
    assert kto(1) == pytest.approx(0.310026, abs=1e-6)
    assert kto(0) == pytest.approx(0.689974, abs=1e-6)
    assert kto(0, weight_U=0.5) == pytest.approx(0.344987, abs=1e-6)
    assert kto(1, weight_D=2.0, weight_U=7.0) == pytest.approx(0.620051, abs=1e-6)


def test_utilities_by_hand():
    """x = 0.8: log sigmoid(.8) = -.371101, -log sigmoid(-.8) = 1.171101; at 0 log 2 either way."""
    assert kto(1, "loss_averse") == pytest.approx(1.371101, abs=1e-6)
    assert kto(1, "risk_seeking") == pytest.approx(1 - 1.171101, abs=1e-6)
    assert kto(0, "loss_averse") == pytest.approx(1 + 1.171101, abs=1e-6)
    still = {"error": 0.1, "reference": 0.1, "z": 0.0}
    assert kto(1, "sigmoid", **still) == kto(0, "sigmoid", **still) == 0.5
    assert kto(1, "loss_averse", **still) == pytest.approx(1 + math.log(2))
    assert kto(0, "risk_seeking", **still) == pytest.approx(1 - math.log(2))


def test_a_flipped_label_mirrors_the_margin_and_a_swapped_pair_the_loss():
    assert kto(1) + kto(0) == pytest.approx(1.0)  # 1 - sigmoid(x) and 1 - sigmoid(-x)
    assert kto(1) < 0.5 < kto(0)
    swapped = dpo(2000, w=0.20, w_ref=0.1999, l=0.10, l_ref=0.1001)
    assert swapped == pytest.approx(-math.log(1 - math.exp(-dpo(2000))), abs=1e-9)


@pytest.mark.parametrize("utility", ["sigmoid", "loss_averse", "risk_seeking"])
def test_kto_gradient_is_that_of_finite_differences_and_none_flows_into_z(utility):
    torch.manual_seed(0)
    error, reference, label = torch.rand(5).double(), torch.rand(5).double(), torch.tensor([1.0, 0, 1, 0, 0]).double()
    z = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)

    def loss(e):
        return diffusion_kto(e, reference, label, z, beta=3.0, weight_D=1.5, utility=utility).loss.sum()

    leaf = error.clone().requires_grad_()
    loss(leaf).backward()
    for i in range(5):
        step = torch.zeros(5).double()
        step[i] = 1e-6
        assert float(leaf.grad[i]) == pytest.approx(float(loss(error + step) - loss(error - step)) / 2e-6, rel=1e-6)
    assert z.grad is None


def test_dpo_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    w, lost, w_ref, l_ref = torch.rand(4, 3).double()
    leaf = w.clone().requires_grad_()
    diffusion_dpo(leaf, w_ref, lost, l_ref, beta=7.0).loss.sum().backward()
    for i in range(3):
        step = torch.zeros(3).double()
        step[i] = 1e-6
        up, down = (diffusion_dpo(w + s * step, w_ref, lost, l_ref, beta=7.0).loss.sum() for s in (1, -1))
        assert float(leaf.grad[i]) == pytest.approx(float(up - down) / 2e-6, rel=1e-6)


def test_dpo_on_one_parameter_ends_where_the_answers_say():
    """l = (theta - c)^2, c_w = 1, c_l = 0, reference theta 0: the margin is beta theta. With three answers of four for w
    the loss is least where sigmoid(beta theta) = 3/4, at theta = log 3 / beta."""
    beta, theta = 4.0, torch.zeros((), dtype=torch.float64, requires_grad=True)
    targets = row(1, 1, 1, 0)
    optimizer = torch.optim.SGD([theta], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        w, lost = (theta - targets).square(), (theta - (1 - targets)).square()
        diffusion_dpo(w, targets.square(), lost, (1 - targets).square(), beta=beta).loss.mean().backward()
        optimizer.step()
    assert float(theta.detach()) == pytest.approx(math.log(3) / beta, abs=1e-9)


def test_kto_on_one_parameter_moves_as_worked_by_hand():
    """l = (theta - c)^2 at theta = 0 = reference: d loss / d theta = -y beta U'(0) dg/dtheta, dg/dtheta = 2 c, U' = 1/4."""
    for label, sign in ((1.0, 1), (0.0, -1)):
        theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        loss = diffusion_kto((theta - 0.7).square(), row(0.49), row(label), 0.0, beta=10.0).loss.sum()
        loss.backward()
        assert float(theta.grad) == pytest.approx(-sign * 10.0 * 0.25 * 2 * 0.7)


def test_the_reference_point_is_clamped_after_everything_is_averaged():
    parts = [row(0.3, 0.1), row(-0.2)]
    sums = gain_sums(parts[0]) + gain_sums(parts[1])
    assert sums.tolist() == pytest.approx([0.2, 3.0])
    assert float(reference_point(sums)) == pytest.approx(0.2 / 3)
    assert float(reference_point(gain_sums(row(-0.4, 0.1)))) == 0.0
    assert float(reference_point(gain_sums(row(0.0, 0.4)))) == pytest.approx(0.2)  # a row that has not moved counts


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="one value a row"):
        diffusion_kto(row(1, 2), row(1, 2), row(1), 0.0, beta=1.0)
    with pytest.raises(ConfigError, match="one value a row"):
        diffusion_dpo(row(1), row(1), row(1), row(1, 2), beta=1.0)
    with pytest.raises(ConfigError, match="Unknown utility 'exp'"):
        kto(1, "exp")
