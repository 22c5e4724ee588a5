"""From rows to items and events, and into a store: all of a file, or none of it, or all but the rows listed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item, content_id
from align.feedback.exchange.layouts import FIELDS, LAYOUTS, detect
from align.feedback.exchange.rows import DUPLICATES, Reading, column_of, events_of, from_record, json_ready
from align.feedback.exchange.tables import Bad, Row, read_table, short
from align.feedback.store import Store
from align.registry import suggest


@dataclass(frozen=True)
class Refused:
    """A row that was not taken: where it stands, why, and its fields where they could be read."""

    place: str
    reason: str
    fields: Mapping[str, Any]


@dataclass
class Found:
    """What a file says: items by id, events with the place each came from, and what was not taken."""

    layout: str = ""
    rows: int = 0
    items: dict[str, Item] = field(default_factory=dict)
    events: list[tuple[FeedbackEvent, str]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    ignored: set[str] = field(default_factory=set)

    def standing(self) -> list[FeedbackEvent]:
        """Return the events that would be current in a store that held this file alone, in its order."""
        last = {event.identifier: event for event, _ in self.events}
        return [event for event, _ in self.events if event is last[event.identifier] and not event.tombstone]


@dataclass(frozen=True)
class Imported:
    """What an import did: rows read, events by what became of them (see `Added.status`), and rows not taken."""

    layout: str
    rows: int
    items: int
    statuses: Mapping[str, int]
    skipped: Mapping[str, int]
    ignored_columns: Sequence[str]
    refused: Sequence[Refused]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; of the refused rows, place and reason."""
        found = dataclasses.asdict(self)
        found["refused"] = [{"where": row.place, "why": row.reason} for row in self.refused]
        return found


def import_file(store: Store, path: str | Path, how: Reading | None = None, *, keep_going: bool = False) -> Imported:
    """Add the feedback of a file to a store, in one commit.

    Importing a file again changes nothing; what was superseded or taken back since stays so.

    Args:
        keep_going: take the good rows and list the others in `refused`; else one bad row refuses the file.

    Raises:
        DataError: as `read_feedback`; nothing was added.
    """
    return add_found(store, read_feedback(path, how, keep_going=keep_going))


def add_found(store: Store, found: Found) -> Imported:
    """Add what `read_feedback` found to a store, in one commit.

    Raises:
        DataError: as `Store.add`; nothing was added.
    """
    added = store.add(found.items.values(), (event for event, _ in found.events))
    return Imported(
        found.layout, found.rows, len(found.items), dict(Counter(a.status for a in added)), dict(found.skipped),
        sorted(found.ignored), found.refused,
    )  # fmt: skip


def read_feedback(path: str | Path, how: Reading | None = None, *, keep_going: bool = False) -> Found:
    """Return the items and events of a file, the events in the order of their times.

    Raises:
        DataError: a file that cannot be read; without `keep_going` also the first row that cannot, as
            file:row:column; or answers that contradict each other.
    """
    how = how or Reading()
    _require(how)
    found, layout, spelled = Found(), "" if how.layout == "auto" else how.layout, dict[str, str]()
    for row in read_table(path, columns=how.columns, delimiter=how.delimiter):
        found.rows += 1
        try:
            if isinstance(row, Bad):
                raise row.error
            renamed = list(_rename(row, how.renamed))
            layout = layout or detect(renamed[0])
            for part in renamed:
                _take(found, part, layout, how, spelled)
        except DataError as error:
            if not keep_going:
                raise
            found.refused.append(Refused(row.place, str(error), getattr(row, "fields", {})))
    if not found.rows:
        raise DataError("There is no feedback", where=f"{path}:1:1", why="the file has no rows", do="Check the file")
    found.layout = layout
    found.events = _settle(found, how, keep_going)
    return found


def _require(how: Reading) -> None:
    choices = {"duplicates": DUPLICATES, "identical": ("refuse", "skip"), "missing": ("", "refuse", "skip", "exposure")}
    choices["layout"] = ("auto", *LAYOUTS)
    for name, allowed in choices.items():
        if getattr(how, name) not in allowed:
            value = str(getattr(how, name))
            raise DataError(f"Unknown choice {value!r} for {name}", do=suggest(value, filter(None, allowed)))
    for name in how.renamed:
        if name not in FIELDS and name not in ("chosen", "rejected", "completion", "completions"):
            raise DataError(f"There is no field {name!r} to map a column to", do=suggest(name, FIELDS))


def _rename(row: Row, renamed: Mapping[str, str]) -> Iterator[Row]:
    """Yield the row with its columns under the names of fields; several where several columns answer one field."""
    fields = dict(row.fields)
    made: dict[str, Any] = {}
    several = ("", [""])
    for name, column in renamed.items():
        columns = column.split("|")
        if len(columns) > 1:
            if several[0]:
                raise DataError("Only one field may be read from several columns", why=f"{several[0]} and {name} are")
            several = (name, columns)
        made |= {(name if len(columns) == 1 else c): _reach(row, c) for c in columns}
    for column in (c for mapped in renamed.values() for c in mapped.split("|")):
        fields.pop(column, None)
        if "." in column:
            fields.pop(column.partition(".")[0], None)
    if not several[0]:
        yield row.but({**fields, **made}, **renamed)
        return
    rest = {name: value for name, value in made.items() if name not in several[1]}
    for column in several[1]:
        found = {**fields, "annotator": column, **rest, several[0]: made[column]}
        yield row.but(found, **{**renamed, several[0]: column})


def _reach(row: Row, column: str) -> Any:
    if column in row.fields:
        return row.fields[column]
    value: Any = row.fields
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise row.wrong(column, "A row has no such column", do=suggest(column, map(str, row.fields)))
        value = value[part]
    return value


def _take(found: Found, row: Row, layout: str, how: Reading, spelled: dict[str, str]) -> None:
    """Add a row's items and events, all of them or none."""
    items: dict[str, Item] = {}
    events: list[tuple[FeedbackEvent, str]] = []
    for part in LAYOUTS[layout][0](row):
        _require_one_code(part, spelled)
        made = from_record(part) if layout == "events" else events_of(part, how, found.skipped, found.ignored)
        items |= {item.id: item for item in made[0]}
        events += [(event, f"{part.place}:{part.names.get(column_of(event), column_of(event))}") for event in made[1]]
    for name, item in items.items():
        known = found.items.get(name)
        found.items[name] = (
            item if known is None else dataclasses.replace(known, metadata={**known.metadata, **item.metadata})
        )
    found.events += events


def _require_one_code(row: Row, spelled: dict[str, str]) -> None:
    """Refuse a file in which both 0 and -1 are labels: one of the two cannot mean "down"."""
    value = row.fields.get("label")
    number = str(value).strip().removesuffix(".0") if not isinstance(value, bool) else ""
    if number in ("0", "-1"):
        other = spelled.get("-1" if number == "0" else "0")
        if other:
            raise row.wrong(
                "label", "The labels 0 and -1 stand in one file", why=f"the other is at {other}",
                do="Say which of them is down, and leave the other cells empty",
            )  # fmt: skip
        spelled.setdefault(number, row.place)


def _settle(found: Found, how: Reading, keep_going: bool) -> list[tuple[FeedbackEvent, str]]:
    """Return the events in the order of their times, repeats dropped, and contradictions treated as asked."""
    duplicates = how.duplicates
    first: dict[tuple[str, int], tuple[FeedbackEvent, str]] = {}
    kept: dict[str, tuple[FeedbackEvent, str]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for event, place in found.events:
        said = (event.identifier, event.ts)
        other = first.setdefault(said, (event, place))[0]
        seen[said] += 1
        if seen[said] > 1 and duplicates == "all":
            number = seen[said]
            event = dataclasses.replace(
                event, identifier=content_id(event.identifier, number), id=content_id(event.id, number)
            )
        elif seen[said] > 1:
            if _answer(other) == _answer(event):
                found.skipped["repeated"] += 1
                continue
            problem = DataError(
                "Two rows contradict each other", where=place,
                why=f"{first[said][1]} answers {short(other.value)} and this one {short(event.value)}"
                f"{_swapped(other, event)}",
                do=f"Give both a ts, or say --duplicates {', '.join(k for k in how.policies if k != 'refuse')}",
            )  # fmt: skip
            if duplicates == "refuse":
                if not keep_going:
                    raise problem
                found.refused.append(Refused(place, str(problem), {}))
                continue
            found.skipped["contradicting"] += 1
            if duplicates == "first":
                continue
            kept.pop(other.id or f"{other.identifier} {other.ts}", None)
            first[said] = (event, place)
        if event.id and event.id in kept and kept[event.id][0] != event:
            raise DataError(
                "Two rows have one event id", where=place, why=f"the other is {kept[event.id][1]}",
                do="Give each its own, or leave the ids out",
            )  # fmt: skip
        kept[event.id or f"{event.identifier} {event.ts}"] = (event, place)
    newest: dict[str, int] = {}
    times = []
    for event, _ in kept.values():  # a row without a time follows those before it of the same answer
        newest[event.identifier] = max(newest.get(event.identifier, 0), event.ts)
        times.append(event.ts or newest[event.identifier])
    ordered = sorted(zip(times, kept.values(), strict=True), key=lambda entry: entry[0])
    return [pair for _, pair in ordered]


def _answer(event: FeedbackEvent) -> tuple[Any, ...]:
    """What was said, whichever of two items stood first."""
    if event.kind == "pairwise" and event.value in ("a", "b"):
        return (event.kind, event.items["ab".index(event.value)], event.tombstone)
    if event.kind == "ranking" and not event.tombstone:
        return (event.kind, *sorted(zip(event.items, event.value, strict=True)))
    return (event.kind, event.value, event.tombstone)


def _swapped(one: FeedbackEvent, other: FeedbackEvent) -> str:
    """Say that two answers which read alike are about the same responses in another order."""
    return ", with the order of the responses swapped" if one.items != other.items else ""


def take_rows(path: str | Path, rows: Iterable[Refused]) -> Iterator[dict[str, Any]]:
    """Yield refused rows as they are written beside the file: where, why, and the row's own fields."""
    for row in rows:
        yield {"where": row.place, "why": row.reason, "row": json_ready(row.fields), "file": str(path)}
