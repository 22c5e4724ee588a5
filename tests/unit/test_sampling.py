"""`align sample` and `align evaluate` of images and videos: every setting is said, used, recorded, and refused by flag."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image
from tiny_runs import BUILD, TAKES_IMAGE, VIDEOS, prompt_file, random_run

import tiny
from align.cli import main
from align.diffusion.families import Size
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy, load_family
from align.diffusion.rollout import solve
from align.errors import ConfigError, KernelError
from align.seeding import normal
from trainers import Sampling, evaluate, find_source, sample_images
from trainers.evaluation import generate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("sampling"), {}

    def folder(name):
        if name not in made:
            made[name] = BUILD[name](root / name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    changed = {
        "seed": 4, "sampler": {"height": 16, "width": 16, "shift": 3, "kernel": "flow_sde", "eta": 0.6},
        "evaluation": {"solver_steps": 3, "guidance_scale": 2},
    }  # fmt: skip
    return random_run(tmp_path_factory.mktemp("run") / "run", folders("sd35"), "sd35", changed=changed)


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def said(row):
    return {k: v for k, v in row.items() if k not in ("image", "video", "prompt", "member")}


QUICK = ("sd", "flux", "wan_image_to_video")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BUILD])
def test_every_family_samples_and_evaluates_as_told(folders, name, tmp_path, capsys):
    video, diffusion = name in VIDEOS, name in ("sd", "sdxl")
    told = {"height": 32, "width": 16, "seed": 3, "eta": 0.5, "guidance_scale": 1.5, "solver_steps": 2}
    told |= {"sampler": "ddim" if diffusion else "dance_sde", "shift": None if diffusion else 2.0}
    told |= {"frames": 5, "fps": 6.0} if video else {}
    if name in ("flux", "hunyuan_video", "skyreels"):
        told["embedded_guidance"] = 2.5
    if name in TAKES_IMAGE:
        told |= {"width": 32}
    flags = {"solver_steps": "steps", "guidance_scale": "guidance", "embedded_guidance": "embedded-guidance"}
    arguments = [
        x for k, v in told.items() if v is not None for x in (f"--{flags.get(k, k)}", f"{v:g}" if k != "sampler" else v)
    ]
    out, prompts = tmp_path / "made", str(prompt_file(tmp_path))
    shared = [str(folders(name)), "--prompts", prompts, *arguments]
    assert main(["sample", *shared, "--count", "2", "--batch", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = rows(out)
    assert len(found) == 6 and {json.dumps(said(row)) for row in found} == {json.dumps(said(found[0]))}
    assert said(found[0]) == {"embedded_guidance": None, **told}
    for key, value in said(found[0]).items():
        assert value is None or (value if key == "sampler" else f"{value:.4g}") in printed.split()
    if video:
        frames, seconds = count_frames_and_secs(str(out / found[0]["video"]))
        assert (frames, seconds) == (5, pytest.approx(5 / 6, abs=0.02))
    else:
        assert Image.open(out / found[0]["image"]).size == (16, 32)
    assert (out / "grid.png").is_file()
    result = tmp_path / "result.json"
    reward = ["--reward", "tiny_videos:redness"] if video else ["--reward", "jpeg"]
    assert main(["evaluate", *shared, *reward, "--samples", "6", "--json", str(result)]) == 0
    result = json.loads(result.read_text())
    assert {key: result[key] for key in said(found[0])} == said(found[0])
    assert result["samples"] == 6 and result["rewards"]["reward"]["n"] == 6


def test_a_stochastic_sampler_takes_the_steps_of_its_equation(folders):
    """Dance-SDE by hand: drift v + eta^2 / (2 sigma) (x + (1 - sigma) v), and fresh noise named by prompt and member."""
    policy = Policy(load_family(folders("sd35")), size=Size(16, 16))
    sampler = {"seed": 2, "solver_steps": 3, "shift": 3.0, "sampler": "dance_sde", "eta": 0.5}
    made = generate(policy, ["a cat", "a dog"], 2, **sampler)
    levels = [1.0, 6 / 7, 0.6, 0.0]  # 3u / (1 + 2u) at u = 1, 2/3, 1/3, 0
    for i, (prompt, member) in enumerate([("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1)]):
        key = (2, "evaluation", prompt, member)
        x = normal(policy.latent_shape, *key, 0, 0, "init")[None]
        for s, (sigma, after) in enumerate(zip(levels, levels[1:], strict=False)):
            with torch.no_grad():
                v = policy.velocity(x, torch.tensor([1000 * sigma]), [prompt])
            delta, eta = sigma - after, 0.5 if after else 0.0
            x = x - delta * (v + eta**2 / (2 * sigma) * (x + (1 - sigma) * v))
            if eta:
                x = x + eta * math.sqrt(delta) * normal(policy.latent_shape, *key, s, "sde")[None]
        torch.testing.assert_close(made.images[i : i + 1], policy.decode(x), atol=1e-5, rtol=0)
    again = generate(policy, ["a dog"], 2, batch=1, **sampler)
    torch.testing.assert_close(again.images, made.images[2:], atol=1e-5, rtol=0)
    plain = generate(policy, ["a dog"], 2, **{**sampler, "eta": 0.0})
    ode = generate(policy, ["a dog"], 2, **{**sampler, "sampler": "ode", "eta": 0.0})
    torch.testing.assert_close(plain.images, ode.images, atol=1e-5, rtol=0)
    assert (plain.images - again.images).abs().max() > 1e-3


def test_samples_go_into_the_run_that_made_them(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(run / "checkpoints" / "step_000003"), "--count", "1", "--steps", "1"]) == 0
    assert f"wrote samples.jsonl, what it names, and grid.png to {run / 'sampled'}\n" in capsys.readouterr().out
    assert (run / "sampled" / rows(run / "sampled")[0]["image"]).is_file() and list(tmp_path.iterdir()) == []
    assert [find_source(name).sampled for name in ("digits", "tiny")] == [Path("samples"), Path("completions.jsonl")]


def test_a_run_says_what_is_not_told(run, tmp_path):
    own = said(rows(sample_images(run, count=1, out=tmp_path / "own"))[0])
    assert own == {
        "seed": 4, "sampler": "ode", "eta": 0.0, "solver_steps": 3, "shift": 3.0, "guidance_scale": 2.0,
        "embedded_guidance": None, "height": 16, "width": 16,
    }  # fmt: skip
    step = run / "checkpoints" / "step_000003"
    told = {"sampler": "flow_sde", "solver_steps": 2, "shift": 1.0, "guidance_scale": 0, "width": 32, "seed": 0}
    assert said(rows(sample_images(step, count=1, out=tmp_path / "told", **told))[0]) == {**own, "eta": 0.6, **told}
    found = evaluate(step, samples=4, rewards=["jpeg"], **told)
    assert {key: found[key] for key in own} == {**own, "eta": 0.6, **told} and found["source"].endswith("at step 3")
    images = [np.asarray(Image.open(tmp_path / name / "0000_00.png")).shape for name in ("own", "told")]
    assert images == [(16, 16, 3), (16, 32, 3)]


def test_a_guidance_of_0_is_the_branch_without_a_prompt(folders, tmp_path):
    how = {"count": 1, "solver_steps": 2, "out": tmp_path / "made"}
    nought = sample_images(folders("sd35"), ["a red cat"], guidance_scale=0, **how)
    policy, key = Policy(load_family(folders("sd35")), size=Size(16, 16)), (0, "evaluation", "a red cat", 0)
    x = normal(policy.latent_shape, *key, 0, 0, "init")[None]
    x0 = solve(policy, x, [""], step_table("ode", 0.0, policy.family.schedule(2, None, policy.latent_shape))).x0
    pixels = (policy.decode(x0)[0] * 255).round().permute(1, 2, 0).numpy()
    assert rows(nought)[0]["guidance_scale"] == 0.0
    assert np.abs(np.asarray(Image.open(nought / "0000_00.png")) - pixels).max() <= 1


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sd35", "--sampler dance", "Unknown sampler 'dance' (--sampler)"),
        (
            "sd35",
            "--sampler cps",
            "How much noise does the sampler add (--eta): cps is not what this model was trained",
        ),
        ("sd35", "--eta 0.3", "The ode sampler adds no noise (--eta)"),
        ("sd35", "--sampler ddim --eta 1", "Set --sampler to a flow kernel such as dance_sde"),
        ("sd", "--sampler dance_sde --eta 1", "Set --sampler to ddim"),
        ("sd", "--sampler ddim --eta 2", "A kernel's eta is out of range (ddim, eta 2). Set it to from 0 to 1"),
        ("sd", "--shift 3", "A diffusion model has no time shift. Leave --shift out"),
        ("sd35", "--shift 0", "A number is out of range (--shift): it is 0. Give more than 0"),
        ("sd35", "--height 13", "(--height, --width): height and width must be multiples of 4. Try 12x16"),
        ("sd35", "--frames 5", "This model makes images: --frames is 5. Leave it out"),
        ("sd35", "--fps 8", "This model makes images: --fps is 8. Leave it out"),
        ("sd35", "--embedded-guidance 3", "Leave --embedded-guidance out; --guidance is classifier-free guidance"),
        ("wan", "--frames 6", "(--frames): their number must be 1 more than a multiple of 4. Set --frames to 5"),
        ("wan", "--width 20", "(--height, --width): height and width must be multiples of 16"),
        ("sd35", "--guidance=-1", "'-1' is not a number from 0"),
        ("sd35", "--steps 0", "it must be 1 or more"),
        ("sd35", "--temperature 1", "is no language model (--temperature)"),
        ("sd", "--steps 7", "Use a number of steps that divides 1000"),
    ],
)
def test_errors_name_the_flag(folders, name, flags, message, tmp_path, capsys):
    out = tmp_path / "out"
    if "divides" in message:  # of a folder whose timesteps are spread evenly
        base = tiny.stable_diffusion(tmp_path / "sd")
        path = base / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "trailing"}))
    else:
        base = folders(name)
    capsys.readouterr()  # a model's building
    assert main(["sample", str(base), "--prompt", "a cat", *flags.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and not re.search(r"sampler\.\w", error) and error.count("\n") == 1
    assert not out.exists()


def test_a_dry_run_refuses_and_samples_nothing(folders, tmp_path, capsys):
    arguments = ["sample", str(folders("sd35")), "--prompt", "a cat", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--steps", "5", "--guidance", "0"]) == 0
    shown = capsys.readouterr().out
    assert "solver_steps    5" in shown and "guidance_scale  0.0" in shown
    assert main([*arguments, "--sampler", "cps"]) == 2 and "--eta" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_out_of_range_are_refused_in_python():
    with pytest.raises(ConfigError, match=r"out of range \(height\)"):
        Sampling(height=0)
    with pytest.raises(ConfigError, match=r"out of range \(guidance_scale\)"):
        Sampling(guidance_scale=-1.0)
    with pytest.raises(ConfigError, match=r"out of range \(fps\)"):
        Sampling(fps=float("nan"))
    with pytest.raises(KernelError, match="Did you mean 'dance_sde'"):
        Sampling(sampler="dance_sd")
    with pytest.raises(TypeError):
        Sampling(stepz=3)
    assert Sampling(guidance_scale=0, seed=0, eta=0).within(None)["seed"] == 0
