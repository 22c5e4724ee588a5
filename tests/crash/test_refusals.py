"""What cannot be begun or resumed is refused by the command line in one sentence, with exit code 2."""

from __future__ import annotations

import json
import shutil

import pytest

from align import checkpoint
from align.cli import main

SETTINGS = [
    "model.path=digits/random", "steps=2", "checkpoint.every=1", "evaluation.every=0", "evaluation.final_samples=20",
    "tracking.samples_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", "digits/smoke", *SETTINGS, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A run with the checkpoints of steps 1 and 2."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def refused(capsys, *arguments):
    """The one sentence with which the command line refuses."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("align: "), said
    return said[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--launch", "torchrnu"], "Unknown launcher 'torchrnu'"),
        (["--launch", "torchrun", "--nproc", "0"], "it must be 1 or more"),
        (["--launch", "torchrun", "--nproc", "two"], "not a whole number"),
        (["--launch", "torchrun", "--deepspeed", "zero2"], "ZeRO needs DeepSpeed's launcher"),
        (["--launch", "deepspeed", "--deepspeed", "zero9"], "There are no DeepSpeed settings 'zero9'"),
        (["--deepspeed", "zero2"], "ZeRO needs a launcher"),
    ],
)
def test_a_launch_that_cannot_be(capsys, tmp_path, flags, words):
    out = tmp_path / "run"
    assert words in refused(capsys, "train", "digits/smoke", *SETTINGS, "--out", str(out), *flags)
    assert not out.exists()


SPLIT = {
    "fsdp2": ["--launch", "torchrun", "--nproc", "2", "--fsdp"],
    "zero3": ["--launch", "deepspeed", "--nproc", "2", "--deepspeed", "zero3"],
}
"""Flags of the engines that leave no process whole weights."""


@pytest.mark.parametrize("engine", SPLIT)
@pytest.mark.parametrize("recipe", ["kto/smoke", "digits/smoke"])
def test_what_goes_on_without_whole_weights_is_launched(monkeypatch, tmp_path, recipe, engine):
    """Only the launch itself is replaced."""
    from align import launch

    commands = []
    monkeypatch.setattr(launch, "run_launched", lambda command, *_: commands.append(command) or 0)
    assert main(["train", recipe, "--out", str(tmp_path / "run"), *SPLIT[engine]]) == 0
    assert commands[0][-1:] == SPLIT[engine][-1:] and ("--fsdp" in commands[0]) == (engine == "fsdp2")


@pytest.mark.parametrize("engine", SPLIT)
@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("digits/nft", [], "The trainer forward needs whole weights"),
        ("digits/diffusion_kto", [], "The trainer offline needs whole weights"),
        ("digits/smoke", ["sparsity.every=1"], "This needs whole weights"),
        ("digits/smoke", ["model.train=full", "objective.kl_weight=0.1"], "This needs whole weights"),
    ],
)
def test_what_needs_whole_weights_is_refused_before_anything_starts(capsys, tmp_path, recipe, settings, words, engine):
    out = tmp_path / "run"
    said = refused(capsys, "train", recipe, *settings, "--out", str(out), *SPLIT[engine])
    assert words in said and "zero2" in said and not out.exists()


@pytest.mark.parametrize("launch", [[], ["--launch", "torchrun"]])
def test_a_changed_config_is_refused_with_what_differs_and_nothing_is_touched(capsys, run, launch):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    changed = ["train", "digits/smoke", *SETTINGS, "optimizer.lr=0.5", "--out", str(run), *launch]
    said = refused(capsys, *changed)
    assert "optimizer.lr: 0.001 there, 0.5 now" in said and "--fork" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def _cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _replace_by_foreign(step):
    """A whole checkpoint, of something that is no training run."""
    import torch

    shutil.rmtree(step)
    checkpoint.save(step.parent, 2, {"model": {"w": torch.ones(3)}}, {"other": 1})


def _replace_by_other_model(step):
    found = checkpoint.load(step)
    tensors = {**found.tensors, "model": {f"other.{n}": t for n, t in found.tensors["model"].items()}}
    checkpoint.save(step.parent, 2, tensors, found.state)


DAMAGE = {
    "truncated": (lambda p: _cut(p / "model.safetensors"), "A checkpoint file has the wrong size"),
    "corrupt": (lambda p: _flip(p / "optimizer.safetensors"), "A checkpoint file is corrupt"),
    "half deleted": (lambda p: (p / "optimizer.safetensors").unlink(), "A checkpoint lost a file"),
    "state deleted": (lambda p: (p / "state.json").unlink(), "A checkpoint lost a file"),
    "emptied": (lambda p: [f.unlink() for f in p.iterdir()], "This is not a whole checkpoint"),
    "manifest deleted": (lambda p: (p / "manifest.json").unlink(), "This is not a whole checkpoint"),
    "manifest cut": (lambda p: _cut(p / "manifest.json"), "A checkpoint's manifest cannot be read"),
    "manifest of a list": (lambda p: (p / "manifest.json").write_text("[]"), "manifest cannot be read"),
    "manifest of nonsense": (
        lambda p: (p / "manifest.json").write_text(json.dumps({"step": 2, "files": ["model.safetensors"]})),
        "manifest cannot be read",
    ),
    "foreign file": (lambda p: (p / "pytorch_model.bin").write_bytes(b"x"), "A checkpoint has a foreign file"),
    "foreign checkpoint": (_replace_by_foreign, "A checkpoint is not one of a training run"),
    "another model": (_replace_by_other_model, "A checkpoint belongs to another model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_stays(capsys, run, damage):
    harm, words = DAMAGE[damage]
    step = run / "checkpoints" / "step_000002"
    harm(step)
    damaged = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    said = refused(capsys, "resume", str(run))
    assert words in said and ("step_000002" in said or "step 2" in said or damage == "another model")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == damaged


def test_without_the_damaged_checkpoint_the_one_before_it_works(run):
    """What every refusal above advises leaves the same folder."""
    shutil.rmtree(run / "checkpoints" / "step_000002")
    assert main(["resume", str(run)]) == 0
    assert checkpoint.load_latest(run / "checkpoints").step == 2


def test_what_is_no_run_cannot_be_resumed(capsys, tmp_path):
    assert "there is no such folder" in refused(capsys, "resume", str(tmp_path / "absent"))
    assert "it has no config.yaml" in refused(capsys, "resume", str(tmp_path))


def test_a_record_that_cannot_be_read_is_written_anew(run):
    """run.json describes the run; what the run resumes from are its checkpoints."""
    (run / "run.json").write_text("{torn")
    assert main(["resume", str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "complete"
