"""Signals to the services, as processes: what was asked is answered, and they end with exit code 0."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.parse

import httpx
import processes
import pytest

from align.cli import main
from align.feedback.store import Store
from align.types import Samples
from rewards.base import get_reward


@contextlib.contextmanager
def serving(folder, *arguments):
    """Serve in a process of its own: its address, its pid, and what waits for its end."""
    pid = processes.fork(lambda: main([*arguments, "--port", "0", "--json", "-"]), folder, "service", {})
    out, until = folder / "service.out", time.monotonic() + 60
    found = []

    def end():
        found.append(processes.ended(pid, folder, "service", 30))
        return found[0]

    try:
        while not (ready := re.search(r'"url": "(.+?)"', out.read_text() if out.exists() else "")):
            assert time.monotonic() < until, out.read_text()
            time.sleep(0.02)
        yield ready[1], pid, end
    finally:
        if not found:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_reward_server_answers_what_it_was_asked(tmp_path):
    config = tmp_path / "rewards.yaml"
    config.write_text("rewards: [{name: 'served:Slow', args: {seconds: 0.5}}]")
    with serving(tmp_path, "rewards", "serve", "--config", str(config)) as (url, pid, end):
        slow, found = get_reward("served:Slow", placement="remote", url=url), []
        asking = threading.Thread(target=lambda: found.append(slow.score(Samples(["x"], texts=[""]))))
        asking.start()
        while "asked" not in (tmp_path / "service.out").read_text():
            time.sleep(0.01)
        os.kill(pid, signal.SIGUSR1)
        asking.join()
        ended = end()
    assert found[0].values.tolist() == [[7.0]]
    assert (ended.code, ended.value) == (0, 0) and "Traceback" not in ended.output, ended.output


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_feedback_server_keeps_an_answer_that_was_on_its_way(tmp_path, number):
    """The second half of the answer comes after the signal."""
    (tmp_path / "task.yaml").write_text('{"name": "try", "data": "data.jsonl", "kind": "thumbs"}')
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Why?", "response": "Because."}))
    store = tmp_path / "feedback.db"
    task = ("feedback", "serve", str(tmp_path / "task.yaml"), "--store", str(store))
    with serving(tmp_path, *task) as (url, pid, end):
        origin = url.rstrip("/")
        with httpx.Client(base_url=origin, headers={"origin": origin}) as person:
            assert person.post("/enter", data={"who": "ana"}).status_code == 303
            ticket = re.search(r'name="ticket" value="([^"]+)"', person.get("/work").text)[1]
            answer = person.build_request("POST", "/answer", data={"ticket": ticket, "thumb": "up"})
        lines = ["POST /answer HTTP/1.1", *(f"{k}: {v}" for k, v in answer.headers.items()), "", ""]
        address = urllib.parse.urlsplit(url)
        with socket.create_connection((address.hostname, address.port)) as line:
            line.sendall("\r\n".join(lines).encode() + answer.content[:10])
            time.sleep(0.3)
            os.kill(pid, number)
            time.sleep(0.3)
            line.sendall(answer.content[10:])
            said = line.recv(100)
        ended = end()
    assert said.startswith(b"HTTP/1.1 303"), said
    assert (ended.code, ended.value) == (0, 0) and "Traceback" not in ended.output, ended.output
    with Store.open(store, create=False) as opened:
        said = [(event.kind, event.value) for event in opened.current() if event.kind != "exposure"]
    assert said == [("binary", True)]
