"""Eight writers in one process, four with connections of their own and four sharing a `Writer`, until it is killed.

    python feedback_writer.py STORE FOLDER PROCESS

Writer w says events w-0, w-1, ... and appends a number to FOLDER/w once it was acknowledged. A new process goes on
after the last number there, so that the event in flight when the old one died is said again.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store, Writer


def said(writer: str, n: int) -> tuple[Item, FeedbackEvent]:
    """Return event n of a writer; every third replaces the one before it."""
    item = Item("p", f"{writer} {n // 3}")
    answer = FeedbackEvent(
        "ordinal", (item.id,), 1 + n % 7, scale=(1, 7), annotator=writer, id=f"{writer}-{n}",
        identifier=f"{writer} {n - n % 3 // 2}", ts=10**12 + n,
    )  # fmt: skip
    return item, answer


def write(writer: str, folder: Path, add) -> None:
    log = os.open(folder / writer, os.O_CREAT | os.O_APPEND | os.O_RDWR)
    n = len(os.read(log, 1 << 24).split())
    while True:
        item, event = said(writer, n)
        added = add([item], [event])[0]
        if added.event != event or added.status not in ("added", "superseded", "unchanged"):
            os.write(2, f"{writer}-{n}: {added}\n".encode())
            os._exit(3)
        os.write(log, f"{n}\n".encode())
        n += 1


def main() -> None:
    path, folder, process = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    shared = Writer(path)
    ways = [Store.open(path).add] * 4 + [lambda items, events: shared.submit(items, events).result()] * 4
    for n, add in enumerate(ways):
        threading.Thread(target=write, args=(f"{process}.{n}", folder, add), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
