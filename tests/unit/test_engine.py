"""Engines where no process has whole weights, as one process sees them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from align.config import load_config
from align.engine import ReplicaEngine
from align.errors import GuardError
from align.launch import World
from align.run import Run
from align.sharding import FSDP2Engine


@dataclass(frozen=True)
class Adding(World):
    """A world that notes on which devices it was asked to add."""

    devices: list[str] = field(default_factory=list)

    def add(self, tensor):
        self.devices.append(tensor.device.type)
        return tensor


def test_a_norm_without_gradients_is_added_up_where_the_weights_are():
    """NCCL refuses a tensor of the CPU, so the sums start on the weights' device, here one without storage."""
    weight = nn.Parameter(torch.zeros(3, device="meta"))
    engine = FSDP2Engine.__new__(FSDP2Engine)  # what `fully_shard` needs is not what this is about
    engine.world, engine.parameters, engine._held = Adding(), {"whole": weight}, {"whole": weight.detach()}
    assert engine.reduce().device.type == "meta"
    assert engine.world.devices == ["meta", "meta"]


def test_an_update_whose_gradients_have_not_met_is_refused(tmp_path):
    """Where weights are split gradients meet in the last pass: one that never came is no update of 0."""
    config = load_config("digits/smoke")
    weight = nn.Parameter(torch.ones(2))
    engine = ReplicaEngine({"w": weight}, config.optimizer, World())
    engine.lockstep = True
    run = Run(config, tmp_path, {"w": weight}, engine=engine)
    run.backward(weight.sum(), weight=1.0, last=False)
    with pytest.raises(GuardError, match=r"have not met \(step 1, process 0\)"):
        run.update()
    run.backward(weight.sum(), weight=1.0, last=True)
    assert run.update() == pytest.approx(8**0.5)
    run.log.close()
