"""A NaN at any of five sites stops every process before the update; weights and optimizer stay as they were."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import processes
import pytest
import torch

import trainers.dance_grpo as loop
from align import checkpoint
from align.checkpoint import Piece
from align.config import load_config
from align.errors import GuardError, RewardError
from align.types import Scores
from rewards.panel import Panel
from trainers import DanceGRPO

SETTINGS = [
    "model.path=digits/random", "prompts_per_step=3", "group_size=5", "updates_per_step=3", "steps=3",
    "checkpoint.every=1", "evaluation.every=0", "evaluation.final_samples=20", "tracking.samples_every=0",
]  # fmt: skip
SITES = {
    "latents": "The rollout is not finite",
    "reward": "Too many rewards failed",
    "log-probability": "The first ratio is not 1",
    "loss": "The loss is not finite",
    "gradient": "The gradient norm is not finite",
}


class Injected(DanceGRPO):
    """A trainer whose step `at` meets a NaN at one site, and which notes the state at first and after every update."""

    def __init__(self, out, site, *, rank=0, update=0, settings=None, value=float("nan"), at=2, steps=3):
        engine = {"fsdp": True} if settings == "fsdp2" else {"deepspeed": settings}
        super().__init__(load_config("digits/smoke", [*SETTINGS, f"steps={steps}"]), out=out, **engine)
        self.at = at
        self.site, self.step, self.updates, self.value = site, 0, 0, value
        self.here, self.at_update = self.world.rank == rank, update
        self.states = []

    def armed(self, site):
        due = self.updates >= self.at_update or site in ("latents", "reward")
        return self.here and self.site == site and self.step == self.at and due

    def open_run(self):
        run = self.run = super().open_run()
        predict, score, replay, update = self.policy.family.predict, self.rewards.joined, loop.replay, run.update

        def predicted(x, timestep, conditioning):
            out = predict(x, timestep, conditioning)
            if self.armed("latents") and not torch.is_grad_enabled():
                out[-1].view(-1)[0] = self.value
            if self.armed("gradient") and out.requires_grad:
                out.register_hook(lambda g: g * self.value)
            return out

        def scored(parts):
            found = score(parts)
            if self.armed("reward"):
                return Scores(np.full_like(found.values, self.value), np.ones_like(found.valid), found.names)
            return found

        def replayed(*arguments, **options):
            found = replay(*arguments, **options)
            if self.armed("log-probability"):
                logp = found.logp.clone()
                logp[-1] = self.value
                return dataclasses.replace(found, logp=logp)
            return found

        def updated(**options):
            norm = update(**options)
            self.updates += 1
            self.states.append(self.state())
            return norm

        self.policy.family.predict, self.rewards.joined, run.update = predicted, scored, updated
        loop.replay = replayed
        self.states.append(self.state())
        return run

    def terms(self, tile, rollout, run, *, first):
        found = super().terms(tile, rollout, run, first=first)
        return dataclasses.replace(found, loss=found.loss * self.value) if self.armed("loss") else found

    def train(self):
        self.prompts = _Watched(self.prompts, self)
        return super().train()

    def state(self):
        """A hash of the trained weights that this process holds, and one of the optimizer's state."""
        return [_hash(self.run.engine.pieces()), _hash(self.run.engine.optimizer_state())]


class _Watched:
    """Prompts that tell the trainer which step begins."""

    def __init__(self, prompts, trainer):
        self.prompts, self.trainer = prompts, trainer

    def at(self, step, *rest):
        self.trainer.step, self.trainer.updates = step, 0
        return self.prompts.at(step, *rest)

    def __getattr__(self, name):
        return getattr(self.prompts, name)

    def __iter__(self):
        return iter(self.prompts)

    def __len__(self):
        return len(self.prompts)


def _hash(tensors):
    values = [t.values if isinstance(t, Piece) else t for _, t in sorted(tensors.items())]
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in values)).hexdigest()


def stopped(out, site, **options):
    """Train until the injected value stops the run: the error's words, the state then and after the last update."""
    trainer, kept = Injected(out, site, **options), loop.replay
    try:
        trainer.train()
    except (GuardError, RewardError) as error:
        return {"error": str(error), "step": trainer.step, "updates": trainer.updates, "last": trainer.states[-1],
                "after": trainer.state()}  # fmt: skip
    finally:
        loop.replay = kept
    return {"error": "", "updates": trainer.updates}


def require_stopped(found, words, out, update=0):
    assert words in found["error"] and "step 2" in found["error"], found
    assert found["step"] == 2 and found["updates"] == update
    assert found["after"] == found["last"]
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert max(checkpoint.checkpoints(out / "checkpoints")) == 1


@pytest.fixture(autouse=True)
def loop_as_it_was():
    kept = loop.replay
    yield
    loop.replay = kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("site", SITES)
def test_the_run_stops_before_the_update(tmp_path, site, value):
    require_stopped(stopped(tmp_path / "run", site, value=value), SITES[site], tmp_path / "run")


@pytest.mark.parametrize(
    ("site", "value"),
    [
        ("log-probability", "nan"),
        ("log-probability", "inf"),
        ("log-probability", "-inf"),
        ("loss", "nan"),
        ("gradient", "nan"),
    ],
)
def test_a_later_update_of_a_rollout_is_stopped_too(tmp_path, site, value):
    words = SITES[site] if site != "log-probability" else "The loss is not finite"
    require_stopped(stopped(tmp_path / "run", site, update=1, value=float(value)), words, tmp_path / "run", update=1)


@pytest.mark.parametrize(
    ("site", "settings"),
    [
        *((site, None) for site in ("reward", "loss", "gradient")),
        *(pytest.param(site, None, marks=pytest.mark.soak) for site in ("latents", "log-probability")),
        *(pytest.param(site, zero, marks=pytest.mark.slow) for site in SITES for zero in ("zero1", "zero2")),
    ],
)
def test_a_nan_on_one_process_stops_both_alike(tmp_path, site, settings):
    out = tmp_path / "run"
    ranks = processes.world(2, lambda: stopped(out, site, rank=1, settings=settings), tmp_path / "world", within=90)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for rank in ranks:
        if site == "reward":  # half of the samples are left, which is too few
            assert "missing for 8 of 15 samples" in rank.value["error"]
        require_stopped(rank.value, SITES[site], out)
    assert (
        ranks[0].value["error"] == ranks[1].value["error"] and ranks[0].value["after"][0] == ranks[1].value["after"][0]
    )


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_nan_on_one_process_stops_both_where_weights_are_split(tmp_path, engine):
    """Each process writes down what it saw, and what it holds of weights and optimizer is as after the last update."""
    work = lambda: {site: stopped(tmp_path / site, site, rank=1, settings=engine) for site in SITES}  # noqa: E731
    ranks = processes.world(2, work, tmp_path / "world", within=250)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for site, words in SITES.items():
        for number, rank in enumerate(ranks):
            require_stopped(rank.value[site], words, tmp_path / site)
            seen = json.loads((tmp_path / site / f"bad_step_000002_process_{number}.json").read_text())
            assert (seen["step"], seen["process"], seen["reproduce"]["from_step"]) == (2, number, 1)
        assert ranks[0].value[site]["error"] == ranks[1].value[site]["error"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_site_at_twenty_steps_in_one_pair_of_processes(tmp_path):
    """Each sitting goes on from the checkpoint before, and is stopped one step later: 100 stops, NaN and Inf in turn."""

    def work():
        return {
            (site, step): stopped(
                tmp_path / site, site, rank=step % 2, at=step, steps=21, value=float("nan" if step % 4 < 2 else "inf")
            )
            for site in SITES
            for step in range(1, 21)
        }

    ranks = processes.world(2, work, tmp_path / "world", within=1700)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for (site, step), found in ranks[0].value.items():
        late = site not in ("latents", "reward") and found["updates"]  # this process had no rows in the first update
        words = SITES["loss" if late and site == "log-probability" else site]
        assert words in found["error"], (site, step, found)
        assert f"step {step}" in found["error"] and found["step"] == step, (site, step, found)
        assert (found["updates"] == 0 or late) and found["after"] == found["last"], (site, step, found)
        assert ranks[1].value[site, step]["after"] == found["after"]
    assert len(ranks[0].value) == 100


def test_the_stopped_run_goes_on_to_the_same_end(tmp_path):
    """The cause gone, it resumes from its last checkpoint and ends as a run that never met a NaN."""
    assert stopped(tmp_path / "run", "gradient")["error"]
    config = load_config("digits/smoke", SETTINGS)
    runs = [DanceGRPO(config, out=tmp_path / name) for name in ("run", "alone")]
    assert [run.train().status for run in runs] == ["complete"] * 2
    first, second = (run.policy.trainable() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_few_missing_rewards_drop_their_members_and_nothing_else(tmp_path):
    """One NaN of 15 is a missing score: its member leaves its group, and the run goes on."""

    class OneMissing(Panel):
        def joined(self, scored):
            found = super().joined(scored)
            values = found.values.copy()
            if len(found) == 15:  # a rollout, not an evaluation
                values[4] = np.nan
            return Scores(values, np.ones_like(found.valid), found.names)

    config = load_config("digits/smoke", SETTINGS)
    panel = OneMissing(Panel.build(config.rewards).rewards, [1.0, 1.0])
    assert DanceGRPO(config, out=tmp_path / "run", rewards=panel).train().status == "complete"
    for row in processes.metrics(tmp_path / "run"):
        assert row["invalid_members"] == 1 and row["valid_share"] == pytest.approx(14 / 15)
        assert row["dropped_groups"] == 0 and np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])


def test_the_launched_command_says_what_stopped_it(tmp_path):
    """Through the command line: one sentence, exit code 2, no traceback."""

    def poison():
        joined = Panel.joined
        Panel.joined = lambda self, scored: Scores(
            np.full_like((found := joined(self, scored)).values, np.nan if len(found) == 15 else 0.0),
            np.ones_like(found.valid), found.names,
        )  # fmt: skip

    arguments = ["train", "digits/smoke", *SETTINGS, "--out", str(tmp_path / "run")]
    ended = processes.align(tmp_path / "cli", *arguments, before=poison)
    assert ended.value == 2 and "Traceback" not in ended.output
    assert "align: Too many rewards failed (step 1): legibility is missing for 15 of 15 samples" in ended.output
