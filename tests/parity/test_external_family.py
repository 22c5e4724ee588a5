"""One file of a package of someone else is a whole family: found by its entry point, equal to its pipeline, trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import tiny_images
from tiny import wake

ROOT = Path(__file__).parents[2]
WHAT_ITS_USER_DOES = """
import json, sys
import torch
from align.cli import main
from align.config import ModelConfig
from align.diffusion.families import FAMILIES, Size
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy
from align.diffusion.rollout import decode, initial_noise, solve

folder, config, out = sys.argv[1:]
prompts = ["a red cat", "two dogs on a road"]
plain = Policy.load(folder, ModelConfig(path=folder), seed=0, size=Size(16, 24))
noise = initial_noise(plain.latent_shape, range(2), 1, "none", 5)
table = step_table("ode", 0.0, plain.family.schedule(4, None, plain.latent_shape))
ours = {scale: decode(plain, solve(plain.with_guidance(scale), noise, prompts, table).x0) for scale in (1.0, 4.5)}
pipeline = plain.family.pipeline
found = {"name": plain.family.name, "listed": "AuraFlowPipeline" in list(FAMILIES), "difference": [], "std": []}
for scale, mine in ours.items():
    theirs = pipeline(
        prompts, latents=noise, guidance_scale=scale, num_inference_steps=4, height=16, width=24,
        output_type="pt",
    ).images
    found["difference"].append(float((mine - theirs).abs().max()))
    found["std"].append(float(theirs.std()))
found["encoded"] = plain.to_latents(ours[1.0]).shape == noise.shape
found["guidance"] = float((ours[1.0] - ours[4.5]).abs().max())
found["exit"] = main(["train", config, "--out", out])
print(json.dumps(found))
"""


def auraflow(folder: Path) -> Path:
    """Save an AuraFlowPipeline that makes 8x8 latents and 16x16 images."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    tokenizer = tiny_images.t5_tokenizer(256)
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=tiny_images.t5(tokenizer), vae=tiny_images._image_vae(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pos_embed_max_size=144,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip
    wake(pipeline.transformer)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_family_is_one_file_of_a_package(tmp_path: Path):
    source = shutil.copytree(ROOT / "tests" / "packages" / "align_auraflow", tmp_path / "source")
    assert [p.name for p in source.rglob("*.py")] == ["align_auraflow.py"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", str(tmp_path / "site"), str(source)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    folder = auraflow(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na blue dog\ntwo cats\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({
        "name": "auraflow", "steps": 2, "prompts_per_step": 2, "group_size": 2, "updates_per_step": 1,
        "model": {"path": str(folder), "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"path": str(tmp_path / "prompts.txt"), "heldout_fraction": 0.5},
        "sampler": {"solver_steps": 3}, "rewards": [{"name": "jpeg"}],
        "optimizer": {"lr": 0.01}, "evaluation": {"every": 0, "samples": 2, "final_samples": 2, "solver_steps": 2},
    }))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WHAT_ITS_USER_DOES, str(folder), str(tmp_path / "config.yaml"), str(tmp_path / "run")],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["name"], found["listed"], found["exit"]) == ("auraflow", True, 0)
    assert found["encoded"]
    assert max(found["difference"]) <= 1e-5 and min(found["std"]) > 0.02 and found["guidance"] > 1e-4
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["first_ratio_error"] <= 1e-5 and row["grad_norm"] > 0 for row in rows] == [True, True]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["family"] == "auraflow"
