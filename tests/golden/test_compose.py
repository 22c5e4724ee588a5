"""Transforms and combinations against numbers worked by hand, and what a missing score does to each."""

from __future__ import annotations

import numpy as np
import pytest

from align.errors import ConfigError, RewardError
from align.groupstats import masked_mean
from align.types import Scores
from rewards.compose import build_transforms, combine, fill_missing, require_scored, transform
from trainers.advantages import group_advantages

NAN = float("nan")


def scores(*rows, names=None, errors=()):
    values = np.array(rows, dtype=float)
    return Scores(values, np.isfinite(values), names or tuple("abcdef"[: values.shape[1]]), errors)


def advantages(given, group_size, mode, weights=None, **options):
    weights = weights or [1.0] * len(given.names)
    composed = combine(given, group_size, weights, mode=mode, **options)
    return group_advantages(composed.scores, group_size, composed.weights, mode=mode, eps=0.0, clip=None)


FOUR = ((1, 0), (1, 100), (0, 200), (0, 300))


def test_a_large_unit_owns_a_sum_of_rewards_and_not_a_sum_of_advantages():
    summed = advantages(scores(*FOUR), 4, "weighted_sum").values[0]
    assert summed == pytest.approx([-1.1627, -0.3850, 0.3850, 1.1627], abs=5e-5)
    each = advantages(scores(*FOUR), 4, "sum_of_advantages").values[0]
    assert each == pytest.approx([-0.2959, 0.4787, -0.4787, 0.2959], abs=5e-5)


def test_a_missing_component_is_neutral_in_a_sum_of_advantages():
    holed = scores((1, 0), (1, 100), (0, NAN), (0, 300))
    found = advantages(holed, 4, "sum_of_advantages")
    assert found.values[0] == pytest.approx([-0.0068, 0.6478, -0.8660, 0.2251], abs=5e-5)
    assert found.kept.all()
    nansum = np.nan_to_num(holed.values).sum(1)
    wrong = (nansum - nansum.mean()) / nansum.std(ddof=1)
    assert wrong == pytest.approx([-0.7047, 0.0035, -0.7118, 1.4130], abs=5e-5)  # what a 0 in its place would do


def test_a_missing_component_drops_the_member_from_a_weighted_sum_and_a_minimum():
    holed = scores((1, 0), (1, 100), (0, NAN), (0, 300))
    for mode in ("weighted_sum", "min"):
        found = advantages(holed, 4, mode)
        assert found.kept[0].tolist() == [True, True, False, True] and found.values[0, 2] == 0
        assert found.values[0].sum() == pytest.approx(0)
    gone = advantages(scores((NAN, NAN), (1, 2), (0, 5), (2, 1)), 4, "sum_of_advantages")
    assert gone.kept[0].tolist() == [False, True, True, True] and gone.invalid_members == 1


def test_gdpo_is_a_sum_of_advantages_and_then_a_batch_z_score():
    two_groups = scores((1, 0), (2, 0), (3, 1), (0, 1), (0, 1), (6, 1))
    summed = advantages(two_groups, 3, "sum_of_advantages").values
    assert summed == pytest.approx(np.array([[-1.57735, -0.57735, 2.15470], [-0.57735, -0.57735, 1.15470]]), abs=1e-5)
    assert summed.std(ddof=1) == pytest.approx(1.375798, abs=1e-6)
    whole = advantages(two_groups, 3, "gdpo").values
    assert whole == pytest.approx(np.array([[-1.14650, -0.41965, 1.56615], [-0.41965, -0.41965, 0.83930]]), abs=1e-5)
    first = advantages(two_groups, 3, "weighted_sum").values
    assert first == pytest.approx(np.array([[-0.87287, -0.21822, 1.09109], [-0.57735, -0.57735, 1.15470]]), abs=1e-5)


def test_a_closed_gate_gives_the_least_of_the_open_ones_and_is_counted():
    given = scores((5, 1), (3, 1), (9, 0), (4, 1), names=("quality", "safe"))
    composed = combine(given, 4, [1.0, 1.0], mode="gate", gates=[False, True])
    assert composed.scores.values[:, 0].tolist() == [5, 3, 3, 4] and composed.gated == 1
    fixed = combine(given, 4, [1.0, 1.0], mode="gate", gates=[False, True], floor=-2.0)
    assert fixed.scores.values[:, 0].tolist() == [5, 3, -2, 4]
    shut = combine(scores((5, 0), (3, 0)), 2, [1.0, 1.0], mode="gate", gates=[False, True])
    assert not shut.scores.valid.any() and shut.gated == 2
    unknown = combine(scores((5, NAN), (3, 1)), 2, [1.0, 1.0], mode="gate", gates=[False, True])
    assert unknown.scores.valid[:, 0].tolist() == [False, True] and unknown.gated == 0
    for gates in ([False, False], [True, True]):
        with pytest.raises(ConfigError, match="role: gate"):
            combine(given, 4, [1.0, 1.0], mode="gate", gates=gates)


def test_a_minimum_is_the_most_pessimistic_weighted_component():
    composed = combine(scores((1, 4), (3, 1)), 2, [2.0, 1.0], mode="min")
    assert composed.scores.values[:, 0].tolist() == [2.0, 1.0]


def applied(spec, *values, group_size=4):
    given = scores(*[(v,) for v in values])
    return transform(given, group_size, [build_transforms([spec])]).values[:, 0]


@pytest.mark.parametrize(
    ("spec", "values", "expected"),
    [
        ({"affine": {"scale": 2, "shift": -1}}, (0, 1, 2, NAN), (-1, 1, 3, NAN)),
        ({"clip": [0, 1]}, (-5, 0.5, 7, NAN), (0, 0.5, 1, NAN)),
        ({"clip": {"low": 0, "high": 1}}, (-5, 0.5, 7, NAN), (0, 0.5, 1, NAN)),
        ({"sigmoid": None}, (0, np.log(3), -np.log(3), -1000), (0.5, 0.75, 0.25, 0)),
        ({"platt": {"a": 2, "b": 1}}, (-0.5, (np.log(4) - 1) / 2, NAN, 400), (0.5, 0.8, NAN, 1)),
        ({"isotonic": {"x": [0, 1, 3], "y": [0.1, 0.5, 0.9]}}, (-2, 0.5, 2, 8), (0.1, 0.3, 0.7, 0.9)),
        ({"zscore": {"mean": 10, "std": 2}}, (10, 12, 6, NAN), (0, 1, -2, NAN)),
        ({"zscore": {"over": "group", "eps": 0}}, (1, 2, 3, NAN), (-1, 0, 1, NAN)),
        ({"rank_in_group": None}, (5, 7, 7, 9), (0, 0.5, 0.5, 1)),
        ({"rank_in_group": None}, (5, NAN, 7, 9), (0, NAN, 0.5, 1)),
        ({"threshold": 0.5}, (0.4, 0.5, 0.6, NAN), (0, 0, 1, NAN)),
        ({"threshold": {"over": "group"}}, (1, 2, 3, 4), (0, 0, 1, 1)),
        ({"threshold": {"over": "group"}}, (1, 2, 3, NAN), (0, 0, 1, NAN)),
    ],
)
def test_transforms_by_hand(spec, values, expected):
    assert applied(spec, *values) == pytest.approx(np.array(expected, float), abs=1e-9, nan_ok=True)


def test_a_batch_z_score_is_over_groups_and_a_group_one_is_not():
    batch = applied({"zscore": {"over": "batch", "ddof": 0, "eps": 0}}, 0, 2, 4, 6, group_size=2)
    assert batch == pytest.approx((np.arange(0, 7, 2) - 3) / np.sqrt(5))
    group = applied({"zscore": {"over": "group", "ddof": 0, "eps": 0}}, 0, 2, 4, 6, group_size=2)
    assert group.tolist() == [-1, 1, -1, 1]


def test_transforms_follow_one_another_in_order():
    chain = build_transforms([{"affine": {"scale": 10}}, {"clip": [0, 5]}])
    assert transform(scores((0.1,), (0.9,)), 2, [chain]).values[:, 0].tolist() == [1, 5]
    chain.reverse()
    assert transform(scores((0.1,), (0.9,)), 2, [chain]).values[:, 0].tolist() == [1, 9]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"afine": {}}, "Did you mean 'affine'"),
        ({"affine": {"scal": 2}}, "Did you mean 'scale'"),
        ({"platt": {"a": 1}}, "lacks a parameter"),
        ({"clip": [1, 0]}, "low below high"),
        ({"isotonic": {"x": [0, 0], "y": [0, 1]}}, "rising"),
        ({"zscore": {}}, "frozen"),
        ({"zscore": {"mean": 0, "std": 0}}, "std above 0"),
        ({"threshold": {}}, "median"),
        ({"sigmoid": 3}, "no parameter"),
        ({"sigmoid": {}, "clip": [0, 1]}, "one name"),
    ],
)
def test_bad_transforms_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_transforms([spec])


def test_filling_is_neutral_and_never_zero():
    holed = scores((20,), (NAN,), (22,), (NAN,), (NAN,), (NAN,))
    filled = fill_missing(holed, 3)
    assert filled.values[:3, 0].tolist() == [20, 21, 22] and not filled.valid[3:].any()
    found = group_advantages(filled, 3, [1.0], eps=0.0)
    assert found.values[0].tolist() == pytest.approx([-1, 0, 1]) and found.dropped_groups == 1
    assert masked_mean(filled.values, filled.valid) == 21


def test_too_many_missing_scores_are_refused_by_component_with_the_reasons():
    errors = ("", "timed out", "timed out", "")
    holed = scores((1, 1), (1, NAN), (1, NAN), (1, 1), names=("a", "b"), errors=errors)
    require_scored(holed, missing="mask", max_fail_frac=0.5, where="step 1")
    with pytest.raises(RewardError, match=r"b is missing for 2 of 4 samples, 10% are allowed; timed out"):
        require_scored(holed, missing="mask", max_fail_frac=0.1, where="step 1")
    with pytest.raises(RewardError, match="none may be"):
        require_scored(holed, missing="raise", max_fail_frac=1.0, where="step 1")
    require_scored(scores((1, 1)), missing="raise", max_fail_frac=0.0, where="step 1")


def test_an_unknown_combination_is_named():
    with pytest.raises(ConfigError, match="Did you mean 'weighted_sum'"):
        combine(scores((1,)), 1, [1.0], mode="weightedsum")
