"""T15: a run is the same run in one process, in two that hold replicas, and under ZeRO 1 and 2.

15 samples in groups of 5 on two processes: 7 and 8 of them, and a group that is split between the two.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import processes
import pytest
import torch

from align import checkpoint
from align.config import load_config
from align.engine import deepspeed_settings
from align.launch import World, launch_command
from align.recipes import list_engines
from tests.distributed.train_and_tell import train
from trainers import DanceGRPO

SETTINGS = [
    "model.path=digits/random", "prompts_per_step=3", "group_size=5", "updates_per_step=3", "steps=4",
    "optimizer.ema_decay=0.9", "evaluation.every=3", "evaluation.samples=20", "evaluation.final_samples=20",
]  # fmt: skip
LONG = pytest.mark.timeout(300)
BIN = processes.Path(sys.executable).parent
ENGINES = {None: "data_parallel", "zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folder of the same configuration in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train(out, SETTINGS)["name"] == "single"
    return out


def require_equal(alone, other, tolerance=1e-5):
    """The curves, the evaluations and everything in the last checkpoint agree."""
    for row, again in zip(processes.metrics(alone), processes.metrics(other), strict=True):
        assert row.keys() == again.keys()
        for name in ("loss", "reward", "grad_norm", "approx_kl", "ratio_max", "ratio_min", "first_ratio_error"):
            assert again[name] == pytest.approx(row[name], abs=tolerance), (row["step"], name)
        for name in ("samples", "updates", "feq_total", "zero_std_groups", "lr"):
            assert again[name] == row[name], (row["step"], name)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (alone, other)]
    for name in ("reward_before", "reward_after", "heldout_after"):
        assert summaries[1][name]["mean"] == pytest.approx(summaries[0][name]["mean"], abs=tolerance), name
    one, two = (checkpoint.load_latest(out / "checkpoints") for out in (alone, other))
    assert one.step == two.step and one.tensors.keys() == two.tensors.keys()
    for group, tensors in one.tensors.items():
        if group == "rng":  # of torch's global generator, which a run keeps and never draws from
            continue
        assert tensors.keys() == two.tensors[group].keys()
        for name, value in tensors.items():
            torch.testing.assert_close(two.tensors[group][name], value, atol=tolerance, rtol=tolerance, msg=name)


def require_engine(told, settings, out):
    """The engine that really ran is the one asked for, and all ranks hold the same bits."""
    assert json.loads((out / "run.json").read_text())["engine"] == ENGINES[settings]
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert len({one["weights"] for one in told}) == 1
    for one in told:
        assert one["status"] == "complete" and one["world"] == 2 and one["name"] == ENGINES[settings]
        if settings is None:
            assert one["engine"] == "ReplicaEngine"
        else:
            assert one["inner"] and one["stage"] == int(settings[-1])
            assert one["optimizer"] == "DeepSpeedZeroOptimizer" and one["splits_gradients"] == (settings == "zero2")


def run_to_the_end(command, log, **environment):
    with processes.launched(command, log, **environment) as process:
        code = process.wait(timeout=200)
    assert code == 0, log.read_text()[-3000:]


def test_the_samples_are_uneven_and_a_group_is_split():
    first, second = (World(rank, 2).share(15) for rank in range(2))
    assert (len(first), len(second)) == (7, 8) and first[-1] // 5 == second[0] // 5


@pytest.mark.parametrize("settings", [None, "zero1", "zero2"])
def test_two_processes_train_as_one_does(alone, tmp_path, settings):
    out = tmp_path / "run"
    ranks = processes.world(2, lambda: train(out, SETTINGS, settings), tmp_path / "world")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    require_engine([rank.value for rank in ranks], settings, out)
    require_equal(alone, out)


def test_three_processes_train_as_one_does(alone, tmp_path):
    ranks = processes.world(3, lambda: train(tmp_path / "run", SETTINGS), tmp_path / "world")
    assert [rank.code for rank in ranks] == [0, 0, 0] and len({rank.value["weights"] for rank in ranks}) == 1
    require_equal(alone, tmp_path / "run")


def test_the_comparison_sees_another_learning_rate(alone, tmp_path):
    train(tmp_path / "run", [*SETTINGS, "optimizer.lr=1.1e-3"])
    with pytest.raises(AssertionError):
        require_equal(alone, tmp_path / "run")


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("settings", [None, "zero2"])
def test_a_run_goes_on_under_another_number_of_processes(alone, tmp_path, settings, sizes):
    """Interrupted in step 3, after the checkpoint of step 2."""
    out = tmp_path / "run"

    def interrupted():
        learnt = DanceGRPO.learn

        def learn(self, run, rollout, advantages, step):
            if step == 3:
                raise KeyError("interrupted")
            return learnt(self, run, rollout, advantages, step)

        DanceGRPO.learn = learn
        return train(out, SETTINGS, None if sizes[0] == 1 else settings)

    def resumed():
        return train(out, SETTINGS, None if sizes[1] == 1 else settings)

    first = processes.world(sizes[0], interrupted, tmp_path / "first")
    assert all(isinstance(rank.value, KeyError) for rank in first), first
    assert list(checkpoint.checkpoints(out / "checkpoints")) == [2]
    second = processes.world(sizes[1], resumed, tmp_path / "second")
    assert [rank.code for rank in second] == [0] * sizes[1], second
    assert len({rank.value["weights"] for rank in second}) == 1
    require_equal(alone, out)


@LONG
def test_torchrun_trains_as_one_process_does(alone, tmp_path):
    out = tmp_path / "run"
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(processes.free_port())]
    script = str(processes.ROOT / "tests/distributed/train_and_tell.py")
    run_to_the_end([*command, script, str(out), *SETTINGS], tmp_path / "log")
    require_engine([json.loads((out / f"told_{rank}.json").read_text()) for rank in range(2)], None, out)
    require_equal(alone, out)


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("settings", ["zero1", "zero2"])
def test_the_deepspeed_launcher_trains_as_one_process_does_without_a_compiler(alone, tmp_path, settings):
    """Compilers that fail come first in PATH, and no extension that was built earlier can be found.

    DeepSpeed asks cc whether libaio is there, and takes no for an answer; nothing else may be asked.
    """
    out, called, tools = tmp_path / "run", tmp_path / "called", tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "cc", "gcc", "clang", "clang++", "ninja", "nvcc"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >> {called}\nexit 1\n")
        (tools / name).chmod(0o755)
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--no_local_rank"]
    command += ["--master_port", str(processes.free_port())]
    script = str(processes.ROOT / "tests/distributed/train_and_tell.py")
    run_to_the_end(
        [*command, script, str(out), "--deepspeed", settings, *SETTINGS], tmp_path / "log",
        PATH=f"{tools}:{BIN}:/usr/bin:/bin", CXX=str(tools / "c++"), CC=str(tools / "cc"),
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )  # fmt: skip
    require_engine([json.loads((out / f"told_{rank}.json").read_text()) for rank in range(2)], settings, out)
    require_equal(alone, out)
    assert not called.exists() or set(called.read_text().split()) == {"cc"}, called.read_text()
    assert not list((tmp_path / "extensions").rglob("*.so"))


@pytest.mark.slow
@LONG
def test_align_train_launch_deepspeed_prints_the_command_it_runs(alone, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = ["train", "digits/smoke", *SETTINGS, "--out", str(out)]
    run_to_the_end([str(BIN / "align"), *arguments, "--launch", "deepspeed", "--nproc", "2"], log)
    printed = next(line for line in log.read_text().splitlines() if line.startswith("align: "))
    command, environment = launch_command("deepspeed", 2, [*arguments, "--deepspeed", "zero2"])
    port = re.compile(r"(--master_port) \d+")
    words = shlex.split(printed.removeprefix("align: "))
    expected = [*(f"{k}={v}" for k, v in environment.items()), *command]
    assert port.sub(r"\1 N", shlex.join(words)) == port.sub(r"\1 N", shlex.join(expected))
    assert json.loads((out / "run.json").read_text())["engine"] == "deepspeed_zero2"
    require_equal(alone, out)
    # What was printed is a command: given again, it finds the run complete.
    again = subprocess.run(
        ["bash", "-c", printed.removeprefix("align: ")], capture_output=True, text=True, timeout=200, check=False
    )
    assert again.returncode == 0 and "complete" in again.stdout, again.stdout + again.stderr


@pytest.mark.slow
@LONG
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (["deepspeed", "--num_accelerators", "2", "--no_local_rank"], "deepspeed_zero2"),
        (["torchrun", "--nproc_per_node", "2"], "data_parallel"),
    ],
)
def test_the_bare_launchers_take_scripts_train(alone, tmp_path, launcher, engine):
    out, settings = tmp_path / "run", ["--deepspeed", "zero2"] if engine == "deepspeed_zero2" else []
    command = [str(BIN / launcher[0]), *launcher[1:], "--master_port", str(processes.free_port()), "scripts/train.py"]
    run_to_the_end([*command, "digits/smoke", *SETTINGS, "--out", str(out), *settings], tmp_path / "log")
    assert json.loads((out / "run.json").read_text())["engine"] == engine
    require_equal(alone, out)


def test_the_deepspeed_settings_that_ship_load():
    assert list_engines() == ["zero1", "zero2", "zero3"]
    for name in list_engines():
        assert deepspeed_settings(name)["zero_optimization"]["stage"] == int(name[-1])


def test_fewer_samples_than_processes_are_refused(tmp_path):
    def start():
        DanceGRPO(load_config("digits/smoke", ["prompts_per_step=1", "group_size=2"]), out=tmp_path / "run")

    ranks = processes.world(3, start, tmp_path / "world")
    assert ["3 processes have only 2 samples" in str(rank.value) for rank in ranks] == [True] * 3
    assert not (tmp_path / "run").exists()
