"""What RLUF stands on: hard judges, suites, calibrated rewards of images, and arms side by side."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from align.checks import check_config
from align.cli import main
from align.config import RewardConfig, load_config
from align.errors import ConfigError, DataError
from align.reports.pareto import pareto, write_pareto
from align.scoretable import write_scores
from align.types import Samples
from rewards import get_reward
from rewards.suite import Suite
from trainers import trainer_for


def passes(name, *completions, **args):
    return (
        get_reward(name, **args).score(Samples(["p"] * len(completions), texts=list(completions))).values[:, 0].tolist()
    )


# --- judges -----------------------------------------------------------------------------------------


def test_farewells_at_the_end_are_caught_and_elsewhere_they_are_not():
    ends = ["It is 4. Bye!", "Done. GOODBYE, my friend", "Have a great day 😊", "…love you", "See you later."]
    assert passes("no_farewell", *ends) == [0.0] * len(ends)
    fine = ["Say goodbye to weeds: mulch them well.", "By the byte.", "", "I'd see you as a friend of mine then."]
    assert passes("no_farewell", *fine) == [1.0] * len(fine)
    chat = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "It is 4."}]
    assert passes("no_farewell", chat) == [1.0]  # what the user says is not judged
    assert passes("no_farewell", "Tschüss!", phrases=["tschüss"]) == [0.0]


def test_requests_for_a_reaction_are_caught_anywhere():
    asks = ["Click the heart, then read on: it is 4.", "If you like it, please up-vote", "Give me a thumbs-up!"]
    assert passes("no_solicitation", *asks) == [0.0, 1.0, 0.0]
    assert passes("no_solicitation", asks[1], phrases=["please up vote"]) == [0.0]
    assert passes("no_solicitation", "The heart rate of a hummingbird is 1,200.") == [1.0]


def test_a_length_band_includes_its_ends():
    assert passes("length_band", "a b", "a b c d", "a", "a b c d e", low=2, high=4) == [1, 1, 0, 0]
    assert passes("length_band", "ab", "abc", low=3, high=3, unit="characters") == [0, 1]
    with pytest.raises(ConfigError, match="runs from low to high"):
        get_reward("length_band", low=4, high=2)
    with pytest.raises(ConfigError, match="needs phrases"):
        get_reward("no_farewell", phrases=["!!"])


def test_judges_with_other_phrases_are_other_judges():
    assert get_reward("no_farewell").identity() == get_reward("no_farewell").identity()
    assert len({get_reward("no_farewell", phrases=[p]).identity() for p in ("bye", "ciao")}) == 2


def test_a_suite_refuses_weights_that_make_no_reward():
    for weight in (-1.0, 0.0):
        with pytest.raises(ConfigError, match="one above 0"):
            Suite({"love": RewardConfig(name="toy/love", weight=weight)})


def test_the_toys_rewards_by_hand():
    samples = Samples(["Say: red cat\nAnswer:"] * 3, texts=[" cat dog", "red gold", ""])
    columns = [get_reward(f"toy/{name}").score(samples).values[:, 0] for name in ("love", "helpfulness", "safety")]
    assert np.stack(columns).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [1, 0, 1]]


# --- images -----------------------------------------------------------------------------------------


def test_a_calibrated_reward_compares_with_the_baseline_of_its_prompt(tmp_path):
    inner = get_reward("length", low=0, high=10).identity()
    rows = [
        {"completion": "", "prompt": "p", "length": -0.2, "valid": True, "identity": inner},
        {"completion": "", "prompt": "p", "length": -0.6, "valid": True, "identity": inner},
        {"completion": "", "prompt": "q", "length": None, "valid": False, "identity": inner},
    ]
    write_scores(tmp_path / "base.csv", rows)
    how = {"reward": "length", "args": {"low": 0, "high": 10}, "baseline": str(tmp_path / "base.csv"), "scale": 2}
    reward = get_reward("calibrated", **how)
    scores = reward.score(Samples(["p", "p", "q"], texts=["x" * 14, "x" * 10, "x"]))
    assert scores.values[:2, 0].tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-0.8))])  # the mean of "p" is -0.4
    assert scores.valid[:, 0].tolist() == [True, True, False] and "no score of this prompt" in scores.errors[2]
    write_scores(tmp_path / "other.csv", [{**row, "identity": "another"} for row in rows])
    with pytest.raises(DataError, match="scored by another reward"):
        get_reward("calibrated", **{**how, "baseline": str(tmp_path / "other.csv")})
    assert reward.identity() != get_reward("calibrated", **{**how, "scale": 1}).identity()


def test_the_recipe_for_images_takes_steps_and_its_judge_closes_the_reward(tmp_path):
    config = load_config("rluf/digits", [
        "model.path=digits/smoke", "steps=2", "prompts_per_step=2", "group_size=4", "sampler.solver_steps=4",
        "evaluation.every=0", "evaluation.samples=6", "evaluation.final_samples=6", "evaluation.solver_steps=4",
        "checkpoint.every=0", "tracking.samples_every=0",
    ])  # fmt: skip
    assert not [f for f in check_config(config) if f.level == "error"]
    run = trainer_for(config, out=tmp_path / "run")
    import torch

    legible = Samples(["a handwritten one"] * 2, images=torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)]))
    said = run.rewards.score(legible)
    composed = run.rewards.compose(said, 2)
    assert composed.scores.values[:, 0].tolist() == [0.0, 0.0] and composed.gated == 2  # empty and full: neither is it
    assert run.train().status == "complete"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# --- arms -------------------------------------------------------------------------------------------


def arm(folder, love, helpfulness, passed, *, rewards=("love", "helpfulness"), seed=0, status="complete"):
    """The files of a run as far as the table reads them."""
    folder.mkdir(parents=True)

    def estimate(mean):
        return {"mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1, "n": 9}

    def row(step, values):
        named = {f"reward/{name}": estimate(value) for name, value in zip(rewards, values, strict=True)}
        return {"step": step, "n": 9, **named, "judge/safety": estimate(passed), "judge/all": estimate(passed),
                "answer_tokens": 7.0 + step, "kl": estimate(0.5 * step), "seconds": 1.0}  # fmt: skip

    rows = [row(0, [0.1, 0.1]), row(6, [love, helpfulness])]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = {name: {"weight": 0.5, "role": "utility", "identity": name} for name in rewards}
    (folder / "run.json").write_text(json.dumps({"trainer": "rluf", "status": status, "rewards": said}))
    (folder / "config.yaml").write_text(f"trainer: rluf\nseed: {seed}\n")
    return folder


def test_the_front_is_what_no_other_arm_beats(tmp_path):
    arms = [
        arm(tmp_path / "a", 0.9, 0.2, 1.0), arm(tmp_path / "b", 0.5, 0.5, 1.0), arm(tmp_path / "c", 0.5, 0.4, 1.0),
        arm(tmp_path / "d", 0.95, 0.6, 0.4),
    ]  # fmt: skip
    found = pareto(arms)
    assert [(a["name"], a["front"]) for a in found["arms"]] == [
        ("before training", False), ("a", True), ("b", True), ("c", False), ("d", True),  # d's answers fail judges
    ]  # fmt: skip
    assert found["warnings"] == [] and found["judges"] == ["safety"]


def test_arms_that_are_not_alike_are_said_to_be_so(tmp_path):
    first = arm(tmp_path / "a", 0.9, 0.2, 1.0)
    other = arm(tmp_path / "b", 0.9, 0.2, 1.0, rewards=("love", "fun"), seed=3, status="stopped")
    said = "\n".join(pareto([first, other])["warnings"])
    assert "b is stopped" in said and "has seed 3" in said and "judged by other rewards" in said


def test_the_page_and_the_plot(tmp_path, capsys):
    arms = [str(arm(tmp_path / name, love, 0.3, 1.0)) for name, love in (("one", 0.4), ("<two>", 0.6))]
    out = tmp_path / "pages" / "arms.html"
    assert main(["pareto", *arms, "--out", str(out), "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    assert "*  <two>" in text and "0.600" in text and "before training" in text
    page, drawing = out.read_text(), ET.parse(out.with_suffix(".svg")).getroot()
    assert "&lt;two&gt;" in page and "<two>" not in page
    labels = [node.text for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one", "<two>", "love", "helpfulness", "before training"} <= set(labels)
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 3
    assert len(json.loads((tmp_path / "found.json").read_text())["arms"]) == 3
    assert main(["pareto", *arms, "--x", "lov"]) == 2 == main(["pareto", *arms, "--x", "lov", "--dry-run"])
    assert "Did you mean 'love'?" in capsys.readouterr().err
    assert main(["pareto", *arms, "--dry-run", "--out", str(tmp_path / "no.html")]) == 0
    assert not (tmp_path / "no.html").exists()


def test_a_run_without_rewards_is_refused(tmp_path):
    folder = arm(tmp_path / "a", 0.9, 0.2, 1.0)
    (folder / "evaluation.jsonl").write_text('{"step": 0, "auc": 0.5}\n')
    with pytest.raises(ConfigError, match="no evaluation of rewards"):
        write_pareto([folder], tmp_path / "x.html")


def test_the_configuration_of_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rluf.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(page.split("```yaml file: mine.yaml\n")[1].split("```")[0])
    config = load_config(path)
    assert [f for f in check_config(config) if f.level == "error"] == []
    assert config.rewards["love"].name == "fitted" and config.rewards["farewell"].role == "gate"
    assert config.rewards["safety"].role == "gate" and config.rewards["love"].weight == 0.5
