"""What goes out comes back, and what is malformed is refused with its place or comes back as it was read.

The generator takes a table that is right, of any layout, and spoils it: a cell, a column, a row, or bytes of the file.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.exchange import export_events, import_file, read_feedback
from align.feedback.exchange.rows import Reading
from align.feedback.store import Store

# --- round trips --------------------------------------------------------------------------------------

WORDS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
NAMES = WORDS.filter(lambda word: word.strip() != "")
CHATS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": WORDS}), min_size=1, max_size=3
)
SMALL = st.none() | st.integers(0, 2**40)


@st.composite
def stored(draw, chats: bool = True, media: bool = True) -> tuple[list[Item], FeedbackEvent]:
    kind = draw(st.sampled_from(["exposure", "binary", "reaction", "ordinal", "pairwise", "ranking", "text"]))
    count = {"pairwise": 2, "ranking": draw(st.integers(2, 4))}.get(kind, 1)
    prompt = draw(NAMES | CHATS) if chats else draw(NAMES)
    form = draw(st.sampled_from(["text", "chat", "image", "video"] if media and chats else ["text"]))
    answers = draw(st.lists(CHATS if form == "chat" else NAMES, min_size=count, max_size=count))
    given_input = draw(WORDS)
    items = [Item(prompt, answer, given_input, form) for answer in answers]
    if len({item.id for item in items}) < count:
        items = [replace(item, input=f"{given_input}") for item in items[:1]]
        kind, count = ("text", 1)
    low = draw(st.integers(-5, 5))
    value: Any = {
        "exposure": st.none(), "binary": st.booleans(), "reaction": st.sampled_from(["love", "🦄", "so_true"]),
        "ordinal": st.integers(low, low + 4), "pairwise": st.sampled_from(["a", "b", "tie", "both_bad"]),
        "ranking": st.lists(st.integers(1, count), min_size=count, max_size=count).filter(lambda r: min(r) == 1),
        "text": NAMES,
    }[kind]  # fmt: skip
    value = draw(value)
    event = FeedbackEvent(
        kind, tuple(i.id for i in items), value, key=draw(NAMES), annotator=draw(WORDS),
        source=draw(st.sampled_from(["user", "human", "ai", "code"])), scale=(low, low + 4) if kind == "ordinal" else None,
        exposure="shown" if kind == "exposure" else draw(st.sampled_from(["shown", "unknown"])),
        tie_origin=draw(st.sampled_from(["judged", ""])) if value == "tie" and kind == "pairwise" else "", policy=draw(WORDS),
        propensity=draw(st.none() | st.floats(0.001, 1)), position=draw(SMALL), latency_ms=draw(SMALL),
        session=draw(WORDS), reply=draw(WORDS), ts=draw(st.just(0) | st.integers(10**11, 7 * 10**12)),
    )  # fmt: skip
    return items, event


def came_back(folder: Path, said: list[tuple[list[Item], FeedbackEvent]], name: str, shape: str) -> None:
    for path in folder.glob("*"):
        path.unlink()
    with Store.open(folder / "one.db") as one, Store.open(folder / "two.db") as two:
        one.add([item for items, _ in said for item in items], [event for _, event in said])
        export_events(one, folder / name, shape)
        import_file(two, folder / name)
        before = sorted(one.current(), key=lambda e: e.ts)
        assert sorted(two.current(), key=lambda e: e.ts) == before
        used = {item for event in before for item in event.items}
        # The same text in another Unicode form is the same item.
        assert set(two.items()) == used and {i: v.media for i, v in two.items().items()} == {
            i: v.media for i, v in one.items(used).items()
        }
        import_file(two, folder / name)
        assert two.counts()["log"] == len(before)


SAID = st.lists(stored(), min_size=1, max_size=6, unique_by=(lambda s: s[1].ts, lambda s: s[1].identifier))
PLAIN = st.lists(stored(chats=False), min_size=1, max_size=6, unique_by=(lambda s: s[1].ts, lambda s: s[1].identifier))
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet", "f.csv"])
@QUICK
@given(said=SAID)
def test_complete_exports_read_back_as_they_were(tmp_path_factory, name: str, said):
    came_back(tmp_path_factory.mktemp("r"), said, name, "events")


@QUICK
@given(said=SAID)
def test_plain_exports_read_back_as_they_were(tmp_path_factory, said):
    came_back(tmp_path_factory.mktemp("r"), said, "f.jsonl", "plain")


@QUICK
@given(said=PLAIN.map(lambda said: [s for s in said if s[1].kind not in ("ranking",)]).filter(bool))
def test_plain_exports_of_texts_fit_in_csv(tmp_path_factory, said):
    came_back(tmp_path_factory.mktemp("r"), said, "f.csv", "plain")


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet", "f.csv"])
@QUICK
@given(
    rows=st.lists(
        st.tuples(NAMES, st.lists(NAMES, min_size=2, max_size=2, unique_by=lambda w: Item("p", w).id), st.booleans()),
        min_size=1, max_size=5, unique_by=lambda row: Item(row[0], "r").id,
    )
)  # fmt: skip
def test_trl_columns_read_back_as_they_were(tmp_path_factory, name: str, rows):
    folder = tmp_path_factory.mktemp("t")
    with Store.open(folder / "s.db") as store:
        for prompt, (one, two), up in rows:
            a, b = Item(prompt, one), Item(prompt, two)
            said = [FeedbackEvent("pairwise", (a.id, b.id), "a"), FeedbackEvent("binary", (a.id,), up)]
            store.add([a, b], [*said, FeedbackEvent("ranking", (a.id, b.id), (2, 1))])
        for shape, kind in (("preference", "pairwise"), ("unpaired", "binary"), ("ranking", "ranking")):
            if name == "f.csv" and kind == "ranking":
                continue
            rows_out = folder / f"{shape}{name}"
            if name == "f.csv":
                export = read_out(store, folder / f"{shape}.jsonl", shape)
                with rows_out.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
                    names = [n for n in export[0] if n != "events"]
                    writer.writerows([names, *([row[n] for n in names] for row in export)])
            else:
                export_events(store, rows_out, shape)
            found = read_feedback(rows_out)
            assert opinions([e for e, _ in found.events]) == opinions(store.current(kind=kind))


def read_out(store: Store, path: Path, shape: str) -> list[dict]:
    export_events(store, path, shape)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def opinions(events) -> set:
    found = set()
    for e in events:
        if e.kind == "pairwise":
            won = "ab".index(e.value)
            found.add((e.items[won], e.items[1 - won]))
        else:
            ranks = e.value if e.kind == "ranking" else [e.value]
            found.add(tuple(sorted(zip(e.items, ranks, strict=True))))
    return found


# --- malformed ----------------------------------------------------------------------------------------

ROWS: list[Callable[[random.Random], dict[str, Any]]] = [
    lambda d: {"prompt": word(d), "response": word(d), "rating": d.randint(1, 7), "annotator": word(d), "scale": "1-7"},
    lambda d: {"prompt": word(d), "response": word(d), "label": d.choice([True, "up", 0, "false"]), "ts": 1735787045 + d.randrange(9**9)},
    lambda d: {"prompt": word(d), "response": word(d), "reaction": d.choice(["❤️", "love", "👍🏽"]), "session": word(d)},
    lambda d: {"prompt": word(d), "input": word(d), "response_a": "x" + word(d), "response_b": "y" + word(d), "preference": d.choice(["a", "(b)", 0])},
    lambda d: {"prompt": word(d), "chosen": "x" + word(d), "rejected": "y" + word(d), "margin": 1.5},
    lambda d: {"prompt": word(d), "completion": word(d), "label": d.random() < 0.5},
    lambda d: {"instruction": word(d), "input": word(d), "output": word(d), "kto_tag": d.random() < 0.5},
    lambda d: {"kind": "binary", "items_json": json.dumps([{"prompt": word(d), "response": word(d)}]), "value_json": "true", "ts": 10**12},
]  # fmt: skip
NESTED: list[Callable[[random.Random], dict[str, Any]]] = [
    lambda d: {"prompt": word(d), "completions": ["x" + word(d), "y" + word(d)], "ranks": [1, d.choice([1, 2])]},
    lambda d: {"prompt": [{"role": "user", "content": word(d)}], "completion": [{"role": "assistant", "content": "x"}], "label": True},
    lambda d: {"conversations": [{"from": "human", "value": word(d)}, {"from": "gpt", "value": word(d)}], "kto_tag": False},
    lambda d: {"data": {"prompt": word(d), "response": word(d)}, "annotations": [{"id": 1, "completed_by": 2, "result": [
        {"type": "choices", "from_name": "c", "value": {"choices": ["love"]}}]}]},
    lambda d: {"input": word(d), "output": word(d), "scores": [{"id": "s", "name": "n", "value": 1, "dataType": "BOOLEAN"}]},
    lambda d: {"kind": "pairwise", "items": [{"prompt": "p", "response": "x" + word(d)}, {"prompt": "p", "response": "y"}], "value": "a"},
]  # fmt: skip
JUNK: list[Any] = [
    None, "", " ", "nan", "null", "None", "-1", "0", "1.5", "6.0", 6.0, 6.5, -1, 0, 2**70, -(2**63), 1e400, float("nan"),
    float("inf"), True, False, [], {}, [[]], [None], {"a": {}}, ["x", 1], [{"role": "user"}], "\ud800", "\0", "\u2028",
    "a\r\nb", '"', "'; DROP TABLE events; --", "=1+1", "<script>alert(1)</script>", "../../etc/passwd", "x" * 5000, "Tie",
    "garbage", "Output (a) and (b)", "❤︎", "Käse", "Ka\u0308se", "1-7", "7-1", "a-b", "2025-13-45", "1e5", "٣", [1, 2], [2, 2, 1],
    {"from": "gpt", "value": 1}, [{"from": [], "value": "x"}], "[1, 2", '{"a": 1}', "true", "TRUE", "yes", b"\xff", "shown",
]  # fmt: skip


def word(draw: random.Random) -> str:
    return draw.choice(["q", "nan", "true", "6.0", "Käse", "a, b", 'say "x"', "two\nlines", "🙂", "Ω≈ç"]) + str(
        draw.randrange(50)
    )


def spoil(draw: random.Random, rows: list[dict[str, Any]]) -> None:
    """Spoil one thing of a table: a cell at any depth, a column's name, or a row."""
    row = draw.choice(rows)
    column = draw.choice(list(row))
    what = draw.random()
    if what < 0.6:
        row[column] = draw.choice(JUNK)
    elif what < 0.75 and isinstance(row[column], (list, dict)) and row[column]:
        inner = row[column]
        place = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
        inner[place] = draw.choice(JUNK)
    elif what < 0.85:
        del row[column]
    else:
        row[draw.choice([column.upper(), "", column + " ", "rating", "scale", "source", "media", "ts", "position"])] = (
            draw.choice(JUNK)
        )


def as_csv(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([row.get(n, "") for n in names] for row in rows)
    return buffer.getvalue().encode("utf-8", "surrogatepass")


def as_jsonl(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, default=str, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def as_json(draw: random.Random, rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, default=str, indent=draw.choice([None, 1])).encode()


def as_parquet(draw: random.Random, rows: list[dict[str, Any]]) -> bytes | None:
    """Return None where Arrow itself holds no such table: it cannot be malformed there."""
    buffer = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return None
    return buffer.getvalue()


FORMATS = {"f.csv": as_csv, "f.jsonl": as_jsonl, "f.json": as_json, "f.parquet": as_parquet}


def malformed(draw: random.Random, name: str) -> bytes:
    """Return the bytes of a table of one to four rows that was spoiled."""
    while True:
        make = draw.choice(ROWS if name == "f.csv" else ROWS + NESTED)
        rows = [make(draw) for _ in range(draw.randint(1, 4))]
        whole = draw.random() < 0.2
        if not whole:
            spoil(draw, rows)
        content = FORMATS[name](draw, rows)
        if content is None:
            continue
        if whole:
            at, tail = draw.randrange(len(content)), bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
            content = content[:at] + tail + content[draw.choice([at, at + 1, at + 3, len(content)]) :]
        return content


def met(folder: Path, name: str, content: bytes) -> str:
    """Return "refused" or "read" of one file; anything else fails."""
    path = folder / name
    path.write_bytes(content)
    problem = None
    try:
        found = read_feedback(path, Reading(missing="skip"))
    except DataError as error:
        problem = error
    if problem is not None:
        assert re.search(re.escape(str(path)) + r":\d+:.+", str(problem), re.S), str(problem)
        assert problem.why or problem.do, str(problem)
        return "refused"
    if found.events:
        back = folder / "back.jsonl"
        with Store.open(folder / "one.db") as store:
            store.add(found.items.values(), [event for event, _ in found.events])
            about = {item for event, _ in found.events for item in event.items}
            standing = {event.id: event for event in store.current(items=about)}
            if standing:  # a tombstone alone leaves nothing
                export_events(store, back, overwrite=True, items=about)
                again = read_feedback(back, Reading(duplicates="all"))
                assert {event.id: event for event, _ in again.events} == standing
    return "read"


def meet(folder: Path, name: str, rows: int, seed: int) -> Counter[str]:
    draw, counts = random.Random(seed), Counter()
    for _ in range(rows):
        counts[met(folder, name, malformed(draw, name))] += 1
    return counts


@pytest.mark.parametrize("name", FORMATS)
def test_malformed_rows_are_refused_with_their_place_or_read_back(tmp_path: Path, name: str):
    counts = meet(tmp_path, name, 200, seed=0)
    assert counts["refused"] > 40 and counts["read"] > 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FORMATS)
def test_10_000_malformed_rows_are_refused_with_their_place_or_read_back(tmp_path: Path, name: str):
    counts = meet(tmp_path, name, 10_000, seed=1)
    assert sum(counts.values()) == 10_000 and counts["refused"] > 2000 and counts["read"] > 500
