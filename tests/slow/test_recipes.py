"""The recipes do what their first line says, on the real embedded model."""

from __future__ import annotations

import json

import pytest

from align.config import load_config
from align.recipes import list_recipes
from align.reports.training import write_report
from trainers import DanceGRPO, trainer_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_hacked_hacks_and_trips_the_alarm(tmp_path):
    small = ["steps=20", "evaluation.final_samples=200", "evaluation.samples=100", "monitor.action=warn"]
    config = load_config("digits/hacked", small)
    summary = DanceGRPO(config, out=tmp_path / "run").train().summary
    assert summary["reward_after"]["ci_low"] > summary["reward_before"]["ci_high"]
    assert summary["heldout_gain"]["ci_high"] < 0
    alarms = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert {a["code"] for a in alarms if a["level"] == "alarm"} == {"drift"}
    assert "hacked" in write_report(tmp_path / "run").read_text()


FEW = ["steps=20", "evaluation.final_samples=600", "evaluation.every=0", "seed=7"]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("digits/dance_grpo", []),
        pytest.param("digits/full", [], marks=pytest.mark.soak),
        pytest.param("digits/stable_diffusion", [], marks=pytest.mark.soak),  # each pretrains a model of its own
        pytest.param("digits/stable_diffusion", ["model.path=digits/sd-v"], marks=pytest.mark.soak),
    ],
    ids=["flow", "flow, every weight", "noise prediction", "v prediction"],
)
def test_recipes_improve_the_heldout_reward(tmp_path, recipe, overrides):
    summary = DanceGRPO(load_config(recipe, [*FEW, *overrides]), out=tmp_path / "run").train().summary
    assert summary["heldout_gain"]["ci_low"] > 0
    assert summary["first_ratio_error_max"] <= 1e-6


def test_thumbs_improve_the_heldout_reward(tmp_path):
    """Half of the samples get a thumb up of each reward, at their medians; the held-out judge is not binary."""
    thumbs = [
        {"name": "threshold", "args": {"reward": "digits/legibility", "at": -0.02}},
        {"name": "threshold", "args": {"reward": "digits/ink_band", "at": -0.05}},
    ]
    config = load_config({"extends": "digits/dance_grpo", "rewards": thumbs}, FEW)
    summary = DanceGRPO(config, out=tmp_path / "run").train().summary
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0.8 < rows[0]["reward"] < 1.4 and all(row["zero_std_groups"] < 10 for row in rows)
    assert summary["reward_after"]["mean"] > summary["reward_before"]["mean"]
    assert summary["heldout_gain"]["ci_low"] > 0


@pytest.mark.parametrize("trainer", ["kto", "bco", "dpo", "sft"])
def test_language_smoke_recipes_learn_the_toy(tmp_path, monkeypatch, trainer):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    assert f"{trainer}/smoke" in dict(list_recipes())
    result = trainer_for(load_config(f"{trainer}/smoke"), out=tmp_path / "run").train()
    found = result.summary
    assert result.status == "complete" and found["steps"] == 24
    if trainer == "sft":
        assert found["nats_change_after"]["ci_high"] < 0
    else:
        assert found["pair_accuracy_after"]["ci_low"] > 0.5 and found["rewards/margin_after"] > 0
