"""The recipes do what their first line says, on the real embedded model."""

from __future__ import annotations

import json

import pytest

from align.config import load_config
from align.reports.training import write_report
from trainers import DanceGRPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_hacked_hacks_and_trips_the_alarm(tmp_path):
    config = load_config("digits/hacked", ["steps=20", "evaluation.final_samples=200", "evaluation.samples=100"])
    summary = DanceGRPO(config, out=tmp_path / "run").train().summary
    assert summary["reward_after"]["ci_low"] > summary["reward_before"]["ci_high"]
    assert summary["heldout_gain"]["ci_high"] < 0
    alarms = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert {a["code"] for a in alarms if a["level"] == "alarm"} == {"drift"}
    assert "hacked" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("recipe", ["digits/dance_grpo", "digits/full"])
def test_recipes_improve_the_heldout_reward(tmp_path, recipe):
    overrides = ["steps=20", "evaluation.final_samples=600", "evaluation.every=0", "seed=7"]
    summary = DanceGRPO(load_config(recipe, overrides), out=tmp_path / "run").train().summary
    assert summary["heldout_gain"]["ci_low"] > 0
    assert summary["first_ratio_error_max"] <= 1e-6
