"""Plain functions as rewards, and a real package of someone else that adds its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from align.errors import ConfigError, RewardError
from align.registry import Registry
from align.types import Samples, Scores
from rewards import base as rewards_base
from rewards import get_reward, list_rewards
from rewards.base import Entry, FunctionReward, RewardCard, register, score_safely

ROOT = Path(__file__).parents[2]
TEXTS = Samples(prompts=["p"] * 3, texts=["ab", "abcd", ""])


def card(name="lengths", components=("length",)):
    return RewardCard(name, "how long", "0 upwards", "text", components)


def lengths(samples, factor: float = 1.0):
    return [factor * len(text) if text else None for text in samples.texts]


@pytest.fixture
def registry(monkeypatch):
    """A registry of this test's own, the built-in rewards in it."""
    fresh = Registry("reward", group="align.rewards")
    fresh._entries.update(rewards_base.REWARDS._entries)
    monkeypatch.setattr(rewards_base, "REWARDS", fresh)
    return fresh


def test_a_registered_function_is_a_reward_with_its_parameters_as_arguments(registry):
    assert register(card())(lengths) is lengths and lengths(TEXTS) == [2.0, 4.0, None]
    reward = get_reward("lengths", factor=0.5)
    scores = reward.score(TEXTS)
    assert scores.names == ("length",) and scores.values[:2, 0].tolist() == [1.0, 2.0]
    assert not scores.valid[2, 0] and np.isnan(scores.values[2, 0]) and "no number" in scores.errors[2]
    with pytest.raises(ConfigError, match="Did you mean 'factor'"):
        get_reward("lengths", factr=2)


@pytest.mark.parametrize(
    "found",
    [
        [1.0, None, float("inf")],
        torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True),
        np.array([[1.0], [np.nan], [-np.inf]]),
        Scores(np.array([[1.0], [np.nan], [np.nan]]), np.array([[True], [False], [False]]), ("length",)),
    ],
)
def test_lists_tensors_arrays_and_scores_are_one(found):
    scores = FunctionReward(card(), lambda samples: found).score(TEXTS)
    assert scores.values.dtype == np.float64 and scores.valid[:, 0].tolist() == [True, False, False]


def test_several_components_a_sample():
    reward = FunctionReward(card(components=("a", "b")), lambda samples: torch.tensor([[1.0, 2.0]] * 3))
    assert reward.score(TEXTS).column("b").tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RewardError, match="no table of numbers"):
        FunctionReward(card(components=("a", "b")), lambda samples: [1.0, 2.0, 3.0]).score(TEXTS)


def test_what_is_no_number_is_refused_and_a_wrong_count_is_not_hidden():
    with pytest.raises(RewardError, match="no table of numbers.*number or None a sample, for each of length"):
        FunctionReward(card(), lambda samples: ["good", "bad", "good"]).score(TEXTS)
    with pytest.raises(RewardError, match="2 scores"):
        score_safely(FunctionReward(card(), lambda samples: [1.0, 2.0]), TEXTS)
    with pytest.raises(KeyError):
        score_safely(FunctionReward(card(), lambda samples: {}["defect"]), TEXTS)


def test_the_identity_follows_the_code_and_the_arguments():
    def other(samples, factor: float = 1.0):
        return [factor * (len(text) + 1) for text in samples.texts]

    one, again = FunctionReward(card(), lengths, {"factor": 1.0}), FunctionReward(card(), lengths, {"factor": 1.0})
    assert one.identity() == again.identity()
    assert (
        len(
            {
                r.identity()
                for r in (one, FunctionReward(card(), lengths, {"factor": 2.0}), FunctionReward(card(), other))
            }
        )
        == 3
    )
    typed = {}
    exec("def typed(samples):\n    return [1.0]\ndef changed(samples):\n    return [2.0]", typed)  # no source to be had
    assert FunctionReward(card(), typed["typed"]).identity() != FunctionReward(card(), typed["changed"]).identity()


def test_a_function_or_class_may_be_named_by_its_path(tmp_path, monkeypatch, registry):
    (tmp_path / "mine_by_path.py").write_text(
        '"""Mine."""\nfrom rewards.base import RewardCard, register\n\n\ndef plain(samples, power=1):\n'
        '    """Length to a power."""\n    return [len(t) ** power for t in samples.texts]\n\n\n'
        '@register(RewardCard("mine/noted", "noted", "any", "text", ("noted",)))\ndef noted(samples):\n    return [1.0] * len(samples)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = get_reward("mine_by_path:plain", power=2)
    assert reward.score(TEXTS).values[:, 0].tolist() == [4.0, 16.0, 0.0]
    assert reward.names == ("plain",) and reward.card.definition == "Length to a power."
    assert get_reward("mine_by_path:noted").names == ("noted",) == get_reward("mine/noted").names
    with pytest.raises(ConfigError, match="cannot be loaded"):
        get_reward("mine_by_path:nothing")


def test_a_factory_function_is_still_a_factory(registry):
    def build(scale: float):
        return FunctionReward(card("made"), lambda samples: [scale] * len(samples))

    register(card("made"), build)
    assert get_reward("made", scale=3.0).score(TEXTS).values[0, 0] == 3.0
    with pytest.raises(ConfigError, match="The reward 'made' needs scale"):
        get_reward("made")


def test_an_entry_that_is_none_spoils_nothing_but_itself(registry):
    registry._entries["odd"] = FunctionReward(card(), lengths)
    registry._entries["astray"] = Entry(card("elsewhere"), lengths)
    cards = {c.name: c for c in list_rewards()}
    assert (
        "it is a FunctionReward" in cards["odd"].definition
        and "its card says 'elsewhere'" in cards["astray"].definition
    )
    assert "digits/legibility" in cards
    with pytest.raises(ConfigError, match="names a rewards.base.Entry"):
        get_reward("odd")


# --- a package of someone else ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package in tests/packages, installed by pip into a folder of its own without a network."""
    work = tmp_path_factory.mktemp("packages")
    source = shutil.copytree(ROOT / "tests" / "packages" / "align_smile", work / "source")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", str(work / "site"), str(source)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    return work / "site"


def python(installed: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_lists_and_describes_an_installed_package(installed: Path):
    cards = {c["name"]: c for c in json.loads(python(installed, "-m", "align.cli", "rewards", "--json", "-"))}
    assert cards["smile/brightness"]["licence"] == "MIT" and cards["smile/vowels"]["media"] == "text"
    assert (
        cards["smile/broken"]["definition"].startswith("cannot be used: ")
        and "nowhere" in cards["smile/broken"]["definition"]
    )
    assert {"hpsv2.1", "digits/legibility"} <= set(cards)
    assert "mean pixel times `gain`" in python(installed, "-m", "align.cli", "rewards", "describe", "smile/brightness")


def test_listing_imports_neither_the_reward_nor_anything_heavy(installed: Path):
    code = (
        "import sys; from rewards import list_rewards; list_rewards(); "
        "print(sorted({'align_smile.smile', 'torch', 'transformers', 'open_clip'} & set(sys.modules)), "
        "'align_smile.cards' in sys.modules)"
    )
    assert python(installed, "-c", code).split() == ["[]", "True"]


def test_an_installed_class_and_function_score(installed: Path):
    code = (
        "import torch; from align import Samples; from rewards import get_reward\n"
        "images = Samples(prompts=['x'], images=torch.full((1, 3, 2, 2), 0.25))\n"
        "texts = Samples(prompts=['x'] * 2, texts=['abba', ''])\n"
        "b, v = get_reward('smile/brightness', gain=2.0), get_reward('smile/vowels')\n"
        "print(b.score(images).values[0, 0], v.score(texts).column('vowels')[0], v.score(texts).valid[1, 0])"
    )
    assert python(installed, "-c", code).split() == ["0.5", "0.5", "False"]
