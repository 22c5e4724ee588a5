"""Every loss on a model's own or given images under ZeRO 2: one process's run, and half of the optimizer and of gradients each.

python -m pytest -n 0 -m "slow or soak" -k "zero" tests/distributed/test_matrix_trainers.py \\
  tests/distributed/test_offline_processes.py tests/distributed/test_rluf_processes.py \\
  -o junit_family=xunit1 --junitxml=trainers.xml

runs these cells, those of offline training, and those of RLUF. Of 15 samples the two processes have 7 and 8.
"""

from __future__ import annotations

import json

import numpy as np
import processes
import pytest
from PIL import Image

import tiny
from align import checkpoint
from align.config import load_config
from tests.distributed.weighing import cell, require_shares, train_weighed
from trainers import trainer_for

CASES = {
    "nft": ("objective.loss=nft", "objective.old_policy=ramp"),
    "awm": ("objective.loss=awm", "objective.old_policy=step"),
    "dgpo": ("objective.loss=dgpo", "objective.old_policy=step"),
    "supervised": ("objective.loss=supervised", "objective.kl_weight=0", "objective.levels=fine"),
    "window": ("trained_steps.window=2", "trained_steps.move_every=1"),
    "flash": ("trained_steps.window=2", "sampler.plain_solver=dpm2m", "sampler.steps_after_window=0.5"),
    "guard": ("objective.loss=guard",),
    "dppo": ("objective.loss=dppo", "objective.dppo_threshold=1e-5"),
}
CLIP = 1e-4
"""Every gradient is longer than this, so that each update is clipped; AdamW's eps is of the size of what is left."""

REVERSE = ("window", "flash", "guard", "dppo")
PROMPTS = [f"a {how} handwritten {digit}" for how in ("bold", "thin") for digit in ("two", "five", "seven")]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, prompts, and two images of each that are liked."""
    place, draw = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    tiny.sd3(place / "sd3")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    rows = [{"prompt": p, "image": f"{i}_{j}.png", "label": True} for i, p in enumerate(PROMPTS) for j in range(2)]
    for row in rows:
        Image.fromarray(draw.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(place / row["image"])
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config_of(made, name):
    reverse = name in REVERSE
    sampler = {"kernel": "cps", "eta": 0.5, "solver_steps": 6, "shift": 3}
    config = {
        "trainer": "dance_grpo" if reverse else "forward", "name": "toy",
        "model": {"path": str(made / "sd3"), "lora": {"rank": 4, "alpha": 8}}, "steps": 3,
        "prompts": {"path": str(made / "prompts.txt"), "heldout_fraction": 0.34},
        "rewards": [{"name": "digits/raw_ink"}], "prompts_per_step": 3, "group_size": 5,
        "updates_per_step": 3 if reverse else 1,
        "sampler": sampler if reverse else {"kernel": "ode", "eta": 0, "solver_steps": 5, "initial_noise": "none"},
        "optimizer": {"lr": 1e-3, "eps": 1e-6, "max_grad_norm": CLIP}, "checkpoint": {"every": 2},
        "evaluation": {"every": 0, "samples": 7, "final_samples": 7, "solver_steps": 3},
        "tracking": {"samples_every": 0},
    }  # fmt: skip
    images = (f"objective.images={made / 'rows.jsonl'}",) if name == "supervised" else ()
    return load_config(config, [*CASES[name], *images])


def train(made, out, name, deepspeed=None, *changed):
    """Train one of CASES; return what this process can tell of its engine."""
    config = load_config(config_of(made, name).model_dump(mode="json"), changed)
    trainer = trainer_for(config, out=out, deepspeed=deepspeed)
    return {"status": trainer.train().status} if deepspeed is None else train_weighed(trainer)


def difference(one, other):
    """The largest difference of a weight or of the optimizer's state; the metrics agree too."""
    for row, again in zip(processes.metrics(one), processes.metrics(other), strict=True):
        assert row.keys() == again.keys() and again["samples"] == row["samples"] and row["grad_norm"] > CLIP
        for name in ("loss", "grad_norm", *(("reward",) if "reward" in row else ())):
            assert again[name] == pytest.approx(row[name], abs=1e-5, rel=1e-4), (row["step"], name)
    first, second = (checkpoint.load_latest(out / "checkpoints").tensors for out in (one, other))
    assert first.keys() == second.keys()
    return max(
        float((value.double() - second[group][name].double()).abs().max())
        for group in first if group != "rng"
        for name, value in first[group].items()
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_processes_under_zero_2_are_one(made, tmp_path, monkeypatch, record_property, name):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    assert train(made, tmp_path / "one", name)["status"] == "complete"
    ended = processes.world(2, lambda: train(made, tmp_path / "two", name, "zero2"), tmp_path / "world", within=250)
    for e in ended:
        assert isinstance(e.value, dict), e.output[-3000:]
        told = e.value
        assert (told["status"], told["engine"], told["stage"]) == ("complete", "DeepSpeedEngine", 2)
        require_shares(told["shares"], "zero2")
    found = difference(tmp_path / "one", tmp_path / "two")
    assert found < 1e-5
    record_property("cell", cell(name, "deepspeed_zero2", "lora", found, [e.value for e in ended]))


def test_the_comparison_sees_another_learning_rate(made, tmp_path):
    train(made, tmp_path / "one", "nft")
    train(made, tmp_path / "other", "nft", None, "optimizer.lr=1.1e-3")
    assert difference(tmp_path / "one", tmp_path / "other") > 1e-5
