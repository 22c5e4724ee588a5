"""Kill, stop and resume training at random moments, and see whether anything acknowledged was lost.

    python -m scripts.fault_injection kills --count 30                   # SIGKILL; resumed runs against one left alone
    python -m scripts.fault_injection kills --trainer kto --count 30
    python -m scripts.fault_injection kills --ranks 2 --deepspeed zero2 --count 40
    python -m scripts.fault_injection stops --count 100                  # SIGTERM: saved within the grace time
    python -m scripts.fault_injection stops --ranks 2 --count 20

Prints a JSON object; exits with 1 when something was lost. What is killed is forked from this process, which has
imported everything already, so that a kill costs a second and not ten. For checkpoints and stores themselves see
`kill_save.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align import checkpoint
from align.cli import main as align
from align.config import load_config
from align.tracking import read_jsonl
from scripts.kill_save import child, finished
from trainers import trainer_for

RECIPE = [
    "model.path=digits/random", "steps=8", "checkpoint.every=2", "optimizer.ema_decay=0.9", "evaluation.every=3",
    "evaluation.final_samples=20", "evaluation.samples=20", "tracking.samples_every=4",
]  # fmt: skip
_LANGUAGE = [
    "steps=40",
    "batch_size=8",
    "microbatch=4",
    "evaluation.every=15",
    "evaluation.rows=8",
    "checkpoint.every=7",
]
_IMAGES = [*RECIPE[:3], *RECIPE[4:], "model.lora.rank=4", "sampler.solver_steps=4", "evaluation.solver_steps=4"]
# A recipe of every trainer, made small: its name and what is changed.
RECIPES = {
    "dance_grpo": ("digits/smoke", RECIPE),
    "forward": ("digits/nft", [*_IMAGES, "prompts_per_step=3", "group_size=4"]),
    "offline": ("digits/diffusion_kto", [*_IMAGES[:-2], "evaluation.solver_steps=4", "batch_size=8"]),
    "kto": ("kto/smoke", [*_LANGUAGE, "evaluation.max_new_tokens=4"]),
    "bco": ("bco/smoke", [*_LANGUAGE, "evaluation.max_new_tokens=4"]),
    "dpo": ("dpo/smoke", [*_LANGUAGE, "evaluation.max_new_tokens=4"]),
    "sft": ("sft/smoke", _LANGUAGE),
    "rluf": ("rluf/smoke", ["steps=6", "evaluation.rows=8", "evaluation.prompts=8", "checkpoint.every=2"]),
}
GRACE = 60  # seconds in which a run that was told to stop must have saved and ended


def _timeless(row: Any) -> Any:
    if isinstance(row, dict):
        return {k: _timeless(v) for k, v in row.items() if not any(t in k for t in ("seconds", "time", "memory"))}
    return [_timeless(value) for value in row] if isinstance(row, list) else row


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything a run ends with, without its timings: weights, optimizer, average, random state, logs."""
    steps = checkpoint.checkpoints(run / "checkpoints")
    last = steps[max(steps)]
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(last.rglob("*.safetensors"))}
    state = _timeless(json.loads((last / "state.json").read_text(encoding="utf-8")))
    logs = {
        name: [_timeless(json.loads(line)) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "evaluation.jsonl", "generations.jsonl", "warnings.jsonl")
        if (run / name).is_file()
    }
    summary = _timeless(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return {"steps": list(steps), **hashes, "state": state, **logs, "summary": summary}


def _launch(work: Callable[[], Any], ranks: int) -> list[int]:
    """Fork `work` as a launcher's processes, which find each other, or as one process; return their pids."""
    if ranks == 1:
        return [child(work)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

    def ranked(rank: int) -> Callable[[], None]:
        def named() -> None:
            os.environ.update({**world, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"})
            work()

        return named

    return [child(ranked(rank)) for rank in range(ranks)]


def _all_finished(pids: list[int], seconds: float) -> bool:
    """Wait that long for the first process; where it is still there, kill them all at once."""
    if finished(pids[0], seconds):
        return [finished(pid, 60) for pid in pids[1:]].count(False) == 0
    for pid in pids[1:]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return False


def kills(
    count: int, seed: int, folder: Path, trainer: str = "dance_grpo", ranks: int = 1, deepspeed: str | None = None
) -> dict[str, Any]:
    """Kill training at random moments until `count` kills are done; compare every finished run with one left alone."""
    recipe, changes = RECIPES[trainer]
    config, draw = load_config(recipe, changes), random.Random(seed)
    _warm(config, deepspeed, folder / "here")

    def train(out: Path) -> Callable[[], None]:
        return lambda: trainer_for(config, out=out, deepspeed=deepspeed).train() and None

    began = time.monotonic()
    if not _all_finished(_launch(train(folder / "alone"), ranks), 600):
        raise SystemExit("the run that is left alone did not end")
    alone, whole = time.monotonic() - began, fingerprint(folder / "alone")
    done, runs, differing, stood = 0, 0, [], []
    while done < count:
        out = folder / f"killed_{runs}"
        while not _all_finished(_launch(train(out), ranks), draw.uniform(0.0, alone) if done < count else 600):
            done += 1
            stood.append(len(read_jsonl(out / "metrics.jsonl")[0]) if (out / "metrics.jsonl").exists() else 0)
        found = fingerprint(out)
        differing += [f"run {runs}: {key}" for key in whole if found.get(key) != whole[key]]
        runs += 1
        shutil.rmtree(out)
    return {
        "trainer": trainer, "ranks": ranks, "deepspeed": deepspeed, "kills": done, "runs": runs,
        "steps_done_at_the_kills": stood, "seconds_of_one_run": round(alone, 2), "differing": differing,
    }  # fmt: skip


def _warm(config: Any, deepspeed: str | None, out: Path) -> None:
    """Run once here, which imports all that a run imports, so that kills hit training."""
    trainer_for(config, out=out).train()
    if deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")


def stops(count: int, seed: int, folder: Path, trainer: str = "dance_grpo", ranks: int = 1) -> dict[str, Any]:
    """Send SIGTERM at `count` random moments, from the start of the command on; all must save and end in `GRACE`."""
    recipe, changes = RECIPES[trainer]
    draw, failures, took = random.Random(seed), [], []
    met = {"saved": 0, "complete": 0, "nothing_to_save": 0}
    codes: dict[str, int] = {}
    _warm(load_config(recipe, changes), None, folder / "here")

    def train(out: Path) -> Callable[[], None]:
        return lambda: os._exit(align(["train", recipe, *changes, "--out", str(out)]))

    began = time.monotonic()
    _all_finished(_launch(train(folder / "alone"), ranks), 600)
    alone = time.monotonic() - began
    for n in range(count):
        out = folder / f"stopped_{n}"
        pids = _launch(train(out), ranks)
        time.sleep(draw.uniform(0.0, alone))
        began, chosen = time.monotonic(), draw.choice(pids)
        os.kill(chosen, signal.SIGTERM)
        ended = {pid: _ended(pid, began + GRACE) for pid in pids}
        took.append(time.monotonic() - began)
        codes[" ".join(map(str, sorted(ended.values())))] = codes.get(" ".join(map(str, sorted(ended.values()))), 0) + 1
        how = _state(out, list(ended.values()))
        if how in met:
            met[how] += 1
        else:
            failures.append(f"stop {n}, exit codes {list(ended.values())}: {how}")
        shutil.rmtree(out, ignore_errors=True)
    return {
        "trainer": trainer, "ranks": ranks, "stops": count, **met, "exit_codes": codes,
        "seconds_of_one_run": round(alone, 2), "longest_seconds": round(max(took), 2), "failures": failures,
    }  # fmt: skip


def _ended(pid: int, until: float) -> int:
    """Return the exit code of a process; it is killed, and counts as -9, where it is still there at that time."""
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _state(out: Path, codes: list[int]) -> str:
    """Say how a run was left: saved at the last step it logged, complete, before its first step, or what is wrong."""
    logged = read_jsonl(out / "metrics.jsonl")[0] if (out / "metrics.jsonl").exists() else []
    found = checkpoint.load_latest(out / "checkpoints") if (out / "checkpoints").exists() else None
    if (found.step if found else 0) != (logged[-1]["step"] if logged else 0):
        return f"logged {len(logged)} steps, and saved {found and found.step}"
    if set(codes) == {0}:
        return "complete"
    if not logged:
        return "nothing_to_save"
    return "saved" if set(codes) == {130} else "it did not end as a stopped run"


def main() -> int:
    """Read the arguments, run one of the two, and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "stops"))
    parser.add_argument("--count", type=int, default=30, help="how many times (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--trainer", choices=RECIPES, default="dance_grpo", help="(default: dance_grpo)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run (default: 1)")
    parser.add_argument("--deepspeed", help="settings of DeepSpeed, as of `align train`; for kills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared = (options.count, options.seed)
    with tempfile.TemporaryDirectory() as name:
        if options.what == "kills":
            found = kills(*shared, Path(name), options.trainer, options.ranks, options.deepspeed)
        else:
            found = stops(*shared, Path(name), options.trainer, options.ranks)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return int(any(found.get(name) for name in ("differing", "failures")))


if __name__ == "__main__":
    sys.exit(main())
