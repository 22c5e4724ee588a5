"""The recipes that learn from thumbs and pairs improve what the embedded models make, by a judge they never asked."""

from __future__ import annotations

import pytest

from align.config import load_config
from trainers import Offline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "recipe", ["digits/diffusion_kto", pytest.param("digits/stable_diffusion_dpo", marks=pytest.mark.soak)]
)
def test_recipes_improve_the_heldout_reward(tmp_path, recipe):
    few = ["steps=60", "evaluation.final_samples=400", "evaluation.every=0", "tracking.samples_every=0", "seed=7"]
    summary = Offline(load_config(recipe, few), out=tmp_path / "run").train().summary
    assert summary["heldout_gain"]["ci_low"] > 0
    assert summary["implicit_after"]["ci_low"] > 0.5
    assert summary["first_ratio_error_max"] == 0
