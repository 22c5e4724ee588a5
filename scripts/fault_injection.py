"""Kill a run, or a save, at random moments, and see whether anything acknowledged was lost.

    python scripts/fault_injection.py kills --count 30     # resumed runs against one that was never killed
    python scripts/fault_injection.py saves --count 120    # checkpoints being written and rotated

Prints a JSON object; exits with 1 when something was lost. The processes that are killed are forked from
this one, which has imported everything already, so that a kill costs a second and not ten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align import checkpoint
from align.config import load_config
from align.errors import AlignError
from align.tracking import read_jsonl
from trainers import DanceGRPO

RECIPE = [
    "model.path=digits/random", "steps=8", "checkpoint.every=2", "optimizer.ema_decay=0.9", "evaluation.every=3",
    "evaluation.final_samples=20", "evaluation.samples=20", "tracking.samples_every=4",
]  # fmt: skip


def child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    finally:
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


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything a run ends with, without its timings: weights, optimizer, average, random state, logs."""

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if not any(t in k for t in ("seconds", "time/", "memory"))}

    steps = checkpoint.checkpoints(run / "checkpoints")
    last = steps[max(steps)]
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(last.glob("*.safetensors"))}
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    logs = {
        name: [timeless(json.loads(line)) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "evaluation.jsonl", "warnings.jsonl")
        if (run / name).is_file()
    }
    summary = timeless(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return {"steps": list(steps), **hashes, "counters": timeless(state["counters"]), **logs, "summary": summary}


def kills(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill training at random moments until `count` kills are done; compare every finished run with one left alone."""
    config, draw = load_config("digits/smoke", RECIPE), random.Random(seed)
    DanceGRPO(config, out=folder / "here").train()  # imports what a run imports, so that kills hit training

    def train(out: Path) -> Callable[[], None]:
        return lambda: DanceGRPO(config, out=out).train() and None

    began = time.monotonic()
    if not finished(child(train(folder / "alone")), 600):
        raise SystemExit("the run that is left alone did not end")
    alone, whole = time.monotonic() - began, fingerprint(folder / "alone")
    done, runs, differing, stood = 0, 0, [], []
    while done < count:
        out = folder / f"killed_{runs}"
        while not finished(child(train(out)), draw.uniform(0.0, alone) if done < count else 600):
            done += 1
            stood.append(len(read_jsonl(out / "metrics.jsonl")[0]))
        differing += [f"run {runs}: {key}" for key, value in fingerprint(out).items() if value != whole[key]]
        runs += 1
        shutil.rmtree(out)
    return {
        "kills": done, "runs": runs, "steps_done_at_the_kills": stood, "seconds_of_one_run": round(alone, 2),
        "differing": differing,
    }  # fmt: skip


def saves(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill a process that saves without pause; every visible checkpoint must be whole, none acknowledged lost."""
    draw, torn, lost, acknowledged, visible = random.Random(seed), [], [], 0, 0
    tensors = {"model": {f"w{i}": torch.randn(256, 1024) for i in range(4)}, "optimizer": {"m": torch.randn(512, 1024)}}
    root = folder / "checkpoints"

    def save_on_and_on(write: int, start: int) -> Callable[[], None]:
        def work() -> None:
            for step in range(start, start + 10_000):
                checkpoint.save(root, step, tensors, {"step": step}, keep=2)
                os.write(write, b"%d\n" % step)

        return work

    for kill in range(count):
        read, write = os.pipe()
        pid = child(save_on_and_on(write, max(checkpoint.checkpoints(root), default=0) + 1))
        os.close(write)
        finished(pid, draw.uniform(0.0, 0.25))
        with os.fdopen(read) as pipe:
            acknowledged = max([acknowledged, *(int(line) for line in pipe.read().split())])
        for step, path in checkpoint.checkpoints(root).items():
            visible += 1
            try:
                checkpoint.verify(path)
            except (AlignError, OSError, ValueError, KeyError) as error:
                torn.append(f"kill {kill}, step {step}: {error}")
        found = checkpoint.load_latest(root)
        if (found.step if found else 0) < acknowledged:
            lost.append(f"kill {kill}: step {acknowledged} was acknowledged")
    return {"kills": count, "saves": acknowledged, "checkpoints_verified": visible, "torn": torn, "lost": lost}


def main() -> int:
    """Read the arguments, run one of the two, and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "saves"))
    parser.add_argument("--count", type=int, default=30, help="how many times to kill (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"kills": kills, "saves": saves}[options.what](options.count, options.seed, Path(folder))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return int(any(found.get(name) for name in ("differing", "torn", "lost")))


if __name__ == "__main__":
    sys.exit(main())
