"""What one call appends to a store's log, within a write transaction that the caller holds: additions and undos."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item, content_id
from align.feedback.schema import COLUMNS, decode, encode, insert

_LISTED = ", ".join(COLUMNS)
# What decides whether an answer is the same one given again: all but its id, latency and time.
_CONTENT = [i for i, name in enumerate(COLUMNS) if name not in ("id", "latency_ms", "ts")]
_ID, _TS, _TOMBSTONE = COLUMNS.index("id"), COLUMNS.index("ts"), COLUMNS.index("tombstone")


@dataclass(frozen=True)
class Added:
    """What became of one event that was handed to `add`.

    Args:
        event: as it stands in the store, with its id.
        seq: its place in the log.
        status: "added": it is new and current; "superseded": it is new, current, and replaced another; "withdrawn": it
            took another back, or undid it; "late": it is new, and older than what is current; "unchanged": it was
            there already and is current; "past": it was there already and has been replaced or taken back since.
        superseded: id of the event that was current before, where that changed.
        restored: id of the event that an undo made current again.
    """

    event: FeedbackEvent
    seq: int
    status: str
    superseded: str = ""
    restored: str = ""


def add_all(db: sqlite3.Connection, items: Iterable[Item], events: Iterable[FeedbackEvent]) -> list[Added]:
    """Add items, then events, within the caller's transaction (see `Store.add`)."""
    for item in items:
        _add_item(db, item)
    seq = db.execute("SELECT ifnull(max(seq), 0) FROM events").fetchone()[0]
    added = []
    for event in events:
        result = _append(db, event, seq + 1)
        seq = max(seq, result.seq)
        added.append(result)
    return added


def _add_item(db: sqlite3.Connection, item: Item) -> None:
    name = item.id
    known = db.execute("SELECT no, metadata FROM items WHERE id = ?", (name,)).fetchone()
    metadata = dict(item.metadata)
    if known is None:
        content = (_json(item.prompt), item.input, _json(item.response), item.media, _json(metadata))
        insert(db, "items", (name, item.prompt_id, *content))
    elif metadata:
        had = json.loads(known[1])
        for (note,) in db.execute("SELECT metadata FROM notes WHERE item = ? ORDER BY no", (known[0],)):
            had |= json.loads(note)
        new = {key: value for key, value in json.loads(_json(metadata)).items() if key not in had or had[key] != value}
        if new:
            insert(db, "notes", (known[0], _json(new)))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError("An item cannot be stored", why=str(error), do="Use texts, numbers, lists and dicts") from error


def _append(db: sqlite3.Connection, event: FeedbackEvent, seq: int) -> Added:
    row = list(encode(event))
    name = event.id or (content_id(*row[1:]) if event.ts else "")
    if name and (known := _row(db, "id = ?", name)):
        same = _same(known, row) and event.ts in (0, known[1 + _TS])
        if not same and event.id:
            raise DataError(
                f"The event id {event.id!r} stands for other content", where=event.identifier,
                why="an event is never changed", do="Leave the id out, or give a new one",
            )  # fmt: skip
        return Added(
            decode(known[1:]), known[0], "unchanged" if _standing(db, event.identifier) == known[0] else "past"
        )
    head = db.execute(
        "SELECT seq, stands, id FROM events WHERE identifier = ? ORDER BY seq DESC LIMIT 1", (event.identifier,)
    ).fetchone()
    before, newest = _deciding(db, event.identifier) if head else (None, 0)
    if before and not event.id and _same(before, row) and event.ts in (0, before[1 + _TS]):
        return Added(decode(before[1:]), before[0], "unchanged")
    row[_ID] = name or _untimed_id(db, row, head[2] if head else "")
    stood = head[1] if head else None
    decides = not event.ts or event.ts >= newest
    stands = (None if event.tombstone else seq) if decides else stood
    _insert(db, seq, row, event.items, head[0] if head else None, None, stands)
    seated = _row(db, "seq = ?", stood) if stood != stands else None
    replaced = seated[1 + _ID] if seated else ""
    status = "late" if not decides else "withdrawn" if event.tombstone else "superseded" if replaced else "added"
    stored = object.__new__(FeedbackEvent)  # it was checked when it was made
    stored.__dict__.update(event.__dict__, id=row[_ID])
    return Added(stored, seq, status, superseded=replaced)


def _untimed_id(db: sqlite3.Connection, row: Sequence[Any], before: str) -> str:
    """Return an id of an event that its content and the one before it give: a file has the same in every store."""
    made = content_id(*row[1:], before)
    return made if _row(db, "id = ?", made) is None else secrets.token_hex(12)


def undo_newest(db: sqlite3.Connection, annotator: str, session: str | None) -> Added | None:
    """Undo an annotator's newest answer within the caller's transaction (see `Store.undo`)."""
    where, values = ("", [annotator]) if session is None else (" AND session = ?", [annotator, session])
    newest = _row(
        db,
        f"annotator = ?{where} AND kind <> 'exposure' AND undoes IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = events.seq) ORDER BY seq DESC LIMIT 1",
        *values,
    )
    if newest is None:
        return None
    target, undone = newest[0], decode(newest[1:])
    seq = db.execute("SELECT max(seq) + 1 FROM events").fetchone()[0]
    head, stood = db.execute(
        "SELECT seq, stands FROM events WHERE identifier = ? ORDER BY seq DESC LIMIT 1", (undone.identifier,)
    ).fetchone()
    left, _ = _deciding(db, undone.identifier, but=target)
    stands = left[0] if left and not left[1 + _TOMBSTONE] else None
    event = dataclasses.replace(
        undone, value=None, tombstone=True, reply="", latency_ms=None, tie_origin="", id=secrets.token_hex(12),
        ts=max(time.time_ns() // 1_000_000, undone.ts),
    )  # fmt: skip
    _insert(db, seq, encode(event), event.items, head, target, stands)
    return Added(
        event, seq, "withdrawn", superseded=undone.id if stood == target else "",
        restored=left[1 + _ID] if left and stands is not None and stands != stood else "",
    )  # fmt: skip


def _insert(
    db: sqlite3.Connection, seq: int, row: Sequence[Any], items: Iterable[str],
    supersedes: int | None, undoes: int | None, stands: int | None,
) -> None:  # fmt: skip
    insert(db, "events", (seq, *row, supersedes, undoes, stands))
    for item in items:
        link = "INSERT OR FAIL INTO event_items SELECT no, ? FROM items WHERE id = ?"
        if db.execute(link, (seq, item)).rowcount != 1:
            raise DataError(
                "An event is about an unknown item", where=item, do="Add the item with the event, or before it"
            )


def _row(db: sqlite3.Connection, where: str, *values: Any) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = db.execute(f"SELECT seq, {_LISTED} FROM events WHERE {where}", values).fetchone()
    return row


def _standing(db: sqlite3.Connection, identifier: str) -> int | None:
    sql = "SELECT stands FROM events WHERE identifier = ? ORDER BY seq DESC LIMIT 1"
    found = db.execute(sql, (identifier,)).fetchone()
    return found[0] if found else None


def _deciding(db: sqlite3.Connection, identifier: str, but: int = 0) -> tuple[tuple[Any, ...] | None, int]:
    """Return the newest row of an identifier that is not undone and is no undo, `but` left out, and its time.

    A row without a time follows those before it, and has the newest of their times; 0 is none.
    """
    found, newest = 0, 0
    for seq, ts in db.execute(
        "SELECT seq, ts FROM events WHERE identifier = ? AND seq <> ? AND undoes IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = events.seq) ORDER BY seq",
        (identifier, but),
    ):
        if not ts or ts >= newest:
            found, newest = seq, ts or newest
    return _row(db, "seq = ?", found), newest


def _same(stored: Sequence[Any], row: Sequence[Any]) -> bool:
    return all(stored[1 + i] == row[i] for i in _CONTENT)
