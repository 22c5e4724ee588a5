"""A full disk: one clear sentence, the previous checkpoint intact, and the run goes on when there is space again."""

from __future__ import annotations

import subprocess

import processes
import pytest

from align import checkpoint
from align.cli import main
from align.run import Run
from scripts.fault_injection import fingerprint

SETTINGS = [
    "model.path=digits/random", "steps=9", "checkpoint.every=5", "evaluation.every=0", "evaluation.final_samples=20",
    "tracking.samples_every=0",
]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["train", "digits/smoke", *SETTINGS, "--out", str(out)]) == 0
    return fingerprint(out)


def fill(disk, leave):
    """Fill a file system up to `leave` bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def fill_after(step, disk, leave):
    """Have the disk fill up when this step has been committed."""
    commit = Run.commit

    def committed(self, at, *rest):
        commit(self, at, *rest)
        if at == step and self.world.leads:
            fill(disk, leave)

    Run.commit = committed


@pytest.mark.parametrize(
    ("leave", "words"),
    [(64 << 10, "The disk has no room for a checkpoint"), (0, "A file of the run could not be written")],
    ids=["the checkpoint does not fit", "the metrics do not fit"],
)
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(tmp_path, small_disk, undisturbed, leave, words):
    out = small_disk / "run"
    ended = processes.align(
        tmp_path / "cli", "train", "digits/smoke", *SETTINGS, "--out", str(out),
        before=lambda: fill_after(5, small_disk, leave),
    )  # fmt: skip
    assert ended.value == 2 and "Traceback" not in ended.output, ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("align: ")]
    assert len(said) == 1 and words in said[0] and "free some space" in said[0]
    assert ("No space left" in said[0] and "metrics.jsonl" in said[0]) if leave == 0 else "MB are free" in said[0]
    assert list(checkpoint.checkpoints(out / "checkpoints")) == [5]
    assert checkpoint.load_latest(out / "checkpoints").step == 5
    (small_disk / "ballast").unlink()
    again = processes.align(tmp_path / "again", "resume", str(out))
    assert again.value == 0, again.output
    assert fingerprint(out) == undisturbed


def test_a_disk_that_is_full_from_the_start_is_one_sentence(tmp_path, small_disk):
    fill(small_disk, 0)
    ended = processes.align(tmp_path / "cli", "train", "digits/smoke", *SETTINGS, "--out", str(small_disk / "run"))
    assert ended.value == 2 and "Traceback" not in ended.output and "No space left" in ended.output, ended.output


@pytest.mark.slow
def test_a_full_disk_stops_both_processes_with_the_same_words(tmp_path, small_disk):
    out = small_disk / "run"

    def work():
        fill_after(5, small_disk, 64 << 10)
        return main(["train", "digits/smoke", *SETTINGS, "--out", str(out)])

    ranks = processes.world(2, work, tmp_path / "world", within=90)
    assert [rank.value for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "The disk has no room for a checkpoint" in rank.output and "Traceback" not in rank.output
    assert list(checkpoint.checkpoints(out / "checkpoints")) == [5]
