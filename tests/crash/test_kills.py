"""SIGKILL at random moments, of training and of saving: what was acknowledged is there, and a run goes on bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest

from align import checkpoint
from scripts import fault_injection, kill_save


def require_killed_runs_equal(count, folder, trainer="dance_grpo"):
    found = fault_injection.kills(count, 1, folder, trainer)
    assert found["kills"] == count and found["runs"] >= 1
    assert len(set(found["steps_done_at_the_kills"])) > 1 + count // 10, "the kills all hit the same moment"
    assert not found["differing"], found


def require_no_save_lost(count, folder):
    found = kill_save.saves(count, 1, folder)
    assert found["cases"] == count and found["saves"] > 0 and found["checkpoints_verified"] > 0
    assert not found["torn"] and not found["lost"], found


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_left_alone(tmp_path):
    require_killed_runs_equal(6, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_kills_change_nothing(tmp_path):
    require_killed_runs_equal(30, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("trainer", fault_injection.RECIPES)
def test_kills_change_nothing_for_any_trainer(tmp_path, trainer):
    found = fault_injection.kills(30 if trainer in ("dance_grpo", "kto") else 5, 1, tmp_path, trainer)
    assert found["kills"] >= 5 and not found["differing"] and not found["failures"], found


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_one_of_two_processes_is_killed_and_the_other_says_so(tmp_path):
    found = fault_injection.kills(5, 1, tmp_path, ranks=2, lone=True, more=["steps=24"])
    assert found["kills"] == 5 and not found["differing"] and not found["failures"], found


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (2, "align: Another process of the run is gone (process 0): connection reset.", ""),
        (2, "align: The loss is not finite (step 3).", "process 1 said 'align: The loss"),
        (1, "torch.distributed.DistNetworkError: Broken pipe", "process 1 said 'torch"),
        (-9, "", "exit codes [-9, -9]"),
        (0, "", ""),
    ],
)
def test_how_the_other_process_ended_is_judged(tmp_path, code, said, wrong):
    """A traceback, other words and a process that waits are failures; one that was done already is none."""
    (tmp_path / "said_0").write_text("")
    (tmp_path / "said_1").write_text(f"step 1\n{said}\n")
    found = fault_injection._survivors([-9, code], 0, tmp_path)
    assert (wrong in found) if wrong else found == ""


def test_every_trainer_has_a_recipe_to_kill():
    from trainers import _TRAINERS

    assert fault_injection.RECIPES.keys() == _TRAINERS.keys()


@pytest.mark.slow
def test_a_run_killed_in_its_last_evaluation_draws_the_same_conclusion(tmp_path):
    """Nothing is left to train: the process that measures has encoded and measured nothing before."""
    from align.config import load_config
    from trainers import DanceGRPO

    config = load_config("digits/smoke", fault_injection.RECIPE)
    out = tmp_path / "run"
    DanceGRPO(config, out=out).train()
    before = fault_injection.fingerprint(out)
    (out / "summary.json").unlink()
    DanceGRPO(config, out=out).train()
    assert fault_injection.fingerprint(out) == before


def test_a_killed_save_tears_and_loses_nothing(tmp_path):
    require_no_save_lost(25, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_120_killed_saves_tear_and_lose_nothing(tmp_path):
    require_no_save_lost(120, tmp_path)


def test_a_save_that_writes_in_place_would_be_seen_to_tear(tmp_path, monkeypatch):
    """The same kills find the damage that a save without the final rename does."""

    def naive(root, step, tensors, state, keep=2):
        target = root / f"step_{step:06d}"
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(written(root / "elsewhere", step, tensors, state, keep).iterdir()):
            shutil.copy(file, target)
        for old in list(checkpoint.checkpoints(root).values())[:-keep]:
            shutil.rmtree(old)

    written = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", naive)
    monkeypatch.setattr(checkpoint, "load_latest", lambda root: None)  # which would refuse what is torn
    assert kill_save.saves(12, 1, tmp_path)["torn"]


def test_a_changed_bit_of_a_run_would_be_seen(tmp_path):
    from align.config import load_config
    from trainers import DanceGRPO

    config = load_config("digits/smoke", ["model.path=digits/random", "steps=2", "evaluation.final_samples=20"])
    DanceGRPO(config, out=tmp_path / "run").train()
    before = fault_injection.fingerprint(tmp_path / "run")
    assert fault_injection.fingerprint(tmp_path / "run") == before
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["loss"] += 1e-12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fault_injection.fingerprint(tmp_path / "run") != before
