"""The registry, scoring that never lies about a failure, and the digits rewards on real digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.config import RewardConfig
from align.diffusion.digits_data import ink_bands, load_split, parse_prompt, prompt_for
from align.errors import ConfigError, DataError, RewardError
from align.types import Samples, Scores, join_scores
from rewards import get_reward, list_rewards
from rewards.base import RewardCard, missing, score_safely
from rewards.panel import Panel


def real(split="evaluator", weight="plain"):
    data = load_split(split)
    return Samples(prompts=[prompt_for(int(d), weight) for d in data.labels], images=data.images)


class Fragile:
    """Fails on the image whose first pixel is 1, as a whole batch would."""

    names = ("mean",)
    card = RewardCard("fragile", "mean pixel", "0 to 1")

    def identity(self):
        return "0"

    def score(self, samples):
        if bool((samples.images[:, 0, 0, 0] == 1).any()):
            raise ValueError("a pixel was 1")
        values = samples.images.mean((1, 2, 3)).double().numpy()[:, None]
        return Scores(values, np.isfinite(values), self.names)


def test_one_bad_sample_never_spoils_its_batch():
    images = torch.full((4, 1, 2, 2), 0.5)
    images[2, 0, 0, 0] = 1
    images[3, 0, 1, 1] = float("nan")
    scores = score_safely(Fragile(), Samples(prompts=["x"] * 4, images=images))
    assert scores.valid[:, 0].tolist() == [True, True, False, False]
    assert scores.values[:2, 0] == pytest.approx([0.5, 0.5]) and np.isnan(scores.values[2:]).all()
    assert "a pixel was 1" in scores.errors[2]


def test_a_defect_in_the_reward_is_not_hidden():
    class Broken(Fragile):
        def score(self, samples):
            return self.no_such_attribute

    class Short(Fragile):
        def score(self, samples):
            return missing(self.names, ["x"])

    samples = Samples(prompts=["x"] * 3, images=torch.zeros(3, 1, 2, 2))
    with pytest.raises(AttributeError):
        score_safely(Broken(), samples)
    with pytest.raises(RewardError, match="1 scores"):
        score_safely(Short(), samples)


def test_missing_scores_join_and_total_as_missing():
    good = Scores(np.array([[1.0], [2.0]]), np.ones((2, 1), bool), ("a",))
    part = Scores(np.array([[5.0], [np.inf]]), np.ones((2, 1), bool), ("b",), ("", "overflow"))
    both = join_scores([good, part])
    assert both.valid.tolist() == [[True, True], [True, False]] and both.errors == ("", "overflow")
    panel = Panel([Fragile(), Fragile()], [2.0, 1.0])
    total = panel.total(both)
    assert total[0] == 7.0 and np.isnan(total[1])


def test_legibility_reads_real_digits_and_only_the_asked_one():
    reward, held = get_reward("digits/legibility"), get_reward("digits/legibility", split="evaluator")
    scores = reward.score(real("evaluator"))
    assert np.nanmean(scores.extras["accuracy"]) > 0.96 and scores.values.mean() > -0.2
    samples = real("evaluator")
    wrong = Samples(prompts=[prompt_for((parse_prompt(p)[0] + 1) % 10) for p in samples.prompts], images=samples.images)
    assert reward.score(wrong).values.mean() < -3
    assert reward.identity() != held.identity() == get_reward("digits/legibility", split="evaluator").identity()
    assert scores.values.min() >= -8


def test_ink_band_is_not_more_ink():
    reward = get_reward("digits/ink_band", split="generator")
    low, high = ink_bands("generator")[3, "bold"]
    images = torch.stack([torch.full((1, 16, 16), ink) for ink in ((low + high) / 2, low - 0.05, high + 0.05, 1.0)])
    values = reward.score(Samples(prompts=["a bold handwritten three"] * 4, images=images)).values[:, 0]
    assert values[0] == 0 and values[1] == pytest.approx(values[2], abs=1e-5) and values[1] < 0 and values[3] == -4
    data = load_split("generator")
    std = float(data.ink[data.labels == 3].std())
    assert values[1] == pytest.approx(-0.05 / std, abs=1e-4)


def test_bands_are_thirds_of_the_data():
    data, bands = load_split("generator"), ink_bands("generator")
    for digit in range(10):
        ink = data.ink[data.labels == digit]
        for weight, share in (("thin", 0.30), ("bold", 0.30), ("plain", 0.94)):
            low, high = bands[digit, weight]
            assert ((ink >= low) & (ink <= high)).float().mean().item() == pytest.approx(share, abs=0.04)
        assert bands[digit, "thin"][1] < bands[digit, "bold"][0]


def test_what_cannot_be_scored_is_missing_with_the_reason():
    images = torch.full((4, 3, 16, 16), 0.5)
    images[1] += 1
    images[2, 0, 0, 0] = float("nan")
    samples = Samples(
        prompts=["a handwritten two", "a handwritten two", "a handwritten two", "a red cat"], images=images
    )
    scores = get_reward("digits/legibility").score(samples)
    assert scores.valid[:, 0].tolist() == [True, False, False, False]
    assert "1.50" in scores.errors[1] and "not numbers" in scores.errors[2] and "a red cat" in scores.errors[3]
    with pytest.raises(DataError, match="16x16"):
        get_reward("digits/raw_ink").score(Samples(prompts=["a handwritten two"], images=torch.zeros(1, 1, 8, 8)))


def test_registry_names_and_suggestions():
    assert {c.name for c in list_rewards()} >= {"digits/legibility", "digits/ink_band", "digits/raw_ink"}
    with pytest.raises(ConfigError, match="Did you mean 'digits/legibility'"):
        get_reward("digits/legibilty")
    with pytest.raises(ConfigError, match="Did you mean 'split'"):
        get_reward("digits/legibility", splits="reward")
    with pytest.raises(ConfigError, match="Did you mean 'evaluator'"):
        get_reward("digits/ink_band", split="evaluater")


def test_t18_permuted_prompts_change_the_scores():
    samples = real("reward")
    panel = Panel.build([RewardConfig(name="digits/legibility"), RewardConfig(name="digits/ink_band")])
    scores = panel.score(samples)
    order = np.random.default_rng(0).permutation(len(samples))
    shuffled = panel.score(Samples(prompts=[samples.prompts[i] for i in order], images=samples.images))
    assert shuffled.column("legibility").mean() < scores.column("legibility").mean() - 2
    assert panel.score(samples.select(order)).values == pytest.approx(scores.values[order], abs=1e-5)
