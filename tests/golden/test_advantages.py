"""Advantages against numbers worked by hand, and the invariances they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.errors import ConfigError
from align.types import Scores
from trainers.advantages import group_advantages, normalise


def scores(*components: list[list[float]], names: str = "abcdef") -> Scores:
    values = np.stack([np.asarray(c, dtype=float).reshape(-1) for c in components], axis=1)
    return Scores(values, np.isfinite(values), tuple(names[: len(components)]))


def advantages(*components, weights=None, **options):
    group = len(components[0][0])
    options = {"eps": 0.0, **options}
    return group_advantages(scores(*components), group, weights or [1.0] * len(components), **options)


@pytest.mark.parametrize(
    ("ddof", "expected"), [(1, [-1.1619, -0.3873, 0.3873, 1.1619]), (0, [-1.3416, -0.4472, 0.4472, 1.3416])]
)
def test_one_group(ddof, expected):
    assert advantages([[1, 2, 3, 4]], ddof=ddof).values[0] == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("size", "bound"), [(8, 2.47), (12, 3.18), (16, 3.75), (24, 4.70)])
def test_largest_possible_advantage(size, bound):
    one_hot = [[1.0] + [0.0] * (size - 1)]
    assert advantages(one_hot, clip=None).values.max() == pytest.approx((size - 1) / math.sqrt(size), rel=1e-6)
    assert advantages(one_hot, clip=None).values.max() == pytest.approx(bound, abs=6e-3)
    assert advantages(one_hot, clip=None, ddof=0).values.max() == pytest.approx(math.sqrt(size - 1), rel=1e-6)


def test_binary_group_of_twelve():
    one = advantages([[1] + [0] * 11]).values[0]
    assert (one[0], one[1]) == pytest.approx((3.18, -0.289), abs=5e-3)
    assert np.abs(advantages([[1] * 6 + [0] * 6]).values[0]) == pytest.approx([0.957] * 12, abs=5e-4)


def test_sum_of_normalised_advantages_not_of_rewards():
    first, second = [[1, 2, 3], [0, 0, 6]], [[0, 0, 1], [1, 1, 1]]
    expected = [[-1.57735, -0.57735, 2.15470], [-0.57735, -0.57735, 1.15470]]
    got = advantages(first, second, eps=0.0, clip=None)
    assert got.values == pytest.approx(np.array(expected), abs=5e-6)
    assert got.zero_std_groups == 0
    summed = advantages((np.array(first) + np.array(second)).tolist(), eps=0.0, clip=None)
    assert summed.values[0] == pytest.approx([-0.87287, -0.21822, 1.09109], abs=5e-6)


def test_clip_comes_once_after_the_weighted_sum():
    got = advantages([[0, 0, 0, 9]], [[9, 0, 0, 0]], weights=[2.0, 1.0], clip=1.0)
    raw = advantages([[0, 0, 0, 9]], [[9, 0, 0, 0]], weights=[2.0, 1.0], clip=None)
    assert got.values == pytest.approx(np.clip(raw.values, -1, 1))
    assert raw.values.max() == pytest.approx(2 * 1.5 - 0.5, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.3, -7.7, 1e9, 0.0])
def test_equal_rewards_give_exact_zeros_whatever_eps(value):
    for eps in (0.0, 1e-8):
        got = advantages([[value] * 6, [1, 2, 3, 4, 5, 6]], eps=eps)
        assert (got.values[0] == 0).all() and got.zero_std_groups == 1 and np.isfinite(got.values).all()


def test_missing_members_leave_the_statistics():
    nan = float("nan")
    got = advantages([[1, 2, 3, 4, nan, nan], [5, nan, nan, nan, nan, nan]])
    assert got.values[0, :4] == pytest.approx([-1.1619, -0.3873, 0.3873, 1.1619], abs=5e-5)
    assert not got.kept[0, 4:].any() and not got.kept[1].any()
    assert (got.values[1] == 0).all() and got.invalid_members == 7 and got.dropped_groups == 1


def test_a_missing_component_contributes_nothing():
    nan = float("nan")
    got = advantages([[1, 2, 3, 4]], [[nan, 1, 1, 7]], clip=None)
    alone = advantages([[1, 2, 3, 4]], clip=None)
    assert got.values[0, 0] == pytest.approx(alone.values[0, 0]) and got.kept.all()


def test_t9_invariances():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 8))
    base = advantages(rewards.tolist(), clip=None).values
    assert advantages((3.5 * rewards - 11).tolist(), clip=None).values == pytest.approx(base, abs=1e-6)
    order = rng.permutation(5)
    assert advantages(rewards[order].tolist(), clip=None).values == pytest.approx(base[order], abs=1e-12)
    members = rng.permutation(8)
    assert advantages(rewards[:, members].tolist(), clip=None).values == pytest.approx(base[:, members], abs=1e-12)
    halves = [advantages(rewards[a:b].tolist(), clip=None).values for a, b in ((0, 2), (2, 5))]
    assert np.concatenate(halves) == pytest.approx(base, abs=1e-12)


def test_scopes():
    rewards = np.array([[1.0, 3.0], [10.0, 20.0]])
    valid = np.ones_like(rewards, bool)
    std = np.std([1, 3, 10, 20], ddof=1)
    assert normalise(rewards, valid, eps=0, scope="global_std")[0] == pytest.approx((rewards - [[2], [15]]) / std)
    assert normalise(rewards, valid, eps=0, scope="global")[0] == pytest.approx((rewards - 8.5) / std)
    # Without a division a group that differs ten times as much has advantages ten times as large, in reward units.
    assert normalise(rewards, valid, scope="group_mean")[0].tolist() == [[-1.0, 1.0], [-5.0, 5.0]]
    equal = advantages([[1, 2, 3, np.nan], [2, 2, 2, 2]], scope="group_mean", weights=[2.0])
    assert equal.values.tolist() == [[-2.0, 0.0, 2.0, 0.0], [0.0] * 4] and equal.zero_std_groups == 1


def test_bad_input():
    with pytest.raises(ConfigError, match="at least two"):
        advantages([[1.0], [2.0]])
    with pytest.raises(ConfigError, match="weight"):
        advantages([[1, 2]], weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="scope"):
        advantages([[1, 2]], scope="globl")
    with pytest.raises(ConfigError, match="whole groups"):
        group_advantages(scores([[1, 2, 3]]), 2, [1.0])


def test_t11_groups_of_equals_teach_nothing_and_are_counted():
    found = advantages([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert not found.values[:2].any() and found.values[2].any()
    assert found.zero_std_groups == 2 and found.kept.all()


def picked(values, **options):
    found = advantages(values, clip=None, **options)
    return [np.flatnonzero(row).tolist() for row in found.kept], found


def test_t12_best_of_n_is_per_group_with_distinct_members():
    groups = [[9, 1, 5, 5, 2, 7], [100, 101, 102, 103, 104, 105]]
    rows, found = picked(groups, best_of=4)
    assert rows == [[0, 1, 4, 5], [0, 1, 4, 5]] and found.unselected == 4
    whole = advantages(groups, clip=None).values
    assert found.values[found.kept] == pytest.approx(whole[found.kept])  # statistics are the whole group's
    assert not found.values[~found.kept].any()


def test_t12_odd_counts_ties_and_identity():
    assert picked([[3, 1, 2, 5, 4]], best_of=3)[0] == [[1, 3, 4]]  # two of the best, one of the worst
    assert picked([[1, 1, 1, 2]], best_of=2)[0] == [[2, 3]]
    assert picked([[1, 1, 1, 1]], best_of=2)[0] == [[0, 3]]
    whole, same = advantages([[1, 2, 3, 4]]), advantages([[1, 2, 3, 4]], best_of=4, recentre=True)
    assert same.values == pytest.approx(whole.values, abs=1e-15) and same.unselected == 0
    assert picked([[1, 2, 3, 4]], best_of=99)[0] == [[0, 1, 2, 3]]


def test_t12_missing_members_are_never_picked_and_recentring_balances_the_rest():
    rows, found = picked([[np.nan, 1, 2, 10, 3, np.nan]], best_of=3, recentre=True)
    assert rows == [[1, 3, 4]]
    assert found.values.sum() == pytest.approx(0, abs=1e-12) and found.invalid_members == 2
    plain = picked([[np.nan, 1, 2, 10, 3, np.nan]], best_of=3)[1]
    assert abs(plain.values.sum()) > 0.1
    assert np.diff(found.values[0][rows[0]]) == pytest.approx(np.diff(plain.values[0][rows[0]]))
