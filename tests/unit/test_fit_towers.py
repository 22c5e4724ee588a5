"""Fits that train the last blocks of CLIP's towers: parity with a loop of its own, what stays frozen, resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from align.config import load_config
from align.errors import ConfigError, ModelError
from align.run import Run
from align.types import Samples
from align.weights import load_tensors
from rewards import embeddings, fit, get_reward
from rewards.fit_data import load_data
from rewards.fit_split import split_rows
from rewards.fitted import Head
from rewards.media import clip_pixels
from rewards.placement import Placement
from rewards.towers import load_towers
from tests import tiny_clip as tc
from tests.people import write_rows

PIXELS = tc.images(24)
LAST = {"visual.transformer.resblocks.1.", "visual.ln_post.", "visual.proj"}, {"transformer.resblocks.1.", "ln_final.", "text_projection"}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Weights on disk, images, and pairs on them: the redder image of a prompt wins, near ones tie."""
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")
    return made(tmp_path)


def made(folder: Path) -> Path:
    tc.register(folder)
    tc.save(tc.build(tc.GELU), folder / "clip.pt")
    red = (PIXELS[:, 0] - PIXELS[:, 2]).mean((1, 2))
    rows = []
    for i in range(0, 24, 2):
        gap = float(red[i] - red[i + 1])
        said = "tie" if abs(gap) < 0.03 else "a" if gap > 0 else "b"
        for j in (i, i + 1):
            tc.pil(PIXELS[j]).save(folder / f"{j}.png")
        for n in range(1 + (i % 3 == 0)):
            rows.append({"prompt": f"a cat number {i}", "response_a": f"{i}.png", "response_b": f"{i + 1}.png",
                         "preference": said, "annotator": f"j{n}"})  # fmt: skip
    write_rows(folder / "pairs.jsonl", rows)
    return folder


def config(folder: Path, *overrides: str, head: str = "cos"):
    return load_config(
        {
            "trainer": "fit", "steps": 3, "batch_size": 999, "calibration": "none",
            "data": {"paths": [str(folder / "pairs.jsonl")], "media": "image"}, "split": {"calibration": 0},
            "model": {"backbone": "clip", "path": str(folder / "clip.pt"), "architecture": tc.GELU, "head": head,
                      "unfreeze_image": 1, "unfreeze_text": 1, "width": 8},
            "objective": {"comparisons": "pick"}, "checkpoint": {"every": 2},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6},
        },
        overrides,
    )  # fmt: skip


def test_the_blocks_move_as_in_a_loop_of_its_own(world):
    """PickScore's cross-entropy with ties, open_clip's own model and AdamW, against three steps of the fit."""
    own = config(world)
    result = fit.fit_reward(own, world / "run")
    data = load_data(own.data.paths, own.data)
    train = [data.rows[i] for i in split_rows(data.rows, own.split, own.seed)[0]["train"]]
    assert {row.value for row in train} == {0.0, 0.5, 1.0}
    model = tc.build(tc.GELU)
    import open_clip

    trained = {n: p for n, p in model.named_parameters() if n.startswith((*LAST[0], *LAST[1]))}
    matrices = [torch.eye(16, requires_grad=True) for _ in range(2)]
    scale = model.logit_scale.detach().clone()[None].requires_grad_()
    optimizer = torch.optim.AdamW([*trained.values(), *matrices, scale], lr=1e-3, weight_decay=0.1, eps=1e-6)
    tokenizer = open_clip.get_tokenizer(tc.GELU)
    pairs_of = {row.prompt: sum(r.prompt == row.prompt for r in train) for row in train}

    named = sorted({name for row in train for name in row.items})
    items = [data.items[name] for name in named]
    pixels = clip_pixels(PIXELS[[int(str(item.response).split(".")[0]) for item in items]], tc.SIDE)
    tokens = tokenizer([str(item.prompt) for item in items])

    def latents() -> torch.Tensor:
        image = F.normalize(model.encode_image(pixels), dim=-1)
        text = F.normalize(model.encode_text(tokens), dim=-1)
        return scale.exp() * F.cosine_similarity(image @ matrices[0].T, text @ matrices[1].T)

    losses = []
    for _ in range(3):
        total, weight, value = 0.0, 0.0, latents()
        for row in train:
            logp = value[[named.index(name) for name in row.items]].log_softmax(0)
            target = torch.tensor([row.value, 1 - row.value])
            loss = torch.xlogy(target, target).sum() - (target * logp).sum()
            total, weight = total + loss / pairs_of[row.prompt], weight + 1 / pairs_of[row.prompt]
        ridge = sum((m - torch.eye(16)).square().sum() for m in matrices) / 2
        loss = total / weight + 0.1 * ridge
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*trained.values(), *matrices, scale], 1.0)
        optimizer.step()
        losses.append(loss.item())
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    saved = load_tensors(world / "run" / "reward" / "towers.safetensors")
    assert saved.keys() == trained.keys() and len(saved) == 2 * (12 + 3) and result.card["heldout"]["comparisons"]["n"]
    for name, value in trained.items():
        torch.testing.assert_close(saved[name], value.detach(), atol=2e-5, rtol=1e-5, msg=name)
        assert not torch.equal(saved[name], tc.build(tc.GELU).get_parameter(name)), name
    head = load_tensors(world / "run" / "reward" / "head.safetensors")
    torch.testing.assert_close(head["image"], matrices[0].detach(), atol=2e-5, rtol=1e-5)
    # Read back, the artefact says what that model says; the weights it began with are as they were.
    reward = get_reward("fitted", path=str(world / "run"))
    places = [int(str(item.response).split(".")[0]) for item in items]
    asked = Samples([str(item.prompt) for item in items], images=PIXELS[places])
    assert reward.score(asked).values[:, 0] == pytest.approx(latents().detach().numpy(), abs=1e-4)
    towers = load_towers(world / "clip.pt", tc.GELU, quick_gelu=False, placement=Placement())
    for name, value in tc.build(tc.GELU).named_parameters():
        assert torch.equal(towers.model.get_parameter(name), value), name


def test_the_scale_of_the_cosine_starts_at_the_towers_own_and_comes_back_from_its_cap(world):
    """Of comparisons alone; what thumbs say depends on f itself, which is to be near 0."""
    own = config(world, "model.unfreeze_image=0", "model.unfreeze_text=0", "steps=1", "optimizer.lr=1e-12")
    fit.fit_reward(own, world / "pairs")
    saved = load_tensors(world / "pairs" / "reward" / "head.safetensors")
    assert saved["log_scale"].item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    rows = [{"prompt": f"a cat number {i}", "response": f"{i}.png", "label": i % 3 > 0} for i in range(24)]
    write_rows(world / "thumbs.jsonl", rows)
    fit.fit_reward(own.model_copy(update={"data": own.data.model_copy(update={"paths": (str(world / "thumbs.jsonl"),)})}),
                   world / "thumbs")  # fmt: skip
    saved = load_tensors(world / "thumbs" / "reward" / "head.safetensors")
    assert saved["log_scale"].item() == pytest.approx(2.3, abs=1e-6)

    head = Head("cos", 6, 1, 2, log_scale=5.0)
    same = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    optimizer = torch.optim.SGD([head.log_scale], lr=1e-3)
    for sign, expected in ((-1, math.log(100)), (1, math.log(100) - 0.1)):  # up is taken back, down is not
        value = head(same)
        assert value.item() == pytest.approx(100, rel=1e-5)
        optimizer.zero_grad()
        (sign * value).sum().backward()
        optimizer.step()
        head(same)
        assert head.log_scale.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("head", "image", "text"), [("cos", 1, 0), ("mlp", 1, 0), ("linear", 0, 2)])
def test_every_head_trains_what_it_is_told_and_nothing_else(world, head, image, text):
    own = config(world, f"model.unfreeze_image={image}", f"model.unfreeze_text={text}", "steps=6", head=head)
    fit.fit_reward(own, world / "run")
    saved = load_tensors(world / "run" / "reward" / "towers.safetensors")
    stacks = {name.partition("resblocks.")[0] for name in saved if "resblocks" in name}
    assert stacks == ({"visual.transformer."} if image else {"transformer."})
    assert {n.partition("resblocks.")[2][:1] for n in saved if "resblocks" in n} == ({"1"} if image else {"0", "1"})
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    start = tc.build(tc.GELU)
    moved = [name for name, value in saved.items() if not torch.equal(value, start.get_parameter(name))]
    assert len(moved) >= len(saved) - 1  # linear starts at 0, through which no gradient passes in the first step
    scores = get_reward("fitted", path=str(world / "run")).score(Samples(["a cat number 0"] * 4, images=PIXELS[:4]))
    assert scores.valid.all() and len(set(scores.values[:, 0].tolist())) > 1


def test_a_killed_fit_of_towers_goes_on_bit_for_bit(world, monkeypatch):
    own = config(world, "steps=7", "batch_size=6", "optimizer.ema_decay=0.5")
    fit.fit_reward(own, world / "whole")
    commit = Run.commit

    def killed(run, step, *rest):
        commit(run, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        fit.fit_reward(own, world / "killed")
    monkeypatch.setattr(Run, "commit", commit)
    fit.fit_reward(own, world / "killed")
    for name in ("towers.safetensors", "head.safetensors", "reward.json"):
        one, two = ((world / run / "reward" / name).read_bytes() for run in ("whole", "killed"))
        assert one == two, name


@pytest.mark.slow
def test_training_the_blocks_finds_what_frozen_towers_do_not(world):
    """The colour is not in the frozen towers' cosine; the last blocks learn it."""
    found = {}
    for blocks in (0, 1):
        own = config(world, f"model.unfreeze_image={blocks}", "model.unfreeze_text=0", "steps=60", "optimizer.lr=3e-3")
        fit.fit_reward(own, world / f"run{blocks}")
        rows = [json.loads(line) for line in (world / f"run{blocks}" / "metrics.jsonl").read_text().splitlines()]
        found[blocks] = float(np.mean([row["loss"] for row in rows[-5:]]))
    assert found[1] < 0.7 * found[0]


def test_what_cannot_be_is_refused(world):
    with pytest.raises(ConfigError, match=r"fewer blocks \(model.unfreeze_text 3\): it has 2"):
        fit.fit_reward(config(world, "model.unfreeze_text=3"), world / "run")
    with pytest.raises(ConfigError, match="no towers of blocks"):
        fit.fit_reward(config(world, "model.backbone=pixels", "model.head=linear"), world / "run")
    fit.require_launchable(config(world), 2)
    fit.fit_reward(config(world, "steps=1"), world / "good")
    file = world / "good" / "reward" / "towers.safetensors"
    from safetensors.torch import save_file

    kept = load_tensors(file)
    before = get_reward("fitted", path=str(world / "good")).identity()
    save_file({**{k: v.clone() for k, v in kept.items()}, "visual.proj": kept["visual.proj"] + 1}, file)
    assert get_reward("fitted", path=str(world / "good")).identity() != before
    save_file({"visual.nothing": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match="visual.nothing has no place"):
        get_reward("fitted", path=str(world / "good"))
    file.unlink()
    with pytest.raises(ModelError):
        get_reward("fitted", path=str(world / "good"))
