"""SIGTERM leaves a checkpoint and exit code 130; a process that dies ends the others in words; both can be resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import processes
import pytest

from align import checkpoint
from align.cli import main
from align.run import Run

BIN = processes.Path(sys.executable).parent
STEPS = 30
SETTINGS = [
    "model.path=digits/random", f"steps={STEPS}", "checkpoint.every=1", "evaluation.every=0",
    "evaluation.final_samples=20", "tracking.samples_every=0",
]  # fmt: skip
WITHIN = 60  # seconds in which survivors and launchers must be gone


def arguments(out):
    return ["train", "digits/smoke", *SETTINGS, "--out", str(out)]


def require_stopped(out):
    """The run stands at a whole checkpoint of the last step it logged."""
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "stopped"
    step = checkpoint.load_latest(out / "checkpoints").step
    assert 0 < step < STEPS and processes.metrics(out)[-1]["step"] == step
    return step


def require_resumable(out, folder):
    """It goes on, in one process, and ends."""
    ended = processes.align(folder, "resume", str(out))
    assert ended.value == 0, ended.output
    assert [row["step"] for row in processes.metrics(out)] == list(range(1, STEPS + 1))


def at_step(step, act):
    """Have `act(run)` happen when this step has been trained, before it is committed."""
    commit = Run.commit

    def committed(self, at, *rest):
        if at == step:
            act(self)
        commit(self, at, *rest)

    Run.commit = committed


@pytest.mark.slow
def test_sigterm_stops_one_process_at_a_checkpoint(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    with processes.launched([str(BIN / "align"), *arguments(out)], log) as process:
        processes.wait_for_step(out, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN) == 130, log.read_text()
    step = require_stopped(out)
    assert f"stopped; `align resume {out}` goes on" in log.read_text() and step >= 2
    require_resumable(out, tmp_path / "resume")


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, rank):
    out = tmp_path / "run"

    def work():
        at_step(3, lambda run: run.world.rank == rank and os.kill(os.getpid(), signal.SIGTERM))
        return main(arguments(out))

    ranks = processes.world(2, work, tmp_path / "world")
    assert [one.value for one in ranks] == [130, 130], ranks
    assert require_stopped(out) == 3
    assert (out / "report.html").is_file()


def test_a_stop_that_comes_between_two_steps_is_not_lost(tmp_path):
    """The signal arrives after the step was committed without a checkpoint: the next step is the last."""
    out, settings = tmp_path / "run", ["checkpoint.every=50"]

    def work():
        commit = Run.commit

        def committed(self, at, *rest):
            commit(self, at, *rest)
            if at == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        Run.commit = committed
        return main([*arguments(out), *settings])

    assert processes.world(1, work, tmp_path / "world")[0].value == 130
    assert require_stopped(out) == 4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_sigterm_to_a_launch_stops_all_its_processes_at_a_checkpoint(tmp_path, launcher):
    out, log = tmp_path / "run", tmp_path / "log"
    command = [str(BIN / "align"), *arguments(out), "--launch", launcher, "--nproc", "2"]
    with processes.launched(command, log) as process:
        processes.wait_for_step(out, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN) == 130, log.read_text()
        assert not processes.descendants(process.pid)
    require_stopped(out)
    assert "goes on" in log.read_text() and "Traceback" not in log.read_text()
    require_resumable(out, tmp_path / "resume")


@pytest.mark.slow
def test_sigterm_to_bare_torchrun_stops_its_processes_at_a_checkpoint(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(processes.free_port())]
    with processes.launched([*command, "scripts/train.py", *arguments(out)[1:]], log) as process:
        processes.wait_for_step(out, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WITHIN) != 0
    require_stopped(out)


@pytest.mark.parametrize(
    ("victim", "settings"),
    [(0, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, None), (0, "zero2"), (1, "zero2")])],
)
def test_a_dead_process_ends_the_other_in_words(tmp_path, victim, settings):
    out, deepspeed = tmp_path / "run", [] if settings is None else ["--deepspeed", settings]

    def work():
        at_step(3, lambda run: run.world.rank == victim and os.kill(os.getpid(), signal.SIGKILL))
        return main([*arguments(out), *deepspeed])

    began = time.monotonic()
    ranks = processes.world(2, work, tmp_path / "world", within=90)
    assert ranks[victim].code == -signal.SIGKILL
    survivor = ranks[1 - victim]
    assert survivor.value == 2 and "Traceback" not in survivor.output, survivor.output
    assert "align: Another process of the run is gone" in survivor.output and "align resume" in survivor.output
    assert checkpoint.load_latest(out / "checkpoints").step == 2
    require_resumable(out, tmp_path / "resume")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_while_deepspeed_gathers_a_save_ends_the_other_in_words(tmp_path, victim):
    out = tmp_path / "run"

    def work():
        from align.engine import DeepSpeedEngine

        gather = DeepSpeedEngine.optimizer_state

        def dying(self):
            if self.world.rank == victim and (out / "checkpoints" / "step_000002").is_dir():
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(self)

        DeepSpeedEngine.optimizer_state = dying
        return main([*arguments(out), "--deepspeed", "zero2"])

    ranks = processes.world(2, work, tmp_path / "world", within=90)
    survivor = ranks[1 - victim]
    assert ranks[victim].code == -signal.SIGKILL
    assert survivor.value == 2 and "Traceback" not in survivor.output, survivor.output
    assert "align: Another process of the run is gone" in survivor.output
    assert checkpoint.load_latest(out / "checkpoints").step == 2
    assert json.loads((out / "run.json").read_text())["status"] == ("failed" if victim else "running")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launch_with_a_dead_process_ends_and_says_what_to_do(tmp_path, launcher):
    out, log = tmp_path / "run", tmp_path / "log"
    command = [str(BIN / "align"), *arguments(out), "--launch", launcher, "--nproc", "2"]
    with processes.launched(command, log) as process:
        processes.wait_for_step(out, 2)
        os.kill(processes.rank_pid(process.pid, 1), signal.SIGKILL)
        assert process.wait(timeout=WITHIN) == 2, log.read_text()
        assert not processes.descendants(process.pid)
    last = log.read_text().splitlines()[-1]
    step = checkpoint.load_latest(out / "checkpoints").step
    assert re.match(rf"align: A process of the run ended early \({launcher}, exit code -?\d+\): ", last), last
    assert f"The checkpoint of step {step} is whole; the same command resumes from it" in last
    require_resumable(out, tmp_path / "resume")
