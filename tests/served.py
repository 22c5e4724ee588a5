"""Rewards that only the tests serve, and an HTTP server that can be told to answer anything."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from align.types import Scores
from rewards.base import RewardCard, identity_of


class _Simple:
    names = ("value",)

    def __init__(self) -> None:
        self.card = RewardCard(f"served:{type(self).__name__}", type(self).__doc__, "unbounded", "any", self.names)

    def identity(self):
        return identity_of(self.card, {})

    def scores(self, rows, errors=(), extras=None):
        values = np.array(rows, dtype=float).reshape(len(rows), len(self.names))
        return Scores(values, np.isfinite(values), self.names, tuple(errors), extras or {})


class Frames(_Simple):
    """Mean of the first frame, number of frames, and duration in seconds."""

    names = ("first", "count", "seconds")

    def score(self, samples):
        clips = samples.videos
        return self.scores([[float(v.frames[0].mean()), len(v.frames), len(v.frames) / v.fps] for v in clips])


class Turns(_Simple):
    """Words of the last turn or of the text, plus metadata["bonus"], minus the words of the prompt."""

    def score(self, samples):
        last = [t if isinstance(t, str) else t[-1]["content"] for t in samples.texts]
        bonus = [m.get("bonus", 0) for m in samples.metadata]
        rows = [len(t.split()) + b - len(p.split()) for t, b, p in zip(last, bonus, samples.prompts, strict=True)]
        return self.scores(rows, extras={"last": last, "tied": [r == 0 for r in rows], "some": [None, *rows[1:]]})


class Partial(_Simple):
    """Two components, of which the second is missing for prompts that say so."""

    names = ("a", "b")

    def score(self, samples):
        bad = ["bad" in prompt for prompt in samples.prompts]
        return self.scores([[0.0, np.nan if b else 1.0] for b in bad], ["b: it was bad" if b else "" for b in bad])


class Defect(_Simple):
    """A reward with a mistake in its code."""

    def score(self, samples):
        return self.no_such_attribute


class Slow(_Simple):
    """Takes `seconds`, and fails when it is asked twice at once."""

    def __init__(self, seconds=0.05):
        super().__init__()
        self.seconds, self.busy = seconds, threading.Lock()

    def score(self, samples):
        if not self.busy.acquire(blocking=False):
            raise ValueError("two at once")
        sys.stderr.write("asked\n")
        sys.stderr.flush()
        time.sleep(self.seconds)
        self.busy.release()
        return self.scores([7.0] * len(samples))


class Scripted:
    """A server whose /score is `answer(handler, document, n)` for request n; it says of itself what `entry` says."""

    def __init__(self, entry, answer):
        self.entry, self.answer, self.asked, self.times = dict(entry), answer, [], []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.give({"rewards": [outer.entry]})

            def do_POST(self):
                document = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    n = len(outer.asked)
                    outer.asked.append(document)
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    outer.answer(self, document, n)
                finally:
                    with outer.lock:
                        outer.now -= 1

            def give(self, document, status=200, headers=(), text=None):
                body = (json.dumps(document) if text is None else text).encode()
                with contextlib.suppress(OSError):  # a client that has gone
                    self.send_response(status)
                    for name, value in (*headers, ("content-length", str(len(body)))):
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            def hang_up(self):
                self.close_connection = True
                self.connection.close()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def good(self, document, **changes):
        """What a good server would answer: every sample's value is its id + 1."""
        ids = [item["id"] for item in document["items"]]
        rows = [[i + 1.0] for i in ids]
        about = {"names": self.entry["names"], "identity": self.entry["identity"], "ids": ids, "ms": 1}
        return {
            **about, "values": rows, "valid": [[True]] * len(ids), "errors": [""] * len(ids), "extras": {}, **changes,
        }  # fmt: skip

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
