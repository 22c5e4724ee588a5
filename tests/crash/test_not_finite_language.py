"""A NaN or an infinity in a loss or a gradient of a language run, under every engine: nothing of that step is kept.

The gradient goes bad behind a finite loss: the output layer hands back a gradient times the value. Under ZeRO it is
DeepSpeed that discards the step; the others are stopped by ours, before the optimizer. The weights in memory are the
same before and after under all of them.
"""

from __future__ import annotations

import json
import os

import processes
import pytest
import torch

from align import checkpoint
from align.errors import GuardError
from align.launch import leave_world
from tests.distributed.language_runs import ENGINES, Told, checkpoint_hashes, small
from trainers.tiny_language import build_tiny

SITES = {"loss": "The loss is not finite", "gradient": "The gradient norm is not finite"}
LAST = "checkpoints/step_000002"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


def poisoned(config, out, site, value, rank, settings):
    """Train until the value meets step 3: the error, and the trained weights before that step and after it."""
    told = Told(config, out, settings)
    losses, state = told.run.objective.losses, {}

    def poison(models, batch, totals, world):
        due = told.trainer.state.global_step == 2
        if due and "before" not in state:
            state["before"] = told.weights()
            state["checkpoint"] = checkpoint_hashes(out / LAST)
            if site == "gradient" and world.rank == rank:
                told.trainer.model.get_output_embeddings().register_forward_hook(bad)
        found = losses(models, batch, totals, world)
        if due and world.rank == rank and site == "loss":
            found.rows[1] = value
        return found

    def bad(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * value)

    told.run.objective.losses = poison
    try:
        told.train()
    except GuardError as error:
        return {
            "error": str(error),
            **state,
            "after": told.weights(),
            "checkpoint_after": checkpoint_hashes(out / LAST),
        }
    return {"error": "", **state}


def require_stopped(found, out, site, settings, value):
    error = found["error"]
    assert SITES[site] in error and "step 3" in error and "weights are unchanged" in error.lower(), found
    assert found["before"] == found["after"]
    assert found["checkpoint"] and found["checkpoint"] == found["checkpoint_after"] == checkpoint_hashes(out / LAST)
    assert list(checkpoint.checkpoints(out / "checkpoints")) == [1, 2]
    checkpoint.verify(out / LAST)
    assert [row["step"] for row in processes.metrics(out)] == [1, 2]
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "failed" and record["engine"] == settings


def cases(model, root, sites, settings, rank=1):
    """Meet each of the sites and values in a run of its own."""

    def work():
        config = small(model, "sft", "steps=4", "checkpoint.every=1", "microbatch=16")
        found = {
            f"{site}_{value}": poisoned(config, root / f"{site}_{value}", site, value, rank, settings)
            for site, value in sites
        }
        leave_world()
        return found

    return work


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("site", "value"), [("gradient", NAN), ("gradient", INF)])
def test_one_process_stops_before_the_optimizer(model, tmp_path, site, value):
    config = small(model, "bco", "steps=4", "checkpoint.every=1")
    require_stopped(poisoned(config, tmp_path / "run", site, value, 0, None), tmp_path / "run", site, "single", value)


def test_the_hook_itself_changes_nothing(model, tmp_path):
    """The run goes to its end when the gradient is multiplied by one."""
    config = small(model, "bco", "steps=4", "checkpoint.every=1")
    found = poisoned(config, tmp_path / "run", "gradient", 1.0, 0, None)
    assert found["error"] == "" and len(processes.metrics(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [None, "zero1", "zero2", "zero3"])
def test_a_value_on_one_process_stops_both_under_every_engine(model, tmp_path, settings):
    sites = [("loss", NAN), ("gradient", NAN), ("gradient", INF)]
    ranks = processes.world(2, cases(model, tmp_path, sites, settings), tmp_path / "world", within=200)
    for rank in ranks:
        assert isinstance(rank.value, dict), rank.output[-3000:]
        for site, value in sites:
            name = f"{site}_{value}"
            require_stopped(rank.value[name], tmp_path / name, site, ENGINES[settings], value)
            assert rank.value[name]["error"] == ranks[0].value[name]["error"]


@pytest.mark.slow
def test_a_step_that_deepspeed_took_all_the_same_is_not_kept(model, tmp_path):
    """As a version that does not discard it would: the message does not claim that the weights are unchanged."""

    def work():
        from deepspeed.runtime.engine import DeepSpeedEngine

        DeepSpeedEngine.was_step_applied = lambda self: True
        found = cases(model, tmp_path, [("gradient", INF)], "zero2")()
        return found["gradient_inf"]["error"]

    for rank in processes.world(2, work, tmp_path / "world", within=100):
        assert "DeepSpeed stepped all the same" in rank.value and "unchanged" not in rank.value, rank
    assert [row["step"] for row in processes.metrics(tmp_path / "gradient_inf")] == [1, 2]
    assert list(checkpoint.checkpoints(tmp_path / "gradient_inf" / "checkpoints")) == [1, 2]


def test_the_command_says_what_stopped_it(model, tmp_path):
    """Through the command line: one sentence, exit code 2, no traceback; the checkpoint before is whole."""
    (tmp_path / "run.yaml").write_text(
        json.dumps(small(model, "bco", "steps=4", "checkpoint.every=1").model_dump(mode="json"))
    )

    def before():
        from trainers.bco import BCOObjective

        losses, count = BCOObjective.losses, [0]

        def bad(self, models, batch, totals, world):
            found, count[0] = losses(self, models, batch, totals, world), count[0] + 1
            if count[0] > 4:
                found.rows[0] = NAN
            return found

        BCOObjective.losses = bad
        os.chdir(tmp_path)

    ended = processes.align(tmp_path / "cli", "train", str(tmp_path / "run.yaml"), before=before)
    assert ended.value == 2 and "Traceback" not in ended.output, ended.output
    assert "align: The loss is not finite (step 3): toy, row" in ended.output
    assert list(checkpoint.checkpoints(tmp_path / "runs" / "toy" / "checkpoints")) == [1, 2]
    assert torch.isfinite(torch.tensor([row["loss"] for row in processes.metrics(tmp_path / "runs" / "toy")])).all()
