"""Simulated people at the real doors: what they see comes over HTTP, and so does what they say.

A visitor enters the annotation page of a task as a browser without scripts does, fetches what stands on each screen and
posts the form. A product posts exposures and thumbs of its users with single-use tokens. Nothing here knows the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import AlignError, DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.server.guard import Limits
from align.feedback.server.run import plan, serve
from align.feedback.server.tokens import load_secret, mint_token

OPEN = Limits(rate=1e6, burst=10**6, address_rate=1e6, address_burst=10**6, entries_a_minute=10**6)
"""A crowd that is one process is faster than people are."""
_TICKET = re.compile(r'name="ticket" value="([^"]+)"')
_MEDIA = re.compile(r'src="/media/([^"]+)"')


@contextlib.contextmanager
def served(task: Path, store: Path) -> Iterator[str]:
    """Serve a task on a free port of this machine as `align feedback serve` does, and give its address.

    Raises:
        AlignError: what serving raises.
    """
    planned = dataclasses.replace(plan(task, store, port=0), limits=OPEN)
    started, stop, found = threading.Event(), threading.Event(), {}

    def work() -> None:
        try:
            serve(planned, lambda about: (found.update(about), started.set()), stop)
        except (AlignError, OSError, RuntimeError) as error:
            found["error"] = error
        finally:
            started.set()

    server = threading.Thread(target=work, daemon=True)
    server.start()
    started.wait()
    try:
        if "error" in found:
            raise found["error"]
        yield found["address"]
    finally:
        stop.set()
        server.join()
    if "error" in found:
        raise found["error"]


class Visitor:
    """One person at the page of a task.

    Args:
        address: of the server, `host:port`.
        name: under which they enter.
        scripts: be a browser with scripts, to which an answer brings the next screen.
    """

    def __init__(self, address: str, name: str, *, scripts: bool = False) -> None:
        self.address, self.scripts = address, scripts
        self._connection = http.client.HTTPConnection(address, timeout=60)
        self._cookie = ""
        self._ticket = ""
        self._ask("POST", "/enter", {"who": name})

    def screen(self) -> list[str]:
        """Return the ids of the images or videos on the next screen, from the left; none when all is answered."""
        return self._see(self._ask("GET", "/work"))

    def look(self, item: str) -> bytes:
        """Return the bytes of an image or a video."""
        return self._ask("GET", f"/media/{item}")

    def answer(self, **fields: str) -> list[str]:
        """Answer the screen with the fields of its form; return what is on the next one, if that came with it."""
        return self._see(self._ask("POST", "/answer", {"ticket": self._ticket, "latency_ms": "2000", **fields}))

    def _see(self, read: bytes) -> list[str]:
        page = read.decode()
        ticket = _TICKET.search(page)
        self._ticket = ticket[1] if ticket else ""
        return _MEDIA.findall(page) if ticket else []

    def leave(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _ask(self, method: str, path: str, fields: Mapping[str, str] | None = None) -> bytes:
        headers = {"origin": f"http://{self.address}", "content-type": "application/x-www-form-urlencoded"}
        if self._cookie:
            headers["cookie"] = self._cookie
        if self.scripts:
            headers["hx-request"] = "true"
        body = None if fields is None else urllib.parse.urlencode(fields)
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        read = answer.read()
        if answer.status not in (200, 303):
            raise DataError("The page refused", where=f"{method} {path}", why=f"{answer.status} {answer.reason}")
        if cookie := answer.getheader("set-cookie"):
            self._cookie = cookie.partition(";")[0]
        return read


def post_events(
    address: str, store: Path, items: Mapping[str, Item], events: Sequence[FeedbackEvent], policy: str
) -> Iterable[FeedbackEvent]:
    """Post exposures and thumbs as a product does, each with a token of its own, and yield each once it is stored.

    Args:
        address: of the server.
        store: the file that it serves; the product's back end has the secret beside it.
        items: what the events are about, by id.
        events: of the kinds exposure and binary; their times are the server's.
        policy: which model made the items.

    Raises:
        DataError: a post was refused.
    """
    secret = load_secret(store.with_name(store.name + ".key"))
    connection = http.client.HTTPConnection(address, timeout=60)
    with contextlib.closing(connection):
        for event in events:
            item = items[event.items[0]]
            token = mint_token(
                secret, item, user=event.annotator, policy=policy, position=event.position, session=event.session
            )
            content = {"prompt": item.prompt, "response": item.response, "media": item.media}
            said: dict[str, Any] = {"token": token, "item": content}
            path = "/exposure" if event.kind == "exposure" else "/feedback"
            if event.kind == "binary":
                said["thumb"] = event.value
            connection.request("POST", path, json.dumps(said), {"content-type": "application/json"})
            answer = connection.getresponse()
            read = answer.read()
            if answer.status != 200:
                raise DataError("The endpoint refused", where=path, why=read.decode(errors="replace")[:200])
            yield event
