"""How long the annotation page takes: one annotator alone, then many at once, through real HTTP to a real server.

    python scripts/bench_feedback_page.py --users 50 --rounds 3 --json page.json

A page is one answer: the post that stores it (on disk before it is acknowledged) and brings the next screen. Everyone
pauses between answers, as people do, only far shorter: `think` seconds on average.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from align.feedback.crowd import Visitor
from align.run import describe_machine

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 5.0
TEXT = "The light of the sky is scattered by the air, and the short wavelengths are scattered the most. " * 6


def annotate(address: str, users: int, answers: int, think: float, label: str) -> list[float]:
    """Have `users` annotators answer at once, and return how many seconds every answer and its next screen took."""
    found: list[list[float]] = []

    def work(place: int) -> None:
        person, draw, taken = Visitor(address, f"{label} {place}", scripts=True), random.Random(place), []
        person.screen()
        entered.wait()
        for _ in range(answers):
            time.sleep(draw.uniform(0.5, 1.5) * think)
            began = time.perf_counter()
            person.answer(d0="5", d1="4")
            taken.append(time.perf_counter() - began)
        person.leave()
        found.append(taken)

    entered = threading.Barrier(users)
    people = [threading.Thread(target=work, args=(place,)) for place in range(users)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    if len(found) < users:
        raise SystemExit(f"{users - len(found)} of {users} annotators did not come to their end")
    return [seconds for taken in found for seconds in taken]


def page_latency(
    users: int = 50, *, answers: int = 20, think: float = 1.0, alone: int = 100, folder: Path | None = None
) -> dict[str, Any]:
    """Return the latency of a page for one annotator and for `users` at once, in milliseconds, and their ratio.

    Args:
        users: annotators at once.
        answers: screens that each of them answers.
        think: average pause before an answer, in seconds, uniform within half and one and a half of it.
        alone: screens that the lone annotator answers, with pauses of a tenth of a second.
        folder: where the store is made; a temporary folder by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as made:
        task = {"name": "bench", "kind": "rating", "data": "data.jsonl", "dimensions": ["accuracy", "coherence"]}
        (Path(made) / "task.yaml").write_text(json.dumps({**task, "annotators_per_item": users + 1}), encoding="utf-8")
        rows = [json.dumps({"prompt": f"Question {i}?", "response": f"{i}. {TEXT}"}) for i in range(400)]
        (Path(made) / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
        command = [sys.executable, "-m", "align.cli", "feedback", "serve", "task.yaml", "--port", "0"]
        command += ["--json", "ready.json"]
        path = {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=made, stdout=subprocess.PIPE, text=True, env={**os.environ, **path}
        ) as server:
            try:
                if server.stdout is None or not server.stdout.readline():
                    raise RuntimeError("the server did not start")
                address = json.loads((Path(made) / "ready.json").read_text(encoding="utf-8"))["address"]
                annotate(address, 1, 20, 0.05, "warm")
                single = annotate(address, 1, alone, 0.1, "alone")
                many = annotate(address, users, answers, think, "many")
            finally:
                server.terminate()
    single_ms = 1000 * statistics.median(single)
    ranked = sorted(1000 * seconds for seconds in many)
    p95 = ranked[min(len(ranked) - 1, round(0.95 * len(ranked)))]
    return {
        "users": users, "think_s": think, "pages": len(many), "single_median_ms": round(single_ms, 2),
        "many_median_ms": round(statistics.median(ranked), 2), "many_p95_ms": round(p95, 2),
        "p95_over_single_median": round(p95 / single_ms, 2),
    }  # fmt: skip


def main() -> int:
    """Measure, write the figures, and fail when the ratio is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--think", type=float, default=1.0, help="average pause of an annotator, in seconds")
    parser.add_argument("--rounds", type=int, default=1, help="of one annotator and then many; medians are reported")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    rounds = [page_latency(options.users, think=options.think) for _ in range(options.rounds)]
    ratios = sorted(one["p95_over_single_median"] for one in rounds)
    ratio = statistics.median(ratios)
    found = {
        "p95_over_single_median": ratio, "p95_over_single_median_spread": [ratios[0], ratios[-1]], "limit": LIMIT,
        "ok": ratio <= LIMIT, "rounds": rounds, **describe_machine(),
    }  # fmt: skip
    text = json.dumps(found, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        Path(options.json).write_text(text, encoding="utf-8")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
