"""A real Chromium, a real server on a free port, and tasks to serve."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from align.feedback.events import FeedbackEvent
from align.feedback.server.guard import Limits
from align.feedback.server.run import ServePlan, plan
from align.feedback.server.run import serve as run_server
from align.feedback.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Chromium, find

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests. Without one they are skipped, or fail where ALIGN_REQUIRE_CHROMIUM is set."""
    if not find():
        reason = "no chromium, chromium-browser or google-chrome on PATH: the page was not tested in a browser"
        if os.environ.get("ALIGN_REQUIRE_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    """A fresh page, which must not have complained by the end of the test."""
    chromium.new_page()
    yield chromium
    assert chromium.complaints() == []


@dataclass
class Served:
    """A running server, in this process or in one of its own, and its store."""

    url: str
    store: Path
    end: Callable[[int], None]

    def events(self, *kinds: str) -> list[FeedbackEvent]:
        """Current events in the order of the log, exposures left out unless asked for."""
        with Store.open(self.store, create=False) as store:
            return [e for e in store.current() if (e.kind in kinds if kinds else e.kind != "exposure")]

    def stop(self, how: int = signal.SIGINT) -> None:
        self.end(how)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Write a task and its data, and serve them: in a thread, or with `process` through the command line."""
    running: list[Served] = []

    def begin(
        task: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        *,
        process: bool = False,
        limits: Limits | None = None,
        **options: Any,
    ) -> Served:
        path, store = tmp_path / "task.yaml", tmp_path / "feedback.db"
        if task is not None:
            path.write_text(
                json.dumps({"name": "try", "data": "data.jsonl", "order": "file", **task}), encoding="utf-8"
            )
        if rows is not None:
            (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        if process:
            url, end = in_process(path, store)
        else:
            planned = plan(path, store, **{"port": 0, **options})
            url, end = in_thread(replace(planned, limits=limits or planned.limits))
        running.append(Served(url, store, end))
        return running[-1]

    yield begin
    for served in running:
        served.stop()


def in_process(path: Path, store: Path) -> tuple[str, Callable[[int], None]]:
    command = [sys.executable, "-m", "align.cli", "feedback", "serve", str(path), "--store", str(store), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json", "-"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    said = ""
    while not said.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line

    def end(how: int) -> None:
        if process.poll() is None:
            process.send_signal(how)
            process.communicate(timeout=15)
            assert process.returncode == (0 if how != signal.SIGKILL else -signal.SIGKILL)

    return json.loads(said)["url"], end


def in_thread(planned: ServePlan) -> tuple[str, Callable[[int], None]]:
    ready: queue.Queue[dict[str, Any]] = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: run_server(planned, ready.put, stop), daemon=True)
    thread.start()
    found = ready.get(timeout=20)

    def end(how: int) -> None:
        stop.set()
        thread.join(15)
        assert not thread.is_alive()

    return found["url"], end


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[str], Path]:
    """Where a screenshot goes: a folder named by ALIGN_SCREENSHOTS, to be looked at, or a temporary one."""
    folder = Path(os.environ.get("ALIGN_SCREENSHOTS", str(tmp_path)))
    return lambda name: folder / f"{name}.png"
