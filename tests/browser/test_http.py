"""The server as anything but a friendly browser sees it: hosts, origins, sizes, rates, cookies, paths, texts, tokens."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import itertools
import json
import re
import signal
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile import TRAVERSALS, XSS
from PIL import Image
from test_page import IDS, ROWS

from align.errors import ConfigError
from align.feedback.events import Item
from align.feedback.server import tokens
from align.feedback.server.app import create_app
from align.feedback.server.guard import Limits
from align.feedback.server.run import plan
from align.feedback.store import Store, Writer
from align.feedback.tasks import load_task

FREE = Limits(rate=1e6, burst=10**6, address_rate=1e6, address_burst=10**6, entries_a_minute=10**6)
TICKET = re.compile(r'name="ticket" value="([^"]+)"')


PEOPLE: list[Person] = []


@pytest.fixture(autouse=True)
def leave() -> Iterator[None]:
    """Close everyone's connections."""
    yield
    while PEOPLE:
        PEOPLE.pop().client.close()


class Person:
    """An annotator without a browser."""

    def __init__(self, served: Any, name: str, *, htmx: bool = True) -> None:
        origin = served.url.rstrip("/")
        PEOPLE.append(self)
        self.client = httpx.Client(base_url=origin, headers={"origin": origin}, timeout=20)
        self.entered = self.client.post("/enter", data={"who": name})
        if htmx:
            self.client.headers["hx-request"] = "true"
        self.page = self.client.get("/work").text if self.entered.status_code == 303 else ""

    @property
    def ticket(self) -> str:
        found = TICKET.search(self.page)
        return found[1] if found else ""

    def post(self, path: str, **fields: Any) -> httpx.Response:
        response = self.client.post(path, data={"ticket": self.ticket, **fields})
        if response.status_code in (200, 422, 503):
            self.page = response.text
        return response


def raw(
    url: str, method: str, target: str, headers: dict[str, str], body: bytes | None = None
) -> tuple[int, bytes, Any]:
    """One request with the target and headers sent as they are."""
    host, _, port = url.removeprefix("http://").strip("/").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    found = response.status, response.read(), response.headers
    connection.close()
    return found


# --- hosts, origins, headers --------------------------------------------------------------------------


def test_only_its_own_host_names_are_served(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    foreign = (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "127.0.0.1:80x",
        "[::1",
        "localhost:80:80",
        "a b",
    )
    for host in foreign:
        assert raw(served.url, "GET", "/", {"host": host})[0] in (400, 421), host
    for host in ("localhost:99", "127.0.0.1", "[::1]:8000", "LOCALHOST", "192.168.1.7:8000"):
        assert raw(served.url, "GET", "/", {"host": host})[0] == 200, host


def test_posts_from_elsewhere_are_refused(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    headers = {"host": served.url.split("/")[2], "content-type": "application/x-www-form-urlencoded"}
    for path in ("/enter", "/answer", "/undo", "/skip", "/again", "/leave"):
        for origin in ("http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1", "", None):
            given = headers if origin is None else {**headers, "origin": origin}
            status, text, _ = raw(served.url, "POST", path, given, b"who=Ana")
            assert (status, text) == (403, b"This request comes from another site."), (path, origin)


def test_every_answer_has_its_headers(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    person = Person(served, "Ana")
    for response in (
        person.entered, person.client.get("/work"), person.client.get("/nowhere"), person.client.get("/static/align.js"),
        person.client.post("/answer", headers={"origin": "http://evil.example"}), person.client.put("/work"),
    ):  # fmt: skip
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self';" in policy
        assert response.headers["x-content-type-options"] == "nosniff" and response.headers["x-frame-options"] == "DENY"
        assert "server" not in response.headers and "cache-control" in response.headers
    cookie = person.entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Ana" not in cookie


def test_pages_hold_no_inline_script_or_style(serve: Any):
    served = serve({"kind": "ranking"}, ROWS)
    person = Person(served, "Ana", htmx=False)
    for page in (person.page, person.client.get("/").text, httpx.get(served.url).text):
        assert re.findall(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|javascript:", page) == []


def test_only_loopback_goes_without_tokens(tmp_path: Path, serve: Any):
    serve({"kind": "thumbs"}, ROWS)
    for host in ("0.0.0.0", "192.168.1.7", "::", "example.org"):
        with pytest.raises(ConfigError, match="needs annotator tokens"):
            plan(tmp_path / "task.yaml", host=host)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert plan(tmp_path / "task.yaml", host=host).tokens is None
    (tmp_path / "t.txt").write_text("ana 0123456789abcdef\n")
    assert plan(tmp_path / "task.yaml", host="0.0.0.0", annotator_tokens=tmp_path / "t.txt").tokens
    for text, why in (
        ("ana short\n", "too short"),
        ("ana\n", "a name and a token"),
        ("# none\n", "no annotator token"),
    ):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(ConfigError, match=why):
            plan(tmp_path / "task.yaml", annotator_tokens=tmp_path / "t.txt")
    with pytest.raises(ConfigError, match="An origin is a scheme and a host"):
        plan(tmp_path / "task.yaml", product_origins=["app.example"])


# --- sizes and rates ----------------------------------------------------------------------------------


def test_bodies_have_a_limit(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS, limits=Limits(body=5000))
    headers = {"host": served.url.split("/")[2], "origin": served.url.rstrip("/")}
    assert raw(served.url, "POST", "/enter", headers, b"who=" + b"x" * 4900)[0] != 413
    assert raw(served.url, "POST", "/enter", headers, b"who=" + b"x" * 5100)[0] == 413
    chunks = (b"x" * 1000 for _ in range(8))
    response = httpx.post(served.url + "enter", content=chunks, headers={"origin": served.url.rstrip("/")})
    assert response.status_code == 413
    assert httpx.post(served.url + "feedback", content=b"x" * 6000).status_code == 413


def test_floods_are_slowed(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS, limits=Limits(rate=0.01, burst=8, entries_a_minute=5))
    ana, bea = Person(served, "Ana"), Person(served, "Bea")
    statuses = [ana.client.get("/work").status_code for _ in range(12)]
    assert statuses == [200] * 7 + [429] * 5
    assert ana.client.get("/work").headers["retry-after"] == "1"
    assert bea.client.get("/work").status_code == 200
    origin = {"origin": served.url.rstrip("/")}
    attempts = [httpx.post(served.url + "enter", data={"who": ""}, headers=origin).status_code for _ in range(4)]
    assert attempts == [422] * 3 + [429]


# --- who ----------------------------------------------------------------------------------------------


def test_tokens_let_in_and_nothing_else_does(serve: Any, tmp_path: Path):
    (tmp_path / "t.txt").write_text("ana 0123456789abcdef-a\nbea 0123456789abcdef-b\n")
    served = serve({"kind": "thumbs"}, ROWS, annotator_tokens=tmp_path / "t.txt")
    assert Person(served, "0123456789abcdef-a").ticket
    for wrong in ("ana", "0123456789abcdef", "0123456789abcdef-A", "", "0123456789abcdef-a\0"):
        assert Person(served, wrong).entered.status_code == 422
    cookie = Person(served, "0123456789abcdef-b").client.cookies
    name, value = next(iter(cookie.items()))
    for forged in (value[:-2] + "AA", "e30." + value.partition(".")[2], value.partition(".")[0], value + "=", "x"):
        page = httpx.get(served.url + "work", cookies={name: forged}, follow_redirects=False)
        assert page.status_code == 303, forged
    # A name of another store, signed with another secret, or one whose token was withdrawn.
    key = tokens.derive(tokens.load_secret(str(served.store) + ".key"), "session")
    known = tokens.unsign(key, value)
    assert known is not None and known["a"].startswith("a-")
    for other in ({"a": "a-0000000000000000"}, {"t": known["t"] - 31 * 86_400}):
        assert httpx.get(served.url + "work", cookies={name: tokens.sign(key, {**known, **other})}).status_code == 303
    assert httpx.get(served.url + "work", cookies={name: value}).status_code == 200
    assert httpx.get(served.url + "work").status_code == 303


def test_a_ticket_is_for_one_person_and_one_screen(serve: Any):
    served = serve({"kind": "thumbs", "annotators_per_item": 2}, ROWS)
    ana, bea = Person(served, "Ana"), Person(served, "Bea")
    stolen = ana.ticket
    assert bea.post("/answer", ticket=stolen, thumb="up").status_code == 200
    assert served.events() == []
    changed = stolen[:5] + ("A" if stolen[5] != "A" else "B") + stolen[6:]
    assert ana.post("/answer", ticket=changed, thumb="up").status_code == 200 and served.events() == []
    assert ana.post("/answer", ticket=stolen, thumb="up").status_code == 200
    assert len(served.events()) == 1
    # The same answer again, as a double click sends it, changes nothing.
    ana.post("/answer", ticket=stolen, thumb="down")
    assert [e.value for e in served.events()] == [True]
    with Store.open(served.store) as store:
        assert len(store.history(served.events()[0].identifier)) == 1


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("rating", [{"d0": "8"}, {"d0": "0"}, {"d0": "4.5"}, {"d0": "٤"}, {"d0": ["3", "4"]}, {}]),
        ("pairwise", [{"choice": "both_bad"}, {"choice": "c"}, {"choice": ["a", "b"]}]),
        ("thumbs", [{"thumb": "maybe"}, {"reaction": "love"}]),
        ("ranking", [{"r0": "1", "r1": "2", "r2": "3"}, {"r0": "1", "r1": "2", "r2": "3", "r3": "5"}]),
    ],
)
def test_what_a_task_does_not_offer_is_refused(serve: Any, kind: str, wrong: list[dict[str, Any]]):
    served = serve({"kind": kind}, ROWS)
    person = Person(served, "Ana")
    before = tokens.unsign(tokens.derive(tokens.load_secret(str(served.store) + ".key"), "ticket"), person.ticket)
    for fields in wrong:
        assert person.post("/answer", **fields).status_code == 422, fields
    assert served.events() == [] and before is not None
    after = tokens.unsign(tokens.derive(tokens.load_secret(str(served.store) + ".key"), "ticket"), person.ticket)
    assert after == before


def test_n_distinct_annotators_answer_each_item(serve: Any):
    """Seven people at once, two wanted for each of twelve pairs: each pair gets two, nobody answers one twice."""
    rows = [{"prompt": f"p{i}", "responses": ["one", "two"]} for i in range(12)]
    served = serve({"kind": "pairwise", "annotators_per_item": 2, "order": "random"}, rows, limits=FREE)

    def work(name: str) -> int:
        person, count = Person(served, name), 0
        while person.ticket:
            assert person.post("/answer", choice="a").status_code == 200
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        counts = list(pool.map(work, [f"person {i}" for i in range(7)]))
    pairs: dict[frozenset[str], list[str]] = {}
    for event in served.events():
        pairs.setdefault(frozenset(event.items), []).append(event.annotator)
    assert sum(counts) == 24 and len(pairs) == 12
    assert all(len(people) == len(set(people)) == 2 for people in pairs.values())
    first = [e.items[0] for e in served.events()]
    assert 0 < sum(item in {Item(f"p{i}", "one").id for i in range(12)} for item in first) < 24


def test_an_answer_that_was_acknowledged_survives_a_kill(serve: Any):
    served = serve({"kind": "rating"}, ROWS, process=True)
    person = Person(served, "Ana")
    for value in (3, 5, 7):
        assert person.post("/answer", d0=str(value)).status_code == 200
    served.stop(signal.SIGKILL)
    assert [e.value for e in served.events()] == [3, 5, 7]
    assert len(served.events("exposure")) == 4


def test_what_could_not_be_stored_is_said_and_asked_again(serve: Any, tmp_path: Path):
    """The writer is closed under the page, as on a disk that is full: nothing is counted, what was written stays."""
    serve({"kind": "rating", "ask_reason": "optional"}, ROWS).stop()
    writer = Writer(tmp_path / "other.db")
    app = create_app(load_task(tmp_path / "task.yaml"), writer, bytes(32))

    async def work() -> None:
        origin = "http://localhost"
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url=origin, headers={"origin": origin}
        ) as ana:
            await ana.post("/enter", data={"who": "Ana"})
            ana.headers["hx-request"] = "true"
            ticket = TICKET.search((await ana.get("/work")).text)
            assert ticket
            writer.close()
            answer = {"ticket": ticket[1], "d0": "6", "reason": "because"}
            for _ in range(2):
                refused = await ana.post("/answer", data=answer)
                assert (
                    refused.status_code == 503 and "Not saved: the store" in refused.text and "because" in refused.text
                )
                assert "<b>0</b> of 4 done" in refused.text and 'value="6" checked' in refused.text

    asyncio.run(work())
    with Store.open(tmp_path / "other.db") as store:
        assert [e.kind for e in store.current()] == ["exposure"]


def test_gold_is_shown_between_and_judged(serve: Any, tmp_path: Path):
    gold = [{"prompt": "2 + 2?", "response": "4", "answer": 7}, {"prompt": "2 + 2?", "response": "5", "answer": 1}]
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, gold)))
    served = serve({"kind": "rating", "gold": {"data": "gold.jsonl", "every": 2}}, ROWS)
    person = Person(served, "Ana")
    for _ in range(6):
        person.post("/answer", d0="6")
    assert [e.items[0] for e in served.events()] == [
        IDS[0], IDS[1], Item("2 + 2?", "4").id, IDS[2], IDS[3], Item("2 + 2?", "5").id,
    ]  # fmt: skip
    assert person.ticket == ""
    with Store.open(served.store) as store:
        assert store.items([Item("2 + 2?", "5").id])[Item("2 + 2?", "5").id].metadata["gold"] == 1


# --- texts and paths ----------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags, attributes and texts of a page, script and style read as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_500_hostile_texts_come_back_as_texts(serve: Any):
    assert len(set(XSS)) == 500
    rows = [{"prompt": text, "input": text, "response": text} for text in XSS]
    served = serve({"kind": "rating", "ask_reason": "optional"}, rows, limits=FREE)
    person = Person(served, "Ana")
    plain = Elements(Person(serve({"kind": "rating", "ask_reason": "optional"}, ROWS), "Ana").page)
    for text in XSS:
        page = Elements(person.page)
        assert page.tags <= plain.tags and page.attributes <= plain.attributes, text
        assert page.texts.count(text) == 3, text
        # A rating is missing: the reason comes back within its field.
        assert person.post("/answer", reason=text).status_code == 422
        again = Elements(person.page)
        assert again.tags <= plain.tags and again.attributes <= plain.attributes, text
        assert "".join(again.texts).count(text.strip()) >= 4, text
        assert person.post("/answer", d0="4", reason=text).status_code == 200
    assert [e.value for e in served.events("text")] == [text.replace("\r\n", "\n").strip() for text in XSS]


def test_1000_traversals_reach_no_file(serve: Any, tmp_path: Path):
    assert len(set(TRAVERSALS)) == 1000
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    served = serve({"kind": "thumbs"}, [{"prompt": "a square", "image": "a.png"}], limits=FREE)
    person = Person(served, "Ana")
    known = Item("a square", "a.png", media="image").id
    assert person.client.get(f"/media/{known}").content == (tmp_path / "a.png").read_bytes()
    cookie = "; ".join(f"{k}={v}" for k, v in person.client.cookies.items())
    host, _, port = served.url.removeprefix("http://").strip("/").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    got = set()
    for i, text in enumerate(TRAVERSALS):
        target = urllib.parse.quote(text, safe="/%\\.;:")
        folder = ("/static/", "/media/", f"/media/{known}/", "/", "/media/a.png")[i % 5]
        connection.putrequest("GET", folder + target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("host", f"{host}:{port}")
        connection.putheader("cookie", cookie)
        connection.endheaders()
        response = connection.getresponse()
        body = response.read()
        got.add(response.status)
        assert response.status in (400, 404) and not re.search(rb"root:|try|PNG|def |name|kind|[0-9a-f]{64}", body), (
            text
        )
    connection.close()
    assert got <= {400, 404}
    assert httpx.get(served.url + f"media/{known}").status_code == 404
    part = person.client.get(f"/media/{known}", headers={"range": "bytes=1-3"})
    assert (part.status_code, part.content, part.headers["content-type"]) == (206, b"PNG", "image/png")


# --- the product endpoint -----------------------------------------------------------------------------

ITEM = Item("How tall is a giraffe?", "About five metres.")
CONTENT = {"prompt": ITEM.prompt, "response": ITEM.response}


def product(served: Any, path: str, **body: Any) -> tuple[int, str]:
    response = httpx.post(served.url + path, json=body)
    return response.status_code, response.json().get("error", "")


def test_a_product_token_is_good_once(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    secret = tokens.load_secret(str(served.store) + ".key")
    token = tokens.mint_token(secret, ITEM, user="u-17", session="c1")
    assert product(served, "feedback", token=token, thumb=True)[0] == 400
    assert product(served, "feedback", token=token, thumb=True, item=CONTENT) == (200, "")
    assert product(served, "feedback", token=token, thumb=True, item=CONTENT) == (409, "This token was used.")
    assert product(served, "feedback", token=token, thumb=False) == (409, "This token was used.")
    assert product(served, "exposure", token=token) == (200, "")
    assert product(served, "exposure", token=token)[0] == 409
    assert [(e.value, e.session) for e in served.events()] == [(True, "c1")]
    served.stop()
    again = serve()
    assert product(again, "feedback", token=token, thumb=False)[0] == 409
    assert [e.value for e in again.events()] == [True]


def test_what_was_said_can_be_taken_back(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    secret = tokens.load_secret(str(served.store) + ".key")

    def post(session: str = "c1", **body: Any) -> tuple[int, str]:
        token = tokens.mint_token(secret, ITEM, user="u-17", session=session)
        return product(served, "feedback", token=token, item=CONTENT, **body)

    assert post(thumb=True, reactions=["love", "sad"], comment="Nice.") == (200, "")
    assert post(session="c2", thumb=True) == (200, "")
    assert post(retract=["thumb", "love", "comment"]) == (200, "")
    assert [(e.key, e.session) for e in served.events()] == [("sad", "c1"), ("thumb", "c2")]
    assert post(retract=["sad"], reactions=["love"]) == (200, ""), "one reaction for another"
    assert post(thumb=False) == (200, "")
    assert sorted((e.key, e.value) for e in served.events() if e.session == "c1") == [
        ("love", "love"),
        ("thumb", False),
    ]
    assert post(retract=["love"], reactions=["love"]) == (400, "love is said and taken back at once.")
    assert post(retract=["<b>"])[0] == post(retract=[])[0] == post(retract="love")[0] == 400
    few = tokens.mint_token(secret, ITEM, user="u-17", session="c1", allow=("binary",))
    assert product(served, "feedback", token=few, retract=["love"])[1] == "This may not be used for reaction."
    spent = tokens.mint_token(secret, ITEM, user="u-17", session="c1")
    assert [product(served, "feedback", token=spent, retract=["love"])[0] for _ in range(2)] == [200, 409]


def test_a_token_used_many_times_at_once_is_used_once(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS, limits=FREE)
    token = tokens.mint_token(tokens.load_secret(str(served.store) + ".key"), ITEM, user="u-17")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        posts = [
            pool.submit(product, served, "feedback", token=token, thumb=i % 2 == 0, item=CONTENT) for i in range(32)
        ]
    assert sorted(post.result()[0] for post in posts) == [200] + [409] * 31
    assert len(served.events()) == 1


def test_expired_changed_and_foreign_tokens_are_refused(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    secret = tokens.load_secret(str(served.store) + ".key")
    expired = tokens.mint_token(secret, ITEM, user="u", expires_s=1e-6)
    assert product(served, "feedback", token=expired, thumb=True, item=CONTENT) == (
        401, "This token has expired. Ask for a new one.",
    )  # fmt: skip
    good = tokens.mint_token(secret, ITEM, user="u")
    body, _, mark = good.partition(".")
    other = tokens.mint_token(bytes(32), ITEM, user="u")
    session = tokens.sign(tokens.derive(secret, "session"), {"n": "x", "i": ITEM.id})
    for wrong in (
        other,
        session,
        body,
        f"{body}.",
        f".{mark}",
        f"{body}A.{mark}",
        f"{body}.{mark[:-1]}",
        "",
        good + "=",
        "é.é",
    ):
        status, why = product(served, "feedback", token=wrong, thumb=True, item=CONTENT)
        assert status == 401 and why.startswith("This token is not valid"), wrong
    assert product(served, "feedback", token=7, thumb=True)[0] in (400, 401)
    assert served.events() == []


WRONG = (
        ({"thumb": 1}, "thumb is no bool"), ({"thumb": "true"}, "thumb is no bool"), ({}, "Nothing was said"),
        ({"reactions": ["<b>"]}, "A reaction is a name"), ({"reactions": "love"}, "reactions is no list"),
        ({"comment": "x" * 20_001}, "too long"), ({"reactions": ["love"]}, "may not be used for reaction"),
        ({"thumb": True, "item": {"prompt": "p", "response": "r"}}, "another item"),
        ({"thumb": True, "item": {"prompt": "p"}}, "a prompt and a response"), ({"thumb": True, "item": ["x"]}, "An item is"),
        ({"thumb": True, "item": {**CONTENT, "media": "html"}}, "Unknown media"), ({"thumb": True, "latency_ms": -1}, "latency_ms"),
        ({"thumb": True, "item": {"prompt": [1], "response": "r"}}, "another item"),
)  # fmt: skip


def test_what_a_token_does_not_allow_is_refused(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    secret = tokens.load_secret(str(served.store) + ".key")
    token = tokens.mint_token(secret, ITEM, user="u", allow=("binary", "text"))
    for body, why in WRONG:
        status, said = product(served, "feedback", **{"token": token, "item": CONTENT, **body})
        assert status == 400 and why in said, body
    assert product(served, "exposure", token=token, item=CONTENT)[0] == 400
    assert served.events() == [] and product(served, "feedback", token=token, thumb=True, item=CONTENT)[0] == 200


def test_only_listed_origins_may_post_from_a_browser(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS, product_origins=["https://app.example"])
    token = tokens.mint_token(tokens.load_secret(str(served.store) + ".key"), ITEM, user="u")
    body = {"token": token, "thumb": True, "item": CONTENT}
    for origin in ("https://evil.example", "http://app.example", "null", "https://app.example.evil.example"):
        response = httpx.post(served.url + "feedback", json=body, headers={"origin": origin})
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
        ask = httpx.options(served.url + "feedback", headers={"origin": origin})
        assert "access-control-allow-origin" not in ask.headers
    ask = httpx.options(served.url + "feedback", headers={"origin": "https://app.example"})
    assert (ask.status_code, ask.headers["access-control-allow-methods"]) == (204, "POST")
    response = httpx.post(served.url + "feedback", json=body, headers={"origin": "https://app.example"})
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in response.headers
    # The listed site may post feedback, and nothing else.
    for path in ("undo", "answer", "enter"):
        assert httpx.post(served.url + path, headers={"origin": "https://app.example"}).status_code == 403


def test_what_is_no_object_is_refused(serve: Any):
    served = serve({"kind": "thumbs"}, ROWS)
    bodies = (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"token": null}')
    for path, body in itertools.product(("feedback", "exposure"), bodies):
        assert httpx.post(served.url + path, content=body).status_code in (400, 401)
