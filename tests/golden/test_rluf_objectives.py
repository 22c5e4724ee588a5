"""CRPG, CRRAFT and CODPO: values worked out by hand, finite differences, and the cases in which nothing can be learnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.errors import ConfigError
from align.types import Scores
from rewards.compose import combine
from trainers.advantages import group_advantages
from trainers.rluf_objectives import (
    NONE,
    calibrated_reward,
    codpo,
    codpo_choice,
    constrained_reward,
    crpg,
    crpg_advantages,
    crraft,
    crraft_choice,
    is_valid,
)

NAN = float("nan")


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


REWARD, BASE = t(1.2, -0.3, 2.0, 0.4)[None], t(0.5)
JUDGED = torch.tensor([[True, True, False, True]])
RATIO = t(0.5, 0.2, 0.1, 3.0)[None]
LOGP, REFERENCE = t(-10.0, -12.0, -9.0, -11.0), t(-10.5, -12.2, -9.1, -14.0)


def worked():
    calibrated, valid = calibrated_reward(REWARD, BASE[:, None]), is_valid(JUDGED, RATIO, 1.0)
    return calibrated, valid, constrained_reward(calibrated, valid)


def test_the_calibrated_and_the_constrained_reward():
    calibrated, valid, constrained = worked()
    assert calibrated[0].tolist() == pytest.approx([0.66818777, 0.31002552, 0.81757448, 0.47502081], abs=5e-9)
    assert valid.tolist() == [[True, True, False, False]]
    assert constrained[0].tolist() == pytest.approx([0.66818777, 0.31002552, 0, 0], abs=5e-9)
    assert float(calibrated_reward(t(7.0), t(7.0))) == 0.5  # the baseline itself


def test_crpg():
    advantage = crpg_advantages(worked()[2])[0]
    assert advantage.tolist() == pytest.approx([0.42363445, 0.06547220, -0.24455332, -0.24455332], abs=5e-9)
    loss = crpg(LOGP, advantage).loss
    assert float(loss.sum()) == pytest.approx(0.1309443922, abs=5e-11)
    assert float(loss.mean()) == pytest.approx(0.0327360981, abs=5e-11)


def test_crraft():
    _, valid, constrained = worked()
    choice = crraft_choice(constrained, valid, torch.tensor([True]))
    assert choice.member.tolist() == [0]
    assert float(crraft(LOGP[choice.member], choice.weight).loss.sum()) == pytest.approx(6.6818777217, abs=5e-11)


def test_codpo():
    calibrated, valid, _ = worked()
    chosen, rejected = codpo_choice(calibrated, valid)
    assert (chosen.tolist(), rejected.tolist()) == ([0], [3])
    terms = codpo(
        LOGP[chosen], LOGP[rejected], REFERENCE[chosen], REFERENCE[rejected], torch.tensor([20]), beta=0.1,
        sft_weight=0.05,
    )  # fmt: skip
    assert float(terms.stats["delta"][0]) == pytest.approx(-2.5, abs=1e-12)
    assert float(terms.loss.sum()) == pytest.approx(0.8509394199, abs=5e-11)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("weighted_sum", [0, 0, 1.224595, -1.224595, -0.865875, 0.865875, 0.865875, -0.865875]),
        ("gdpo", [0, 0, 1.527391, -1.527391, -0.763695, 0.763695, 0.763695, -0.763695]),
    ],
)
def test_two_rewards_summed_and_normalised_or_normalised_and_summed(mode, expected):
    values = np.array([(1, 0), (0, 1), (1, 1), (0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], dtype=float)
    scores = Scores(values, np.ones((8, 2), bool), ("love", "helpfulness"))
    composed = combine(scores, 4, (1.0, 1.0), mode=mode)
    found = group_advantages(composed.scores, 4, composed.weights, mode=mode, clip=None).values.ravel()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["crpg", "crraft", "codpo"])
def test_gradients_are_those_of_finite_differences_and_reach_log_probs_alone(name):
    torch.manual_seed(0)
    logp, other, weight = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    length = torch.randint(1, 30, (5,))
    if name == "codpo":
        reference = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

        def loss(a, b):
            return codpo(a, b, *reference, length, beta=0.3, sft_weight=0.2).loss

        assert torch.autograd.gradcheck(loss, (logp, other))
        loss(logp, other).sum().backward()
        assert reference.grad is None and logp.grad.abs().min() > 0
        return
    function = {"crpg": crpg, "crraft": crraft}[name]
    assert torch.autograd.gradcheck(lambda a: function(a, weight).loss, (logp,))
    function(logp, weight).loss.sum().backward()
    assert weight.grad is None and torch.equal(logp.grad, -weight.detach())


def test_equal_rewards_move_nothing():
    equal, valid = torch.full((1, 3), 0.7, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    assert crpg_advantages(equal).tolist() == [[0.0, 0.0, 0.0]]
    assert [part.tolist() for part in codpo_choice(equal, valid)] == [[NONE], [NONE]]  # chosen would be rejected


def test_without_a_valid_sample_the_baseline_or_nothing_is_learnt():
    calibrated, none = t(0.6, 0.8)[None], torch.zeros(1, 2, dtype=torch.bool)
    constrained = constrained_reward(calibrated, none)
    assert constrained.tolist() == [[0.0, 0.0]] and crpg_advantages(constrained).tolist() == [[0.0, 0.0]]
    fallback = crraft_choice(constrained, none, torch.tensor([True]))
    assert (fallback.member.tolist(), fallback.weight.tolist()) == ([2], [0.5])
    skipped = crraft_choice(constrained, none, torch.tensor([False]))
    assert (skipped.member.tolist(), skipped.weight.tolist()) == ([NONE], [0.0])
    assert [part.tolist() for part in codpo_choice(calibrated, none)] == [[NONE], [NONE]]


def test_codpo_rejects_the_worst_of_all_where_nothing_violates():
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert [part.tolist() for part in codpo_choice(t(0.5, 0.2, 0.9)[None], valid)] == [[2], [1]]
    alone = codpo_choice(t(0.5)[None], valid[:, :1])
    assert [part.tolist() for part in alone] == [[NONE], [NONE]]


def test_a_violating_completion_is_rejected_though_its_reward_is_the_largest():
    valid = torch.tensor([[True, True, False]])
    assert [part.tolist() for part in codpo_choice(t(0.5, 0.2, 0.9)[None], valid)] == [[0], [2]]


def test_a_missing_reward_is_left_out_and_never_counts_as_0():
    calibrated, valid = t(0.2, NAN, 0.6, NAN)[None], torch.tensor([[True, True, True, False]])
    constrained = constrained_reward(calibrated, valid)
    assert math.isnan(constrained[0, 1]) and constrained[0, 3] == 0  # what is violated is 0 whatever its reward
    assert crpg_advantages(t(0.2, NAN, 0.6)[None])[0].tolist() == pytest.approx([-0.2, 0.0, 0.2])
    assert crraft_choice(constrained, valid, torch.tensor([False])).member.tolist() == [2]
    assert [part.tolist() for part in codpo_choice(calibrated, valid)] == [[2], [0]]
    unknown = torch.full((1, 2), NAN, dtype=torch.float64)
    assert crpg_advantages(unknown).tolist() == [[0.0, 0.0]]
    assert crraft_choice(unknown, valid[:, :2], torch.tensor([False])).member.tolist() == [NONE]


def test_a_bound_is_on_the_log_ratio_itself():
    judged = torch.ones(4, dtype=torch.bool)
    assert is_valid(judged, t(1.0, 1.0001, -50.0, NAN), 1.0).tolist() == [True, False, True, False]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"\(2,\), \(3,\)"):
        crpg(t(1, 2), t(1, 2, 3))
    with pytest.raises(ConfigError):
        crraft(t(1, 2)[None], t(1, 2)[None])
