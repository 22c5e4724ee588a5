"""Checkpoints: written whole or not at all, verified before they are read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from align import checkpoint
from align.config import OptimizerConfig
from align.engine import ReplicaEngine
from align.errors import CheckpointError
from align.launch import World


def write(root, step, value=1.0, keep=9):
    return checkpoint.save(
        root,
        step,
        {"model": {"w": torch.full((3, 2), value)}, "rng": {"torch": torch.get_rng_state()}},
        {"n": step},
        keep,
    )


def test_round_trip_and_choice_by_step_number(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step, float(step))
    got = checkpoint.load_latest(tmp_path)
    assert (
        got.step == 10 and got.state == {"n": 10} and torch.equal(got.tensors["model"]["w"], torch.full((3, 2), 10.0))
    )
    assert checkpoint.load_latest(tmp_path / "absent") is None


def test_rotation_keeps_the_newest_and_a_step_can_be_written_again(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, keep=2)
    assert list(checkpoint.checkpoints(tmp_path)) == [4, 5]
    write(tmp_path, 5, 7.0, keep=2)
    assert checkpoint.load_latest(tmp_path).tensors["model"]["w"][0, 0] == 7.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000004", "step_000005"]


def test_leftovers_of_a_kill_are_never_read_and_are_removed(tmp_path):
    write(tmp_path, 1)
    torn = tmp_path / ".writing_step_000002"
    shutil.copytree(tmp_path / "step_000001", torn)
    assert checkpoint.load_latest(tmp_path).step == 1
    write(tmp_path, 3)
    assert not torn.exists()


def test_what_a_kill_left_of_rotating_goes_with_the_next_publication(tmp_path):
    write(tmp_path / "root", 2)
    shutil.copytree(tmp_path / "root" / "step_000002", tmp_path / "root" / ".removed_step_000001")
    (tmp_path / "made").mkdir()
    checkpoint.publish(tmp_path / "root", 3, tmp_path / "made", {})
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["step_000002", "step_000003"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "manifest.json").unlink(), "not a whole checkpoint"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda p: (p / "model.safetensors").unlink(), "lost a file"),
        (lambda p: (p / "extra.bin").write_bytes(b"x"), "foreign file"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1]), "wrong size"),
        (
            lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1] + b"\x01"),
            "corrupt",
        ),
        (lambda p: (p / "manifest.json").write_text(json.dumps({"step": 7, "files": {}})), "renamed"),
    ],
)
def test_damage_is_refused_by_name_with_the_previous_one_offered(tmp_path, damage, words):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    damage(path)
    with pytest.raises(CheckpointError, match=words) as refused:
        checkpoint.load_latest(tmp_path)
    assert (
        "step_000002" in str(refused.value)
        and "goes on from" in str(refused.value)
        and "step_000001" in refused.value.do
    )


def test_optimizer_state_round_trips_bit_for_bit(tmp_path):
    def engine_over(model):
        return ReplicaEngine(dict(model.named_parameters()), OptimizerConfig(lr=0.1), World())

    def train(model, engine, steps):
        for _ in range(steps):
            engine.backward(model(torch.ones(2, 3)).square().sum())
            engine.step(engine.reduce())

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    engine = engine_over(model)
    train(model, engine, 3)
    checkpoint.save(tmp_path, 3, {"model": dict(model.named_parameters()), "optimizer": engine.optimizer_state()}, {})
    found = checkpoint.load_latest(tmp_path)
    train(model, engine, 4)

    again = torch.nn.Linear(3, 2)
    again.load_state_dict(found.tensors["model"])
    resumed = engine_over(again)
    resumed.load_optimizer_state(found.tensors["optimizer"])
    train(again, resumed, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    fresh = torch.nn.Linear(3, 2)
    fresh.load_state_dict(found.tensors["model"])
    train(fresh, engine_over(fresh), 4)
    assert not torch.equal(fresh.weight, model.weight)


def test_what_is_delivered_is_found_and_read_alone(tmp_path):
    run, weights = tmp_path / "run", {"w": torch.ones(2)}
    assert checkpoint.find_run(run) is None
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        checkpoint.find_run(run)
    first = checkpoint.save(run / "checkpoints", 1, {"model": weights, "optimizer": weights}, {})
    last = checkpoint.save(run / "checkpoints", 2, {"model": weights, "average": {"w": torch.zeros(2)}}, {})
    assert checkpoint.find_run(run) == (run, last) and checkpoint.find_run(first) is None
    (run / "config.yaml").write_text("")
    assert checkpoint.find_run(first) == (run, first)
    assert (checkpoint.delivered_group(first), checkpoint.delivered_group(last)) == ("model", "average")
    assert set(checkpoint.load(first, only="model").tensors) == {"model"}
    assert not checkpoint.load(last, only="average").tensors["average"]["w"].any()
    (first / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="wrong size"):
        checkpoint.load(first, only="model")


@pytest.mark.parametrize(("short", "refused"), [(1, True), (0, False)])
def test_room_on_the_disk_is_looked_for_before_anything_is_written(tmp_path, monkeypatch, short, refused):
    write(tmp_path, 1)
    needed = 6 * 4 + torch.get_rng_state().nbytes
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - short)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if refused:
        with pytest.raises(CheckpointError, match="no room"):
            write(tmp_path, 2)
    else:
        write(tmp_path, 2)
    assert list(checkpoint.checkpoints(tmp_path)) == ([1] if refused else [1, 2])
    assert checkpoint.load_latest(tmp_path).step == (1 if refused else 2)
    assert not list(tmp_path.glob(".*"))
