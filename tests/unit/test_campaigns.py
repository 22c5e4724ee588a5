"""Accounts that act together: the statistics by hand, worlds whose campaigns are known, and the fit that reads them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from align.config import load_config
from align.errors import ConfigError
from align.feedback.audit import answered_together
from align.feedback.resampling import benjamini_hochberg
from align.feedback.simulate import SimulationConfig, simulate
from rewards import campaigns, embeddings
from rewards.fit import fit_reward
from rewards.fit_data import FitData, observe
from tests.people import accounted

ITEMS = 200


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def people(seed, *, users=80, each=30, cohort=0, campaign=0, spread=0.8, up=0.95):
    """Thumbs of honest people; the first `cohort` of them share the outputs they are shown, the last are a campaign."""
    rng = np.random.default_rng(seed)
    quality, shared, listed = rng.normal(0, 1.5, ITEMS), rng.permutation(ITEMS)[:40], rng.permutation(ITEMS)[:40]
    rows = []
    for u in range(users + campaign):
        own = shared if u < cohort else listed if u >= users else np.arange(ITEMS)
        items = rng.permutation(own)[:each]
        honest = rng.random(each) < sigmoid(quality[items] + rng.normal(0, spread))
        seen = honest if u < users else rng.random(each) < up
        rows += [(u, i, float(y), quality[i]) for i, y in zip(items, seen, strict=True)]
    user, item, seen, logit = (np.array(column) for column in zip(*rows, strict=True))
    return user.astype(int), item.astype(int), seen, logit, [f"u{n:03d}" for n in range(users + campaign)]


def listed(world, **how):
    user, item, seen, logit, names = world
    return campaigns.find_campaigns(logit, seen, user, item, names, **how)


# --- by hand ----------------------------------------------------------------------------------------


def test_statistics_by_hand():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.9])
    assert sorted(benjamini_hochberg(p, 0.05)) == [0, 1, 2, 3], ".04 <= .05 * 4 / 5, whatever .03 is"
    assert sorted(benjamini_hochberg(p, 0.045)) == [0, 3], ".01 <= .018; .03 > .027 and .04 > .036"
    assert not len(benjamini_hochberg(np.ones(4), 0.1))
    assert np.exp(campaigns.log_beta(np.array([2.0]), np.array([3.0])))[0] == pytest.approx(1 / 12, abs=1e-12)


def test_what_two_accounts_share_is_poisson_given_their_activity_and_the_items():
    """Accounts 0 and 1 answer items 0..9, account 2 items 9..18: counts 10, 10, 10; item 9 has three answers."""
    answers = [(u, i) for u in (0, 1) for i in range(10)] + [(2, i) for i in range(9, 19)]
    user, item = np.array(answers).T
    found = answered_together(np.r_[user, user], np.r_[item, item], users=4)  # said twice is said once
    popularity = np.array([2] * 9 + [3] + [1] * 9)
    expected = float(np.sum(np.minimum(1, 10 * popularity / 30) ** 2))
    tail = 1 - sum(math.exp(-expected) * expected**k / math.factorial(k) for k in range(10))
    assert found.p_U[:2] == pytest.approx([2 * tail] * 2, rel=1e-4) and found.p_U[3] == 1
    assert tail > 0.05 / 3
    assert found.shared_U.tolist() == [10, 10, 1, 0] and found.closest_U[:2].tolist() == [1, 0]
    assert found.groups() == [[0], [1], [2], [3]], "so few answers link nobody"
    assert answered_together(user, item, users=4, least=11).shared_U.tolist() == [0, 0, 0, 0]


def test_copies_are_linked_and_people_at_large_are_not():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 25)
    item = np.concatenate([rng.permutation(300)[:25] for _ in range(60)])
    assert all(len(group) == 1 for group in answered_together(user, item, users=60).groups())
    item[user < 4] = np.concatenate([rng.permutation(30)[:25] for _ in range(4)])
    assert [group for group in answered_together(user, item, users=60).groups() if len(group) > 1] == [[0, 1, 2, 3]]


# --- what is and what is not evidence ---------------------------------------------------------------


def test_p_values_of_honest_people_are_uniform():
    user, _, seen, logit, names = people(0, users=150, each=40)
    honest = campaigns.Honest.fit(logit, seen, user, len(names))
    p = np.array([honest.judge([u], 400, 0)[0] for u in range(len(names))])
    assert (p <= 0.1).mean() == pytest.approx(0.1, abs=0.07) and (p <= 0.5).mean() == pytest.approx(0.5, abs=0.12)


def test_the_likelihood_of_an_honest_person_is_a_mean_over_people():
    user, _, seen, logit, names = people(7, users=30, each=12)
    honest = campaigns.Honest.fit(logit, seen, user, len(names))
    prior = np.exp(honest.prior_J)
    for u in (0, 11):
        z = logit[user == u][:, None] * honest.slope_J + honest.effect_J
        chance = np.where(seen[user == u][:, None] > 0.5, sigmoid(z), 1 - sigmoid(z)).prod(0)
        assert honest.m_U[u] == pytest.approx(math.log(chance @ prior), abs=1e-9)


def test_a_campaign_is_listed_whole_with_its_reason():
    found = listed(people(1, campaign=6))
    assert {row.account for row in found} == {f"u{n:03d}" for n in range(80, 86)}
    first = found[0]
    assert (
        first.group == 6 and first.n == 30 and first.up > 25 and first.shared > 15 and first.closest.startswith("u08")
    )
    assert first.p == max(first.p_together, first.p_content) < 0.01
    assert f"{first.up} of 30 thumbs are up" in first.reason and first.closest in first.reason
    assert json.loads(json.dumps(first.as_dict()))["account"] == first.account
    assert [row.as_dict() for row in listed(people(1, campaign=6))] == [row.as_dict() for row in found]


def test_a_campaign_that_is_always_up_without_a_slip_is_listed():
    assert len(listed(people(2, campaign=5, up=1.1))) == 5


def test_a_campaign_against_outputs_is_listed_too():
    assert len(listed(people(3, campaign=5, up=0.0))) == 5


@pytest.mark.parametrize("seed", range(4))
def test_honest_people_who_are_shown_the_same_are_linked_and_not_listed(seed):
    world = people(seed, cohort=12)
    linked = [group for group in answered_together(world[0], world[1], users=80).groups() if len(group) > 1]
    assert linked and len(linked[0]) > 6
    assert listed(world) == []


def test_an_honest_person_who_saw_the_same_is_not_listed_with_the_campaign():
    user, item, seen, logit, names = people(8, campaign=6)
    mine, theirs = user == 4, user == 80
    item[mine], logit[mine] = item[theirs], logit[theirs]
    seen[mine] = np.random.default_rng(0).random(30) < sigmoid(logit[mine])
    assert any(4 in group and 80 in group for group in answered_together(user, item, users=86).groups())
    assert {row.account for row in listed((user, item, seen, logit, names))} == {f"u{n:03d}" for n in range(80, 86)}


def test_one_account_that_likes_everything_is_a_lenient_person():
    user, item, seen, logit, names = people(5)
    seen = np.where(user == 7, 1.0, seen)
    assert campaigns.Honest.fit(logit, seen, user, len(names)).judge([7], 1000, 0)[0] < 0.2
    assert campaigns.find_campaigns(logit, seen, user, item, names) == []


def test_a_lower_rate_lists_no_more():
    world = people(6, campaign=4, up=0.9)
    strict, usual = ({row.account for row in listed(world, rate=rate)} for rate in (1e-3, 0.1))
    assert strict <= usual and usual


# --- in a fit ---------------------------------------------------------------------------------------

WORLD = SimulationConfig(
    users=90, always_up=5, prompts=50, shown_per_user=50, reaction_rate=0.3, raters=0, vocabulary=20, campaign=30,
    false_thumbs=0.05,
)  # fmt: skip


@pytest.mark.parametrize("silence", ["ignore", "negative"])
def test_auto_leaves_out_the_campaign_and_says_so(tmp_path, monkeypatch, silence):
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")
    world = simulate(WORLD)
    config = load_config({
        "trainer": "fit", "steps": 20, "data": {"paths": ["simulated"], "silence": silence},
        "users": {"trim": "auto", "effects": True}, "checkpoint": {"every": 0},
    })  # fmt: skip
    data = observe(world.events, FitData(dict(world.items)), config.data)
    result = fit_reward(config, tmp_path / "run", data=data)
    gone = {row["account"] for row in result.card["trimmed_users"]}
    assert gone == {f"always-up-{n:04d}" for n in range(5)}
    for row in result.card["trimmed_users"]:
        assert row["p"] <= 0.1 and "thumbs are up" in row["reason"]
    (note,) = [text for text in result.card["warnings"] if "left out" in text]
    assert "5 accounts" in note and "always-up-0003" in note
    left = [result.card["left_out"][f"of trimmed people, in {part}"] for part in ("train", "calibration", "heldout")]
    assert min(left) > 0 and sum(left) > 60
    assert result.card["read"] == accounted(result.card) == len(data.rows) + data.left_out.total()
    assert all(part["users"] <= 90 for part in result.card["split"].values()), "nobody listed is in any part"
    from align.reports.training import write_report

    page = write_report(tmp_path / "run").read_text()
    assert "always-up-0003" in page and "outputs are those of always-up" in page


def test_what_trim_takes():
    own = {"trainer": "fit", "data": {"paths": ["x"]}}
    assert load_config(own, ["users.trim=auto"]).users.trim == "auto"
    assert load_config(own, ["users.trim=0.03"]).users.trim == 0.03
    for bad in ("most", "0.5", "-0.1"):
        with pytest.raises(ConfigError, match="trim"):
            load_config(own, [f"users.trim={bad}"])
