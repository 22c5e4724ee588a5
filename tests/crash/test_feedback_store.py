"""The store under SIGKILL and on a full disk: nothing that was acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash.feedback_writer import said

from align.feedback.store import Store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROCESSES = 8  # of eight writers each


def start(store: Path, folder: Path, process: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / "feedback_writer.py"), str(store), str(folder), str(process)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def survive(tmp_path: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill writers at random `kills` times, then check the store against what each of them had acknowledged."""
    draw, path, folder = random.Random(seed), tmp_path / "feedback.db", tmp_path / "acknowledged"
    folder.mkdir()
    running = [start(path, folder, n) for n in range(PROCESSES)]
    try:
        for _ in range(kills):
            time.sleep(draw.uniform(0.0, 0.25))
            n = draw.randrange(PROCESSES)
            assert running[n].poll() is None, running[n].communicate()[1].decode()
            running[n].kill()
            assert running[n].wait() == -signal.SIGKILL
            running[n] = start(path, folder, n)
        deadline = time.monotonic() + 60  # every writer gets to write something
        while any(not count(folder / f"{p}.{w}") for p in range(PROCESSES) for w in range(8)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return verify(path, folder)


def count(log: Path) -> int:
    return len(log.read_bytes().split()) if log.exists() else 0


def verify(path: Path, folder: Path) -> dict[str, int]:
    acknowledged = {f"{p}.{w}": count(folder / f"{p}.{w}") for p in range(PROCESSES) for w in range(8)}
    with Store.open(path, create=False) as store:
        store.check()
        rows = store._db().execute("SELECT id FROM events").fetchall()
        stored = {name for (name,) in rows}
        duplicates = len(rows) - len(stored)
        expected = {f"{writer}-{n}" for writer, number in acknowledged.items() for n in range(number)}
        lost = expected - stored
        # Beyond what was acknowledged a writer has at most the one event that was in flight.
        extra = stored - expected
        assert extra <= {f"{writer}-{number}" for writer, number in acknowledged.items()}
        standing: dict[str, str] = {}
        for writer, number in acknowledged.items():
            for n in range(number + (f"{writer}-{number}" in stored)):
                event = said(writer, n)[1]
                standing[event.identifier] = event.id
        current = {event.identifier: event.id for event in store.current()}
        assert current == standing
        assert sum(len(store.history(name)) for name in list(current)[:50]) >= 50
    return {"acknowledged": len(expected), "in_flight": len(extra), "lost": len(lost), "duplicates": duplicates}


@pytest.mark.slow
def test_64_writers_survive_50_kills(tmp_path: Path):
    found = survive(tmp_path, kills=50, seed=0)
    assert found["acknowledged"] > 500 and found["lost"] == 0 and found["duplicates"] == 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_64_writers_survive_1000_kills(tmp_path: Path):
    found = survive(tmp_path, kills=1000, seed=1)
    sys.stderr.write(f"{found}\n")
    assert found["acknowledged"] > 10_000 and found["lost"] == 0 and found["duplicates"] == 0


def test_the_check_would_see_a_lost_event(tmp_path: Path):
    folder = tmp_path / "acknowledged"
    folder.mkdir()
    (folder / "0.0").write_text("0\n1\n")
    with Store.open(tmp_path / "feedback.db") as store:
        item, event = said("0.0", 0)
        store.add([item], [event])
    with pytest.raises(AssertionError):
        verify(tmp_path / "feedback.db", folder)


FULL = """
import sys
from pathlib import Path
from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store, Writer

path = Path(sys.argv[1])
store, kept, n, said = Store.open(path), [], 0, ""
add = store.add
if sys.argv[2] == "writer":
    writer = Writer(path)
    add = lambda items, events: writer.submit(items, events).result()
while n < 10_000 and not said:
    item = Item("p", f"{n} " + "x" * 2000)
    try:
        kept += [a.event.id for a in add([item], [FeedbackEvent("binary", (item.id,), True, annotator="a")])]
    except DataError as error:
        said = str(error)
    n += 1
assert said and path.name in said, said
sys.stdout.write(said + "\\n")
store.check()
assert [e.id for e in store.current()] == kept, (len(kept), store.counts())
assert len(kept) > 50
for ballast in path.parent.glob("ballast"):
    ballast.unlink()
    add([item], [FeedbackEvent("binary", (item.id,), True, annotator="a")])
    assert store.counts()["events"] == len(kept) + 1
"""


@pytest.mark.parametrize("way", ["store", "writer"])
def test_a_full_disk_is_said_and_leaves_the_store_whole(tmp_path: Path, way: str):
    """On a file system of 4 MB: the error names the file, what was acknowledged is there, and freed space is used."""
    unshare = shutil.which("unshare")
    script = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && head -c 500000 /dev/zero > {tmp_path}/ballast && exec"
    mounted = [unshare or "", "-rm", "sh", "-c", script + ' "$@"', "sh"]
    if not unshare or subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here (needs unshare with user namespaces)")
    done = subprocess.run(
        [*mounted, sys.executable, "-c", FULL, str(tmp_path / "full.db"), way],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "The disk is full" in done.stdout and "Free some space and repeat" in done.stdout


def test_a_file_that_may_not_grow_is_said_and_leaves_the_store_whole(tmp_path: Path):
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))\n{FULL}"
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path / "full.db"), "store"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "The disk" in done.stdout
