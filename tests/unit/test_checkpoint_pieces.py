"""A checkpoint that several processes write in pieces is read as if one had written it whole."""

from __future__ import annotations

import json
import os
import shutil

import processes
import pytest
import torch

from align import checkpoint
from align.checkpoint import Piece
from align.errors import CheckpointError
from align.launch import World, join_world, leave_world
from align.sparsity.sources import open_source

ROWS = torch.arange(15.0).view(5, 3)
"""Three processes hold 2, 2 and 1 of its rows."""


def pieces_of(rank):
    rows = ROWS[2 * rank : 2 * rank + 2]
    first = (Piece(torch.tensor([7.0]), 0, (1,)), Piece(torch.zeros(0), 1, (1,)))[min(rank, 1)]
    return {
        "model": {"layer.weight": Piece(rows, 6 * rank, (5, 3)), "one": first, "alike": Piece(ROWS[0].clone(), 0, (3,), alike=True)},
        "average": {"layer.weight": Piece(rows + 100, 6 * rank, (5, 3))},
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The root of a checkpoint of step 1, and what each process met with at step 2, when one had no room."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"

    def work():
        world, tensors = join_world(), {"rng": {"torch": torch.get_rng_state()}}
        checkpoint.save_pieces(root, 1, pieces_of(world.rank), tensors, {"seen": 1}, world=world)
        if world.rank == 2:  # a folder lies where its file would go
            kept = checkpoint._write
            checkpoint._write = lambda path, *rest: (path.mkdir(), kept(path, *rest))
        try:
            checkpoint.save_pieces(root, 2, pieces_of(world.rank), tensors, {}, world=world)
        except CheckpointError as error:
            leave_world()
            return str(error)
        return "written"

    ended = processes.world(3, work, root.parent / "world")
    return root, [e.value for e in ended]


def test_pieces_make_up_whole_tensors(written):
    root, _ = written
    found = checkpoint.load_latest(root)
    assert (found.step, found.state, set(found.tensors)) == (1, {"seen": 1}, {"model", "average", "rng"})
    assert set(found.tensors["model"]) == {"layer.weight", "one", "alike"}
    assert torch.equal(found.tensors["model"]["layer.weight"], ROWS)
    assert torch.equal(found.tensors["average"]["layer.weight"], ROWS + 100)
    assert found.tensors["model"]["one"].tolist() == [7.0]
    assert checkpoint.delivered_group(root / "step_000001") == "average"
    assert set(checkpoint.load(root / "step_000001", only="model").tensors) == {"model"}


def test_every_process_hears_that_one_could_not_write_and_nothing_is_left(written):
    root, said = written
    assert len(said) == 3 and all("could not be written" in text for text in said), said
    assert [path.name for path in root.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("rank", range(3))
def test_a_run_goes_on_from_the_piece_that_it_holds(rank):
    piece = pieces_of(rank)["model"]["layer.weight"]
    assert torch.equal(piece.of(ROWS), piece.values)
    assert Piece(torch.zeros(4), 6, (5, 3)).of(ROWS).tolist() == [6, 7, 8, 9]


def test_sparsity_reads_what_is_delivered(written):
    source = open_source(written[0] / "step_000001")
    entry = source.entries["layer.weight"]
    assert (entry.shape, entry.dtype) == ((5, 3), "F32") and len(source.files) == 3
    assert torch.frombuffer(bytearray(entry.read(2, 14).tobytes()), dtype=torch.float32).tolist() == [*range(102, 114)]


def copied(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "checkpoints") / "step_000001"


def test_a_piece_that_is_lost_or_changed_is_named(written, tmp_path):
    step = copied(written, tmp_path)
    file = step / "model.00001.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"corrupt.*model\.00001"):
        checkpoint.load(step)
    os.remove(file)
    with pytest.raises(CheckpointError, match=r"lost a file.*model\.00001"):
        checkpoint.load(step)


@pytest.mark.parametrize("first", [5, 7])
def test_pieces_that_leave_a_gap_or_overlap_are_refused(tmp_path, first):
    pieces = {"model": {"w": Piece(torch.zeros(6), first, (12,))}}
    checkpoint.save_pieces(tmp_path, 1, pieces, {}, {}, world=World())
    with pytest.raises(CheckpointError, match="gaps or overlap"):
        checkpoint.load_latest(tmp_path).tensors["model"]["w"]


def test_the_manifest_names_every_piece(written):
    named = json.loads((written[0] / "step_000001/manifest.json").read_text())["files"]
    groups = [f"{group}.{rank:05d}.safetensors" for group in ("average", "model") for rank in range(3)]
    assert set(named) == {*groups, "rng.safetensors", "state.json"}
