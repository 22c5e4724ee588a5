"""Best of n by hand, by closed forms, and against all subsets written out."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from align.errors import ConfigError
from trainers.best_of import Rule, best_first, best_of_weights, curve, expected_best, kl_bound, label, mine_pairs

NAN = float("nan")


def test_three_candidates_by_hand():
    # pairs of {1, 2, 4}: max 2, 4, 4
    assert expected_best(np.array([4.0, 1.0, 2.0]), 2) == pytest.approx(10 / 3)
    assert best_of_weights(3, 2) == pytest.approx([0, 1 / 3, 2 / 3])
    assert best_of_weights(4, 1) == pytest.approx([0.25] * 4) and best_of_weights(4, 4) == pytest.approx([0, 0, 0, 1])


@pytest.mark.parametrize(("count", "n"), [(5, 2), (7, 7), (9, 4), (12, 1)])
def test_all_subsets_written_out(count, n):
    rng = np.random.default_rng(count)
    score, judge = rng.normal(size=count), rng.normal(size=count)
    score[3] = score[1]  # a tie: the first candidate is the better one
    best = [max(part, key=lambda i: (score[i], -i)) for part in combinations(range(count), n)]
    assert expected_best(score, n) == pytest.approx(np.mean(score[best]))
    assert expected_best(score, n, judge) == pytest.approx(np.mean(judge[best]))


def test_ranks_have_a_closed_form_and_large_n_does_not_overflow():
    # without replacement from 1..N the expected maximum of n is n (N + 1) / (n + 1)
    for count, n in ((10, 3), (1000, 37), (5000, 2500)):
        assert expected_best(np.arange(1.0, count + 1), n) == pytest.approx(n * (count + 1) / (n + 1))
        assert best_of_weights(count, n).sum() == pytest.approx(1)


def test_the_estimator_is_unbiased():
    # the maximum of n exponentials has mean 1 + 1/2 + ... + 1/n
    rng = np.random.default_rng(0)
    draws = [expected_best(rng.exponential(size=12), 4) for _ in range(4000)]
    assert np.mean(draws) == pytest.approx(25 / 12, abs=4 * np.std(draws) / math.sqrt(4000))


def test_the_bound_of_the_kl():
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(0.6362943611) and kl_bound(64) == pytest.approx(3.1745080834)
    # it is the KL of the best of n from a uniform draw over many candidates
    weights = best_of_weights(20_000, 4)
    assert (weights[weights > 0] * np.log(20_000 * weights[weights > 0])).sum() == pytest.approx(kl_bound(4), abs=1e-3)


def test_n_outside_of_the_candidates_is_refused():
    for n in (0, 4):
        with pytest.raises(ConfigError, match="best of n"):
            best_of_weights(3, n)


GROUP = [0, 0, 0, 0, 1, 1, 1, 2]
SCORE = np.array([0.2, 0.9, NAN, 0.9, 0.5, 0.1, 0.7, NAN])


def test_what_is_kept_by_hand():
    def kept(**rule):
        return np.flatnonzero(Rule(**rule).keep(SCORE, GROUP)).tolist()

    assert best_first(SCORE).tolist() == [1, 3, 6, 4, 0, 5]
    assert kept(best=1) == [1, 6], "the first of equal ones; a missing score is never the worst or the best"
    assert kept(best=2) == [1, 3, 4, 6] and kept(best=9) == [0, 1, 3, 4, 5, 6]
    assert kept(share=0.67) == [1, 3, 4, 6] and kept(share=0.01) == [1, 6], "one of each prompt at least"
    assert kept(share=0.5, across=True) == [1, 3, 6]
    assert kept(threshold=0.5) == [1, 3, 4, 6] and kept(best=1, threshold=0.8) == [1]
    with pytest.raises(ConfigError):
        Rule(best=1, share=0.5)
    with pytest.raises(ConfigError):
        Rule(best=1, across=True)


def test_pairs_by_hand():
    content = list("abcdefgh")
    pairs, left = mine_pairs(SCORE, GROUP, content)
    assert pairs == [(1, 0, pytest.approx(0.7)), (6, 5, pytest.approx(0.6))]
    assert left == {"prompts with fewer than two scores": 1}
    pairs, left = mine_pairs(SCORE, GROUP, content, "all", margin=0.3)
    assert [p[:2] for p in pairs] == [(1, 0), (3, 0), (6, 5), (4, 5)]
    assert left == {"ties": 1, "margins too small": 1, "prompts with fewer than two scores": 1}
    same, left = mine_pairs(SCORE, GROUP, ["a", "a", *content[2:]])
    assert [p[:2] for p in same] == [(6, 5)] and left["two of the same content"] == 1
    _, left = mine_pairs(np.ones(4), [0, 0, 1, 1], content[:4])
    assert left == {"ties": 2}
    with pytest.raises(ConfigError, match="best-worst"):
        mine_pairs(SCORE, GROUP, content, "best-wurst")


def test_the_worst_of_equal_ones_is_the_first_and_random_ones_are_drawn_again_alike():
    pairs, _ = mine_pairs(np.array([1.0, 0.0, 0.0, 2.0]), [0] * 4, list("abcd"))
    assert pairs == [(3, 1, 2.0)]
    score, group = np.arange(400.0), np.repeat(np.arange(100), 4)
    drawn = [mine_pairs(score, group, list(map(str, score)), "best-random", seed=s)[0] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    rejected = np.array([j - i for i, j, _ in drawn[0]])
    assert set(rejected) == {-1, -2, -3} and np.bincount(-rejected)[1:].min() > 15


def test_thumbs_by_hand():
    assert label(SCORE, 0.5).tolist()[:2] == [0, 1] and np.isnan(label(SCORE, 0.5)[2])
    banded = label(SCORE, 0.8, 0.2)
    assert np.array_equal(banded, [0, 1, NAN, 1, NAN, 0, NAN, NAN], equal_nan=True)
    with pytest.raises(ConfigError, match="end below"):
        label(SCORE, 0.5, 0.5)


def test_a_judge_that_turns_against_the_reward_is_seen():
    rng = np.random.default_rng(1)
    score = rng.normal(size=(60, 16))
    judge = np.where(score < 1, score, 2 - 3 * (score - 1)) + 0.2 * rng.normal(size=score.shape)
    group = np.repeat(np.arange(60), 16)
    found = curve(score.ravel(), group, {"gold": judge.ravel(), "other": rng.normal(size=960), "same": score.ravel()})
    assert found["n_max"] == 16 and [p["n"] for p in found["points"]] == list(range(1, 17))
    assert found["judges"]["gold"]["over_optimised"] and 1 < found["judges"]["gold"]["peak"] < 16
    assert found["judges"]["gold"]["gain"]["ci_low"] < found["judges"]["same"]["gain"]["ci_low"]
    assert not found["judges"]["same"]["over_optimised"] and not found["judges"]["other"]["over_optimised"]
    last = found["points"][-1]
    assert last["reward"] == last["judges"]["same"] and last["reward"]["mean"] == pytest.approx(score.max(1).mean())


def test_the_same_prompts_stand_behind_every_n():
    group = [0] * 6 + [1] * 6 + [2] * 2 + [3]
    score = np.arange(15.0)
    score[14] = NAN
    found = curve(score, group)
    assert found["n_max"] == 2 and found["prompts"] == 3 and found["prompts_left_out"] == 1
    many = np.repeat(np.arange(20), 4)
    short = np.where((many == 0) & (np.arange(80) > 0), NAN, np.arange(80.0))
    assert curve(short, many)["n_max"] == 4 and curve(short, many)["prompts_left_out"] == 1, "one short prompt in 20"
    assert curve(np.full(4, NAN), [0, 0, 1, 1])["n_max"] == 0
