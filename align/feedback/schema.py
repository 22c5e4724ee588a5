"""The file of a feedback store: its tables, how it is opened, and what SQLite's complaints mean to people.

Everything is appended and nothing is changed: triggers refuse UPDATE, DELETE and the replacing of a row, for this
library and for any other program that opens the file.

| table        | a row                                                                                        |
|--------------|----------------------------------------------------------------------------------------------|
| `items`      | content, once, by the hash of its content                                                    |
| `notes`      | metadata of an item that came later than the item                                            |
| `events`     | one event; `supersedes` is the row before it of the same identifier, `undoes` the row it      |
|              | undoes, `stands` the row that is current for the identifier once this one is written          |
| `event_items`| which items an event is about, for finding events by item                                    |

An event is current when the last row of its identifier says so in `stands`. That row is found without a sort: it is
the one that no row supersedes.

SQLite keeps no checksums, so every item, note and event has one of its own, `seal`, which `Store.check` compares.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.feedback.events import FeedbackEvent

SCHEMA = 2
APPLICATION = 0x414C4644
BUSY_SECONDS = 60.0

COLUMNS = (
    "id", "identifier", "kind", "items", "value", "key", "annotator", "source", "scale_low", "scale_high",
    "tombstone", "exposure", "tie_origin", "policy", "propensity", "position", "latency_ms", "session", "reply", "ts",
)  # fmt: skip
SEALED = {
    "items": ("id", "prompt_id", "prompt", "input", "response", "media", "metadata"),
    "notes": ("item", "metadata"),
    "events": ("seq", *COLUMNS, "supersedes", "undoes", "stands"),
}
"""The columns of each table that its seal is of, in order."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE items (
    no INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt_id TEXT NOT NULL,
    prompt TEXT NOT NULL, input TEXT NOT NULL, response TEXT NOT NULL, media TEXT NOT NULL, metadata TEXT NOT NULL,
    seal INTEGER NOT NULL
) STRICT;
CREATE TABLE notes (
    no INTEGER PRIMARY KEY, item INTEGER NOT NULL, metadata TEXT NOT NULL, seal INTEGER NOT NULL
) STRICT;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, identifier TEXT NOT NULL, kind TEXT NOT NULL,
    items TEXT NOT NULL, value TEXT, key TEXT NOT NULL, annotator TEXT NOT NULL, source TEXT NOT NULL,
    scale_low INTEGER, scale_high INTEGER, tombstone INTEGER NOT NULL, exposure TEXT NOT NULL,
    tie_origin TEXT NOT NULL, policy TEXT NOT NULL, propensity REAL, position INTEGER, latency_ms INTEGER,
    session TEXT NOT NULL, reply TEXT NOT NULL, ts INTEGER NOT NULL,
    supersedes INTEGER, undoes INTEGER, stands INTEGER, seal INTEGER NOT NULL
) STRICT;
CREATE TABLE event_items (item INTEGER NOT NULL, event INTEGER NOT NULL, PRIMARY KEY (item, event))
    STRICT, WITHOUT ROWID;
CREATE INDEX items_prompt ON items (prompt_id);
CREATE INDEX notes_item ON notes (item);
CREATE INDEX events_identifier ON events (identifier, seq);
CREATE INDEX events_annotator ON events (annotator, session, seq);
CREATE INDEX events_key ON events (key, kind, seq);
CREATE INDEX events_ts ON events (ts);
CREATE INDEX events_supersedes ON events (supersedes) WHERE supersedes IS NOT NULL;
CREATE INDEX events_undoes ON events (undoes) WHERE undoes IS NOT NULL;
CREATE INDEX events_restored ON events (stands) WHERE stands <> seq;
"""

# When an insertion would replace a row. A new number is above all others, and an `event_items` row is all key, so that
# replacing one leaves it as it was.
_REPLACES = {
    "meta": "EXISTS (SELECT 1 FROM meta WHERE name = NEW.name)",
    "items": "NEW.no <= (SELECT max(no) FROM items) AND NEW.no > 0 OR EXISTS (SELECT 1 FROM items WHERE id = NEW.id)",
    "notes": "NEW.no <= (SELECT max(no) FROM notes) AND NEW.no > 0",
    "events": "NEW.seq <= (SELECT max(seq) FROM events) OR EXISTS (SELECT 1 FROM events WHERE id = NEW.id)",
    "event_items": "",
}


# As bytes, since damaged ones may be no text. Indexes of others are left alone, and tables of SQLite's own.
_SCHEMA_OF = (
    "SELECT CAST(name AS BLOB), CAST(sql AS BLOB) FROM sqlite_master"
    " WHERE type <> 'index' AND substr(name, 1, 7) <> 'sqlite_'"
)


def connect(path: Path, *, create: bool) -> sqlite3.Connection:
    """Open the store at `path`, making it first where there is none and `create` is true.

    Raises:
        DataError: no such file, not a store, a store of a newer version or with tables, views or triggers of others,
            damaged, or not writable.
    """
    if path.is_dir():
        raise DataError("A feedback store is a file, and this is a folder", where=str(path), do="Name a file in it")
    if not path.exists():
        if not create:
            raise DataError("There is no such feedback store", where=str(path), do="Check the path")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError("A store's folder cannot be made", where=str(path), why=error.strerror or "") from error
    elif not create and not path.stat().st_size:
        raise DataError("A feedback store is empty", where=str(path), why="the file has no bytes", do="Restore a copy")
    with speaking(path):
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with speaking(path):
            _prepare(db, path)
    except DataError:
        db.close()
        raise
    return db


@lru_cache(maxsize=1)
def _own() -> frozenset[tuple[bytes, bytes]]:
    """The names of what a store holds, and the statements that made it."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        _make(db)
        return frozenset(db.execute(_SCHEMA_OF))


def _require_own(db: sqlite3.Connection, path: Path) -> None:
    """Refuse views, triggers and tables of others: they run with every statement, and can change what it says."""
    foreign = set(db.execute(_SCHEMA_OF)) - _own()
    if foreign:
        raise DataError(
            "A feedback store holds what align did not put there", where=str(path),
            why=", ".join(sorted(repr(str(name or b"", "utf-8", "replace")) for name, _ in foreign))[:200],
            do="Drop it with sqlite3 if it is yours; do not trust the store otherwise",
        )  # fmt: skip


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA cache_size = -32768")
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION:
        with writing(db, path):
            application = db.execute("PRAGMA application_id").fetchone()[0]
            if application == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                _make(db)
            elif application != APPLICATION:
                raise DataError(
                    "This is no feedback store", where=str(path), why="it is a database of another program",
                    do="Name another file",
                )  # fmt: skip
        _sync_folder(path.parent)
    version = dict(db.execute("SELECT name, value FROM meta")).get("schema", "")
    if version != str(SCHEMA):
        older = version.isdecimal() and int(version) < SCHEMA
        raise DataError(
            "A feedback store is of another version", where=str(path),
            why=f"it is of version {version or 'unknown'}, and this library reads {SCHEMA}",
            do="Write it out with the align that made it, `align feedback export`, and import that into a new store"
            if older else "Update align",
        )  # fmt: skip
    _require_own(db, path)
    # SQLite does not wait for others here.
    _until(time.monotonic() + BUSY_SECONDS, lambda: db.execute("PRAGMA journal_mode = WAL"))


def _make(db: sqlite3.Connection) -> None:
    for statement in filter(str.strip, _TABLES.split(";")):
        db.execute(statement)
    for table, replaces in _REPLACES.items():
        refuse = f"the table {table} is append-only"
        for change in ("UPDATE", "DELETE"):
            db.execute(
                f"CREATE TRIGGER {table}_{change.lower()} BEFORE {change} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, '{refuse}'); END"
            )
        if replaces:
            # FAIL, and not ABORT, spares every insertion a journal of its own, two fifths of its time.
            db.execute(
                f"CREATE TRIGGER {table}_replace BEFORE INSERT ON {table} WHEN {replaces}"
                f" BEGIN SELECT RAISE(FAIL, '{refuse}'); END"
            )
    facts = {"schema": str(SCHEMA), "store": secrets.token_hex(12), "created_ms": str(time.time_ns() // 1_000_000)}
    db.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
    db.execute(f"PRAGMA application_id = {APPLICATION}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_turns: dict[str, threading.Lock] = {}
os.register_at_fork(after_in_child=_turns.clear)


@contextlib.contextmanager
def writing(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Hold the store's only write lock for a block, and commit it whole or not at all.

    Threads of one process queue for it; processes ask again at short random intervals, since under SQLite's own, ever
    longer ones the first of many writers starves the others.
    """
    turn, deadline = _turns.setdefault(os.path.abspath(path), threading.Lock()), time.monotonic() + BUSY_SECONDS
    if not turn.acquire(timeout=BUSY_SECONDS):
        raise sqlite3.OperationalError("database is locked by another thread")
    try:
        db.execute("PRAGMA busy_timeout = 0")
        _until(deadline, lambda: db.execute("BEGIN IMMEDIATE"))
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        turn.release()


def _until(deadline: float, ask: Callable[[], object]) -> None:
    while True:
        try:
            ask()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.0005, 0.01))


_MEANINGS = (
    ("disk is full", "The disk is full", "Free some space and repeat; nothing of this call was written"),
    ("disk I/O error", "The disk refused to read or write", "Free some space or check the disk, and repeat"),
    ("locked", "A feedback store stays locked", "See which other program holds it open, and repeat"),
    ("not a database", "This is no feedback store", "Name another file"),
    ("malformed", "A feedback store is damaged", "Restore a copy, or recover it with SQLite's `.recover`"),
    ("no such table", "A feedback store is damaged", "Restore a copy"),
    ("no such column", "A feedback store is damaged", "Restore a copy"),
    ("append-only", "A feedback store is only ever added to", "Add an event that supersedes, or a tombstone"),
    ("readonly", "A feedback store cannot be written", "Check the permissions of the file and its folder"),
    ("unable to open", "A feedback store cannot be opened", "Check the path and its permissions"),
)


@contextlib.contextmanager
def speaking(path: Path) -> Iterator[None]:
    """Turn what SQLite, or a damaged value, raises within a block into a `DataError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        for sign, what, advice in _MEANINGS:
            if sign in text:
                raise DataError(what, where=str(path), why=text, do=advice) from error
        raise DataError("A feedback store refused", where=str(path), why=text) from error
    except UnicodeEncodeError as error:
        raise DataError(
            "A text cannot be stored", where=str(path), why="it holds half of a character (a lone surrogate)",
            do="Mend the text where it comes from",
        ) from error  # fmt: skip
    except UnicodeDecodeError as error:  # a damaged name within SQLite's own message
        raise DataError(
            "A feedback store is damaged", where=str(path), why=f"a name is no text: {error}", do="Restore a copy"
        ) from error
    except OverflowError as error:
        raise DataError("A number cannot be stored", where=str(path), why="it is beyond 64 bits") from error
    except json.JSONDecodeError as error:
        raise DataError(
            "A feedback store is damaged", where=str(path), why=f"a value is no JSON: {error}", do="Restore a copy"
        ) from error


_json = json.JSONEncoder(ensure_ascii=False).encode
_sealed = json.JSONEncoder(ensure_ascii=False, default=str).encode  # of what is no value of SQLite's, it says so itself


def seal(values: Sequence[Any]) -> int:
    """Return the checksum of a row: the CRC-32 of the JSON of its values as they are stored, in UTF-8."""
    plain = [int(v) if v is True or v is False or (isinstance(v, float) and v.is_integer()) else v for v in values]
    return zlib.crc32(_sealed(plain).encode())


def insert(db: sqlite3.Connection, table: str, row: Sequence[Any]) -> None:
    """Append a row of `SEALED[table]`, with its seal."""
    columns = SEALED[table]
    marks = ", ".join("?" * (len(columns) + 1))
    db.execute(f"INSERT OR FAIL INTO {table} ({', '.join(columns)}, seal) VALUES ({marks})", (*row, seal(row)))


def broken_seals(db: sqlite3.Connection) -> Iterator[str]:
    """Yield the rows that are not what was written, by table and number."""
    for table, columns in SEALED.items():
        number = "seq" if table == "events" else "no"
        for at, kept, *row in db.execute(f"SELECT {number}, seal, {', '.join(columns)} FROM {table}"):
            if seal(row) != kept:
                yield f"row {at} of {table} is not what was written"


def encode(event: FeedbackEvent) -> tuple[Any, ...]:
    """Return an event's values in the order of `COLUMNS`."""
    low, high = event.scale or (None, None)
    value = event.value if event.value is None else _json(event.value)
    return (
        event.id, event.identifier, event.kind, _json(event.items), value, event.key, event.annotator,
        event.source, low, high, int(event.tombstone), event.exposure, event.tie_origin, event.policy,
        event.propensity, event.position, event.latency_ms, event.session, event.reply, event.ts,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def decode_value(text: str | None) -> Any:
    """Return what a stored value means; ranks are a tuple."""
    value = None if text is None else json.loads(text)
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=65536)
def decode_items(text: str) -> tuple[str, ...]:
    """Return the ids of a stored list of items."""
    return tuple(json.loads(text))


def decode(row: tuple[Any, ...]) -> FeedbackEvent:
    """Return the event of a row of `COLUMNS`, as it was checked when it was added."""
    event = object.__new__(FeedbackEvent)
    fields = dict(zip(COLUMNS, row, strict=False))
    low, high = fields.pop("scale_low"), fields.pop("scale_high")
    fields["scale"] = None if low is None else (low, high)
    fields["items"] = decode_items(fields["items"])
    fields["value"] = decode_value(fields["value"])
    fields["tombstone"] = bool(fields["tombstone"])
    event.__dict__.update(fields)
    return event
