"""Holds the demo to what it promises: python scripts/check_demo.py runs/demo/summary.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def failures(summary: dict) -> list[str]:
    """Return what the summary of a demo run fails to show, one sentence each."""
    found = []
    if not summary["heldout_gain"]["ci_low"] > 0:
        found.append(f"the held-out gain is not above 0: {summary['heldout_gain']}")
    lost = summary["heldout_accuracy_before"] - summary["heldout_accuracy_after"]
    if lost > 0.01:
        found.append(f"held-out accuracy fell by {100 * lost:.1f} points")
    if not summary["diversity_after"] >= 0.8 * summary["diversity_before"]:
        found.append(f"diversity fell from {summary['diversity_before']:.3f} to {summary['diversity_after']:.3f}")
    if not summary["first_ratio_error_max"] <= 1e-6:
        found.append(f"the first ratio was off by {summary['first_ratio_error_max']:.1e}")
    if not summary["taste_gain"]["ci_low"] > 0:
        found.append(f"what people like did not rise: {summary['taste_gain']}")
    if not min(summary["win_rate"][protocol]["rate"] for protocol in ("ratings", "rankings")) > 0.5:
        found.append(f"people do not prefer what was trained: {summary['win_rate']}")
    if not summary["cpu_seconds"] <= 800:
        found.append(f"it took {summary['cpu_seconds']:.0f} CPU-seconds, more than 800")
    if summary["heldout_gain"]["n"] < 2000:
        found.append(f"only {summary['heldout_gain']['n']} held-out samples were compared")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    summary = json.loads(path.read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    problems = failures(summary)
    for problem in problems:
        sys.stderr.write(f"demo: {problem}\n")
    sys.exit(1 if problems else 0)
