"""A checkpoint that several processes write in pieces is read as if one had written it whole."""

from __future__ import annotations

import json
import os
import re
import shutil

import processes
import pytest
import torch

from align import checkpoint
from align.checkpoint import Piece
from align.errors import AlignError, CheckpointError
from align.launch import World, join_world, leave_world
from align.sparsity.sources import open_source

ROWS = torch.arange(15.0).view(5, 3)
"""Three processes hold 2, 2 and 1 of its rows."""


def failing(error):
    def fail(path):
        raise error

    return fail


FAILURES = {
    "disk": lambda path: path.mkdir(),  # a folder lies where its file would go
    "device": failing(RuntimeError("the device is gone\nand more")), "defect": failing(ValueError("neither")),
}  # fmt: skip


def pieces_of(rank):
    rows = ROWS[2 * rank : 2 * rank + 2]
    first = (Piece(torch.tensor([7.0]), 0, (1,)), Piece(torch.zeros(0), 1, (1,)))[min(rank, 1)]
    return {
        "model": {
            "layer.weight": Piece(rows, 6 * rank, (5, 3)), "one": first, "nothing": Piece(torch.zeros(0, 4), 0, (0, 4)),
            "alike": Piece(ROWS[0].clone(), 0, (3,), alike=True),
        },
        "average": {
            "layer.weight": Piece(rows + 100, 6 * rank, (5, 3)), "nothing": Piece(torch.zeros(0, 4), 0, (0, 4)),
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The root of a checkpoint of step 1, and what each process met with when one failed, in four ways."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"

    def work():
        world, tensors = join_world(), {"rng": {"torch": torch.get_rng_state()}}
        pieces, kept = pieces_of(world.rank), checkpoint._write
        checkpoint.save_pieces(root, 1, pieces, tensors, {"seen": 1}, world=world)
        said = {}

        def attempt(name, call):
            try:
                call()
            except (AlignError, ValueError, ZeroDivisionError) as error:
                said[name] = f"{type(error).__name__}: {error}"

        def save():
            checkpoint.save_pieces(root, 2, pieces, tensors, {}, world=world)

        for name, failing in FAILURES.items():
            if world.rank == 2:
                checkpoint._write = lambda path, *rest, failing=failing: (failing(path), kept(path, *rest))
            attempt(name, save)
        attempt("leader", lambda: world.led(lambda: 1 // 0))
        leave_world()
        return said

    ended = processes.world(3, work, root.parent / "world")
    assert not [e.output for e in ended if e.code]
    return root, [e.value for e in ended]


def test_pieces_make_up_whole_tensors(written):
    root, _ = written
    found = checkpoint.load_latest(root)
    assert (found.step, found.state, set(found.tensors)) == (1, {"seen": 1}, {"model", "average", "rng"})
    assert set(found.tensors["model"]) == {"layer.weight", "one", "nothing", "alike"}
    assert torch.equal(found.tensors["model"]["layer.weight"], ROWS)
    assert torch.equal(found.tensors["average"]["layer.weight"], ROWS + 100)
    assert found.tensors["model"]["one"].tolist() == [7.0]
    assert checkpoint.delivered_group(root / "step_000001") == "average"
    assert set(checkpoint.load(root / "step_000001", only="model").tensors) == {"model"}


@pytest.mark.parametrize(
    ("failure", "words"), [("disk", "Is a directory|I/O error"), ("device", r"the device is gone\.")]
)
def test_every_process_hears_that_one_could_not_write_and_nothing_is_left(written, failure, words):
    root, said = written
    for told in said:
        assert re.match(f"CheckpointError: A checkpoint could not be written .*({words})", told[failure]), told
    assert [path.name for path in root.iterdir()] == ["step_000001"]


def test_a_defect_of_one_process_is_no_wait_for_the_others(written):
    """Where it arose it is itself; the others name the process, in each of them and in the leading one alone."""
    for failure, failed, itself in (("defect", 2, "ValueError: neither"), ("leader", 0, "ZeroDivisionError: ")):
        for rank, told in enumerate(written[1]):
            other = f"AlignError: Another process of the run failed (process {failed}): {itself.partition(':')[0]}"
            assert told[failure].startswith(itself if rank == failed else other), told


def test_tensors_without_values_are_kept(written):
    found = checkpoint.load_latest(written[0]).tensors["model"]
    assert found["nothing"].shape == (0, 4) == checkpoint.shape_of(found, "nothing")
    assert open_source(written[0] / "step_000001").entries["nothing"].shape == (0, 4)


def test_shapes_and_names_are_known_without_reading_a_value(written, tmp_path):
    step = copied(written, tmp_path)
    found = checkpoint.load(step).tensors["model"]
    for file in step.glob("model.*"):
        file.unlink()
    assert checkpoint.shape_of(found, "layer.weight") == (5, 3)
    assert "layer.weight" in found and "layer.bias" not in found
    with pytest.raises(OSError):
        found["layer.weight"]


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
