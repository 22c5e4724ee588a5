"""What the feedback store costs: writing one by one and in groups, reading a million events, and the page on top.

    python scripts/bench_feedback.py --json bench.json [--folder DIR] [--events 1000000] [--rounds 5]

grouped_vs_single     events a second of a `Writer` that 50 threads post to / with a commit an event   (>= 5)
add_events_a_second   one `Store.add` of many events
current_seconds       iterating over the current view of `--events` events
columns_seconds       the same as columns, without the items; and with them
annotator_ms, ...     the current view of one annotator, of one item, of a key that nothing has
peak_mb               the most memory the process held after each of these
page                  what `bench_feedback_page.py` measures of the annotation page, with --users

Both ways of writing alternate within each round on the same disk, and the medians of the rounds' ratios are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import over_rounds, peak_mb

from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store, Writer
from align.run import describe_machine


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def thumbs(items: list[Item], count: int, name: str) -> list[FeedbackEvent]:
    """Return `count` thumbs of one annotator after another, each about one item."""
    ids = [item.id for item in items]
    return [
        FeedbackEvent("binary", (ids[n % len(ids)],), n % 3 > 0, annotator=f"{name}{n // len(ids)}", key="thumb")
        for n in range(count)
    ]


def compare_writing(folder: Path, events: int, threads: int) -> dict[str, float]:
    """Return events a second of both ways of writing, from as many threads and on the same disk.

    A commit an event is the same `Writer` with groups of one, so that the group is all that differs; `single_direct`
    is one plain loop of `Store.add`.
    """
    items = [Item("p", f"r{n}") for n in range(events)]
    rates = {}
    for way, group in (("single", 1), ("grouped", 512)):
        path = folder / f"{way}{time.time_ns()}.db"
        with Store.open(path) as store:
            store.add(items)
        parts = [thumbs(items, events, way)[n::threads] for n in range(threads)]
        with Writer(path, group=group) as writer:

            def annotate(part: list[FeedbackEvent], writer: Writer = writer) -> None:
                for future in [writer.submit(events=[event]) for event in part]:
                    future.result()

            workers = [threading.Thread(target=annotate, args=(part,)) for part in parts]
            rates[way] = events / seconds(lambda started=workers: _run(started))
    with Store.open(folder / f"direct{time.time_ns()}.db") as store:
        store.add(items)
        said = thumbs(items, events // 4, "direct")
        rates["single_direct"] = len(said) / seconds(lambda: [store.add(events=[event]) for event in said])
    return rates


def _run(workers: list[threading.Thread]) -> None:
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def read_many(folder: Path, events: int) -> dict[str, Any]:
    """Fill a store with `events` events about a tenth as many items, and time what reads it."""
    found: dict[str, Any] = {"peak_mb": {}}
    items = [Item(f"prompt {n // 4}", f"response {n} " + "word " * 40) for n in range(max(1, events // 10))]
    with Store.open(folder / "many.db") as store:
        store.add(items)
        filled = 0.0
        for start in range(0, events, 50_000):
            part = thumbs(items, min(50_000, events - start), f"{start}-")
            filled += seconds(lambda part=part: store.add(events=part))
        found |= {"events": events, "add_events_a_second": events / filled, "mb": store.counts()["bytes"] / 2**20}
        found["peak_mb"]["add"] = peak_mb()
        began = time.process_time()
        found["current_seconds"] = seconds(lambda: sum(1 for _ in store.current()))
        found["current_cpu_seconds"] = time.process_time() - began
        found["peak_mb"]["current"] = peak_mb()
        began = time.process_time()
        found["columns_seconds"] = seconds(lambda: store.events_with_items(content=False))
        found["columns_cpu_seconds"] = time.process_time() - began
        found["peak_mb"]["columns"] = peak_mb()
        found["columns_and_items_seconds"] = seconds(store.events_with_items)
        found["peak_mb"]["columns_and_items"] = peak_mb()
        found["counts_seconds"] = seconds(store.counts)
        found["check_seconds"] = seconds(store.check)
        for name, chosen in (("annotator", "0-0"), ("items", [items[0].id])):
            found[f"{name}_ms"] = 1000 * seconds(lambda f=name, c=chosen: list(store.current(**{f: c})))
        found["unknown_key_ms"] = 1000 * seconds(lambda: list(store.current(key="none")))
    return found


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary one)")
    parser.add_argument("--events", type=int, default=1_000_000, help="events of the store that is read")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison of the two ways of writing")
    parser.add_argument("--written", type=int, default=2000, help="events written in each way and round")
    parser.add_argument("--threads", type=int, default=50, help="that write at once")
    parser.add_argument("--users", type=int, default=50, help="annotators of the page at once; 0 leaves it out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rounds = [compare_writing(folder, options.written, options.threads) for _ in range(options.rounds)]
        ratios = [r["grouped"] / r["single"] for r in rounds]
        result: dict[str, Any] = {
            **over_rounds("grouped_vs_single", ratios),
            "grouped_vs_direct": statistics.median(r["grouped"] / r["single_direct"] for r in rounds),
            "events_a_second": {way: statistics.median(r[way] for r in rounds) for way in rounds[0]},
            "threads": options.threads,
            "read": read_many(folder, options.events) if options.events else {},
        }
        if options.users:
            from bench_feedback_page import page_latency

            result["page"] = page_latency(options.users, folder=folder)
    result |= describe_machine()
    Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
