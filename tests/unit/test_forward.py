"""The successors end to end on tiny folders: flow and diffusion, every loss; they learn, and resume bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from align import checkpoint
from align.config import load_config
from align.errors import ConfigError
from align.types import Scores
from rewards.base import RewardCard
from rewards.panel import Panel
from trainers import DanceGRPO, Forward

PROMPTS = ["a red cat", "a blue dog", "two dogs", "a cat", "four cats", "a red dog"]


class Redness:
    """Red minus green, or whether it is above a threshold."""

    names = ("red",)
    card = RewardCard("test/red", "mean red minus mean green", "-1 to 1")

    def __init__(self, threshold=None):
        self.threshold = threshold

    def identity(self):
        return "red"

    def score(self, samples):
        values = (samples.images[:, 0] - samples.images[:, 1]).mean((1, 2)).double().numpy()
        values = values if self.threshold is None else (values > self.threshold).astype(float)
        return Scores(values[:, None], values[:, None] == values[:, None], self.names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"sd3": tiny.sd3(root / "sd3"), "sd": tiny.stable_diffusion(root / "sd", prediction="v_prediction")}


def config_of(folder, out, *overrides, trainer="forward", **sections):
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    config = {
        "trainer": trainer, "name": "toy", "model": {"path": str(folder), "lora": {"rank": 4, "alpha": 8}},
        "prompts": {"path": str(prompts), "heldout_fraction": 0.34}, "rewards": [{"name": "digits/raw_ink"}],
        "steps": 4, "prompts_per_step": 4, "group_size": 6, "optimizer": {"lr": 1e-2},
        "evaluation": {"every": 0, "samples": 8, "final_samples": 16, "solver_steps": 5},
        "checkpoint": {"every": 2}, "tracking": {"samples_every": 0}, **sections,
    }  # fmt: skip
    if trainer == "forward":
        config["sampler"] = {"kernel": "ode", "eta": 0, "solver_steps": 5, "initial_noise": "none"}
    return load_config(config, overrides)


def run(folder, out, *overrides, reward=None, trainer="forward", **sections):
    config = config_of(folder, out, *overrides, trainer=trainer, **sections)
    kind = Forward if trainer == "forward" else DanceGRPO
    return kind(config, out=out, rewards=Panel([reward or Redness()], [1.0], combined=config.combine))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["nft", "awm", "dgpo"])
@pytest.mark.parametrize("family", ["sd3", "sd"])
def test_every_loss_moves_every_kind_of_model(folders, tmp_path, family, loss):
    old = "ramp" if loss == "nft" else "step"
    trainer = run(folders[family], tmp_path / "run", f"objective.loss={loss}", f"objective.old_policy={old}", "steps=2")
    before = {n: p.detach().clone() for n, p in trainer.policy.trainable().items()}
    assert trainer.train().status == "complete"
    moved = {n for n, p in trainer.policy.trainable().items() if not torch.equal(p, before[n])}
    assert moved == set(before)
    rows = metrics(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["feq_per_sample"] == 5 + 4 * (2 + 1 + {"nft": 1, "awm": 0, "dgpo": 2}[loss])


@pytest.mark.parametrize("loss", ["nft", "awm"])
def test_it_learns(folders, tmp_path, loss):
    old = "ramp" if loss == "nft" else "step"
    trainer = run(
        folders["sd3"], tmp_path / "run", f"objective.loss={loss}", f"objective.old_policy={old}", "steps=12",
        "prompts_per_step=4", "group_size=8", "objective.kl_weight=0",
    )  # fmt: skip
    summary = trainer.train().summary
    assert summary["heldout_gain"]["ci_low"] > 0


def test_binary_labels_are_native(folders, tmp_path):
    """A thumb is optimality as it is: groups that agree still teach."""
    trainer = run(
        folders["sd3"], tmp_path / "run", "objective.nft_feedback=label", "steps=2", reward=Redness(threshold=-1.0)
    )
    trainer.train()
    rows = metrics(tmp_path / "run")
    assert [row["optimality"] for row in rows] == [1.0, 1.0] and all(row["grad_norm"] > 0 for row in rows)
    with pytest.raises(ConfigError, match="A label is not from 0 to 1"):
        run(folders["sd3"], tmp_path / "bad", "objective.nft_feedback=label").train()


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_first_rollout_of_equals_does_not_stop_the_run(folders, tmp_path, noise):
    """At the start NFT's two pulls cancel where r is a half, to the last digit of float32."""
    trainer = run(folders["sd3"], tmp_path / "run", "objective.loss=nft", "steps=1", "advantage.eps=1e-2")
    score = trainer.rewards.rewards[0].score
    trainer.rewards.rewards[0].score = lambda samples: Scores(
        noise * (found := score(samples)).values, found.valid, found.names
    )
    assert trainer.train().status == "complete"


def test_resume_is_bit_for_bit_with_the_old_policy(folders, tmp_path):
    whole = run(folders["sd3"], tmp_path / "whole")
    whole.train()
    part = run(folders["sd3"], tmp_path / "part", "steps=4")
    stepped, commit = part.open_run, None

    def stop_after_two():
        opened = stepped()
        nonlocal commit
        commit = opened.commit

        def committed(step, *rest):
            opened.sitting.stop.asked = "SIGTERM" if step == 2 else ""
            commit(step, *rest)

        opened.commit = committed
        return opened

    part.open_run = stop_after_two
    assert part.train().status == "stopped"
    assert run(folders["sd3"], tmp_path / "part").train().status == "complete"
    a, b = (checkpoint.load_latest(tmp_path / name / "checkpoints").tensors for name in ("whole", "part"))
    for group in ("model", "old_policy", "optimizer"):
        assert a[group].keys() == b[group].keys()
        assert all(torch.equal(a[group][name], b[group][name]) for name in a[group])
    assert any(not torch.equal(a["old_policy"][n], a["model"][n]) for n in a["model"])


def test_a_group_of_equals_is_no_stumbling_block_to_dgpo(folders, tmp_path):
    """With a KL term every sample is trained on, also those of a group that all scored alike."""
    trainer = run(
        folders["sd3"], tmp_path / "run", "objective.loss=dgpo", "objective.old_policy=step",
        "objective.kl_weight=0.01", "steps=2", reward=Redness(threshold=-1.0),
    )  # fmt: skip
    assert trainer.train().status == "complete"
    assert [row["zero_std_groups"] for row in metrics(tmp_path / "run")] == [4, 4]


def test_tiles_do_not_change_the_update(folders, tmp_path):
    for size in (3, 96):
        run(folders["sd3"], tmp_path / f"tile{size}", f"batch.tile={size}", "steps=1", "objective.loss=dgpo",
            "objective.old_policy=step", "optimizer.lr=1e-3").train()  # fmt: skip
    a, b = (metrics(tmp_path / f"tile{size}")[0] for size in (3, 96))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [("trained_steps.window=2",), ("objective.loss=guard",), ("objective.loss=dppo", "objective.dppo_threshold=1e-5"),
     ("trained_steps.window=2", "sampler.plain_solver=dpm2m", "sampler.steps_after_window=0.5",
      "objective.loss=guard_delta")],
)  # fmt: skip
def test_reverse_successors_learn_and_start_at_ratio_one(folders, tmp_path, overrides):
    trainer = run(
        folders["sd3"], tmp_path / "run", "sampler.solver_steps=6", "sampler.shift=3", "sampler.eta=0.5",
        "sampler.kernel=cps", "steps=3", *overrides, trainer="dance_grpo",
    )  # fmt: skip
    assert trainer.train().status == "complete"
    rows = metrics(tmp_path / "run")
    assert max(row["first_ratio_error"] for row in rows) == 0.0 and all(row["grad_norm"] > 0 for row in rows)
    window = [o for o in overrides if "window=2" in o]
    assert rows[0]["feq_per_sample"] == ({True: 6 + 2 * 2, False: 6 + 4 * 2}[bool(window)] if len(overrides) < 4 else 8)


def test_a_moving_window_costs_what_each_step_takes(folders, tmp_path):
    """Of 6 solver steps those after the window are halved: 2 + 2, 3 + 2 and 4 + 1, and 2 trained ones at 2 F."""
    run(
        folders["sd3"], tmp_path / "run", "sampler.solver_steps=6", "steps=3", "trained_steps.window=2",
        "trained_steps.move_every=1", "sampler.steps_after_window=0.5", trainer="dance_grpo",
    ).train()  # fmt: skip
    rows = metrics(tmp_path / "run")
    assert [row["feq_per_sample"] for row in rows] == [8, 9, 9] and rows[-1]["feq_total"] == 24 * 26


BAD = {
    ("dance_grpo", "trained_steps.window=6", "sampler.solver_steps=6"): "A window of 6 steps",
    ("dance_grpo", "sampler.plain_solver=dpm2m"): "about the steps beside a window",
    ("dance_grpo", "objective.loss=guard", "objective.logprob_reduction=sum"): "defined on means",
    ("dance_grpo", "objective.loss=dppo", "objective.clip_share_target=0.1"): "does not read objective.clip_share",
    ("forward", "sampler.initial_noise=group"): "the ODE makes one sample",
    ("forward", "sampler.guidance=both_branches", "sampler.guidance_scale=3"): "what the model says of a prompt itself",
    ("forward", "objective.loss=dgpo", "updates_per_step=2"): "so it takes one update",
    ("forward", "sampler.steps_after_window=0.4"): "no window",
    ("forward", "objective.draws=9"): "More draws than levels",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folders, tmp_path, case):
    trainer, *overrides = case
    with pytest.raises(ConfigError, match=BAD[case]):
        run(folders["sd3"], tmp_path / "run", *overrides, trainer=trainer)


# Given images


@pytest.fixture
def liked(tmp_path, monkeypatch):
    """Two red images of every prompt are liked, a blue one is not."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    draw, rows = np.random.default_rng(0), []
    for p, prompt in enumerate(PROMPTS):
        for i, (colour, label) in enumerate((((200, 20, 20), True), ((180, 40, 30), True), ((20, 20, 200), False))):
            pixels = (draw.integers(0, 50, (16, 16, 3)) + np.array(colour)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{p}_{i}.png")
            rows.append({"prompt": prompt, "image": f"{p}_{i}.png", "label": label})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_given_images_are_dealt_like_samples_and_learnt(folders, tmp_path, liked):
    told = ("objective.loss=supervised", f"objective.images={liked}", "objective.kl_weight=0", "steps=16")
    trainer = run(folders["sd3"], tmp_path / "run", *told, "group_size=4", "objective.levels=fine")
    trainer.prepare()
    prompts = trainer.prompts.at(1, 2, 0)
    scored = []
    rollout = trainer.rollout(prompts, 1, 8, scored.append)
    again = trainer.rollout(prompts, 1, 8, None)
    assert len(rollout) == 8 and rollout.rows == range(8) and rollout.x.shape == (8, 1, *trainer.policy.latent_shape)
    assert torch.equal(rollout.x, again.x) and rollout.prompts[:4] == (prompts.prompts[0],) * 4
    red = scored[0].images
    assert (red[:, 0] > red[:, 2]).all()  # the disliked ones are blue
    assert len({float(x.sum()) for x in rollout.x[:4, 0]}) == 2  # two images, each twice
    assert torch.allclose(rollout.x[:, 0], trainer.policy.to_latents(red), atol=1e-5)
    assert trainer.train().status == "complete"
    rows = metrics(tmp_path / "run")
    errors = [row["matching_error"] for row in rows]
    assert sum(errors[-4:]) < 0.9 * sum(errors[:4])
    assert all(row["feq_per_sample"] == 4 * 2 and row["loss"] == row["matching_error"] for row in rows)  # no rollout


def test_a_prompt_without_a_liked_image_is_refused_before_anything_is_written(folders, tmp_path, liked):
    rows = [json.loads(line) for line in liked.read_text().splitlines()]
    liked.write_text("".join(json.dumps(row | {"label": False}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="no image to learn from"):
        run(folders["sd3"], tmp_path / "run", "objective.loss=supervised", f"objective.images={liked}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="no other loss reads it"):
        run(folders["sd3"], tmp_path / "run", f"objective.images={liked}")
