"""Two processes train what one does: the same microbatches, z0, delta and weights, to rounding."""

from __future__ import annotations

import json
import os

import processes
import pytest
import torch
from safetensors.torch import load_file

from align.config import load_config
from align.launch import leave_world
from trainers import trainer_for
from trainers.tiny_language import build_tiny, toy_thumbs


def work(model, out, trainer, steps=3):
    def train():
        rows = toy_thumbs(40).split(0.2)
        config = load_config({
            "trainer": trainer, "name": "toy", "model": {"path": str(model), "train": "full"}, "data": {"path": "toy"},
            "batch_size": 16, "microbatch": 8, "steps": steps, "optimizer": {"lr": 1e-3},
            "evaluation": {"every": 0, "rows": 7, "prompts": 3, "max_new_tokens": 6}, "checkpoint": {"every": 2},
        })  # fmt: skip
        status = trainer_for(config, out=out, rows=rows).train().status
        leave_world()
        return status

    return train


def row(out, i=-1):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[i])


def same_answers(one, other):
    """The answers of two runs: in the same order, to the letter where nothing was trained, their log-ratios alike."""
    one, other = (
        [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()] for out in (one, other)
    )
    assert [(row["step"], row["index"]) for row in one] == [(s, i) for s in (0, 3) for i in range(3)]
    assert [(row["step"], row["index"]) for row in other] == [(row["step"], row["index"]) for row in one]
    assert [row["completion"] for row in other] == [row["completion"] for row in one]
    assert [row["log_ratio"] for row in other] == pytest.approx([row["log_ratio"] for row in one], abs=1e-4)
    assert all(row["log_ratio"] != 0 for row in one[3:])


@pytest.mark.parametrize("trainer", ["kto", "bco"])
def test_two_processes_are_one(tmp_path, trainer):
    model = build_tiny(tmp_path / "model")
    for size in (1, 2):
        ended = processes.world(size, work(model, tmp_path / str(size), trainer), tmp_path / f"w{size}", within=100)
        assert [e.value for e in ended] == ["complete"] * size, "\n".join(e.output for e in ended)
    weights = [load_file(tmp_path / n / "checkpoints" / "step_000003" / "model.safetensors") for n in ("1", "2")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
    same_answers(tmp_path / "1", tmp_path / "2")
    one, two = row(tmp_path / "1"), row(tmp_path / "2")
    for key in (
        "loss",
        "rewards/up",
        "rewards/down",
        "log_ratio/down",
        "grad_norm",
        "z0" if trainer == "kto" else "delta/mean_up",
    ):
        assert one[key] == pytest.approx(two[key], abs=1e-5), key
    record = json.loads((tmp_path / "2" / "run.json").read_text())
    assert record["engine"] == "data_parallel" and record["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["zero1", "zero2", "zero3"])
def test_zero_is_one_process(tmp_path, settings):
    pytest.importorskip("deepspeed")
    model = build_tiny(tmp_path / "model")
    processes.world(1, work(model, tmp_path / "1", "kto"), tmp_path / "w1")

    def train():
        os.environ["DS_ACCELERATOR"] = "cpu"
        rows = toy_thumbs(40).split(0.2)
        config = load_config(tmp_path / "1" / "config.yaml")
        status = trainer_for(config, out=tmp_path / settings, rows=rows, deepspeed=settings).train().status
        leave_world()
        return status

    ended = processes.world(2, train, tmp_path / "w2", within=200)
    assert [e.value for e in ended] == ["complete"] * 2, "\n".join(e.output for e in ended)
    one = load_file(tmp_path / "1" / "checkpoints" / "step_000003" / "model.safetensors")
    zero = load_file(tmp_path / settings / "checkpoints" / "step_000003" / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(zero[name], value, atol=1e-5, rtol=1e-4, msg=name)
    same_answers(tmp_path / "1", tmp_path / settings)
    assert json.loads((tmp_path / settings / "run.json").read_text())["engine"] == f"deepspeed_{settings}"
