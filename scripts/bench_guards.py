"""What guards and stops cost of a step: one run whose steps have them and do without them in turn.

    python scripts/bench_guards.py --pairs 40 [--json FILE]

A pair is two steps that follow each other; which of them has the guards changes from pair to pair, so neither a drift
of the machine nor the order favours one. Printed is the median of (seconds with / seconds without - 1), and its
quartiles over the pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import rewards.base
from align import guards, stops
from align.config import load_config
from align.run import Run, describe_machine
from align.sitting import Sitting
from trainers import DanceGRPO

SETTINGS = [
    "model.path=digits/random", "checkpoint.every=0", "evaluation.every=0", "evaluation.final_samples=20",
    "tracking.samples_every=0",
]  # fmt: skip


def without() -> contextlib.ExitStack:
    """Take all guards, time limits and what is kept for a bad step out, until the stack is closed."""

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    def null(*arguments: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        *((guards, name, nothing) for name in vars(guards) if name.startswith("require_")),
        *((Sitting, name, nothing) for name in ("see", "see_tile", "at")),
        (guards, "weights_check", lambda parameters: torch.zeros(())),
        (guards, "first_ratio_errors", lambda *rest: (0.0, 0.0)),
        (stops, "region", null), (rewards.base, "time_limit", null), (rewards.base, "cut", null),
    ]  # fmt: skip
    stack = contextlib.ExitStack()
    for owner, name, value in changed:
        stack.enter_context(patch.object(owner, name, value))
    return stack


def measure(pairs: int, out: Path) -> np.ndarray:
    """Return the ratio less 1 of every pair of steps of one run."""
    commit, state = Run.commit, contextlib.ExitStack()

    def guarded(step: int) -> bool:  # step 1 warms up: pairs are (2, 3), (4, 5) and so on
        pair, second = divmod(step - 2, 2)
        return step < 2 or bool(second) == bool(pair % 2)

    def committed(run: Run, step: int, *rest: Any) -> None:
        nonlocal state
        commit(run, step, *rest)
        state.close()
        state = contextlib.ExitStack() if guarded(step + 1) else without()

    config = load_config("digits/smoke", [*SETTINGS, f"steps={2 * pairs + 1}"])
    with patch.object(Run, "commit", committed):
        DanceGRPO(config, out=out).train()
    state.close()
    seconds = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = []
    for first in range(2, 2 * pairs + 2, 2):
        both = {guarded(step): seconds[step - 1] for step in (first, first + 1)}
        found.append(both[True] / both[False] - 1)
    return np.array(found)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.pairs, Path(folder) / "run")
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75]).tolist()
    if options.json:
        figures = {"guards_cost": middle, "guards_cost_spread": [low, high], "pairs": len(found), **describe_machine()}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"guards cost {middle:+.1%} of a step: median of {len(found)} interleaved pairs, "
        f"quartiles {low:+.1%} to {high:+.1%}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
