"""Modules built without memory, and files known by the beginning of their hash."""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from torch import nn

from align.errors import ModelError
from align.hub import Weights, locate
from align.weights import load_into, without_storage


class Table(nn.Module):
    """A linear map, and a buffer that no file holds."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.map(x * self.table)


def test_parameters_wait_for_their_file_and_buffers_do_not():
    with without_storage():
        module = Table()
    assert all(p.is_meta and not p.requires_grad for p in module.parameters())
    load_into(module, {"map.weight": torch.ones(2, 3), "map.bias": torch.tensor([0.0, 1.0])}, "file")
    assert module(torch.ones(1, 3)).tolist() == [[3.0, 4.0]]
    assert not any(p.is_meta for p in Table().parameters())


def test_an_error_inside_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), without_storage():
        raise ZeroDivisionError
    assert not nn.Linear(1, 1).weight.is_meta


def test_other_threads_are_not_affected():
    built = []
    with without_storage():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(1, 1)))
        thread.start()
        thread.join()
        built.append(nn.Linear(1, 1))
    assert [m.weight.is_meta for m in built] == [False, True]


def test_a_file_is_known_by_the_beginning_of_its_hash(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for known in (digest, digest[:12], ""):
        assert locate(Weights("a/b", "model.pth", sha256=known), tmp_path) == tmp_path / "model.pth"
    for other in (digest[1:13], digest[:12] + "g", "0" * 64):
        with pytest.raises(ModelError, match="not the published"):
            locate(Weights("a/b", "model.pth", sha256=other), tmp_path)
