"""An offline run is the same run in one process, in two that hold replicas, and under ZeRO 2."""

from __future__ import annotations

import json

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import tiny
from align import checkpoint
from align.config import load_config
from tests.distributed.weighing import cell, require_shares, train_weighed
from trainers import Offline


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and 40 noisy images with thumbs or as pairs, of which 9 rows make an update: 4 and 5 on two processes."""
    place, draw = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    names = [f"{i}.png" for i in range(40)]
    for name in names:
        Image.fromarray(draw.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(place / name)
    prompts = ["a red cat", "a blue dog", "two dogs", "a cat"]
    thumbs = [{"prompt": prompts[i % 4], "image": names[i], "label": i % 3 == 0} for i in range(40)]
    pairs = [{"prompt": prompts[i % 4], "chosen": names[i], "rejected": names[i + 20]} for i in range(20)]
    for name, rows in (("kto", thumbs), ("dpo", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny.sd3(place / "sd3"), place


def train(made, out, loss, deepspeed=None):
    model, data = made
    config = {
        "trainer": "offline", "name": "toy", "model": {"path": str(model), "lora": {"rank": 4, "alpha": 8}},
        "data": {"path": str(data / f"{loss}.jsonl"), "heldout_fraction": 0.25}, "batch_size": 9, "steps": 3,
        "objective": {"loss": loss, "beta": 30.0}, "optimizer": {"lr": 1e-3}, "batch": {"tile": 4},
        "evaluation": {"every": 2, "samples": 4, "final_samples": 4, "solver_steps": 3},
        "checkpoint": {"every": 2}, "tracking": {"samples_every": 0},
    }  # fmt: skip
    trainer = Offline(load_config(config), out=out, deepspeed=deepspeed)
    return {"summary": trainer.train().summary} if deepspeed is None else train_weighed(trainer)


@pytest.mark.parametrize(
    ("loss", "deepspeed"),
    [
        pytest.param("kto", None, marks=pytest.mark.slow),
        pytest.param("dpo", None, marks=pytest.mark.slow),
        pytest.param("kto", "zero2", marks=pytest.mark.slow),
        pytest.param("dpo", "zero2", marks=pytest.mark.soak),
    ],
)
def test_two_processes_train_as_one_does(made, tmp_path, monkeypatch, record_property, loss, deepspeed):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    alone = train(made, tmp_path / "alone", loss)["summary"]
    ranks = processes.world(2, lambda: train(made, tmp_path / "two", loss, deepspeed), tmp_path / "world")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert ranks[0].value["summary"]["implicit_after"]["mean"] == pytest.approx(
        alone["implicit_after"]["mean"], abs=0.02
    )
    rows, others = (processes.metrics(tmp_path / name) for name in ("alone", "two"))
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "grad_norm", "matching_error", "error_gain", "margin", *(("z",) if loss == "kto" else ())):
            assert other[name] == pytest.approx(row[name], abs=1e-5, rel=1e-4), (row["step"], name)
        assert other["samples"] == row["samples"] and other["epoch"] == row["epoch"]
    one, two = (checkpoint.load_latest(tmp_path / name / "checkpoints") for name in ("alone", "two"))
    for name, value in one.tensors["model"].items():
        torch.testing.assert_close(two.tensors["model"][name], value, atol=1e-5, rtol=1e-4)
    if deepspeed is not None:
        for told in (rank.value for rank in ranks):
            assert (told["engine"], told["stage"]) == ("DeepSpeedEngine", int(deepspeed[-1]))
            require_shares(told["shares"], deepspeed)
        found = max(float((value - two.tensors["model"][n]).abs().max()) for n, value in one.tensors["model"].items())
        name = f"offline {loss}"
        record_property("cell", cell(name, "deepspeed_zero2", "lora", found, [rank.value for rank in ranks]))
