"""Two RLUF processes train what one does: the same completions, choices and weights, under every engine."""

from __future__ import annotations

import json

import processes
import pytest
import torch
from safetensors.torch import load_file

from align.config import load_config
from align.launch import leave_world
from tests.distributed.language_runs import ENGINES, Told
from tests.distributed.weighing import cell, require_shares

LOSSES = {"crpg": (), "gdpo": ("objective.aggregation=gdpo",), "crraft": ("objective.loss=crraft",),
          "codpo": ("objective.loss=codpo",)}  # fmt: skip


def small(model, *overrides):
    """A run of three updates of 8 prompts in two microbatches; AdamW's eps keeps rounding small."""
    return load_config(
        {
            "trainer": "rluf", "name": "toy", "model": {"path": str(model), "train": "full"}, "data": {"path": "toy"},
            "batch_size": 8, "microbatch": 4, "steps": 3, "optimizer": {"lr": 1e-3, "warmup": 0.0, "eps": 1e-6},
            "rewards": {
                "love": {"name": "tests.unit.test_rluf:letters", "transform": [{"affine": {"scale": 8}}]},
                "helpfulness": {"name": "toy/helpfulness"},
                "safety": {"name": "tests.unit.test_rluf:even", "role": "gate"},
            },
            "sampling": {"completions": 3, "max_new_tokens": 5},
            "evaluation": {"every": 2, "rows": 5, "prompts": 5, "max_new_tokens": 5}, "checkpoint": {"every": 2},
        },
        overrides,
    )  # fmt: skip


def several(model, root, names, deepspeed=None):
    def work():
        told = {}
        for name in names:
            run = Told(small(model, *LOSSES[name]), root / name, deepspeed)
            status = run.train().status
            told[name] = {**run.about(), "status": status, "weights": run.weights()}
        leave_world()
        return told

    return work


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def require_equal(one, other):
    """Two runs are one: metrics, answers to the letter, and weights to rounding, whose largest difference it returns."""
    for mine, theirs in zip(lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True):
        for key, value in mine.items():
            if "seconds" not in key and "memory" not in key and "real_token" not in key:
                assert theirs[key] == pytest.approx(value, abs=2e-5), key
    texts = [[row["completion"] for row in lines(run / "generations.jsonl")] for run in (one, other)]
    assert texts[0] == texts[1]
    last = [lines(run / "evaluation.jsonl")[-1] for run in (one, other)]
    for key in ("reward/love", "gain/love", "judge/all", "constrained"):
        assert last[1][key]["mean"] == pytest.approx(last[0][key]["mean"], abs=1e-5)
    a, b = (load_file(run / "checkpoints/step_000003/model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=2e-5, rtol=1e-4, msg=key)
    return max(float((b[key] - value).abs().max()) for key, value in a.items())


def test_two_processes_are_one(model, tmp_path):
    ended = processes.world(2, several(model, tmp_path / "two", ["crpg"]), tmp_path / "w", within=200)
    assert [e.value and e.value["crpg"]["status"] for e in ended] == ["complete"] * 2, "\n".join(
        e.output for e in ended
    )
    Told(small(model), tmp_path / "one", None).train()
    require_equal(tmp_path / "one", tmp_path / "two" / "crpg")
    Told(small(model, "optimizer.lr=1.2e-3"), tmp_path / "other", None).train()
    with pytest.raises(AssertionError):
        require_equal(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        pytest.param("zero2", list(LOSSES), marks=pytest.mark.slow, id="zero2"),
        pytest.param("zero3", ["codpo"], marks=pytest.mark.slow, id="zero3"),
        pytest.param("fsdp2", ["crpg", "codpo"], marks=pytest.mark.soak, id="fsdp2"),
    ],
)
def test_every_engine_trains_what_one_process_does(model, tmp_path, record_property, settings, names):
    ended = processes.world(2, several(model, tmp_path / "two", names, settings), tmp_path / "w", within=280)
    for e in ended:
        assert isinstance(e.value, dict), e.output[-3000:]
    for name in names:
        for e in ended:
            told = e.value[name]
            assert told["status"] == "complete" and told["weights"] == ended[0].value[name]["weights"]
            if settings == "fsdp2":
                assert told["split"] and told["copy_split"]
            else:
                assert told["engine"] == "DeepSpeedEngine" and told["stage"] == int(settings[-1])
            require_shares(told["shares"], settings)
        Told(small(model, *LOSSES[name]), tmp_path / "one" / name, None).train()
        record = json.loads((tmp_path / "two" / name / "run.json").read_text())
        assert record["engine"] == ENGINES[settings] and record["processes"] == 2
        found = require_equal(tmp_path / "one" / name, tmp_path / "two" / name)
        record_property("cell", cell(f"rluf {name}", ENGINES[settings], "full", found, [e.value[name] for e in ended]))


@pytest.mark.slow
def test_a_zero2_run_resumes_bit_for_bit(model, tmp_path):
    def train(out, stop_after=None):
        def work():
            told = Told(small(model, "steps=4"), out, "zero2")
            finish = told.run.objective.finish

            def counted(world):
                if stop_after is not None and told.run.objective.step + 1 == stop_after:
                    import os
                    import signal

                    os.kill(os.getpid(), signal.SIGTERM)
                return finish(world)

            told.run.objective.finish = counted
            status = told.train().status
            leave_world()
            return status

        return work

    assert [e.value for e in processes.world(2, train(tmp_path / "whole"), tmp_path / "a", within=200)] == [
        "complete"
    ] * 2
    assert [e.value for e in processes.world(2, train(tmp_path / "run", 3), tmp_path / "b", within=200)] == [
        "stopped"
    ] * 2
    assert [e.value for e in processes.world(2, train(tmp_path / "run"), tmp_path / "c", within=200)] == [
        "complete"
    ] * 2
    whole, parts = (load_file(tmp_path / d / "checkpoints/step_000004/model.safetensors") for d in ("whole", "run"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
