"""Every objective on single thumbs under every engine: one process's run, and what a process holds of it.

python -m pytest -n 0 -m "slow or soak" tests/distributed/test_matrix_language.py \\
  -o junit_family=xunit1 --junitxml=matrix.xml

runs all cells; matrix.xml has of each the engine, the largest difference of a weight, and the shares held.
"""

from __future__ import annotations

import json

import processes
import pytest
import torch
from safetensors.torch import load_file

from align.launch import leave_world
from tests.distributed.language_runs import ENGINES, Told, require_equal, small
from tests.distributed.weighing import SPLITS, cell, require_shares

TRAIN = {"full": (), "lora": ("model.train=lora", "model.lora.rank=4", "model.gradient_checkpointing=true")}
CLIPPED = ("optimizer.max_grad_norm=0.1", "optimizer.eps=1e-3")
"""Every update is clipped, and AdamW's eps is large, so that the size of a gradient matters."""

UNEVEN = ("batch_size=24",)
"""Two updates an epoch, which leave 16 of its 64 rows over; the third is of the next epoch."""

pytestmark = [pytest.mark.timeout(300)]
SLOW, SOAK = pytest.mark.slow, pytest.mark.soak


def require_cell(model, alone, out, record, trainer, engine, overrides, size=2):
    """Train in `size` processes: the engine asked for, its shares, and one process's run to 1e-5."""

    def work():
        told = Told(small(model, trainer, *overrides), out, engine)
        status = told.train().status
        found = {**told.about(), "status": status, "weights": told.weights()}
        leave_world()
        return found

    ended = processes.world(size, work, out.parent / "world", within=280)
    for e in ended:
        assert isinstance(e.value, dict), e.output[-4000:]
        about = e.value
        assert about["status"] == "complete" and about["world"] == size
        assert about["weights"] == ended[0].value["weights"]
        if engine == "fsdp2":
            assert about["split"] and about["engine"].startswith("FSDP") and about["stage"] == 0
            assert about["copy_split"] is (trainer != "sft" and not about["adapted"])
        else:
            assert about["engine"] == ("DeepSpeedEngine" if engine else "DistributedDataParallel")
            assert about["stage"] == int(engine[-1] if engine else 0)
        require_shares(about["shares"], engine, size)
    first = alone(trainer, overrides)
    require_equal(first, out)
    found = difference(first, out)
    assert found < 1e-5
    told = json.loads((out / "run.json").read_text())
    assert told["engine"] == ENGINES[engine] and told["processes"] == size
    assert told["model"] == json.loads((first / "run.json").read_text())["model"]
    train = "lora" if about["adapted"] else "full"
    record("cell", cell(trainer, ENGINES[engine], train, found, [e.value for e in ended]))


def difference(one, other) -> float:
    """The largest difference of a weight after the last update."""
    file = next((one / "checkpoints/step_000003").glob("*model.safetensors"))
    first, second = (load_file(run / "checkpoints/step_000003" / file.name) for run in (one, other))
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


@pytest.mark.parametrize(
    ("trainer", "engine", "train"),
    [
        pytest.param(trainer, engine, train, marks=SLOW if (trainer, train) == ("kto", "full") else SOAK)
        for trainer in ("kto", "bco")
        for engine in SPLITS
        for train in TRAIN
    ],
)
def test_two_processes_are_one_under_every_engine(model, alone, tmp_path, record_property, trainer, engine, train):
    require_cell(model, alone, tmp_path / "run", record_property, trainer, engine, (*TRAIN[train], *CLIPPED))


@SOAK
@pytest.mark.parametrize("engine", SPLITS)
def test_four_processes_are_one(model, alone, tmp_path, record_property, engine):
    require_cell(model, alone, tmp_path / "run", record_property, "kto", engine, CLIPPED, size=4)


@SOAK
@pytest.mark.parametrize(
    ("trainer", "engine"), [("dpo", "zero2"), ("sft", "zero2"), ("dpo", "fsdp2"), ("sft", "fsdp2")]
)
def test_pairs_and_examples_too(model, alone, tmp_path, record_property, trainer, engine):
    require_cell(model, alone, tmp_path / "run", record_property, trainer, engine, CLIPPED)


@SOAK
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_rows_that_fill_no_update_are_left_over_alike(model, alone, tmp_path, record_property, engine):
    require_cell(model, alone, tmp_path / "run", record_property, "bco", engine, (*CLIPPED, *UNEVEN))
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert epochs == [0.5, 1.0, 1.5]


@SLOW
def test_gradients_of_fsdp2_meet_once_an_update_and_its_weights_load(model, tmp_path):
    """Three updates of two microbatches: one reduction an update of each of two blocks and of what is around them."""
    from transformers import AutoModelForCausalLM

    def work():
        count, single = [0], torch.distributed.reduce_scatter_single

        def counted(*arguments, **options):
            count[0] += 1
            return single(*arguments, **options)

        torch.distributed.reduce_scatter_single = counted
        told = Told(small(model, "bco", "evaluation.every=0"), tmp_path / "run", "fsdp2")
        told.train()
        leave_world()
        return count[0]

    assert [e.value for e in processes.world(2, work, tmp_path / "world", within=100)] == [9, 9]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoints/step_000003")
    saved = load_file(tmp_path / "run/checkpoints/step_000003/model.safetensors")
    assert type(found).__name__ == "Qwen2ForCausalLM" and saved.keys() <= found.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], value) for name, value in saved.items())
