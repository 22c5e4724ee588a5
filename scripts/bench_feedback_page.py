"""How long the annotation page takes: one annotator alone, then many at once, through real HTTP to a real server.

    python scripts/bench_feedback_page.py --users 50 --json page.json

A page is one answer: the post that stores it (on disk before it is acknowledged) and brings the next screen. Everyone
pauses between answers, as people do, only far shorter: `think` seconds on average.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 5.0
TICKET = re.compile(rb'name="ticket" value="([^"]+)"')
TEXT = "The light of the sky is scattered by the air, and the short wavelengths are scattered the most. " * 6


class Person:
    """One annotator on one kept-alive connection."""

    def __init__(self, address: str) -> None:
        self.address, self.cookie, self.page = address, "", b""

    async def enter(self, name: str) -> None:
        """Connect, sign in and open the first screen."""
        host, _, port = self.address.partition(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        headers = await self._ask("POST", "/enter", {"who": name})
        self.cookie = re.findall(r"(?i)set-cookie: ([^;\r]+)", headers)[0]
        await self._ask("GET", "/work")

    async def answer(self) -> float:
        """Answer the screen and read the next one; return how many seconds that took."""
        ticket = TICKET.search(self.page)
        if ticket is None:
            raise RuntimeError(f"no screen to answer: {self.page[:200]!r}")
        began = time.perf_counter()
        await self._ask("POST", "/answer", {"ticket": ticket[1].decode(), "d0": "5", "d1": "4", "latency_ms": "900"})
        return time.perf_counter() - began

    async def _ask(self, method: str, path: str, fields: dict[str, str] | None = None) -> str:
        body = urllib.parse.urlencode(fields or {}).encode()
        lines = [
            f"{method} {path} HTTP/1.1", f"host: {self.address}", f"origin: http://{self.address}", "hx-request: true",
            f"cookie: {self.cookie}", "content-type: application/x-www-form-urlencoded", f"content-length: {len(body)}",
        ]  # fmt: skip
        head = "\r\n".join(lines) + "\r\n\r\n"
        self._writer.write(head.encode() + body)
        headers = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"(?i)content-length: (\d+)", headers)
        self.page = await self._reader.readexactly(int(length[1])) if length else b""
        if not headers.startswith(("HTTP/1.1 200", "HTTP/1.1 303")):
            raise RuntimeError(f"{method} {path}: {headers.splitlines()[0]}")
        return headers

    def leave(self) -> None:
        """Close the connection."""
        self._writer.close()


async def _work(address: str, users: int, answers: int, think: float, label: str) -> list[float]:
    people = [Person(address) for _ in range(users)]
    for i, person in enumerate(people):
        await person.enter(f"{label} {i}")

    async def one(person: Person, seed: int) -> list[float]:
        draw, taken = random.Random(seed), []
        for _ in range(answers):
            await asyncio.sleep(draw.uniform(0.5, 1.5) * think)
            taken.append(await person.answer())
        return taken

    found = await asyncio.gather(*(one(person, i) for i, person in enumerate(people)))
    for person in people:
        person.leave()
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
        command = [
            sys.executable,
            "-m",
            "align.cli",
            "feedback",
            "serve",
            "task.yaml",
            "--port",
            "0",
            "--json",
            "ready.json",
        ]
        path = {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=made, stdout=subprocess.PIPE, text=True, env={**os.environ, **path}
        ) as server:
            try:
                if server.stdout is None or not server.stdout.readline():
                    raise RuntimeError("the server did not start")
                address = json.loads((Path(made) / "ready.json").read_text(encoding="utf-8"))["address"]
                asyncio.run(_work(address, 1, 20, 0.05, "warm"))
                single = asyncio.run(_work(address, 1, alone, 0.1, "alone"))
                many = asyncio.run(_work(address, users, answers, think, "many"))
            finally:
                server.terminate()
    single_ms = 1000 * statistics.median(single)
    ranked = sorted(1000 * seconds for seconds in many)
    p95 = ranked[min(len(ranked) - 1, round(0.95 * len(ranked)))]
    return {
        "users": users, "think_s": think, "pages": len(many), "single_median_ms": round(single_ms, 2),
        "many_median_ms": round(statistics.median(ranked), 2), "many_p95_ms": round(p95, 2),
        "p95_over_single_median": round(p95 / single_ms, 2), "limit": LIMIT, "ok": p95 <= LIMIT * single_ms,
    }  # fmt: skip


def main() -> int:
    """Measure, write the figures, and fail when the ratio is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--think", type=float, default=1.0, help="average pause of an annotator, in seconds")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    found = page_latency(options.users, think=options.think)
    text = json.dumps(found, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        Path(options.json).write_text(text, encoding="utf-8")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
