"""What a first use costs: start-up, and the embedded model that builds itself.

    python scripts/bench_first_run.py --json FILE [--rounds 9] [--recipe default]

import_align_seconds   `import align` in a process of its own, less bare Python                        (< .3)
help_seconds           `align --help`, the same                                                        (< .3)
base                   pretraining of the model in an empty cache: CPU seconds (<= 120) and its card,
                       accuracy (.80 to .97), pixel std and variance within a class (>= .85), at guidance 1

Start-up is CPU time of the child processes, of arms that alternate; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from align.diffusion.digits import build_digits
from align.run import describe_machine

ARMS = {
    "bare": ("-c", "pass"),
    "import_align": ("-c", "import align"),
    "help": ("-m", "align.cli", "--help"),
}


def child_seconds(command: tuple[str, ...]) -> float:
    """Return the CPU seconds of one process of Python."""

    def used() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    began = used()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return used() - began


def start_up(rounds: int) -> dict[str, Any]:
    """Return what starting costs over bare Python, medians and spreads of the rounds."""
    for command in ARMS.values():
        child_seconds(command)
    rows = [{arm: child_seconds(command) for arm, command in ARMS.items()} for _ in range(rounds)]
    found: dict[str, Any] = {"bare_seconds": statistics.median(row["bare"] for row in rows)}
    for arm in ("import_align", "help"):
        over = [row[arm] - row["bare"] for row in rows]
        found |= {f"{arm}_seconds": statistics.median(over), f"{arm}_seconds_spread": [min(over), max(over)]}
    return found


def base(recipe: str) -> dict[str, Any]:
    """Build the embedded model in an empty cache and return its card."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"ALIGN_CACHE": folder}):
        card = json.loads((build_digits(recipe, progress=False) / "card.json").read_text(encoding="utf-8"))
    return {key.removesuffix(".0"): value for key, value in card.items()}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--rounds", type=int, default=9, help="of start-up; medians are reported")
    parser.add_argument("--recipe", default="default", help="of the embedded model (default: default)")
    options = parser.parse_args()
    found = start_up(options.rounds) | {"base": base(options.recipe), **describe_machine()}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({k: v for k, v in found.items() if k.endswith("seconds")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
