"""A stop in the middle of a step: it is abandoned at once, by all processes, and done again to the same bits.

The stop comes where the test says, with no grace time, and what is at hand then hangs: only an interruption ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

import processes
import pytest
import torch
from safetensors.torch import load_file

import tiny
from align import checkpoint, stops
from align.cli import main
from align.config import load_config
from align.launch import leave_world
from align.sitting import Sitting
from rewards import embeddings, fit
from tests.distributed.test_fit_processes import config as fit_config
from tests.distributed.test_fit_processes import said_of_everything
from tests.people import thumbs, world
from tests.unit import test_forward, test_offline, test_rluf
from tests.unit.test_fit import store
from trainers import DanceGRPO, trainer_for
from trainers.tiny_language import build_tiny, toy_thumbs

NO_GRACE = "checkpoint.grace_seconds=0"
VISUAL = [
    "model.path=digits/random", "prompts_per_step=3", "group_size=4", "steps=3", "checkpoint.every=2",
    "evaluation.every=2", "evaluation.samples=12", "evaluation.final_samples=12", "tracking.samples_every=0", NO_GRACE,
]  # fmt: skip


class Hang:
    """Has a stop come, and what may be cut hang, when this process begins to do `doing` for the first time.

    Where processes meet within passes through the model (`meets`), nothing hangs: the stop waits for the next meeting.
    """

    def __init__(self, doing, *, rank=None, seconds=20.0, stop=signal.SIGTERM, meets=False):
        self.doing, self.rank, self.seconds, self.stop, self.hung, self.now = doing, rank, seconds, stop, False, ""
        self.kind, self.seconds = ("meetings", 0.0) if meets else ("cut", seconds)

    def __enter__(self):
        self.at, self.region = Sitting.at, stops.region

        def at(sitting, doing):
            self.at(sitting, doing)
            mine = self.rank is None or sitting.world.rank == self.rank
            self.now = sitting.doing if mine else ""

        @contextlib.contextmanager
        def region(kind):
            with self.region(kind):
                if kind == self.kind and self.now == self.doing and not self.hung:
                    self.hung = True
                    if self.stop:
                        os.kill(os.getpid(), self.stop)
                    time.sleep(self.seconds)
                yield

        Sitting.at, stops.region = at, region
        return self

    def __exit__(self, *error):
        Sitting.at, stops.region = self.at, self.region


def status(out):
    return json.loads((out / "run.json").read_text())["status"]


def rows(out, name="metrics.jsonl"):
    timed = ("seconds", "time/", "memory", "saved", "feq_s")
    found = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in found]


def last(out):
    """Every tensor of the last checkpoint."""
    step, folder = max(checkpoint.checkpoints(out / "checkpoints").items())
    return {f"{step} {f.name} {name}": t for f in folder.glob("*.safetensors") for name, t in load_file(f).items()}


def require_equal(whole, parts):
    a, b = last(whole), last(parts)
    assert a and a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert rows(whole) == rows(parts)


def require_abandoned(go, root, moments):
    """Stop one run at each of the moments, go on, and end as a run that was left alone.

    Args:
        go: train in a folder, and return how that ended.
        moments: what the run does when the stop comes, and the last step that is kept then.
    """
    assert go(root / "whole") == "complete"
    for doing, kept in moments:
        began = time.monotonic()
        with Hang(doing) as hang:
            assert go(root / "parts") == "stopped", doing
        assert hang.hung and time.monotonic() - began < 20, doing
        assert status(root / "parts") == "stopped"
        assert max(checkpoint.checkpoints(root / "parts" / "checkpoints"), default=0) == kept, doing
    assert go(root / "parts") == "complete"
    require_equal(root / "whole", root / "parts")


@pytest.mark.slow
def test_a_visual_run_is_stopped_at_every_phase(tmp_path):
    """What memory still holds is saved; an update that is abandoned half-way goes back to the disk."""
    require_abandoned(
        lambda out: DanceGRPO(load_config("digits/smoke", VISUAL), out=out).train().status, tmp_path,
        [
            ("evaluation", 0), ("step 1, training", 0), ("step 2, rollout", 1), ("step 2, waiting for scores", 1),
            ("step 2, evaluation", 1), ("step 3, training", 2), ("step 3, evaluation", 3),
        ],
    )  # fmt: skip


def test_a_reward_is_interrupted_by_a_stop(tmp_path):
    """Within the reward itself, as a hung one would be."""
    config = load_config("digits/smoke", [*VISUAL, "steps=2"])
    trainer = DanceGRPO(config, out=tmp_path / "run")
    score, calls = trainer.rewards.rewards[0].score, []

    def hanging(samples):
        calls.append(len(samples))
        if trainer_step(tmp_path / "run") == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(20)
        return score(samples)

    trainer.rewards.rewards[0].score = hanging
    assert trainer.train().status == "stopped" and calls
    assert list(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == [1]


def trainer_step(out):
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").is_file() else 0


@pytest.mark.soak
def test_a_forward_run_is_stopped_at_every_phase(tmp_path):
    model = tiny.sd3(tmp_path / "sd3")
    settings = ["steps=3", "evaluation.every=2", "checkpoint.every=2", NO_GRACE]
    require_abandoned(
        lambda out: test_forward.run(model, out, *settings).train().status, tmp_path,
        [("step 2, rollout", 1), ("step 3, training", 2)],
    )  # fmt: skip


@pytest.mark.soak
def test_an_offline_run_is_stopped_at_every_phase(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    data = test_offline.data.__wrapped__(_Factory(tmp_path))
    model = tiny.stable_diffusion(tmp_path / "sd")
    require_abandoned(
        lambda out: test_offline.trainer(model, data, out, "steps=3", "checkpoint.every=5", NO_GRACE).train().status,
        tmp_path, [("step 2, training", 1), ("step 3, training", 2)],
    )  # fmt: skip


class _Factory:
    def __init__(self, place):
        self.place = place

    def mktemp(self, name):
        (self.place / name).mkdir()
        return self.place / name


def test_a_fit_is_stopped_at_every_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")
    items, quality = world()
    config = load_config(
        {"trainer": "fit", "steps": 6, "data": {"paths": [store(tmp_path, thumbs(items, quality))]}},
        [NO_GRACE, "checkpoint.every=4"],
    )
    require_abandoned(
        lambda out: fit.fit_reward(config, out).status, tmp_path,
        [("step 1, training", 0), ("step 3, training", 2), ("step 6, training", 5), ("step 6, calibrating", 6)],
    )  # fmt: skip
    card = "reward/reward.json"
    assert json.loads((tmp_path / "whole" / card).read_text()) == json.loads((tmp_path / "parts" / card).read_text())


def language_run(root, out, trainer):
    """A run that can hang in every microbatch, once its losses are known."""
    if trainer == "rluf":
        run = test_rluf.run(root / "tiny", out, "checkpoint.every=9", NO_GRACE)
    else:
        run = trainer_for(language_config(root, trainer), out=out, rows=toy_thumbs(60).split(0.2))
    losses = run.objective.losses

    def found(*arguments, **options):
        result = losses(*arguments, **options)
        with stops.region("cut"):  # so that the test can hang here
            return result

    run.objective.losses = found
    return run


def language_config(root, trainer):
    return load_config(
        {
            "trainer": trainer, "name": "toy", "model": {"path": str(root / "tiny"), "train": "full"},
            "data": {"path": "toy", "heldout_fraction": 0.2, "max_length": 64}, "batch_size": 16, "microbatch": 8,
            "steps": 4, "optimizer": {"lr": 1e-3}, "evaluation": {"every": 2, "rows": 20, "prompts": 0},
            "checkpoint": {"every": 9},
        },
        [NO_GRACE, f"reference.cache={root / 'cache'}"] if trainer not in ("sft",) else [NO_GRACE],
    )  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("trainer", ["kto", "bco", "dpo", "sft", "rluf"])
def test_a_language_run_is_stopped_at_every_phase(tmp_path, trainer):
    build_tiny(tmp_path / "tiny")
    require_abandoned(
        lambda out: language_run(tmp_path, out, trainer).train().status, tmp_path,
        [("step 1, training", 0), ("step 2, training", 1), ("step 2, evaluation", 2), ("step 4, training", 3)],
    )  # fmt: skip
    assert rows(tmp_path / "whole", "evaluation.jsonl") == rows(tmp_path / "parts", "evaluation.jsonl")


# --- several processes ------------------------------------------------------------------------------


def arguments(out, *settings):
    return ["train", "digits/smoke", *VISUAL, *settings, "--out", str(out)]


@pytest.mark.slow
def test_one_of_two_processes_stops_both_in_the_middle_of_a_step(tmp_path):
    """Its step hangs; the other one waits for it, and abandons its own."""

    def work(hang):
        with hang:
            return main(arguments(tmp_path / "parts"))

    moments = [("step 2, rollout", 0, 1), ("step 3, training", 1, 2)]
    for doing, rank, kept in moments:
        ended = processes.world(2, lambda d=doing, r=rank: work(Hang(d, rank=r)), tmp_path / "world", within=60)
        assert [one.value for one in ended] == [130, 130], ended
        assert status(tmp_path / "parts") == "stopped" and "Traceback" not in ended[0].output + ended[1].output
        assert max(checkpoint.checkpoints(tmp_path / "parts" / "checkpoints")) == kept
    for out in ("parts", "whole"):
        ended = processes.world(2, lambda o=out: main(arguments(tmp_path / o)), tmp_path / "world")
        assert [one.value for one in ended] == [0, 0], ended
    require_equal(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", [["--fsdp"], ["--deepspeed", "zero3"]], ids=["fsdp2", "zero3"])
def test_a_stop_ends_a_step_at_once_where_weights_are_split(tmp_path, engine):
    """A rollout is interrupted, as weights are whole then; an update is abandoned by both where they next meet."""

    def work(*moment, **how):
        with Hang(*moment, **how) as hang:
            return main([*arguments(tmp_path / "parts", "model.train=full"), *engine]), hang.hung

    for doing, rank, meets, kept in [
        ("step 2, rollout", 0, False, 1), ("step 2, evaluation", 1, False, 1), ("step 3, training", 1, True, 2),
    ]:  # fmt: skip
        began = time.monotonic()
        ended = processes.world(
            2, lambda d=doing, r=rank, m=meets: work(d, rank=r, meets=m), tmp_path / "world", within=90
        )
        assert [one.value for one in ended] == [(130, rank == 0), (130, rank == 1)], ended
        assert time.monotonic() - began < 60 and status(tmp_path / "parts") == "stopped"
        assert len(processes.metrics(tmp_path / "parts")) == kept
        assert max(checkpoint.checkpoints(tmp_path / "parts" / "checkpoints")) == kept
    for out in ("parts", "whole"):
        flags = [*arguments(tmp_path / out, "model.train=full"), *engine]
        ended = processes.world(2, lambda given=flags: main(given), tmp_path / "world")
        assert [one.value for one in ended] == [0, 0], ended
    require_equal(tmp_path / "whole", tmp_path / "parts")


def require_abandoned_by_both(go, root, moments):
    """Stop one of two processes at each of the moments, go on, and end as two that were left alone.

    Args:
        go: train in a folder, and return how that ended.
        moments: what that process does when the stop comes, which one it is, and the last step that is kept then.
    """

    def ended(work):
        found = processes.world(2, work, root / "world", within=120)
        assert not any("Traceback" in one.output for one in found), found
        return [one.value for one in found]

    def stopped(doing, rank):
        with Hang(doing, rank=rank, seconds=1.0) as hang:
            return go(root / "parts"), hang.hung

    assert ended(lambda: go(root / "whole")) == ["complete"] * 2
    for doing, rank, kept in moments:
        found = ended(lambda d=doing, r=rank: stopped(d, r))
        assert found == [("stopped", rank == 0), ("stopped", rank == 1)], (doing, found)
        assert max(checkpoint.checkpoints(root / "parts" / "checkpoints"), default=0) == kept, doing
    assert ended(lambda: go(root / "parts")) == ["complete"] * 2
    require_equal(root / "whole", root / "parts")


@pytest.mark.soak
@pytest.mark.parametrize("trainer", ["kto", "rluf"])
def test_two_processes_of_a_language_run_abandon_a_step_together(tmp_path, trainer):
    """One is asked while its losses are worked out; both leave where they meet next."""
    build_tiny(tmp_path / "tiny")

    def go(out):
        status = language_run(tmp_path, out, trainer).train().status
        leave_world()
        return status

    require_abandoned_by_both(
        go, tmp_path, [("step 1, training", 0, 0), ("step 2, training", 1, 1), ("step 4, training", 0, 3)]
    )


@pytest.mark.soak
def test_two_processes_of_a_fit_abandon_a_step_together(tmp_path):
    said_of_everything(tmp_path)
    config = fit_config(tmp_path, "lora", NO_GRACE, "checkpoint.every=9")

    def go(out):
        status = fit.fit_reward(config, out).status
        leave_world()
        return status

    require_abandoned_by_both(
        go, tmp_path, [("step 1, training", 0, 0), ("step 3, training", 1, 2), ("step 6, calibrating", 0, 6)]
    )


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_not_waited_for(tmp_path):
    def work():
        with Hang("step 2, rollout", rank=1, seconds=12.0, stop=None):
            return main(arguments(tmp_path / "run", "checkpoint.every=1", "checkpoint.hung_after_seconds=3"))

    began = time.monotonic()
    first, second = processes.world(2, work, tmp_path / "world", within=60)
    assert first.value == 2 and "Traceback" not in first.output, first.output
    assert "A process of the run does not come (process 1, last seen in step 2, rollout)" in first.output
    assert "the others have waited 3 s for it" in first.output and "align resume" in first.output
    assert second.value == 2 and "Another process of the run is gone" in second.output, second.output
    assert time.monotonic() - began < 50 and status(tmp_path / "run") == "failed"
    assert list(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == [1]


@pytest.mark.parametrize("moment", ["joining", "loading"])
def test_a_stop_at_start_up_ends_both_processes(tmp_path, moment):
    """One is interrupted while the two find each other, or while it reads its model, for which the other one waits."""

    def work():
        import torch.distributed as dist

        from trainers import online

        place, name = {"joining": (dist, "init_process_group"), "loading": (online, "load_policy")}[moment]
        done = getattr(place, name)

        def asked(*rest, **options):
            if os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGUSR1)
            return done(*rest, **options)

        setattr(place, name, asked)
        return main(arguments(tmp_path / "run"))

    ended = processes.world(2, work, tmp_path / "world", within=60)
    assert [one.value for one in ended] == [130, 130], ended
    assert all("Interrupted" in one.output and "Traceback" not in one.output for one in ended)
    assert not (tmp_path / "run" / "checkpoints").exists()
