"""Two processes train what one does, under every engine: the same microbatches, z0, delta and weights, to rounding."""

from __future__ import annotations

import json
import signal

import processes
import pytest
import torch
from safetensors.torch import load_file

from align import checkpoint
from align.errors import CheckpointError
from align.launch import leave_world
from tests.distributed.language_runs import (
    ENGINES,
    Told,
    checkpoint_hashes,
    killed,
    require_equal,
    row,
    small,
)

LORA = ("model.train=lora", "model.lora.rank=4", "model.gradient_checkpointing=true")
ALL = ("data.heldout_fraction=0", "optimizer.eps=1e-3")
RUNS = {
    "kto": ("kto", ()),
    "bco": ("bco", ()),
    "lora": ("bco", LORA),
    "cached": ("kto", ("reference.mode=precomputed",)),
    "one_kto": ("kto", (*ALL, "microbatch=16", "objective.z0=zero")),
    "one_bco": ("bco", (*ALL, "microbatch=16")),
}
"""Of those in FINER an update holds all rows there are: as one microbatch in one process, and four in several."""
FINER = ("one_kto", "one_bco")


def several(model, root, names, deepspeed=None):
    """Train some of RUNS, one after the other; return what this process can tell of each."""

    def work():
        told = {}
        for name in names:
            trainer, overrides = RUNS[name]
            overrides = (*overrides, f"reference.cache={root}")
            finer = ("microbatch=4",) if name in FINER else ()
            run = Told(small(model, trainer, *overrides, *finer), root / name, deepspeed)
            status = run.train().status
            told[name] = {**run.about(), "status": status, "weights": run.weights()}
        leave_world()
        return told

    return work


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_two_processes_are_one(model, alone, tmp_path, name):
    ended = processes.world(2, several(model, tmp_path, [name]), tmp_path / "w", within=100)
    assert [e.value and e.value[name]["status"] for e in ended] == ["complete"] * 2, "\n".join(e.output for e in ended)
    require_equal(alone(*RUNS[name]), tmp_path / name)
    record = json.loads((tmp_path / name / "run.json").read_text())
    assert record["engine"] == "data_parallel" and record["processes"] == 2


def test_the_comparison_sees_another_learning_rate(model, alone, tmp_path):
    Told(small(model, "bco", "optimizer.lr=1.1e-3"), tmp_path / "run", None).train()
    with pytest.raises(AssertionError):
        require_equal(alone(*RUNS["bco"]), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [None, "zero1", "zero2", "zero3"])
def test_every_engine_trains_what_one_process_does_and_leaves_whole_weights(model, alone, tmp_path, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = [*(n for n in RUNS if n != "cached"), *(["cached"] if settings == "zero3" else [])]
    ended = processes.world(2, several(model, tmp_path, names, settings), tmp_path / "w", within=280)
    for e in ended:
        assert isinstance(e.value, dict), e.output[-3000:]
        for name, told in e.value.items():
            sharded = settings == "zero3"
            assert told["status"] == "complete" and told["world"] == 2
            assert told["engine"] == ("DeepSpeedEngine" if settings else "DistributedDataParallel")
            assert told["stage"] == int(settings[-1] if settings else 0)
            assert told["partitioned"] is sharded
            assert told["reference_partitioned"] is (sharded and name not in ("lora", "cached"))
            assert told["weights"] == ended[0].value[name]["weights"]
    for name in names:
        require_equal(alone(*RUNS[name]), tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["engine"] == ENGINES[settings] and record["processes"] == 2
        first = json.loads((alone(*RUNS[name]) / "run.json").read_text())
        assert record["model"] == first["model"]
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        whole = [AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_000003")(ids).logits
                 for run in (alone(*RUNS["kto"]), tmp_path / "kto")]  # fmt: skip
        torch.testing.assert_close(whole[1], whole[0], atol=1e-4, rtol=1e-4)
        adapted = [
            PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(model), run / "checkpoints/step_000003"
            )(ids).logits
            for run in (alone(*RUNS["lora"]), tmp_path / "lora")
        ]  # fmt: skip
        torch.testing.assert_close(adapted[1], adapted[0], atol=1e-4, rtol=1e-4)
        assert (adapted[0] - AutoModelForCausalLM.from_pretrained(model)(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        pytest.param("zero2", ("model.dtype=bf16", *LORA), marks=pytest.mark.slow),
        pytest.param("zero3", ("model.dtype=bf16",), marks=pytest.mark.slow),
        pytest.param("fsdp2", ("model.dtype=bf16",), marks=pytest.mark.slow),
        pytest.param("fsdp2", ("model.dtype=bf16", *LORA), marks=pytest.mark.soak),
        pytest.param("zero2_offload", ("model.dtype=bf16",), marks=pytest.mark.soak),
    ],
    ids=["zero2_lora", "zero3_full", "fsdp2_full", "fsdp2_lora", "zero2_offload_full"],
)
def test_a_killed_run_resumes_as_if_nothing_had_been(model, tmp_path, settings, overrides):
    """Bit for bit, also in bfloat16, where it stays finite and the loss falls; another engine or size is refused."""
    config = small(model, "bco", "steps=6", "checkpoint.every=3", *overrides)

    def train(out, size_settings=settings):
        def work():
            told = Told(config, out, size_settings)
            status = told.train().status
            leave_world()
            return status

        return work

    whole = processes.world(2, train(tmp_path / "whole"), tmp_path / "w1", within=150)
    assert [e.value for e in whole] == ["complete"] * 2, whole[0].output[-3000:]
    out = tmp_path / "run"
    dead = processes.world(2, killed(config, out, settings, 5), tmp_path / "w2", within=150)
    assert [e.code for e in dead] == [-signal.SIGKILL] * 2, dead[0].output[-3000:]
    assert list(checkpoint.checkpoints(out / "checkpoints")) == [3]
    before = checkpoint_hashes(out / "checkpoints" / "step_000003")
    one = processes.world(1, train(out, None), tmp_path / "w3", within=100)
    assert isinstance(one[0].value, CheckpointError), one[0].output[-3000:]
    assert f"its optimizer is that of {ENGINES[settings]} on 2 processes, and this is single on 1" in str(one[0].value)
    assert checkpoint_hashes(out / "checkpoints" / "step_000003") == before
    resumed = processes.world(2, train(out), tmp_path / "w4", within=150)
    assert [e.value for e in resumed] == ["complete"] * 2, resumed[0].output[-3000:]
    name = "adapter_model" if "model.train=lora" in overrides else "model"
    first, second = (load_file(p / f"checkpoints/step_000006/{name}.safetensors") for p in (tmp_path / "whole", out))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    losses = [row(out, i)["loss"] for i in range(6)]
    assert losses == [row(tmp_path / "whole", i)["loss"] for i in range(6)]
    assert all(abs(loss) < 10 for loss in losses) and sum(losses[3:]) < sum(losses[:3])


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "name", "sizes"), [(None, "bco", (2, 1)), ("fsdp2", "lora", (2, 4))])
def test_some_engines_go_on_in_another_number_of_processes(model, alone, tmp_path, settings, name, sizes):
    trainer, overrides = RUNS[name]
    config = small(model, trainer, *overrides)

    def train():
        status = Told(config, tmp_path / "run", settings).train().status
        leave_world()
        return status

    dead = processes.world(sizes[0], killed(config, tmp_path / "run", settings, 3), tmp_path / "w1", within=100)
    assert [e.code for e in dead] == [-signal.SIGKILL] * sizes[0], dead[0].output[-3000:]
    assert list(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == [2]
    ended = processes.world(sizes[1], train, tmp_path / "w2", within=100)
    assert [e.value for e in ended] == ["complete"] * sizes[1], ended[0].output[-3000:]
    require_equal(alone(*RUNS[name]), tmp_path / "run")
