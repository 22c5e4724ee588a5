"""Whether the demo finds the hidden taste and keeps legibility, over seeds.

    python scripts/bench_demo.py --json FILE --work DIR [--seeds 0-4] [key=value ...]

Runs `align demo` once a seed in a folder of its own, and gathers what its summary says and what `check_demo.py` finds
wrong with it. A seed whose summary is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from check_demo import failures

from align.run import describe_machine

KEPT = (
    "heldout_gain", "heldout_accuracy_before", "heldout_accuracy_after", "diversity_before", "diversity_after",
    "first_ratio_error_max", "feq_per_sample", "taste_gain", "legibility_points", "win_rate", "cpu_seconds", "seconds",
    "peak_memory_mb",
)  # fmt: skip


def summary(seed: int, work: Path, more: list[str]) -> dict[str, Any]:
    """Return what the demo of a seed says of itself, and run it where it has not said so yet."""
    folder = work / f"seed_{seed}"
    file = folder / "summary.json"
    if not file.is_file():
        command = ["-m", "align.cli", "demo", "--out", str(folder), "--seed", str(seed), *more]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    said = json.loads(file.read_text(encoding="utf-8"))
    return {**{key: said[key] for key in KEPT}, "failures": failures(said)}


def main() -> None:
    """Run the seeds and write the JSON, after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the demos are kept")
    parser.add_argument("--seeds", default="0-4", metavar="A-B", help="(default: 0-4)")
    options, more = parser.parse_known_args()
    first, _, last = options.seeds.partition("-")
    found: dict[str, Any] = {}
    for seed in range(int(first), int(last or first) + 1):
        found[str(seed)] = summary(seed, options.work, more)
        text = json.dumps({"seeds": found, "arguments": more, **describe_machine()}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    for key in ("heldout_gain", "taste_gain"):
        sys.stdout.write(f"{key}: {statistics.median(one[key]['mean'] for one in found.values()):.3f} in the median\n")


if __name__ == "__main__":
    main()
