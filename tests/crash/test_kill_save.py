"""Checkpoints and stores that are killed, damaged or out of space: nothing torn, nothing lost, all damage refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from align import checkpoint
from align.errors import CheckpointError, DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store
from scripts import kill_save

FEW = {"flips": 120, "events": 8, "store_flips": 60}


def require_passed(found, cases=1):
    assert not found["failures"] and (found["cases"] >= cases or "not_run" in found), found


@pytest.mark.parametrize(
    "part", [pytest.param(n, marks=pytest.mark.slow if n == "cuts" else ()) for n in kill_save.PARTS if n != "saves"]
)  # fmt: skip
def test_a_part_of_the_suite_in_small(tmp_path, part):
    require_passed(kill_save.PARTS[part][0](FEW.get(part, 0), 1, tmp_path), FEW.get(part, 20))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_whole_suite():
    found = kill_save.run([], None, 1)
    assert [found[name]["cases"] for name in ("saves", "events", "flips", "cuts")] == [500, 500, 2000, 400]
    for part in found.values():
        require_passed(part)


def test_a_reader_that_skips_the_hashes_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda path: json.loads((path / "manifest.json").read_text()))
    assert len(kill_save.flips(40, 1, tmp_path)["failures"]) >= 10


def test_a_store_that_acknowledges_too_early_would_be_seen(tmp_path, monkeypatch):
    add = Store.add
    monkeypatch.setattr(Store, "add", lambda self, items, events: add(self, items, events) if events[0].ts % 2 else [])
    assert kill_save.events(4, 1, tmp_path)["failures"]


def test_a_manifest_of_another_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    for changed in ({**manifest, "format": 3}, {k: v for k, v in manifest.items() if k != "format"}):
        (path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.verify(path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(path)


def test_an_empty_file_is_no_store_unless_one_is_to_be_made(tmp_path):
    path = tmp_path / "feedback.db"
    path.touch()
    with pytest.raises(DataError, match=r"empty.*feedback\.db"):
        Store.open(path, create=False)
    Store.open(path).close()
    Store.open(path, create=False).close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE items SET response = '\"a market answer\"'", "row 1 of items is not what was written"),
        ('UPDATE items SET metadata = \'{"model": "b"}\'', "row 1 of items is not"),
        ("UPDATE notes SET metadata = '{\"seed\": 8}'", "row 1 of notes is not"),
        ("UPDATE events SET value = '5'", "row 1 of events is not"),
        ("UPDATE events SET propensity = 0.25", "row 1 of events is not"),
        ("UPDATE events SET stands = NULL", "row 1 of events is not"),
        ("UPDATE event_items SET item = 2", "filed under an item that it is not about"),
        ("DELETE FROM event_items", "not filed under an item that it is about"),
    ],
)
def test_an_answer_that_still_reads_as_one_is_not_taken_for_what_was_said(tmp_path, change, words):
    path, item = tmp_path / "feedback.db", Item("p", "a marked answer", metadata={"model": "a"})
    rating = FeedbackEvent("ordinal", (item.id,), 4, scale=(1, 7), annotator="a", propensity=1, latency_ms=1200)
    with Store.open(path) as store:
        store.add([item, Item("p", "another")], [rating])
        store.add([dataclasses.replace(item, metadata={"seed": 7})])
        store.check()
        for table in ("items", "notes", "events", "event_items"):
            store._db().execute(f"DROP TRIGGER {table}_update")
        store._db().execute("DROP TRIGGER event_items_delete")
        store.check()
        assert store._db().execute(change).rowcount
        with pytest.raises(DataError, match=f"damaged.*feedback.db.*{words}"):
            store.check()


def test_a_value_that_is_no_json_is_named(tmp_path):
    path, item = tmp_path / "feedback.db", Item("p", "an answer")
    with Store.open(path) as store:
        store.add([item], [FeedbackEvent("ordinal", (item.id,), 4, scale=(1, 7), annotator="a")])
        store._db().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    path.write_bytes(data.replace(f'["{item.id}"]'.encode(), f'"["{item.id}]'.encode()))
    with Store.open(path) as store, pytest.raises(DataError, match=r"damaged.*feedback\.db.*no JSON"):
        list(store.current())
