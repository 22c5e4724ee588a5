"""KTO, BCO and DPO against numbers worked from their equations, their closed-form gradients and their theorems."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from align.errors import ConfigError
from trainers.preference import (
    BalancedDelta,
    PooledDelta,
    RunningPoint,
    apo_zero_unpaired,
    auto_class_weights,
    bco,
    class_sums,
    dpo,
    effective_sample_size,
    humanline,
    kto,
    kto_reference_point,
    mismatch_sums,
    row_shares,
    state_to_json,
    udm_weights,
    weight_ratio_message,
)

LABELS = torch.tensor([1.0, 0.0, 0.0])


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def measured(objective, *rest, **options):
    """Loss rows and the gradient of their sum at h = (3, -2, 1)."""
    h = tensor(3, -2, 1).requires_grad_()
    loss = objective(h, *rest, **options).loss
    loss.sum().backward()
    return loss.tolist(), h.grad.tolist(), float(loss.detach().mean())


def test_kto_losses_and_gradients():
    loss, gradient, mean = measured(kto, LABELS, 0.5, beta=0.1)
    assert loss == pytest.approx([0.4378234991, 0.4378234991, 0.5124973965], abs=1e-10)
    assert gradient == pytest.approx([-0.0246134083, 0.0246134083, 0.0249843815], abs=1e-10)
    assert mean == pytest.approx(0.4627147982, abs=1e-10)
    loss, _, mean = measured(kto, LABELS, 0.5, beta=0.1, weight_D=1.5, weight_U=2.0)
    assert loss == pytest.approx([0.6567352487, 0.8756469982, 1.0249947930], abs=1e-10)
    assert mean == pytest.approx(0.8524590133, abs=1e-10)


def test_apo_zero_is_kto_at_zero():
    loss, _, mean = measured(apo_zero_unpaired, LABELS, beta=0.1)
    assert loss == pytest.approx([0.4255574832, 0.4501660027, 0.5249791875], abs=1e-10)
    assert mean == pytest.approx(0.4669008911, abs=1e-10)


def test_a_weight_of_zero_stays_zero():
    loss, gradient, _ = measured(kto, LABELS, 0.5, beta=0.1, weight_D=0.0)
    assert loss[0] == 0 and gradient[0] == 0 and loss[1] > 0


def test_bco_losses_gradients_and_class_means():
    loss, gradient, mean = measured(bco, LABELS, 0.05, beta=0.1)
    assert loss == pytest.approx([0.5759394199, 0.5759394199, 0.7184596480], abs=1e-10)
    assert gradient == pytest.approx([-0.0437823499, 0.0437823499, 0.0512497396], abs=1e-10)
    assert mean == pytest.approx(0.6234461626, abs=1e-10)
    shares = row_shares(LABELS > 0.5, 1, 2, "class_mean")
    assert float((tensor(*loss) * shares).sum()) == pytest.approx(1.2231389538, abs=1e-9)
    loss, _, mean = measured(bco, LABELS, 0.05, beta=0.1, weight=tensor(1, 0.5, 4))
    assert mean == pytest.approx(1.2459159073, abs=1e-10)
    assert float((tensor(*loss) * shares).sum()) == pytest.approx(2.1568435709, abs=1e-9)


def test_bco_takes_soft_labels():
    h, q = tensor(3, -2, 1).requires_grad_(), tensor(0.8, 0.3, 0.5)
    loss = bco(h, q, 0.05, beta=0.1).loss
    loss.sum().backward()
    x = 0.1 * h.detach() - 0.05
    by_hand = -q * x.sigmoid().log() - (1 - q) * (1 - x.sigmoid()).log()
    torch.testing.assert_close(loss.detach(), by_hand)
    torch.testing.assert_close(h.grad, 0.1 * (x.sigmoid() - q))


def test_at_the_reference_losses_are_what_an_undecided_model_pays():
    h, labels = torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert kto(h, labels, 0.0, beta=0.1, weight_D=1.5).loss.mean() == pytest.approx(1.25 / 2)
    rows = bco(h, labels, 0.0, beta=0.1).loss
    assert rows.mean() == pytest.approx(math.log(2))
    both = row_shares(labels > 0.5, 2, 2, "class_mean")
    assert (rows * both).sum() == pytest.approx(2 * math.log(2))
    assert dpo(torch.zeros(2), torch.zeros(2), beta=0.1).loss.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(
    ("ranks", "z0"),
    [
        ([(0.9, -0.2, 0.5)], 0.4),
        ([(0.9, -0.2, 0.5, 0.0)], 0.4),  # an empty completion does not count
        ([(-1.2, 0.4, -0.3)], 0.0),
        ([(0.9, -0.2, 0.5), (2.0,)], 0.8),  # not the mean of means, 1.2
        ([(-0.9,), (0.3,)], 0.0),  # clamped after averaging, not before, .15
        ([(), (0.3,)], 0.3),  # a process without a row sends zeros
        ([(0.0, 0.0)], 0.0),
    ],
)
def test_the_reference_point_is_one_mean_over_all_processes(ranks, z0):
    sums = sum(mismatch_sums(tensor(*rank)) for rank in ranks)
    assert float(kto_reference_point(sums)) == pytest.approx(z0, abs=1e-12)


def test_reference_points_and_deltas_carry_no_gradient():
    h = tensor(0.3, 0.8).requires_grad_()
    labels = tensor(1, 0)
    z0 = h.mean() * 2
    kto(h, labels, z0, beta=0.1).loss.sum().backward()
    alone = tensor(0.3, 0.8).requires_grad_()
    kto(alone, labels, float(z0.detach()), beta=0.1).loss.sum().backward()
    assert torch.equal(h.grad, alone.grad)
    h.grad = None
    bco(h, labels, h.mean(), beta=0.1).loss.sum().backward()
    alone.grad = None
    bco(alone, labels, float(h.mean().detach()), beta=0.1).loss.sum().backward()
    assert torch.equal(h.grad, alone.grad)


def test_delta_is_the_midpoint_of_the_classes_and_not_the_mean_of_rows():
    rewards, desirable = tensor(*[0.5] * 9, -1.5), torch.arange(10) < 9
    sums = class_sums(rewards, desirable)
    assert BalancedDelta().update(sums).value == pytest.approx(-0.5)
    assert PooledDelta().update(sums).value == pytest.approx(0.3)


def test_the_running_delta_by_hand():
    before = BalancedDelta(0.99, 0.4, -0.2, updates=1000)
    assert before.update(tensor(1.0, 1, -0.7, 1)).value == pytest.approx(0.1005)
    assert before.update(tensor(2.0, 2, 0, 0)).value == pytest.approx(0.103)  # the absent class keeps its mean
    assert BalancedDelta().update(tensor(3.0, 2, 0, 0)).value == 0  # one class alone has no midpoint
    assert BalancedDelta().update(tensor(3.0, 2, 0, 0)).update(tensor(0, 0, -1.0, 2)).value == pytest.approx(0.5)


def test_a_running_mean_soon_forgets_that_the_first_rewards_are_0():
    """Updates 2 and 3 have decay 2/11 and 3/12: from 0 and a constant 1, 1 - 2/11 and 1 - (2/11) (3/12)."""
    state, means = BalancedDelta().update(tensor(0.0, 2, 0.0, 2)), []
    for _ in range(2):
        state = state.update(tensor(2.0, 2, -2.0, 2))
        means.append(state.mean_D)
    assert means == pytest.approx([1 - 2 / 11, 1 - 2 / 11 * 3 / 12]) and state.value == 0


def test_the_running_reference_point_averages_before_it_clamps():
    state = RunningPoint(0.5, updates=100)
    assert state.value == 0
    state = state.update(tensor(-4.0, 2))
    assert state.value == 0 and state.mean == -2
    state = state.update(tensor(8.0, 1))
    assert state.value == 3.0 and state.update(tensor(0, 0)) == state


@pytest.mark.parametrize("state", [BalancedDelta(0.9, 0.1, -1 / 3, 7), PooledDelta(1 / 3, 12), RunningPoint(0.9, -0.1)])
def test_states_survive_json_bit_for_bit(state):
    import json

    assert type(state)(**json.loads(json.dumps(state_to_json(state)))) == state


def test_theorems_3_and_4_bco_bounds_dpo_and_the_midpoint_is_the_tightest_shift():
    r_w, r_l = tensor(0.6), tensor(-0.2)
    bound = float(dpo(r_w, r_l, beta=1.0).loss)
    assert bound == pytest.approx(0.3711006659, abs=1e-10)
    expected = {0.2: 1.0260305048, 0.0: 1.0356268199, -0.5: 1.1416905696}
    for delta, loss in expected.items():
        rows = bco(torch.cat([r_w, r_l]), tensor(1, 0), delta, beta=1.0).loss
        assert float(rows.sum()) == pytest.approx(loss, abs=1e-10) and float(rows.sum()) >= bound
    gap = lambda delta: math.exp(-(0.6 - delta)) + math.exp(-0.2 - delta)  # noqa: E731
    assert gap(0.2) == pytest.approx(1.3406400921) and gap(0.2) < min(gap(0.0), gap(0.4), gap(-0.5))


@given(st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=1, max_size=8), st.floats(-3, 3))
def test_flipping_labels_and_signs_changes_nothing(rows, point):
    h, labels = tensor(*(r[0] for r in rows)), tensor(*(float(r[1]) for r in rows))
    for a, b in (
        (kto(h, labels, point, beta=0.3, weight_D=2.0), kto(-h, 1 - labels, -point, beta=0.3, weight_U=2.0)),
        (bco(h, labels, point, beta=0.3), bco(-h, 1 - labels, -point, beta=0.3)),
    ):
        torch.testing.assert_close(a.loss, b.loss)


def test_bco_stays_alive_where_kto_gives_up():
    h = tensor(-200).requires_grad_()
    kto(h, tensor(1), 0.0, beta=0.1).loss.sum().backward()
    faded = float(h.grad.abs())
    h.grad = None
    bco(h, tensor(1), 0.0, beta=0.1).loss.sum().backward()
    assert faded < 1e-9 and float(h.grad.abs()) == pytest.approx(0.1, rel=1e-6)


def test_dpo_with_smoothing_by_hand_and_its_gradient():
    w, l = tensor(1.0, -0.5).requires_grad_(), tensor(0.2, 0.7).requires_grad_()  # noqa: E741
    terms = dpo(w, l, beta=0.5, label_smoothing=0.1)
    m = 0.5 * (w - l).detach()
    torch.testing.assert_close(terms.loss.detach(), 0.9 * functional.softplus(-m) + 0.1 * functional.softplus(m))
    terms.loss.sum().backward()
    torch.testing.assert_close(w.grad, 0.5 * (m.sigmoid() - 0.9))
    torch.testing.assert_close(w.grad, -l.grad)
    assert terms.stats["accuracy"].tolist() == [1.0, 0.0]


def test_humanline_clamps_tokens_before_they_are_summed():
    assert float(humanline(tensor(-2, 0.5, 3)).sum()) == pytest.approx(1.0)


def test_udm_weights_and_what_they_leave_of_the_sample():
    found = udm_weights(tensor(0.2, 0.4, 0.5, 0.8, 0.95)).tolist()
    assert found == pytest.approx([0.5, 0.6666666556, 0.99999998, 3.9999998, 10.0], abs=1e-9)
    assert effective_sample_size(tensor(0.5, 1, 4, 10)) == pytest.approx(2.0490405117)
    assert effective_sample_size(torch.ones(7)) == 7


def test_auto_class_weights():
    assert auto_class_weights(900, 100) == (1.0, 9.0)
    assert auto_class_weights(900, 100, ratio=1.5) == pytest.approx((1.0, 6.0))
    assert auto_class_weights(900, 100, ratio=4 / 3) == pytest.approx((1.0, 6.75))
    assert auto_class_weights(100, 1000) == (10.0, 1.0)
    assert auto_class_weights(100, 1000, ratio=1.5) == pytest.approx((15.0, 1.0))
    assert auto_class_weights(100, 1000, ratio=4 / 3) == pytest.approx((13.3333, 1.0), abs=1e-4)
    assert auto_class_weights(900, 100, weight_U=1.0) == pytest.approx((0.1111, 1.0), abs=1e-4)
    assert auto_class_weights(900, 100, weight_U=1.0, ratio=1.5) == pytest.approx((0.1667, 1.0), abs=1e-4)
    assert auto_class_weights(5, 5, weight_D=0.0, weight_U=2.0) == (0.0, 2.0)
    with pytest.raises(ConfigError, match="both classes"):
        auto_class_weights(0, 5)
    with pytest.raises(ConfigError, match="weight of 0"):
        auto_class_weights(3, 5, weight_D=0.0)


def test_weights_outside_the_advised_range_are_mentioned_with_both_bounds():
    assert weight_ratio_message(900, 100, 1.0, 9.0) == "" == weight_ratio_message(900, 100, 1.0, 6.0)
    assert "is 9; the paper advises 1 to 1.5 (earlier versions and TRL 1 to 1.33)" in weight_ratio_message(
        900, 100, 1, 1
    )
    assert "inf" in weight_ratio_message(9, 1, 1.0, 0.0)


def test_shapes_and_names_are_checked():
    with pytest.raises(ConfigError, match="one value a row"):
        kto(torch.zeros(3), torch.zeros(2), 0.0, beta=0.1)
    with pytest.raises(ConfigError, match="one value a row"):
        dpo(torch.zeros(3), torch.zeros(2), beta=0.1)
    with pytest.raises(ConfigError, match="class_mean, pooled or oversample"):
        row_shares(torch.ones(1, dtype=torch.bool), 1, 1, "mean")
    assert row_shares(torch.tensor([True, True]), 2, 0, "class_mean").tolist() == [0.5, 0.5]
