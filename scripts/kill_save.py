"""Kill, damage and starve what keeps a run and its feedback: checkpoints and the store.

    python scripts/kill_save.py                            # all of it: prints a table, exits with 1 on any failure
    python scripts/kill_save.py saves flips --count 50     # two parts, 50 cases each
    python scripts/kill_save.py --json faults.json

    saves        SIGKILL while checkpoints are written, written again and rotated
    events       SIGKILL while feedback is written
    flips        one bit of a checkpoint changed
    cuts         every file of a checkpoint cut at each percent of its length
    files        files missing, added, swapped, linked, renamed
    full         a disk that is full at 20 points of a save
    store_full   a disk that is full at 20 points of a store
    store_cuts   a store cut at each percent of its length
    store_flips  one bit of a store changed: refused with its name, or nothing that it holds is another

A case of damage passes when the checkpoint is refused with the name of the file and of the checkpoint before it, and
when that one loads. The processes that are killed are forked from this one, which has imported everything already.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from align import checkpoint
from align.errors import AlignError, CheckpointError, DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store
from align.run import describe_machine

MANIFEST = "manifest.json"


def child(work: Callable[[], None], log: str | Path = os.devnull) -> int:
    """Run `work` in a forked process and return its pid; what it says on stderr, or raises, goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def finished(pid: int, seconds: float) -> bool:
    """Wait that long for a process; kill it with SIGKILL when it is still there. Return whether it ended itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a run ended with status {status}")
            return True
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _killed(work: Callable[[int], None], seconds: float) -> list[int]:
    """Kill `work` after that long and return the numbers it had written to its pipe: what it acknowledged."""
    read, write = os.pipe()
    pid = child(lambda: work(write))
    os.close(write)
    finished(pid, seconds)
    with os.fdopen(read) as pipe:
        return [int(line) for line in pipe.read().split()]


# --- kills ------------------------------------------------------------------------------------------


def saves(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill a process that saves without pause; every visible checkpoint must be whole, none acknowledged lost."""
    draw, torn, lost, acknowledged, visible = random.Random(seed), [], [], 0, 0
    tensors = {"model": {f"w{i}": torch.randn(256, 1024) for i in range(4)}, "optimizer": {"m": torch.randn(512, 1024)}}
    root = folder / "checkpoints"

    def save_on_and_on(start: int) -> Callable[[int], None]:
        def work(write: int) -> None:
            for step in range(start, start + 10_000):
                for _ in range(1 + step % 2):  # every other one is written twice: the first is set aside meanwhile
                    checkpoint.save(root, step, tensors, {"step": step}, keep=2)
                    os.write(write, b"%d\n" % step)

        return work

    for kill in range(count):
        start = max(checkpoint.checkpoints(root), default=0) + 1
        acknowledged = max([acknowledged, *_killed(save_on_and_on(start), draw.uniform(0.0, 0.25))])
        for step, path in checkpoint.checkpoints(root).items():
            visible += 1
            try:
                checkpoint.verify(path)
            except (AlignError, OSError, ValueError, KeyError) as error:
                torn.append(f"kill {kill}, step {step}: {error}")
        found = checkpoint.load_latest(root)
        if (found.step if found else 0) < acknowledged:
            lost.append(f"kill {kill}: step {acknowledged} was acknowledged")
    return {
        "cases": count, "saves": acknowledged, "checkpoints_verified": visible, "failures": torn + lost, "torn": torn,
        "lost": lost,
    }  # fmt: skip


def _said(n: int) -> tuple[Item, FeedbackEvent]:
    item = Item("a prompt", f"answer {n}")
    return item, FeedbackEvent("binary", (item.id,), bool(n % 2), annotator="a", id=f"e{n}", ts=10**12 + n)


def events(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill a process that adds feedback without pause; the store must stay whole and hold all it acknowledged."""
    draw, acknowledged, total, failures = random.Random(seed), 0, 0, []

    def add_on_and_on(path: Path, start: int) -> Callable[[int], None]:
        def work(write: int) -> None:
            with Store.open(path) as store:
                for n in range(start, start + 100_000):
                    item, event = _said(n)
                    store.add([item], [event])
                    os.write(write, b"%d\n" % n)

        return work

    for kill in range(count):
        path = folder / f"feedback_{kill // 25}.db"  # a store that is read whole after each kill must stay small
        before = acknowledged if kill % 25 else 0
        said = _killed(add_on_and_on(path, before), draw.uniform(0.0, 0.1))
        acknowledged = max([before, *(n + 1 for n in said)])
        total += acknowledged - before
        try:
            with Store.open(path) as store:
                store.check()
                held = [event.id for event in store.current()]
        except AlignError as error:
            failures.append(f"kill {kill}: {error}")
            continue
        if held not in ([f"e{n}" for n in range(acknowledged)], [f"e{n}" for n in range(acknowledged + 1)]):
            failures.append(f"kill {kill}: {acknowledged} were acknowledged, {len(held)} are there")
    return {"cases": count, "acknowledged": total, "failures": failures}


# --- damage to checkpoints --------------------------------------------------------------------------


def _two_checkpoints(folder: Path) -> tuple[Path, Path]:
    root = folder / "whole"
    for step in (1, 2):
        torch.manual_seed(step)
        tensors = {"model": {"w": torch.randn(40, 40)}, "optimizer": {"m": torch.randn(30, 40)}}
        checkpoint.save(root, step, tensors, {"step": step, "counters": {"updates": step}})
    return root / "step_000001", root / "step_000002"


def _require_refused(root: Path, hurt: str) -> str:
    """Say what is wrong with how the newest checkpoint, damaged in file `hurt`, is met; "" where all is well."""
    newest = checkpoint.latest(root)
    if newest is None:
        return "no checkpoint is visible"
    try:
        checkpoint.load(newest)
    except CheckpointError as error:
        said = str(error)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "it was loaded"
    # A manifest that was changed may disagree with any file, and names that one.
    if not (str(newest / hurt) in said or (hurt == MANIFEST and str(newest) in said)):
        return f"the file is not named: {said}"
    if "step_000001" not in said:
        return f"the checkpoint before is not offered: {said}"
    shutil.rmtree(newest)  # as the message says
    found = checkpoint.load_latest(root)
    return "" if found and found.step == 1 else "the checkpoint before does not load"


def _each(cases: Iterator[tuple[str, str, Callable[[Path], object]]], folder: Path) -> dict[str, Any]:
    """Do each damage (what, file, act) to a fresh copy of two checkpoints, and see how it is met."""
    whole, root = _two_checkpoints(folder)[0].parent, folder / "damaged"
    done, failures = 0, []
    for what, hurt, act in cases:
        shutil.copytree(whole, root)
        act(root / "step_000002")
        if wrong := _require_refused(root, hurt):
            failures.append(f"{what}: {wrong}")
        shutil.rmtree(root)
        done += 1
    return {"cases": done, "failures": failures}


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flips(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Change one bit of one file, drawn so that each file is hit as often."""
    draw, newest = random.Random(seed), _two_checkpoints(folder)[1]
    sizes = {path.name: path.stat().st_size for path in sorted(newest.iterdir())}

    def cases() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
        for n in range(count):
            name = list(sizes)[n % len(sizes)]
            bit = draw.randrange(8 * sizes[name])
            yield f"bit {bit} of {name}", name, lambda step, name=name, bit=bit: _flip(step / name, bit)

    return _each(cases(), folder)


def cuts(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Cut each file at each percent of its length."""
    del count, seed
    newest = _two_checkpoints(folder)[1]

    def cases() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
        for path in sorted(newest.iterdir()):
            for percent in range(100):
                size = path.stat().st_size * percent // 100
                yield f"{path.name} at {percent} %", path.name, lambda s, p=path, n=size: os.truncate(s / p.name, n)

    return _each(cases(), folder)


def files(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Files that are missing, were added, swapped with another or with those of another step, linked, renamed."""
    del count, seed
    newest = _two_checkpoints(folder)[1]
    names = sorted(path.name for path in newest.iterdir())

    def swap(step: Path, a: str, b: str) -> None:
        (step / a).rename(step / "aside")
        (step / b).rename(step / a)
        (step / "aside").rename(step / b)

    def link(step: Path, name: str) -> None:
        shutil.move(step / name, step.parent / name)
        (step / name).symlink_to(step.parent / name)

    def add(step: Path, name: str) -> None:
        (step / name).parent.mkdir(exist_ok=True)
        (step / name).write_bytes(b"x")

    def cases() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
        for name in names:
            yield f"{name} missing", name, lambda s, n=name: (s / n).unlink()
            yield f"{name} emptied", name, lambda s, n=name: (s / n).write_bytes(b"")
            yield f"{name} renamed", MANIFEST, lambda s, n=name: (s / n).rename(s / f"{n}.old")
            yield f"{name} of another step", name, lambda s, n=name: shutil.copy(s.parent / "step_000001" / n, s / n)
            if name != MANIFEST:
                yield f"{name} a link", name, lambda s, n=name: link(s, n)
            for other in names[names.index(name) + 1 :]:
                yield f"{name} and {other} swapped", MANIFEST, lambda s, a=name, b=other: swap(s, a, b)
        for name in ("pytorch_model.bin", "average.safetensors", "deep/er.bin", ".hidden"):
            yield f"{name} added", name, lambda s, n=name: add(s, n)
        yield "all of them missing", MANIFEST, lambda s: [p.unlink() for p in s.iterdir()]
        yield "another checkpoint in its place", MANIFEST, _replace_by_the_first

    return _each(cases(), folder)


def _replace_by_the_first(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.parent / "step_000001", step)


# --- full disks -------------------------------------------------------------------------------------


def _small_disk(folder: Path) -> Path | None:
    """Mount a file system of 4 MB; None where that is not allowed."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    return None if subprocess.run(command, capture_output=True, check=False).returncode else disk


def _fill(disk: Path, leave: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return ballast


def _on_small_disks(points: int, folder: Path, case: Callable[[Path, int], str]) -> dict[str, Any]:
    """Run `case` on an empty small disk for each point; it returns what went wrong, or nothing."""
    disk = _small_disk(folder)
    if disk is None:
        return {"cases": 0, "failures": [], "not_run": "no small file system can be mounted here"}
    failures = []
    try:
        for point in range(points):
            if wrong := case(disk, point):
                failures.append(f"point {point}: {wrong}")
            for path in list(disk.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return {"cases": points, "failures": failures}


def full(count: int, seed: int, folder: Path, points: int = 20) -> dict[str, Any]:
    """Fill the disk so that a save of 800 kB finds 0, 1/20, ... 19/20 of its room; the one before must stand.

    Each point twice: a save that sees so and does not begin, and one that saw room which others took while it wrote.
    """
    del count, seed
    tensors = {"model": {"w": torch.randn(300, 400)}, "optimizer": {"m": torch.randn(200, 400)}}

    def case(disk: Path, point: int) -> str:
        taken, point = divmod(point, points)
        root = disk / "checkpoints"
        first = checkpoint.save(root, 1, tensors, {})
        needed = sum(-(-p.stat().st_size // 4096) * 4096 for p in first.iterdir())
        ballast = _fill(disk, needed * point // points)
        seen = shutil.disk_usage
        try:
            if taken:
                shutil.disk_usage = lambda path: seen(path)._replace(free=1 << 30)
            checkpoint.save(root, 2, tensors, {})
        except CheckpointError as error:
            said = str(error)
        else:
            return "it was saved"
        finally:
            shutil.disk_usage = seen
        reason = "No space left" if taken else "has no room for a checkpoint"
        if "step_000002" not in said or reason not in said or "Earlier checkpoints are intact" not in said:
            return f"said {said!r}"
        if [p.name for p in root.iterdir()] != ["step_000001"] or checkpoint.load_latest(root).step != 1:
            return "the checkpoint before does not stand alone"
        ballast.unlink()
        checkpoint.save(root, 2, tensors, {})
        return "" if checkpoint.load_latest(root).step == 2 else "freed space was not used"

    return _on_small_disks(2 * points, folder, case)


def store_full(count: int, seed: int, folder: Path, points: int = 20) -> dict[str, Any]:
    """Fill the disk so that a store finds 0, 20, ... 380 kB; all it acknowledged must be there, and nothing else."""
    del count, seed

    def case(disk: Path, point: int) -> str:
        with Store.open(disk / "feedback.db") as store:
            kept, said = [], ""
            while not said and len(kept) < 5000:
                if len(kept) == 20:
                    ballast = _fill(disk, point * 20_000)
                item, event = _said(len(kept))
                try:
                    store.add([item], [event])
                    kept.append(event.id)
                except DataError as error:
                    said = str(error)
            if "feedback.db" not in said or "disk is full" not in said:
                return f"said {said!r}"
            store.check()
            if [e.id for e in store.current()] != kept:
                return f"{len(kept)} were acknowledged, {store.counts()['events']} are there"
            ballast.unlink()
            store.add([item], [event])
            return "" if store.counts()["events"] == len(kept) + 1 else "freed space was not used"

    return _on_small_disks(points, folder, case)


# --- damage to stores -------------------------------------------------------------------------------


def _store(folder: Path) -> Path:
    path = folder / "feedback.db"
    if not path.exists():
        with Store.open(path) as store:
            for n in range(300):
                item, event = _said(n)
                store.add([item], [event])
    return path


def _read(path: Path) -> list[Any]:
    with Store.open(path, create=False) as store:
        store.check()
        return [list(store.current()), store.items()]


def store_cuts(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Cut a store at each percent of its length: it is refused with its name, and never taken for a new one."""
    del count, seed
    path, failures = _store(folder), []
    data, cut = path.read_bytes(), folder / "cut.db"
    for percent in range(100):
        cut.write_bytes(data[: len(data) * percent // 100])
        try:
            _read(cut)
            failures.append(f"at {percent} %: it was read")
        except DataError as error:
            if "cut.db" not in str(error):
                failures.append(f"at {percent} %: the file is not named: {error}")
    return {"cases": 100, "failures": failures}


def store_flips(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Change one bit of a store: that is refused with its name, or it hit what stands for nothing."""
    path, draw, failures = _store(folder), random.Random(seed), []
    data, whole, hurt = path.read_bytes(), _read(path), folder / "hurt.db"
    met = {"refused": 0, "nothing_changed": 0}
    for _ in range(count):
        bit = draw.randrange(8 * len(data))
        for left in folder.glob("hurt.db*"):
            left.unlink()
        hurt.write_bytes(data)
        _flip(hurt, bit)
        try:
            if _read(hurt) == whole:
                met["nothing_changed"] += 1
            else:
                failures.append(f"bit {bit}: an answer changed unseen")
        except DataError as error:
            met["refused"] += 1
            if "hurt.db" not in str(error):
                failures.append(f"bit {bit}: the file is not named: {error}")
        except (ValueError, KeyError, TypeError) as error:
            failures.append(f"bit {bit}: {type(error).__name__}: {error}")
    return {"cases": count, "failures": failures, **met}


PARTS = {
    "saves": (saves, 500), "events": (events, 500), "flips": (flips, 2000), "cuts": (cuts, 0), "files": (files, 0),
    "full": (full, 0), "store_full": (store_full, 0), "store_cuts": (store_cuts, 0), "store_flips": (store_flips, 2000),
}  # fmt: skip


def run(names: list[str], count: int | None, seed: int) -> dict[str, dict[str, Any]]:
    """Run these parts, all of them where none is named; each in a folder of its own."""
    found = {}
    for name in names or list(PARTS):
        part, usual = PARTS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found[name] = part(usual if count is None else count, seed, Path(folder))
        found[name]["seconds"] = round(time.monotonic() - began, 1)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the parts as a Markdown table."""
    lines = ["| part | cases | failures | seconds | measured |", "|---|---:|---:|---:|---|"]
    for name, part in found.items():
        rest = {k: v for k, v in part.items() if k not in ("cases", "failures", "seconds", "torn", "lost")}
        told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in rest.items())
        lines.append(f"| {name} | {part['cases']} | {len(part['failures'])} | {part['seconds']} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Read the arguments, run the parts, print the table and what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts (default: all)")
    parser.add_argument("--count", type=int, help="cases of kills and flips (default: 500 and 2,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits (default: 0)")
    parser.add_argument("--json", type=Path, help="write all that was found to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options.parts, options.count, options.seed)
    sys.stdout.write(table(found))
    failures = [f"{name}: {failure}" for name, part in found.items() for failure in part["failures"]]
    sys.stdout.write("".join(f"{failure}\n" for failure in failures))
    if options.json:
        options.json.write_text(json.dumps({**found, **describe_machine()}, indent=1) + "\n", encoding="utf-8")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
