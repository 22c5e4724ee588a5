"""How far `align plan` is off: memory of a process and seconds of a step, on 1, 2 and 4 CPU processes.

    python scripts/bench_plan.py [--hidden 768] [--layers 8] [--json FILE]

Trains KTO on a random Qwen2 of tens of millions of weights under every engine. A process's peak is compared with the
plan's, each less that of a model a hundred times smaller, so that what Python and torch take is on neither side. The
step is compared with `rows / W x F_eq x seconds of a forward`, the forward timed alone in this process: on a machine
with fewer free cores than processes, the ratio counts how many processes share one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.commands.jobs import describe_job
from align.commands.plan import make_plan
from align.config import load_config
from align.plan import held
from align.run import describe_machine
from align.tracking import read_jsonl
from trainers.tiny_language import build_tiny

ENGINES = ("data_parallel", "zero1", "zero2", "zero3", "fsdp2")
SMALL = (64, 2)
LENGTH = 16


def settings(model: Path, steps: int) -> list[str]:
    """Return the changes to `kto/smoke`: every row of one length, no evaluation, no checkpoint before the end."""
    return [
        f"model.path={model}", f"data.max_length={LENGTH}", "reference.mode=precomputed", f"steps={steps}",
        "evaluation.every=0", "evaluation.rows=8", "evaluation.prompts=0", "checkpoint.every=0", "batch_size=16",
        "microbatch=16",
    ]  # fmt: skip


def run(model: Path, engine: str, processes: int, out: Path, steps: int) -> dict[str, float]:
    """Train, and return the first process's peak in bytes and the median seconds of a step."""
    command = [sys.executable, "-m", "align.cli", "train", "kto/smoke", "--out", str(out), *settings(model, steps)]
    if engine.startswith("zero"):
        command += ["--launch", "deepspeed", "--nproc", str(processes), "--deepspeed", engine]
    elif processes > 1:
        command += ["--launch", "torchrun", "--nproc", str(processes), *(["--fsdp"] if engine == "fsdp2" else [])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    rows = read_jsonl(out / "metrics.jsonl")[0]
    return {
        "peak": 1e6 * max(row["peak_memory_mb"] for row in rows),
        "seconds": statistics.median(row["seconds"] for row in rows[1:]),
    }


def compare(large: Path, small: Path, folder: Path, counts: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Return a row for each engine and count: measured, planned, and their ratio."""
    jobs = {model: describe_job(load_config("kto/smoke", settings(model, steps)))[0] for model in (large, small)}
    torch.set_num_threads(1)  # as each process has
    forward = make_plan("kto/smoke", settings(large, steps), measure=True)["forward_seconds"]
    rows = []
    for processes in counts:
        for engine in ENGINES if processes > 1 else ("single",):
            found = {
                model: run(model, engine, processes, folder / f"{engine}_{processes}_{model.name}", steps)
                for model in (large, small)
            }
            measured = found[large]["peak"] - found[small]["peak"]
            planned = held(jobs[large], engine, processes).peak - held(jobs[small], engine, processes).peak
            seconds = jobs[large].rows / processes * jobs[large].feq * forward
            rows.append({
                "engine": engine, "processes": processes, "measured_mb": measured / 1e6, "planned_mb": planned / 1e6,
                "memory_ratio": planned / measured, "step_seconds": found[large]["seconds"],
                "planned_seconds": seconds, "seconds_ratio": seconds / found[large]["seconds"],
            })  # fmt: skip
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
    return rows


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    return (
        f"| {row['engine']} | {row['processes']} | {row['measured_mb']:,.0f} | {row['planned_mb']:,.0f} "
        f"| {row['memory_ratio']:.2f} | {row['step_seconds']:.2f} | {row['planned_seconds']:.2f} "
        f"| {row['seconds_ratio']:.2f} |"
    )


def main() -> None:
    """Measure, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--counts", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    heading = ("engine", "processes", "peak MB", "planned", "ratio", "step s", "planned", "ratio")
    sys.stdout.write(f"| {' | '.join(heading)} |\n{'|---' * len(heading)}|\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        large = build_tiny(root / "large", hidden=args.hidden, layers=args.layers)
        small = build_tiny(root / "small", hidden=SMALL[0], layers=SMALL[1])
        rows = compare(large, small, root, args.counts, args.steps)
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, **describe_machine()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
