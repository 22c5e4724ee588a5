"""The store of feedback: what stands after which events, what is refused, and that nothing written can be changed."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store, Writer

ITEMS = [Item("What is 2 + 2?", text, metadata={"model": "m"}) for text in ("4", "5", "four")]
CHAT = Item([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ho"}], media="chat")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.open(tmp_path / "feedback.db") as opened:
        opened.add(items=[*ITEMS, CHAT])
        yield opened


def rating(value: int | None, item: Item = ITEMS[0], **fields) -> FeedbackEvent:
    if value is None:
        return FeedbackEvent("ordinal", (item.id,), tombstone=True, annotator="ann", **fields)
    return FeedbackEvent("ordinal", (item.id,), value, scale=(1, 7), annotator="ann", **fields)


def standing(store: Store) -> list:
    return [event.value for event in store.current()]


def statuses(store: Store, *events: FeedbackEvent) -> list[str]:
    return [added.status for added in store.add(events=events)]


def test_what_goes_in_comes_out(store: Store):
    events = [
        FeedbackEvent("exposure", (ITEMS[0].id, ITEMS[1].id), exposure="shown", position=0, propensity=0.25, ts=5),
        FeedbackEvent("binary", (CHAT.id,), False, key="thumb", source="user", session="s", reply="zu kurz 🙂", ts=6),
        FeedbackEvent("reaction", (ITEMS[1].id,), "love", latency_ms=12, policy="v2", ts=7),
        FeedbackEvent("ordinal", (ITEMS[1].id,), -1, scale=(-2, 2), ts=8),
        FeedbackEvent("pairwise", (ITEMS[1].id, ITEMS[0].id), "tie", tie_origin="judged", source="ai", ts=9),
        FeedbackEvent("ranking", tuple(i.id for i in ITEMS), (1, 3, 1), ts=10),
        FeedbackEvent("text", (ITEMS[0].id,), "a\0b\n\u2028", identifier="mine", id="given", ts=11),
    ]
    added = store.add(events=events)
    assert [a.status for a in added] == ["added"] * 7 and [a.seq for a in added] == [1, 2, 3, 4, 5, 6, 7]
    found = list(store.current())
    assert [replace(e, id="") for e in found[:-1]] == events[:-1] and found[-1] == events[-1]
    assert store.items([CHAT.id, "unknown"]) == {CHAT.id: CHAT}
    assert store.get(found[2].id) == found[2] and store.get("none") is None
    store.check()


def test_the_same_again_changes_nothing_and_another_answer_supersedes(store: Store):
    first = store.add(events=[rating(5)])[0]
    again = store.add(events=[rating(5, latency_ms=9)])[0]
    assert (again.status, again.event, again.seq) == ("unchanged", first.event, first.seq)
    other = store.add(events=[rating(6)])[0]
    assert (other.status, other.superseded) == ("superseded", first.event.id) and standing(store) == [6]
    history = store.history(first.event.identifier)
    assert [(h.event.value, h.supersedes, h.current) for h in history] == [(5, "", False), (6, first.event.id, True)]


def test_a_tombstone_takes_back_and_a_new_answer_may_follow(store: Store):
    assert statuses(store, rating(5), rating(None), rating(None)) == ["added", "withdrawn", "unchanged"]
    assert standing(store) == [] and statuses(store, rating(3)) == ["added"] and standing(store) == [3]


def test_what_was_taken_back_does_not_rise_again_when_its_file_is_read_again(store: Store):
    timed, named = rating(5, ts=1000), rating(4, ITEMS[1], id="row 7")
    assert statuses(store, timed, named) == ["added", "added"]
    assert statuses(store, rating(None), rating(None, ITEMS[1])) == ["withdrawn", "withdrawn"]
    assert statuses(store, timed, named) == ["past", "past"] and standing(store) == []


def test_an_old_event_that_arrives_late_does_not_replace_a_newer_one(store: Store):
    assert statuses(store, rating(5, ts=2000), rating(2, ts=1000)) == ["added", "late"] and standing(store) == [5]
    assert statuses(store, rating(None, ts=3000), rating(1, ts=2500)) == ["withdrawn", "late"] and standing(store) == []
    assert statuses(store, rating(7, ts=4000)) == ["added"] and standing(store) == [7]


def test_an_event_without_a_time_follows_what_is_there_and_gets_none(store: Store):
    assert statuses(store, rating(5, ts=2000), rating(6), rating(4, ts=1000)) == ["added", "superseded", "late"]
    assert standing(store) == [6] and next(store.current()).ts == 0
    assert statuses(store, rating(6, ts=2000), rating(None)) == ["superseded", "withdrawn"] and standing(store) == []
    assert statuses(store, rating(3), rating(2, ITEMS[1]), rating(2, ITEMS[1], ts=1)) == [
        "added",
        "added",
        "superseded",
    ]
    with pytest.raises(DataError, match="milliseconds since 1970"):
        rating(5, ts=-1)


def test_ids_of_events_without_a_time_are_those_of_any_store_with_the_same_log(store: Store, tmp_path: Path):
    said = [rating(5), rating(6), rating(5), rating(5, ITEMS[1])]
    with Store.open(tmp_path / "other.db") as other:
        other.add(items=ITEMS)
        ids = [added.event.id for added in other.add(events=said)]
    assert ids == [added.event.id for added in store.add(events=said)] and len(set(ids)) == 4
    taken = rating(6, ITEMS[2], id=store.add(events=[rating(6, ITEMS[2])])[0].event.id)  # as another store's export
    store.add(events=[rating(7, ITEMS[2])])
    assert statuses(store, taken) == ["past"]


def test_undo_restores_what_was_superseded_one_answer_at_a_time(store: Store):
    a, b, c = store.add(events=[rating(5), rating(6), rating(2, ITEMS[1])])
    assert standing(store) == [6, 2]
    assert store.undo("ann").superseded == c.event.id and standing(store) == [6]
    undone = store.undo("ann")
    assert (undone.superseded, undone.restored) == (b.event.id, a.event.id) and standing(store) == [5]
    assert store.undo("ann").restored == "" and standing(store) == []
    assert store.undo("ann") is None and store.undo("nobody") is None
    assert [(h.undoes, h.event.tombstone, h.current) for h in store.history(a.event.identifier)] == [
        ("", False, False), ("", False, False), (b.event.id, True, False), (a.event.id, True, False),
    ]  # fmt: skip
    assert statuses(store, rating(6)) == ["added"]
    store.check()


def test_undo_takes_a_tombstone_back_too_and_leaves_exposures(store: Store):
    shown = FeedbackEvent("exposure", (ITEMS[0].id,), annotator="ann", exposure="shown")
    store.add(events=[rating(5), rating(None), shown])
    assert store.undo("ann").restored and standing(store) == [None, 5][::-1]


def test_undo_of_one_session_leaves_the_others(store: Store):
    store.add(events=[rating(5, session="x"), rating(6, session="y")])
    assert store.undo("ann", session="x").event.session == "x" and standing(store) == [6]


def test_undo_of_an_answer_that_was_replaced_by_another_annotator_leaves_that(store: Store):
    other = replace(rating(1, identifier="shared"), annotator="bob")
    store.add(events=[rating(5, identifier="shared"), other])
    undone = store.undo("ann")
    assert (undone.superseded, undone.restored) == ("", "") and standing(store) == [1]


def test_an_id_stands_for_one_content(store: Store):
    assert statuses(store, rating(5, id="x"), rating(5, id="x")) == ["added", "unchanged"]
    with pytest.raises(DataError, match="The event id 'x' stands for other content"):
        store.add(events=[rating(2, ITEMS[1]), rating(6, id="x")])
    assert standing(store) == [5]


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (FeedbackEvent("binary", ("nowhere",), True), "An event is about an unknown item (nowhere)"),
        (rating(1, ts=2**70), "A number cannot be stored"),
        (rating(1, reply="\ud800"), "A text cannot be stored"),
        (rating(1, position="first"), "A feedback store refused"),
    ],
)
def test_a_call_that_is_refused_adds_nothing(store: Store, event: FeedbackEvent, sentence: str):
    with pytest.raises(DataError) as caught:
        store.add(items=[Item("new", "item")], events=[rating(5), event])
    assert sentence in str(caught.value) and standing(store) == [] and len(store.items()) == 4


def test_an_item_is_kept_once_and_later_metadata_beside_it(store: Store):
    composed, decomposed = Item("Käse", "ja", metadata={"a": 1}), Item("Ka\u0308se", "ja", metadata={"a": 1, "b": [2]})
    for _ in range(2):
        store.add(items=[composed, decomposed])
    assert composed.id == decomposed.id and store.items()[composed.id] == replace(composed, metadata={"a": 1, "b": [2]})
    with pytest.raises(DataError, match="An item cannot be stored"):
        store.add(items=[Item("p", "r", metadata={"x": object()})])


def test_filters(store: Store):
    store.add(events=[
        rating(5, ts=10), rating(6, ITEMS[1], key="style", ts=20),
        FeedbackEvent("pairwise", (ITEMS[1].id, ITEMS[2].id), "a", annotator="bob", source="ai", ts=30),
    ])  # fmt: skip

    def found(**filters) -> list:
        rows, table = [e.value for e in store.current(**filters)], store.events_with_items(**filters)
        assert rows == list(table["value"])
        return rows

    assert found(key="style") == [6] and found(kind="pairwise") == ["a"] == found(source=["ai", "user"])
    assert found(annotator=["ann"]) == [5, 6] and found(since=20) == [6, "a"] and found(kind=()) == []
    assert found(items=[ITEMS[1].id]) == [6, "a"] == found(key=["style", "quality"], items=[ITEMS[1].id], since=11)
    assert found(upto=1) == [5] and found(upto=0) == [] == found(items=[])


def test_columns(store: Store):
    store.add(events=[rating(5, position=2, ts=10), FeedbackEvent("ranking", (ITEMS[0].id, CHAT.id), (2, 1), ts=20)])
    table = store.events_with_items()
    assert len(table) == 2 and table["ts"].tolist() == [10, 20] and table["position"].tolist() == [2, -1]
    assert list(table["value"]) == [5, (2, 1)] and list(table["scale"]) == [(1, 7), None]
    assert np.isnan(table["propensity"]).all() and list(table["items"])[1] == (ITEMS[0].id, CHAT.id)
    assert table.content == {ITEMS[0].id: ITEMS[0], CHAT.id: CHAT}
    assert store.events_with_items(content=False).content == {} and len(store.events_with_items(kind="text")) == 0


def test_counts(store: Store):
    store.add(events=[rating(5, ts=10), rating(6, ts=20), rating(7, ITEMS[1], ts=15), rating(None, ITEMS[1], ts=30)])
    store.add(events=[rating(5, ITEMS[2])])
    found = store.counts()
    assert (found["items"], found["prompts"], found["events"], found["log"]) == (4, 2, 2, 5)
    assert (found["tombstones"], found["superseded"], found["annotators"]) == (1, 2, 1)
    assert (found["kinds"], found["sources"]) == ({"ordinal": 2}, {"human": 2})
    assert (found["first_ms"], found["last_ms"], found["untimed"]) == (20, 20, 1)


def test_reading_does_not_see_what_is_written_meanwhile(store: Store, monkeypatch):
    monkeypatch.setattr("align.feedback.store._PAGE", 2)
    store.add(events=[rating(v, item) for v, item in zip((1, 2, 3), ITEMS, strict=True)])
    seen = []
    for event in store.current():
        seen.append(event.value)
        store.add(events=[rating(event.value + 3, ITEMS[event.value - 1])])
    assert seen == [1, 2, 3] and standing(store) == [4, 5, 6]


@pytest.mark.parametrize("table", ["meta", "items", "events", "event_items", "notes"])
def test_other_programs_cannot_change_or_remove_rows_either(store: Store, table: str):
    store.add(items=[replace(ITEMS[0], metadata={"more": 1})], events=[rating(5), rating(6)])
    db = sqlite3.connect(store.path, isolation_level=None)
    columns = [row[0] for row in db.execute(f"SELECT name FROM pragma_table_info('{table}')")]
    before = db.execute(f"SELECT * FROM {table}").fetchall()
    for change in (f"UPDATE {table} SET {columns[0]} = {columns[0]}", f"DELETE FROM {table}"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(change)
    for verb in ("REPLACE", "INSERT OR REPLACE"):
        # A row of event_items is all key: replacing it leaves it as it was.
        with (
            contextlib.nullcontext()
            if table == "event_items"
            else pytest.raises(sqlite3.IntegrityError, match="append")
        ):
            db.execute(f"{verb} INTO {table} SELECT * FROM {table}")
    assert db.execute(f"SELECT * FROM {table}").fetchall() == before and before
    db.close()


@pytest.mark.parametrize(
    ("table", "known", "new"),
    [("events", "id", {"seq": None}), ("items", "id", {"no": None}), ("events", "seq", {"id": "x"})],
)
def test_a_row_cannot_be_replaced_by_either_of_its_keys(store: Store, table: str, known: str, new: dict):
    store.add(events=[rating(5), rating(6), rating(None)])
    store.undo("ann")
    db = sqlite3.connect(store.path, isolation_level=None)
    db.row_factory = sqlite3.Row
    for row in [dict(r) for r in db.execute(f"SELECT * FROM {table}")]:
        values = {**row, **new}
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(
                f"REPLACE INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                [*values.values()],
            )
    db.close()


def test_a_row_that_repeats_a_link_cannot_push_another_out(store: Store):
    store.add(events=[rating(5), rating(6)])
    db = sqlite3.connect(store.path, isolation_level=None)
    columns = [row[0] for row in db.execute("SELECT name FROM pragma_table_info('events')")]
    taken = [{"seq": "99", "id": "'x'"}.get(name, name) for name in columns]
    db.execute(f"REPLACE INTO events SELECT {', '.join(taken)} FROM events WHERE seq = 2")
    assert db.execute("SELECT count(*) FROM events").fetchone() == (3,)
    db.close()
    with pytest.raises(DataError, match="two rows of an identifier are both its last"):
        store.check()


def test_settings_of_the_file(store: Store):
    db = store._db()
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    strict = dict(
        db.execute("SELECT name, strict FROM pragma_table_list WHERE name NOT LIKE 'sqlite_%' AND type = 'table'")
    )
    assert strict == dict.fromkeys(("meta", "items", "notes", "events", "event_items"), 1)


def refused(path: Path, **options: bool) -> str:
    with pytest.raises(DataError) as caught:
        Store.open(path, **options).check()
    return str(caught.value)


def test_files_that_are_no_store(tmp_path: Path):
    assert "There is no such feedback store" in refused(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()
    assert "this is a folder" in refused(tmp_path)
    (tmp_path / "text.db").write_text("prompt,response\n" * 100)
    assert "This is no feedback store" in refused(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE meta (name, value)")
    other.close()
    assert "it is a database of another program" in refused(tmp_path / "other.db")


@pytest.mark.parametrize(("version", "words"), [("3", "Update align"), ("1", "Write it out with the align that made")])
def test_a_store_of_another_version(tmp_path: Path, version: str, words: str):
    Store.open(tmp_path / "other.db").close()
    db = sqlite3.connect(tmp_path / "other.db", isolation_level=None)
    db.execute("DROP TRIGGER meta_update")
    db.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (version,))
    db.close()
    assert f"it is of version {version}, and this library reads 2. {words}" in refused(tmp_path / "other.db")


def test_damage_is_found(tmp_path: Path):
    path = tmp_path / "torn.db"
    with Store.open(path) as store:
        store.add(items=ITEMS, events=[rating(1 + n % 7, ITEMS[n % 3], session=str(n)) for n in range(500)])
        store._db().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 6000] = b"\xff" * 6000
    path.write_bytes(content)
    assert "A feedback store is damaged" in refused(path)


def test_a_broken_link_is_found(store: Store):
    store.add(events=[rating(5)])
    store._db().execute("INSERT INTO event_items VALUES (999, 1)")
    with pytest.raises(DataError, match="an event names an item that is not there"):
        store.check()


def test_a_store_serves_many_threads(store: Store):
    def work(name: int) -> None:
        for n in range(20):
            store.add(events=[replace(rating(1 + n % 7, session=str(n)), annotator=str(name), identifier="")])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts()["events"] == 160
    store.check()


# --- the writer ---------------------------------------------------------------------------------------


def test_the_writer_acknowledges_what_is_on_disk(store: Store):
    with Writer(store.path) as writer:
        futures = [writer.submit(events=[rating(1 + n % 7, session=str(n))]) for n in range(300)]
        for n, future in enumerate(futures):
            added = future.result(30)[0]
            assert store.get(added.event.id).session == str(n)
    assert store.counts()["events"] == 300


def test_a_bad_submission_fails_alone_and_whole(store: Store):
    with Writer(store.path) as writer:
        good = [writer.submit(events=[rating(1, session=str(n))]) for n in range(20)]
        bad = [
            writer.submit(
                items=[Item("p", "r")], events=[rating(2, session="bad"), FeedbackEvent("text", ("nowhere",), "x")]
            ),
            writer.submit(events=["no event"]),
            writer.submit(events=[rating(3, session="bad", reply="\udc00")]),
        ]
        more = [writer.submit(events=[rating(1, session=f"more {n}")]) for n in range(20)]
        assert all(future.exception(30) for future in bad) and isinstance(bad[0].exception(), DataError)
        assert all(future.result(30)[0].status == "added" for future in [*good, *more])
    assert store.counts()["events"] == 40 and len(store.items()) == 4


def test_the_writer_undoes_in_turn(store: Store):
    with Writer(store.path) as writer:
        writer.submit(events=[rating(5)])
        writer.submit(events=[rating(6)])
        undone = writer.undo("ann")
        assert undone.result(30).restored and standing(store) == [5] and writer.undo("nobody").result(30) is None


def test_close_writes_all_that_was_submitted_and_then_refuses(store: Store):
    writer = Writer(store.path, group=4)
    futures = [writer.submit(events=[rating(1, session=str(n))]) for n in range(100)]
    writer.close()
    writer.close()
    assert all(future.done() and future.result()[0].seq for future in futures) and store.counts()["events"] == 100
    with pytest.raises(DataError, match="The store's writer is closed"):
        writer.submit(events=[rating(2)])


def test_a_full_queue_says_so(store: Store):
    db = store._db()
    db.execute("BEGIN IMMEDIATE")
    writer = Writer(store.path, group=1, pending=2)
    futures = []
    with pytest.raises(DataError, match="The store cannot keep up"):
        for n in range(10):
            futures.append(writer.submit(events=[rating(1, session=str(n))], timeout=0.2))
    db.execute("ROLLBACK")
    writer.close()
    assert len(futures) in (2, 3) and all(future.result().pop().status == "added" for future in futures)


def test_a_defect_in_the_writer_leaves_no_future_waiting(store: Store, monkeypatch):
    caught = []
    monkeypatch.setattr(threading, "excepthook", lambda details: caught.append(details.exc_type))
    writer = Writer(store.path)

    def broken(db: sqlite3.Connection) -> None:
        raise ZeroDivisionError

    future = writer._put(broken, None)
    with pytest.raises(DataError, match="The store's writer stopped"):
        future.result(30)
    writer.close()
    assert caught == [ZeroDivisionError]


# --- against a plain model ----------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 2), st.integers(1, 3), st.none() | st.integers(0, 4)),
        st.tuples(st.just("take"), st.integers(0, 2), st.none(), st.none() | st.integers(0, 4)),
        st.tuples(st.just("undo"), st.none(), st.none(), st.none()),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_what_stands_is_the_newest_that_was_not_undone(tmp_path_factory, steps):
    """A list of (item, value, time, undone), searched anew each time, agrees with the store after every step."""
    log: list[dict] = []
    now = 10**12

    def deciding(item: int) -> list[dict]:
        live = [entry for entry in log if entry["item"] == item and not entry["undone"]]
        at = [entry["ts"] or max([0, *(other["ts"] for other in live[:n])]) for n, entry in enumerate(live)]
        return [live[n] for _, n in sorted(zip(at, range(len(live)), strict=True))[-1:]]

    with Store.open(tmp_path_factory.mktemp("s") / "f.db") as store:
        store.add(items=ITEMS)
        for step, item, value, when in steps:
            if step == "undo":
                store.undo("ann")
                live = [entry for entry in log if not entry["undone"]]
                if live:
                    live[-1]["undone"] = True
            else:
                ts = 0 if when is None else now + when
                alike = log if ts else deciding(item)
                known = any((e["item"], e["value"], e["ts"] if ts else 0) == (item, value, ts) for e in alike)
                store.add(events=[rating(value, ITEMS[item], ts=ts)])
                if not known:
                    log.append({"item": item, "value": value, "ts": ts, "undone": False})
            expected = {}
            for item_number in range(3):
                for entry in deciding(item_number):
                    expected |= {} if entry["value"] is None else {ITEMS[item_number].id: entry["value"]}
            assert {event.items[0]: event.value for event in store.current()} == expected
        store.check()
