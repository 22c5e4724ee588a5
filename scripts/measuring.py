"""What the benchmarks share: what a call costs, the largest memory of this process, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def cost(work: Callable[[], object]) -> float:
    """Return the seconds of one call: of a GPU by events, else CPU time of this process, whatever runs beside it."""
    import torch

    if not torch.cuda.is_available():
        began = time.process_time()
        work()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def over_rounds(name: str, values: Sequence[float]) -> dict[str, float | list[float]]:
    """Return the median of what the rounds gave under a name, and their range under it with `_spread`."""
    return {name: statistics.median(values), f"{name}_spread": [min(values), max(values)]}


def peak_mb() -> float:
    """Return this process's largest resident size in MB, without that of its parent, which `getrusage` has in it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("This needs Linux: /proc/self/status has no VmHWM")
