"""Tiny pipelines of every family by name, and run folders whose trained weights are drawn at random."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import tiny_videos
import torch

import tiny
import tiny_images
from align import checkpoint
from align.config import load_config, save_config
from align.diffusion.families import Size
from trainers.evaluation import load_policy

BUILD = {
    "sd": tiny.stable_diffusion,
    "sdxl": tiny_images.sdxl,
    "sd35": partial(tiny.sd3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "flux": tiny_images.flux,
    "qwen": tiny_images.qwen_image,
    "wan": tiny_videos.wan,
    "wan_image_to_video": partial(tiny_videos.wan, image=True),
    "hunyuan_video": tiny_videos.hunyuan,
    "skyreels": partial(tiny_videos.hunyuan, image=True),
}
VIDEOS = ("wan", "wan_image_to_video", "hunyuan_video", "skyreels")
TAKES_IMAGE = ("wan_image_to_video", "skyreels")


def size_of(name: str) -> Size:
    """Return a size that the tiny pipeline can make."""
    return Size(32, 32, 5) if name in VIDEOS else Size(16, 16)


def prompt_file(root: Path) -> Path:
    """Write three prompts with a first frame each."""
    tiny_videos.picture(root / "first.png")
    path = root / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a red cat {i}", "image": "first.png"}) + "\n" for i in "abc"))
    return path


def random_run(
    folder: Path, base: Path, name: str, train: str = "lora", average: bool = False, changed: dict | None = None, **lora
) -> Path:
    """Write a run folder with a checkpoint of step 3; with `average` its last weights are zeros, and not delivered."""
    size = size_of(name)
    config = load_config(
        {
            "name": name, "steps": 3, "rewards": [{"name": "jpeg"}],
            "prompts": {"path": str(prompt_file(base.parent)), "heldout_fraction": 0.5,
                        "image_column": "image" if name in TAKES_IMAGE else None},
            "model": {"path": str(base), "train": train, "lora": {"rank": 2, "alpha": 3, **lora}},
            "sampler": {"height": size.height, "width": size.width, "frames": size.frames},
            **(changed or {}),
        }
    )  # fmt: skip
    policy, generator = load_policy(config), torch.Generator().manual_seed(1)
    weights = policy.trainable()
    with torch.no_grad():
        for parameter in weights.values():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * draw if train == "lora" else parameter + 0.05 * draw)
    groups = {"model": weights}
    if average:
        groups = {"average": weights, "model": {n: torch.zeros_like(p) for n, p in weights.items()}}
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    (folder / "run.json").write_text("{}")
    checkpoint.save(folder / "checkpoints", 3, groups, {})
    return folder
