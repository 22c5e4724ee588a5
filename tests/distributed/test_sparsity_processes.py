"""Masks, measures and receipts in two processes: the same as in one, or refused with the reason."""

from __future__ import annotations

import json

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from align.config import load_config
from align.errors import ConfigError
from align.sparsity.masks import write_mask
from trainers import DanceGRPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a mask of a fifth of it, and prompts."""
    root = tmp_path_factory.mktemp("made")
    folder = tiny.sd3(root / "sd3")
    base = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    draw = torch.Generator().manual_seed(5)
    tuned = {n: w + 0.01 * (torch.rand(w.shape, generator=draw) < 0.2) for n, w in base.items()}
    save_file(tuned, root / "tuned.safetensors")
    write_mask(folder / "transformer", root / "tuned.safetensors", root / "some.mask")
    (root / "prompts.txt").write_text("a red cat\na blue dog\ntwo dogs\na cat\n")
    return root, base, tuned


def train(root, out, *overrides, deepspeed=None):
    config = {
        "name": "toy", "model": {"path": str(root / "sd3"), "train": "full"},
        "prompts": {"path": str(root / "prompts.txt"), "heldout_fraction": 0.4}, "rewards": [{"name": "jpeg"}],
        "steps": 2, "prompts_per_step": 2, "group_size": 3, "sampler": {"solver_steps": 3},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1}, "sparsity": {"every": 1, "dtype": "bf16"},
        "evaluation": {"every": 0, "samples": 2, "final_samples": 2, "solver_steps": 2},
        "checkpoint": {"every": 0}, "tracking": {"samples_every": 0},
    }  # fmt: skip
    return DanceGRPO(load_config(config, overrides), out=out, deepspeed=deepspeed).train().summary


def last(out):
    return load_file(out / "checkpoints" / "step_000002" / "model.safetensors")


def test_a_mask_in_two_processes_is_that_of_one(made, tmp_path):
    root, base, tuned = made
    told = (f"sparsity.mask={root / 'some.mask'}",)
    train(root, tmp_path / "one", *told)
    ranks = processes.world(2, lambda: train(root, tmp_path / "two", *told), tmp_path / "world", within=400)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert ranks[0].value["sparsity"]["status"] == "measured" and ranks[1].value == {}
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], atol=1e-5, rtol=1e-5)
        kept = base[name] == tuned[name]
        assert torch.equal(weight[kept], base[name][kept]), name
    rows = [processes.metrics(tmp_path / place) for place in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert b["sparsity/cumulative"] == pytest.approx(a["sparsity/cumulative"], abs=2e-3) and a.keys() == b.keys()


def test_under_zero_the_receipt_is_that_of_the_saved_weights_and_masks_are_refused(made, tmp_path):
    root, base, _ = made
    ranks = processes.world(
        2, lambda: train(root, tmp_path / "run", deepspeed="zero2"), tmp_path / "world", within=400
    )  # fmt: skip
    assert [rank.code for rank in ranks] == [0, 0], ranks
    receipt = json.loads((tmp_path / "run" / "sparsity.json").read_text())
    after = last(tmp_path / "run")
    same = sum(int((base[n] == w).sum()) for n, w in after.items()) / sum(w.numel() for w in after.values())
    assert receipt["views"][0]["bit_identical"] == same < 0.5
    assert processes.metrics(tmp_path / "run")[-1]["sparsity/cumulative"] == receipt["views"][1]["bit_identical"]
    mask = f"sparsity.mask={root / 'some.mask'}"
    refused = processes.world(
        2, lambda: train(root, tmp_path / "masked", mask, deepspeed="zero2"), tmp_path / "world", within=400
    )  # fmt: skip
    assert all(isinstance(rank.value, ConfigError) and "flat pieces" in str(rank.value) for rank in refused)
