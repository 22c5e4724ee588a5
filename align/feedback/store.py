"""The append-only store of what was shown and said: one SQLite file, many writers, nothing ever lost.

    store = Store.open("feedback.db")
    store.add(items=[item], events=[FeedbackEvent("ordinal", (item.id,), 6, scale=(1, 7), annotator="ann")])
    for event in store.current(kind="ordinal"): ...

What `add` returns was committed and is on disk. Of the events of one identifier the newest by (`ts`, order of arrival)
that was not undone is the current one, or none is when that is a tombstone; one without a time follows what was there
when it came. So an old event that arrives late enters the history without replacing a newer one, a repeated event
changes nothing, and what was taken back stays so when its file is imported again. The store makes up no times: what it
holds is a function of what was added in which order, not of when.

Many processes may write to one file: each call takes SQLite's write lock and waits for it. The file must be on a local
disk, since SQLite's write-ahead log is shared memory. A server uses `Writer`, which commits in groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import DataError
from align.feedback.appending import Added, add_all, undo_newest
from align.feedback.events import FeedbackEvent, Item
from align.feedback.schema import COLUMNS, broken_seals, connect, decode, speaking, writing

if TYPE_CHECKING:
    from align.feedback.eventtable import EventTable

Words = str | Collection[str] | None
_Entry = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]

_PAGE = 20_000
_LISTED = ", ".join(COLUMNS)


@dataclass(frozen=True)
class Entry:
    """One row of an identifier's history: the event, the ids of what it superseded or undid, and whether it stands."""

    seq: int
    event: FeedbackEvent
    supersedes: str
    undoes: str
    current: bool


class Store:
    """A feedback store. One object serves any number of threads: each gets its own connection."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path, self._create = Path(path), create
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        self._db()

    @classmethod
    def open(cls, path: str | Path, *, create: bool = True) -> Store:
        """Open the store at `path`, making it where there is none unless `create` is false.

        Raises:
            DataError: no such file, another program's file, a newer version, damaged, or not writable.
        """
        return cls(path, create=create)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every thread's connection."""
        while self._connections:
            (process, _), db = self._connections.popitem()
            if process == os.getpid():
                db.close()

    def _db(self) -> sqlite3.Connection:
        place = (os.getpid(), threading.get_ident())
        if place not in self._connections:
            self._connections[place] = connect(self.path, create=self._create and not self._connections)
        return self._connections[place]

    # --- writing ------------------------------------------------------------------------------------

    def add(self, items: Iterable[Item] = (), events: Iterable[FeedbackEvent] = ()) -> list[Added]:
        """Add items, then events about them or about earlier ones, in one commit: all of them or none.

        An item that is known is left as it is; metadata it did not have is kept beside it. An event with the same
        content as the current one of its identifier, and with no time or the same time, is not added again; nor is
        one whose `id` is known, whatever became of it since. Any other event is appended, and becomes current
        unless its `ts` is older than that of the current one.

        Raises:
            DataError: an event about an unknown item, an id that stands for other content, a text that is not
                Unicode, a full disk, a store that stays locked; nothing was added.
        """
        items, events = list(items), list(events)
        with speaking(self.path), writing(self._db(), self.path):
            return add_all(self._db(), items, events)

    def undo(self, annotator: str, session: str | None = None) -> Added | None:
        """Take back the newest answer of an annotator that was not undone yet, and restore what it had superseded.

        Exposures are not answers. Undoing twice takes back two answers. Returns None where nothing is left.
        """
        with speaking(self.path), writing(self._db(), self.path):
            return undo_newest(self._db(), annotator, session)

    # --- reading ------------------------------------------------------------------------------------

    def current(
        self,
        *,
        key: Words = None,
        kind: Words = None,
        annotator: Words = None,
        source: Words = None,
        since: int | None = None,
        items: Collection[str] | None = None,
        upto: int | None = None,
    ) -> Iterator[FeedbackEvent]:
        """Iterate over the current events in the order of the log; each filter takes one word or several.

        Args:
            since: only events of this time (milliseconds since 1970) or later; those without a time are not.
            items: only events about at least one of these items.
            upto: the current events as they were after row `upto` of the log (`seq`); the newest row by default, so
                that what is written meanwhile does not show.
        """
        chosen = _filters(key=key, kind=kind, annotator=annotator, source=source, since=since, items=items)
        for page in self._pages(chosen, upto):
            with speaking(self.path):
                events = [decode(row[1:]) for row in page]
            yield from events

    def events_with_items(
        self,
        *,
        key: Words = None,
        kind: Words = None,
        annotator: Words = None,
        source: Words = None,
        since: int | None = None,
        items: Collection[str] | None = None,
        upto: int | None = None,
        content: bool = True,
    ) -> EventTable:
        """Return the current events as columns, with the items they are about; the filters are those of `current`."""
        from align.feedback.eventtable import EventTable, event_columns

        chosen = _filters(key=key, kind=kind, annotator=annotator, source=source, since=since, items=items)
        table = event_columns(self._pages(chosen, upto))
        named = {item for ids in table["items"] for item in ids} if content else set()
        return EventTable(table, self.items(named) if named else {})

    def _pages(self, chosen: tuple[str, list[Any]], upto: int | None) -> Iterator[list[tuple[Any, ...]]]:
        where, values = chosen
        with speaking(self.path):
            last = self.last if upto is None else upto
            at = 0
            while True:
                sql = f"SELECT seq, {_LISTED} FROM events e WHERE {_CURRENT} AND seq > ?{where} ORDER BY seq LIMIT ?"
                page = self._db().execute(sql, [last, last, last, last, at, *values, _PAGE]).fetchall()
                if not page:
                    return
                yield page
                at = page[-1][0]

    @property
    def last(self) -> int:
        """The number of the newest row of the log; 0 while there is none."""
        with speaking(self.path):
            return int(self._db().execute("SELECT ifnull(max(seq), 0) FROM events").fetchone()[0])

    def get(self, event_id: str) -> FeedbackEvent | None:
        """Return the event of this id, current or not, or None."""
        with speaking(self.path):
            row = self._db().execute(f"SELECT {_LISTED} FROM events WHERE id = ?", (event_id,)).fetchone()
        return decode(row) if row else None

    def history(self, identifier: str) -> list[Entry]:
        """Return every row of an identifier in the order of the log, taken back ones included."""
        listed = ", ".join(f"e.{name}" for name in COLUMNS)
        sql = (
            f"SELECT e.seq, ifnull(p.id, ''), ifnull(u.id, ''), e.stands, {listed} FROM events e"
            " LEFT JOIN events p ON p.seq = e.supersedes LEFT JOIN events u ON u.seq = e.undoes"
            " WHERE e.identifier = ? ORDER BY e.seq"
        )
        with speaking(self.path):
            rows = self._db().execute(sql, (identifier,)).fetchall()
        standing = rows[-1][3] if rows else None
        return [Entry(row[0], decode(row[4:]), row[1], row[2], row[0] == standing) for row in rows]

    def items(self, ids: Iterable[str] | None = None) -> dict[str, Item]:
        """Return items by id: those of `ids` that are known, or all of them."""
        sql = "SELECT id, prompt, input, response, media, metadata FROM items i"
        late = "SELECT i.id, n.metadata FROM notes n JOIN items i ON i.no = n.item"
        asked = None if ids is None else list(ids)
        parts = [None] if asked is None else [json.dumps(asked[at : at + _PAGE]) for at in range(0, len(asked), _PAGE)]
        found: dict[str, Item] = {}
        with speaking(self.path):
            for part in parts:
                where, values = (
                    ("", ()) if part is None else (" WHERE i.id IN (SELECT value FROM json_each(?))", (part,))
                )
                found |= {row[0]: _item(row) for row in self._db().execute(f"{sql}{where}", values)}
                for name, note in self._db().execute(f"{late}{where} ORDER BY n.no", values):
                    if name in found:  # an item may have come since
                        merged = {**found[name].metadata, **json.loads(note)}
                        found[name] = dataclasses.replace(found[name], metadata=merged)
        return found

    def counts(self) -> dict[str, Any]:
        """Return how much there is: items, prompts, rows of the log, current events, those by kind, key and source,
        annotators, the first and last time (ms), current events without a time, and bytes on disk."""
        with speaking(self.path):
            db, last = self._db(), self.last
            bound = [last] * 4

            def by(column: str) -> dict[str, int]:
                sql = f"SELECT {column}, count(*) FROM events e WHERE {_CURRENT} GROUP BY {column} ORDER BY 2 DESC, 1"
                return dict(db.execute(sql, bound).fetchall())

            items, prompts = db.execute("SELECT count(*), count(DISTINCT prompt_id) FROM items").fetchone()
            kinds = by("kind")
            first, newest, timed, people = db.execute(
                "SELECT min(nullif(ts, 0)), max(nullif(ts, 0)), count(nullif(ts, 0)),"
                f" count(DISTINCT nullif(annotator, '')) FROM events e WHERE {_CURRENT}", bound,
            ).fetchone()  # fmt: skip
            withdrawn = db.execute("SELECT count(*) FROM events WHERE tombstone = 1 AND seq <= ?", (last,)).fetchone()[
                0
            ]
            rows = db.execute("SELECT count(*) FROM events WHERE seq <= ?", (last,)).fetchone()[0]
        total = sum(kinds.values())
        return {
            "items": items, "prompts": prompts, "events": total, "log": rows, "tombstones": withdrawn,
            "superseded": rows - total - withdrawn, "kinds": kinds, "keys": by("key"), "sources": by("source"),
            "annotators": people, "first_ms": first, "last_ms": newest, "untimed": total - timed,
            "bytes": _bytes(self.path),
        }  # fmt: skip

    def check(self) -> None:
        """Verify the file: SQLite's own structure, every row against its seal, and every link between rows.

        Raises:
            DataError: SQLite finds damage, a row is not what was written, or it refers to one that is not there.
        """
        with speaking(self.path):
            db = self._db()
            found = [row[0] for row in db.execute("PRAGMA integrity_check(3)")]
            broken = found if found != ["ok"] else [
                *islice(broken_seals(db), 3), *(what for what, sql in _LINKS.items() if db.execute(sql).fetchone()[0])
            ]  # fmt: skip
        if broken:
            raise DataError(
                "A feedback store is damaged", where=str(self.path), why="; ".join(broken),
                do="Restore a copy, or recover it with SQLite's `.recover`",
            )  # fmt: skip


class Writer:
    """One thread that writes for many: it commits in groups and acknowledges after the commit.

    `submit` returns a future at once; its result, a list of `Added`, means that the events are on disk. A submission
    that is refused fails its own future alone. Undone work of a crash is at most what was never acknowledged.

    Args:
        path: the store.
        group: how many submissions share a commit at most; a lone one is committed without waiting for others.
        pending: how many submissions may wait before `submit` does.
    """

    def __init__(self, path: str | Path, *, group: int = 512, pending: int = 4096) -> None:
        self.store, self._group = Store.open(path), group
        self._queue: queue.Queue[_Entry | None] = queue.Queue(pending)
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="feedback-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def submit(
        self, items: Iterable[Item] = (), events: Iterable[FeedbackEvent] = (), *, timeout: float | None = None
    ) -> Future[list[Added]]:
        """Queue what `Store.add` would add, all of it or none; waits up to `timeout` seconds for a place in the queue.

        Raises:
            DataError: the writer is closed, or the queue stayed full.
        """
        items, events = list(items), list(events)
        return self._put(lambda db: add_all(db, items, events), timeout)

    def undo(self, annotator: str, session: str | None = None, *, timeout: float | None = None) -> Future[Added | None]:
        """Queue a `Store.undo`."""
        return self._put(lambda db: undo_newest(db, annotator, session), timeout)

    def close(self) -> None:
        """Write everything that was submitted, then stop. Later calls do nothing."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._queue.put(None)
        self._thread.join()
        self.store.close()

    def _put(self, work: Callable[[sqlite3.Connection], Any], timeout: float | None) -> Future[Any]:
        future: Future[Any] = Future()
        behind = DataError(
            "The store cannot keep up", where=str(self.store.path), why=f"{self._queue.maxsize} writes wait",
            do="Repeat in a moment",
        )  # fmt: skip
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            raise behind
        try:
            if self._closed:
                raise DataError("The store's writer is closed", where=str(self.store.path))
            self._queue.put((work, future), timeout=timeout)
        except queue.Full:
            raise behind from None
        finally:
            self._lock.release()
        return future

    def _run(self) -> None:
        group: list[_Entry | None] = []
        try:
            while not group or group[-1] is not None:
                group = [self._queue.get()]
                with contextlib.suppress(queue.Empty):
                    while len(group) < self._group and group[-1] is not None:
                        group.append(self._queue.get_nowait())
                self._commit([entry for entry in group if entry and entry[1].set_running_or_notify_cancel()])
        finally:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    group.append(self._queue.get_nowait())
            stopped = DataError("The store's writer stopped", where=str(self.store.path), do="Report this as a defect")
            for entry in group:
                if entry and not entry[1].done():
                    entry[1].set_exception(stopped)

    def _commit(self, group: Sequence[_Entry], *, apart: bool = False) -> None:
        """Write a group in one transaction; where one of it is refused, again with a savepoint for each.

        The second way lets a bad submission fail alone, and costs each of the others a little.
        """
        done: list[tuple[Future[Any], Any]] = []
        refused: list[tuple[Future[Any], Exception]] = []
        at_work = False
        try:
            with speaking(self.store.path), writing(db := self.store._db(), self.store.path):
                for work, future in group:
                    at_work = True
                    if apart:
                        try:
                            done.append((future, self._alone(db, work)))
                        except _REFUSALS as refusal:
                            if not db.in_transaction:
                                raise
                            refused.append((future, refusal))
                    else:
                        done.append((future, work(db)))
                    at_work = False
        except _REFUSALS as problem:
            if at_work and not apart:
                self._commit(group, apart=True)
                return
            done, refused = [], [(future, problem) for _, future in group]
        for future, result in done:
            future.set_result(result)
        for future, reason in refused:
            future.set_exception(reason)

    def _alone(self, db: sqlite3.Connection, work: Callable[[sqlite3.Connection], Any]) -> Any:
        db.execute("SAVEPOINT alone")
        try:
            with speaking(self.store.path):
                return work(db)
        except _REFUSALS:
            if db.in_transaction:
                db.execute("ROLLBACK TO alone")
            raise
        finally:
            if db.in_transaction:
                db.execute("RELEASE alone")


_REFUSALS = (DataError, TypeError, ValueError, OverflowError, AttributeError)

# Rows that are current as of a log that ends at the row bound four times: those no later row of their identifier
# supersedes and that stand themselves, and those that an undo, or a late event, lets stand.
_CURRENT = """seq <= ? AND (
    (stands = seq AND NOT EXISTS (SELECT 1 FROM events n WHERE n.supersedes = e.seq AND n.seq <= ?))
    OR seq IN (SELECT r.stands FROM events r INDEXED BY events_restored WHERE r.stands <> r.seq AND r.seq <= ?
        AND NOT EXISTS (SELECT 1 FROM events n WHERE n.supersedes = r.seq AND n.seq <= ?)))"""

_LINKS = {
    "an event is undone twice": "SELECT count(*) - count(DISTINCT undoes) FROM events WHERE undoes IS NOT NULL",
    "an event names an item that is not there": "SELECT count(*) FROM event_items l"
    " LEFT JOIN items i ON i.no = l.item LEFT JOIN events e ON e.seq = l.event WHERE i.no IS NULL OR e.seq IS NULL",
    "an event is filed under an item that it is not about": "SELECT count(*) FROM event_items l"
    " JOIN items i ON i.no = l.item JOIN events e ON e.seq = l.event"
    " WHERE i.id NOT IN (SELECT value FROM json_each(e.items))",
    "an event is not filed under an item that it is about": "SELECT (SELECT ifnull(sum(json_array_length(items)), 0)"
    " FROM events) - (SELECT count(*) FROM event_items)",
    "an event supersedes one of another identifier": "SELECT count(*) FROM events e"
    " LEFT JOIN events p ON p.seq = e.supersedes WHERE e.supersedes IS NOT NULL AND p.identifier IS NOT e.identifier",
    "two rows of an identifier are both its last": "SELECT count(*) FROM (SELECT 1 FROM events e WHERE NOT EXISTS"
    " (SELECT 1 FROM events n WHERE n.supersedes = e.seq) GROUP BY identifier HAVING count(*) > 1)",
}


def _filters(*, since: int | None, items: Collection[str] | None, **words: Words) -> tuple[str, list[Any]]:
    clauses: list[str] = []
    values: list[Any] = []
    for column, chosen in words.items():
        if chosen is not None:
            one = isinstance(chosen, str)
            clauses.append(f"{column} = ?" if one else f"{column} IN (SELECT value FROM json_each(?))")
            values.append(chosen if one else json.dumps(list(chosen)))
    if since is not None:
        clauses.append("ts >= ?")
        values.append(since)
    if items is not None:
        about = "SELECT l.event FROM items i JOIN event_items l ON l.item = i.no WHERE i.id IN"
        clauses.append(f"seq IN ({about} (SELECT value FROM json_each(?)))")
        values.append(json.dumps(list(items)))
    return "".join(f" AND {clause}" for clause in clauses), values


def _item(row: Sequence[Any]) -> Item:
    _, prompt, given, response, media, metadata = row
    return Item(json.loads(prompt), json.loads(response), given, media, json.loads(metadata))


def _bytes(path: Path) -> int:
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())
