"""Checkpoints and stores that are killed, damaged or out of space: nothing torn, nothing lost, all damage refused."""

from __future__ import annotations

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


def test_a_changed_item_and_a_value_that_is_no_json_are_named(tmp_path):
    path, item = tmp_path / "feedback.db", Item("p", "a marked answer")
    with Store.open(path) as store:
        store.add([item], [FeedbackEvent("ordinal", (item.id,), 4, scale=(1, 7), annotator="a")])
        store.check()
        store._db().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    assert data.count(b"a marked answer") == 1
    path.write_bytes(data.replace(b"a marked answer", b"a market answer"))
    with Store.open(path) as store, pytest.raises(DataError, match=f"item {item.id} has other content"):
        store.check()
    path.write_bytes(data.replace(f'["{item.id}"]'.encode(), f'"["{item.id}]'.encode()))
    with Store.open(path) as store, pytest.raises(DataError, match=r"damaged.*feedback\.db.*no JSON"):
        list(store.current())
