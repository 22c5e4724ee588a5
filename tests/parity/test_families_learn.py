"""Every family learns without trajectories: two steps on tiny weights move every adapter and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import tiny_videos
import torch
from PIL import Image

import tiny
import tiny_images
from align.config import load_config
from align.errors import ConfigError
from trainers import Forward, Offline

IMAGES = {"height": 16, "width": 16}
VIDEOS = {"height": 32, "width": 32, "frames": 5, "fps": 8}


@dataclass(frozen=True)
class Case:
    """A tiny family: how it is built, what it makes, and whether it starts from a first frame."""

    build: Callable[[Path], Path]
    size: dict[str, int]
    first_frame: bool = False

    @property
    def reward(self) -> dict[str, object]:
        """A reward of what it makes."""
        if "frames" in self.size:
            return {"name": "tiny_videos:redness"}
        return {"name": "jpeg", "args": {"direction": "compressible"}}


CASES = {
    "stable_diffusion": Case(tiny.stable_diffusion, IMAGES),
    "sdxl": Case(tiny_images.sdxl, IMAGES),
    "sd3": Case(partial(tiny.sd3, dual_attention_layers=(0, 1), qk_norm="rms_norm"), IMAGES),
    "flux": Case(tiny_images.flux, IMAGES),
    "qwen_image": Case(tiny_images.qwen_image, IMAGES),
    "wan": Case(tiny_videos.wan, VIDEOS),
    "wan_image_to_video": Case(partial(tiny_videos.wan, image=True), VIDEOS, first_frame=True),
    "hunyuan_video": Case(tiny_videos.hunyuan, VIDEOS),
    "skyreels": Case(partial(tiny_videos.hunyuan, image=True), VIDEOS, first_frame=True),
}
QUICK = ("flux", "skyreels")


def prompts(case: Case, folder: Path) -> dict[str, object]:
    """Write four prompts, with first frames where the family starts from one."""
    rows = [{"prompt": text} for text in ("a red cat", "two dogs", "a blue dog", "two cats running slowly")]
    if case.first_frame:
        for i, row in enumerate(rows):
            row["image"] = tiny_videos.picture(folder / f"{i}.png", seed=i).name
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    column = "image" if case.first_frame else None
    return {"path": str(folder / "prompts.jsonl"), "heldout_fraction": 0.5, "image_column": column}


def nft(case: Case, model: Path, folder: Path, out: Path) -> Forward:
    """DiffusionNFT on what the model samples."""
    config = {
        "trainer": "forward", "name": "toy", "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "prompts": prompts(case, folder), "rewards": [case.reward],
        "steps": 2, "prompts_per_step": 2, "group_size": 2, "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
        "sampler": {"kernel": "ode", "eta": 0, "solver_steps": 3, "initial_noise": "none", **case.size},
        "objective": {"loss": "nft", "draws": 2},
        "evaluation": {"every": 0, "samples": 2, "final_samples": 2, "solver_steps": 2},
        "checkpoint": {"every": 2}, "tracking": {"samples_every": 0},
    }  # fmt: skip
    return Forward(load_config(config), out=out)


def diffusion_kto(case: Case, model: Path, folder: Path, out: Path) -> Offline:
    """Diffusion-KTO on given images; a model of videos takes each for a video of one frame."""
    size = {**case.size, "frames": 1} if "frames" in case.size else case.size
    size = {name: size[name] for name in ("height", "width", "frames") if name in size}
    rows = []
    for i in range(8):
        shade = 200 if i % 2 else 40
        image = Image.new("RGB", (size["width"], size["height"]), (shade, 255 - shade, 30 * i))
        image.save(folder / f"given_{i}.png")
        prompt = ("a red cat", "two dogs", "a blue dog", "two cats running slowly")[i // 2]
        rows.append({"prompt": prompt, "image": f"given_{i}.png", "label": bool(i % 2)})
    (folder / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "trainer": "offline", "name": "toy", "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "data": {"path": str(folder / "thumbs.jsonl"), "heldout_fraction": 0.25}, "steps": 2, "batch_size": 4,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0}, "sampler": {"solver_steps": 4, **size},
        "objective": {"loss": "kto", "beta": 10, "draws": 2},
        "evaluation": {"every": 0, "samples": 2, "final_samples": 2, "solver_steps": 2, "rows": 2},
        "checkpoint": {"every": 2}, "tracking": {"samples_every": 0},
    }  # fmt: skip
    return Offline(load_config(config), out=out)


TRAINERS = {"nft": nft, "diffusion_kto": diffusion_kto}
"""What builds a run of two steps with adapters, from a case, the model's folder, a folder for its data, and its own."""
LEARNT = [
    pytest.param(learner, name, marks=() if name in QUICK else pytest.mark.slow)
    for learner in TRAINERS
    for name, case in CASES.items()
    if not (learner == "diffusion_kto" and case.first_frame)
]


@pytest.mark.parametrize(("learner", "name"), LEARNT)
def test_every_family_takes_steps_that_reach_every_adapter(tmp_path, monkeypatch, learner, name):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    case = CASES[name]
    model = case.build(tmp_path / "model")
    run = TRAINERS[learner](case, model, tmp_path, tmp_path / "run")
    denoiser = run.policy.family.denoiser
    assert run.policy.family.name == name
    before = {n: p.detach().clone() for n, p in denoiser.named_parameters()}
    result = run.train()
    assert result.status == "complete"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    # An adapter's A gets its first gradient once its B has left 0: so every one of both moved in two steps.
    moved = {n for n, p in denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora" in n} == set(run.policy.trainable())


@pytest.mark.parametrize("name", ["skyreels", pytest.param("wan_image_to_video", marks=pytest.mark.slow)])
def test_a_model_that_starts_from_a_frame_learns_from_no_single_image(tmp_path, name):
    model = CASES[name].build(tmp_path / "model")
    with pytest.raises(ConfigError, match="only images can be learnt from here"):
        diffusion_kto(CASES[name], model, tmp_path, tmp_path / "run")
