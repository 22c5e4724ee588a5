"""Processes for tests: a few that form a world, the command line in one of its own, and what a launcher left behind.

They are forked from the test, which has imported everything, so each costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a process ended: what it returned or raised, its exit code (minus the signal's number), and its output."""

    code: int
    value: Any
    output: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(work: Callable[[], Any], folder: Path, name: str, environment: dict[str, str]) -> int:
    """Run `work` in a forked process, which leaves its result and output in files; return its pid."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(folder / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update(environment)
        torch.set_num_threads(1)
        try:
            value = work()
            code = 0
        except Exception as error:  # noqa: BLE001 (it is handed to the test)
            value = error
        (folder / f"{name}.value").write_bytes(pickle.dumps(value))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(pid: int, folder: Path, name: str, within: float) -> Ended:
    """Wait for a forked process. It is killed, and the test fails, when it takes longer than `within` seconds."""
    until = time.monotonic() + within
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"a process still ran after {within} s: {(folder / f'{name}.out').read_text()[-2000:]}")
        time.sleep(0.01)
    left = folder / f"{name}.value"
    value = pickle.loads(left.read_bytes()) if left.is_file() else None  # noqa: S301 (written above)
    return Ended(os.waitstatus_to_exitcode(status), value, (folder / f"{name}.out").read_text())


def world(size: int, work: Callable[[], Any], folder: Path, *, within: float = 120) -> list[Ended]:
    """Run `work` in each of `size` processes that find each other as a launcher's do; return how they ended, by rank."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["DS_ACCELERATOR"] = "cpu"
    if folder.is_dir():
        shutil.rmtree(folder)
    pids = [
        fork(work, folder, f"rank_{rank}", {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    return [ended(pid, folder, f"rank_{rank}", within) for rank, pid in enumerate(pids)]


def align(folder: Path, *arguments: str, before: Callable[[], None] = lambda: None, within: float = 120) -> Ended:
    """Run `align <arguments>` in a process of its own, after `before`; its exit code is `value`."""
    from align.cli import main

    def work() -> int:
        before()
        return main(list(arguments))

    return ended(fork(work, folder, "align", {}), folder, "align", within)


@contextlib.contextmanager
def launched(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Start a command, with its output in `log`, as leader of a session that is killed when the block is left."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        )  # fmt: skip
        try:
            yield process
        finally:
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def rank_pid(launcher: int, rank: int) -> int:
    """The process of this rank below a launcher."""
    for pid in descendants(launcher):
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    raise AssertionError(f"no process of rank {rank}")


def wait_for_step(out: Path, step: int, within: float = 120) -> None:
    """Return when the run in `out` has a checkpoint of this step or a later one."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if any(int(p.name[5:]) >= step for p in (out / "checkpoints").glob("step_*")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} after {within} s")


def metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
