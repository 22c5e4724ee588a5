"""A split module computes, steps and saves as a whole one does, also where its rows do not divide evenly."""

from __future__ import annotations

import json

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from align.config import load_config
from align.errors import CheckpointError, ConfigError, ModelError
from align.launch import join_world, leave_world
from trainers import KTO
from trainers.language_fsdp import (
    FOLDER,
    load_optimizer,
    require_sharded,
    save_optimizer,
    set_weights,
    shard_module,
    whole_weights,
)
from trainers.tiny_language import toy_thumbs

IDS = torch.arange(12) % 5


class Net(nn.Module):
    """Two blocks in a list, one of which has a list of its own, between an embedding that is the output layer too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([Experts(), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        found = self.embed(ids)
        for block in self.blocks:
            found = block(found).tanh()
        return self.head(found)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.several = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        return self.several[0](x) + self.several[1](x)


def trained_by(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, eps=1e-2)
    return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def step(net, optimizer, scheduler, ids):
    """Take a step on the mean over `ids`; return the gradient's norm."""
    net(ids).square().mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def first(folder):
    """Take two steps, save, and take a third."""

    def work():
        from torch.distributed.fsdp import FSDPModule

        world, net = join_world(), Net()
        try:
            require_sharded(net)
            raise AssertionError("a whole model is split")
        except ModelError as error:
            refused = str(error)
        shard_module(net)
        require_sharded(net)
        split = [name for name, module in net.named_modules() if isinstance(module, FSDPModule)]
        parts, share = trained_by(net), world.share(len(IDS))
        norms = [step(*parts, IDS[share.start : share.stop]) for _ in range(2)]
        save_optimizer(*parts, folder, world)
        state = whole_weights(net, trained=False)
        if world.leads:
            save_file({n: t.clone() for n, t in state.items()}, folder / "model.safetensors")
        norms.append(step(*parts, IDS[share.start : share.stop]))
        state = {name: value.tolist() for name, value in whole_weights(net, trained=False).items()}
        local = [tuple(p.to_local().shape) for p in net.parameters()]
        leave_world()
        return {"refused": refused, "split": split, "norms": norms, "weights": state, "local": local}

    return work


def again(folder):
    """Go on from what was saved and take the third step."""

    def work():
        world, net = join_world(), Net()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        parts, share = trained_by(shard_module(net)), world.share(len(IDS))
        set_weights(net, load_file(folder / "model.safetensors"), trained=False)
        load_optimizer(*parts, folder)
        rate, norm = parts[2].get_last_lr(), step(*parts, IDS[share.start : share.stop])
        state = {name: value.tolist() for name, value in whole_weights(net, trained=False).items()}
        leave_world()
        return {"norm": norm, "weights": state, "rate": rate}

    return work


def test_a_split_module_is_a_whole_one_and_goes_on_in_another_number_of_processes(tmp_path):
    alone = trained_by(Net())
    norms = [step(*alone, IDS) for _ in range(3)]
    expected = alone[0].state_dict()

    def require_same(weights, tolerance=1e-6):
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(weights[name]), value, atol=tolerance, rtol=0, msg=name)

    ended = processes.world(2, first(tmp_path), tmp_path / "w1")
    for e in ended:
        assert isinstance(e.value, dict), e.output[-3000:]
        assert "embed.weight is whole on each of them" in e.value["refused"]
        assert e.value["split"] == ["", "blocks.0", "blocks.1"]
        assert e.value["norms"] == pytest.approx(norms, abs=1e-6)
    require_same(ended[0].value["weights"])
    assert ended[1].value["weights"] == {}  # they are gathered in one process
    assert [e.value["local"][0] for e in ended] == [(3, 3), (2, 3)]  # of an embedding of 5 rows

    same = processes.world(2, again(tmp_path), tmp_path / "w2")
    assert same[0].value["weights"] == ended[0].value["weights"], same[0].output[-3000:]  # bit for bit
    more = processes.world(3, again(tmp_path), tmp_path / "w3")
    assert [e.value["norm"] for e in more] == pytest.approx([norms[2]] * 3, abs=1e-6), more[0].output[-3000:]
    assert more[0].value["rate"] == [0.1 / 3]
    require_same(more[0].value["weights"])

    shares = tmp_path / FOLDER / "optimizer_00000.safetensors"
    save_file({**load_file(shares), "blocks.7.bias.step": torch.ones(())}, shares)
    foreign = processes.world(2, again(tmp_path), tmp_path / "w4")
    assert isinstance(foreign[0].value, CheckpointError) and "blocks.7.bias.step" in str(foreign[0].value)
    assert json.loads((tmp_path / FOLDER / "schedule.json").read_text())["last_epoch"] == 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mask": "mask.safetensors"}, "A mask does not go with FSDP2"),
        ({"every": 2}, "Under ZeRO 3 and FSDP2 weights are measured after training alone"),
    ],
)
def test_what_needs_whole_weights_is_refused_before_anything_is_written(tmp_path, asked, words):
    (tmp_path / "mask.safetensors").touch()
    asked = {name: str(tmp_path / value) if name == "mask" else value for name, value in asked.items()}
    config = load_config({"trainer": "kto", "data": {"path": "toy"}, "model": {"path": "tiny", "train": "full"},
                          "steps": 1, "batch_size": 8, "microbatch": 8, "sparsity": asked})  # fmt: skip

    def work():
        try:
            return KTO(config, out=tmp_path / "run", fsdp=True, rows=(toy_thumbs(8), None))
        except ConfigError as error:
            leave_world()  # together, or a process that is late finds nobody
            return error

    ended = processes.world(2, work, tmp_path / "world")
    assert all(isinstance(e.value, ConfigError) and words in str(e.value) for e in ended), [e.value for e in ended]
    assert not (tmp_path / "run").exists()
