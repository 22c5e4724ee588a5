"""The parts of the page that need no server: assignment, answers to events and back, signatures, Markdown, limits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import ConfigError, DataError
from align.feedback.events import Item
from align.feedback.server import tokens
from align.feedback.server.answers import Answer, answer_events, answer_of, fields_of, read_answer
from align.feedback.server.assign import Assignments, Shown
from align.feedback.server.guard import Buckets, host_allowed
from align.feedback.server.markdown import render_markdown
from align.feedback.task_data import make_unit
from align.feedback.tasks import GoldConfig, Task, TaskConfig

STATIC = Path(tokens.__file__).parent / "static"
KEY = bytes(range(32))


def test_htmx_is_the_released_file_unchanged():
    """Version 2.0.11, as its npm package holds it at dist/htmx.min.js, with its licence."""
    raw = (STATIC / "htmx.min.js").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717"
    assert b'version:"2.0.11"' in raw
    assert (STATIC / "htmx.LICENSE.txt").read_text(encoding="utf-8").startswith("Zero-Clause BSD")


# --- assignment ---------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def task(count: int, **options: Any) -> Task:
    config = TaskConfig(**{"name": "t", "kind": "rating", "data": "d", "order": "file", **options})
    units = tuple(make_unit("t", [Item("p", str(i))]) for i in range(count))
    return Task(config, Path("t"), units)


def responses(shown: Shown | None) -> Any:
    return shown.unit.items[0].response if shown else None


def test_a_reservation_keeps_others_away_until_it_ends():
    clock = Clock()
    work = Assignments(task(2, reservation_minutes=10), clock)
    assert responses(work.next("a")) == "0" and responses(work.next("a")) == "0"
    assert responses(work.next("b")) == "1" and work.next("c") is None
    assert work.progress("c").waiting
    clock.now += 599
    assert work.next("c") is None and responses(work.next("b")) == "1"
    clock.now += 2
    # a's time is over, b has just been seen again.
    assert responses(work.next("c")) == "0"
    assert work.next("a") is None
    clock.now += 601
    assert responses(work.next("a")) == "0"


def test_late_work_is_kept():
    clock = Clock()
    work = Assignments(task(1), clock)
    late = work.next("a")
    clock.now += 10_000
    assert responses(work.next("b")) == "0" and late is not None
    work.answered("a", late.unit.id)
    work.answered("b", late.unit.id)
    assert work.complete == 1 and work.progress("a").done == work.progress("b").done == 1
    work.taken_back("b", late.unit.id)
    assert work.complete == 1 and responses(work.next("b")) == "0"


def test_what_is_taken_back_is_open_to_others_again():
    work = Assignments(task(3))
    for name, unit in (("a", "0"), ("b", "1"), ("a", "2")):
        shown = work.next(name)
        assert responses(shown) == unit and shown is not None
        work.answered(name, shown.unit.id)
    assert work.next("c") is None and not work.progress("c").waiting
    work.taken_back("a", work.task.units[0].id)
    work.annotator("a").again = ""
    assert responses(work.next("c")) == "0"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_kept_through_any_history(data: st.DataObject):
    """Against a count from scratch, after any sequence of answers, undos, skips and waits by any people."""
    clock, wanted = Clock(), data.draw(st.integers(1, 3))
    work = Assignments(task(data.draw(st.integers(1, 5)), annotators_per_item=wanted, order="random"), clock)
    done: dict[str, list[str]] = {name: [] for name in "abcd"}
    for _ in range(data.draw(st.integers(0, 40))):
        name, act = (
            data.draw(st.sampled_from("abcd")),
            data.draw(st.sampled_from(["answer", "answer", "undo", "skip", "wait", "unskip"])),
        )
        shown = work.next(name)
        if act == "answer" and shown:
            assert shown.unit.id not in done[name]
            work.answered(name, shown.unit.id)
            done[name].append(shown.unit.id)
        elif act == "undo" and done[name]:
            unit_id = done[name].pop()
            work.taken_back(name, unit_id)
            again = work.next(name)
            assert again is not None and again.unit.id == unit_id
        elif act == "skip" and shown:
            work.skip(name, shown.unit.id)
        elif act == "unskip":
            work.unskip(name)
        elif act == "wait":
            clock.now += data.draw(st.integers(0, 4000))
        by = {unit.id: {n for n in done if unit.id in done[n]} for unit in work.task.units}
        full = {unit_id for unit_id, people in by.items() if len(people) >= wanted}
        assert work.complete == len(full)
        for n in done:
            progress = work.progress(n)
            left = [u for u in by if u not in full and u not in done[n]]
            assert (progress.done, progress.total) == (len(done[n]), len(done[n]) + len(left))


def test_gold_comes_after_every_few_others():
    judged = task(5).config.model_copy(update={"gold": GoldConfig(data="g", every=2)})
    units = tuple(make_unit("t", [Item("g", str(i))], gold=7) for i in range(2))
    work, seen = Assignments(replace(task(5), config=judged, gold=units)), []
    while shown := work.next("a"):
        seen.append(shown.unit.items[0].prompt)
        assert work.progress("a").total >= len(seen)
        work.answered("a", shown.unit.id, True if shown.unit.gold else None)
    assert seen == list("ppgppgp")


def test_orders_differ_between_people_and_repeat():
    first = [work.next(name).unit.id for name in "abcdefgh" for work in [Assignments(task(50, order="random"))]]
    again = [work.next(name).unit.id for name in "abcdefgh" for work in [Assignments(task(50, order="random"))]]
    assert first == again and len(set(first)) > 4


# --- answers ------------------------------------------------------------------------------------------

texts = st.text(max_size=30).map(lambda t: t.replace("\r\n", "\n").strip())
KINDS = {
    "rating": st.fixed_dictionaries({"accuracy": st.integers(1, 7), "tone": st.integers(1, 7)}),
    "pairwise": st.fixed_dictionaries({"quality": st.sampled_from(["a", "b", "tie", "both_bad"])}),
    "ranking": st.sampled_from([[1, 2, 3], [1, 1, 1], [2, 1, 2], [1, 2, 2], [3, 1, 2], [1, 1, 2]]).map(lambda r: {"quality": r}),
    "thumbs": st.fixed_dictionaries({"thumb": st.booleans()}),
}  # fmt: skip


def screen(kind: str) -> tuple[TaskConfig, Shown]:
    options: dict[str, Any] = {
        "rating": {"dimensions": ["accuracy", "tone"], "ask_correction": "optional"}, "pairwise": {"both_bad": True}, "ranking": {},
        "thumbs": {"reactions": ["love", "sad"], "ask_correction": "optional"},
    }[kind]  # fmt: skip
    config = TaskConfig(name="t", kind=kind, data="d", ask_reason="optional", **options)
    count = {"pairwise": 2, "ranking": 3}.get(kind, 1)
    unit = make_unit("t", [Item("p", f"r{i}", metadata={"policy": "v1"}) for i in range(count)])
    return config, Shown(unit, tuple(reversed(range(count))), 5, 3)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_form_answer_events_and_back(kind: str, data: st.DataObject):
    config, shown = screen(kind)
    reactions = tuple(r for r in config.reactions if data.draw(st.booleans()))
    correction = data.draw(texts) if kind in ("rating", "thumbs") else ""
    answer = Answer(data.draw(KINDS[kind]), reactions, data.draw(texts), "" if correction == "r0" else correction)
    fields = fields_of(config, answer)
    assert read_answer(config, shown, fields) == answer
    events = answer_events(config, "ann", shown, answer, 1200, 99)
    found = answer_of(config, events)
    assert fields_of(config, found) == fields
    for event in events:
        assert event.items == tuple(item.id for item in reversed(shown.unit.items))
        assert (event.latency_ms, event.position, event.exposure, event.policy, event.ts) == (
            1200,
            3,
            "shown",
            "v1",
            99,
        )
        assert event.tie_origin == ("judged" if event.value == "tie" else "")
    assert len({event.identifier for event in events}) == len(events)


def test_gaps_between_ranks_are_closed():
    config, shown = screen("ranking")
    assert read_answer(config, shown, {"r0": ["3"], "r1": ["1"], "r2": ["3"]}).values == {"quality": [2, 1, 2]}


def test_what_is_missing_is_named():
    config, shown = screen("rating")
    with pytest.raises(DataError, match="Rate tone"):
        read_answer(config, shown, {"d0": ["3"]})
    config = config.model_copy(update={"ask_reason": "required"})
    with pytest.raises(DataError, match="Say why"):
        read_answer(config, shown, {"d0": ["3"], "d1": ["3"], "reason": ["  "]})
    with pytest.raises(DataError, match="20,000 characters"):
        read_answer(config, shown, {"d0": ["3"], "d1": ["3"], "reason": ["x" * 20_001]})


def test_a_correction_that_changes_nothing_is_none():
    config, shown = screen("thumbs")
    assert read_answer(config, shown, {"thumb": ["up"], "correction": ["r0 \r\n"]}).correction == ""


# --- signatures ---------------------------------------------------------------------------------------


def test_a_signature_worked_by_hand():
    """base64url of {"a":1}, and HMAC-SHA256 under the key 00..1f, by another implementation."""
    openssl = subprocess.run(
        ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{KEY.hex()}"], input=b'{"a":1}', capture_output=True, check=False
    ).stdout.split()  # fmt: skip
    made = tokens.sign(KEY, {"a": 1})
    assert made.partition(".")[0] == "eyJhIjoxfQ"
    assert not openssl or tokens._decode(made.partition(".")[2]).hex() == openssl[-1].decode()


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=9), st.none()), max_size=4))
def test_signed_values_come_back(payload: dict[str, Any]):
    assert tokens.unsign(KEY, tokens.sign(KEY, payload)) == payload
    assert tokens.unsign(bytes(32), tokens.sign(KEY, payload)) is None


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=300)
def test_any_changed_byte_is_seen(place: int, change: int):
    made = bytearray(tokens.sign(KEY, {"a": "ann", "u": "0123456789abcdef"}).encode())
    made[place % len(made)] ^= change
    assert tokens.unsign(KEY, made.decode("latin-1")) is None


@given(st.text(max_size=60))
def test_what_was_never_signed_is_refused(text: str):
    assert tokens.unsign(KEY, text) is None


def test_a_secret_is_drawn_once_and_kept_private(tmp_path: Path):
    path = tmp_path / "s.key"
    first = tokens.load_secret(path)
    assert tokens.load_secret(path) == first and len(first) == 32 and path.stat().st_mode & 0o777 == 0o600
    path.write_text("abcd")
    with pytest.raises(ConfigError, match="64 hex digits"):
        tokens.load_secret(path)
    path.write_text("no hex")
    with pytest.raises(ConfigError, match="cannot be read"):
        tokens.load_secret(path)


def test_pseudonyms_are_stable_keyed_and_say_nothing():
    assert tokens.pseudonym(KEY, "Ana") == tokens.pseudonym(KEY, "Ana")
    others = (tokens.pseudonym(KEY, "ana"), tokens.pseudonym(KEY, "Ana", "user"), tokens.pseudonym(bytes(32), "Ana"))
    assert len({tokens.pseudonym(KEY, "Ana"), *others}) == 4
    token = tokens.mint_token(KEY, Item("p", "r"), user="user-1017", policy="v1")
    assert b"1017" not in tokens._decode(token.partition(".")[0])


def test_a_token_is_read_as_minted():
    item, key = Item("p", "r"), tokens.derive(KEY, "product")
    token = tokens.mint_token(
        KEY, item, user="u", allow=("binary",), session="s", policy="v", propensity=0.25, position=1, expires_s=60
    )
    found = tokens.read_token(key, token, 0)
    assert (found.item, found.allow, found.session, found.policy) == (item.id, ("binary",), "s", "v")
    assert (found.propensity, found.position, found.user) == (0.25, 1, tokens.pseudonym(KEY, "u", "user"))
    assert tokens.read_token(key, token, found.expires_ms) == found
    with pytest.raises(DataError, match="has expired"):
        tokens.read_token(key, token, found.expires_ms + 1)
    with pytest.raises(DataError, match="not valid"):
        tokens.read_token(tokens.derive(KEY, "session"), token, 0)
    for wrong in ({"allow": ()}, {"allow": ("ordinal",)}, {"propensity": 0.0}, {"expires_s": 0}):
        with pytest.raises(ConfigError):
            tokens.mint_token(KEY, item, user="u", **wrong)


def test_minting_needs_no_web_framework_and_no_torch():
    code = "import sys, align.feedback.server.tokens, align.feedback.tasks; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", "import json;" + code], capture_output=True, text=True, check=True).stdout
    )
    assert not {"fastapi", "starlette", "uvicorn", "torch", "transformers", "diffusers"} & set(loaded)


# --- Markdown and limits ------------------------------------------------------------------------------


def test_markdown_worked_by_hand():
    text = "# One\nTwo **three**\n*four* `five <b>`\n\n- a\n- b\n  c\n1. d\n2. e\nend < & > [x](javascript:y)"
    assert render_markdown(text).replace("\n", "") == (
        "<h2>One</h2><p>Two <strong>three</strong> <em>four</em> <code>five &lt;b&gt;</code></p><ul><li>a</li><li>b c</li></ul>"
        "<ol><li>d</li><li>e</li></ol><p>end &lt; &amp; &gt; [x](javascript:y)</p>"
    )


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[Any] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@given(st.text(alphabet="<>&\"'`*#-.1 \nab/=!()[]", max_size=80))
@settings(max_examples=300)
def test_markdown_makes_few_tags_no_attributes_and_closes_all(text: str):
    found = Tags(render_markdown(text))
    assert set(found.tags) <= {"h2", "h3", "h4", "p", "ul", "ol", "li", "strong", "em", "code"}
    assert found.attributes == [] and found.open == []


def test_a_bucket_refills():
    clock = Clock()
    bucket = Buckets(2.0, 3, clock)
    assert [bucket.take("a") for _ in range(4)] == [True, True, True, False] and bucket.take("b")
    clock.now += 0.5
    assert [bucket.take("a") for _ in range(2)] == [True, False]
    clock.now += 100
    assert [bucket.take("a") for _ in range(4)] == [True, True, True, False]


@given(st.text(max_size=20))
def test_only_addresses_and_known_names_are_hosts(name: str):
    if host_allowed(name, frozenset()):
        bare = name.strip().lower()
        assert bare.startswith(("localhost", "[")) or bare[0].isdigit()
    assert not host_allowed(f"x{name}.example", frozenset())
    assert host_allowed("Feedback.Example:443", frozenset({"feedback.example"}))
