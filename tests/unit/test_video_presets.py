"""Presets of videos are what the paper and the released code say, and fit the families they name."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from align.checks import check_config
from align.config import load_config
from align.diffusion.families import FAMILIES, Size
from align.ledger import feq_ledger
from align.recipes import read_recipe
from rewards.base import REWARDS

REST = {"prompts": {"path": "p.txt"}}
PRESETS = {
    # solver steps, trained steps, samples a step, updates, F_eq a sample (full with checkpointing: k = 4)
    "repo_hunyuan_video": (16, 9, 768, 2, 16 + 9 * 4 / 3),
    "paper_hunyuan_video": (25, 15, 384, 4, 25 + 15 * 4),
    "repo_skyreels": (16, 9, 256, 1, 2 * 16 + 2 * 9 * 4),
    "paper_skyreels": (25, 15, 384, 1, 2 * 25 + 2 * 15 * 4),
    "repo_wan": (20, 11, 192, 1, 2 * 20 + 2 * 11 * 4),
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_cost_and_updates_are_those_of_the_source(name):
    config = load_config({"extends": f"presets/{name}", **REST})
    ledger = feq_ledger(config)
    found = (ledger["solver_steps"], ledger["trained_steps"], ledger["samples_per_step"], ledger["updates_per_step"])
    assert (*found, ledger["feq_per_sample"]) == pytest.approx(PRESETS[name])
    assert [f for f in check_config(config, reward_names=list(REWARDS)) if f.level == "error"] == []
    assert (config.sampler.guidance == "off") == ("hunyuan" in name)
    assert config.model.train == "full" and config.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("repo_hunyuan_video", (16, 14, 60, 60)),
        ("paper_hunyuan_video", (16, 14, 60, 60)),
        ("repo_skyreels", (16, 14, 50, 80)),
        ("paper_skyreels", (16, 14, 50, 80)),
        ("repo_wan", (16, 1, 64, 64)),
    ],
)
def test_sizes_fit_the_published_models(name, shape):
    """The latents of the published VAE and patches; the clip range in nats follows from their number."""
    config = load_config({"extends": f"presets/{name}", **REST})
    family = FAMILIES.get(config.model.family)
    patch = {"patch_size": (1, 2, 2)} if "wan" in name else {"patch_size": 2, "patch_size_t": 1}
    found = object.__new__(family)
    found.pipeline = SimpleNamespace(
        vae_scale_factor_temporal=4, vae_scale_factor_spatial=8,
        transformer=SimpleNamespace(config=SimpleNamespace(out_channels=16, **patch)),
    )  # fmt: skip
    size = Size(**{key: getattr(config.sampler, key) for key in ("height", "width", "frames", "fps")})
    assert found.latent_shape(size) == shape and math.prod(shape) > 0
    assert family.takes_image == (config.prompts.image_column is not None)


def test_what_is_peculiar_to_each():
    hunyuan = load_config({"extends": "presets/repo_hunyuan_video", **REST})
    assert (hunyuan.sampler.shift, hunyuan.sampler.eta, hunyuan.sampler.fps) == (5.0, 0.25, 8.0)
    assert hunyuan.sampler.embedded_guidance * 1000 == pytest.approx(6018) and hunyuan.steps == 202
    assert (hunyuan.group_size, hunyuan.advantage.best_of) == (24, 8)
    skyreels = load_config({"extends": "presets/repo_skyreels", **REST})
    assert (skyreels.sampler.guidance_scale, skyreels.sampler.embedded_guidance, skyreels.sampler.shift) == (5, 1, 7)
    assert skyreels.rewards[0].components == {"mq": 1.0}
    wan = load_config({"extends": "presets/repo_wan", **REST})
    assert wan.rewards[0].args == {"reward": "hpsv2.1", "count": 1} and wan.sampler.frames == 1
    for name in PRESETS:
        text = read_recipe(f"presets/{name}")
        assert "# There: " in text and "Memory" in text and "xpected" in text
