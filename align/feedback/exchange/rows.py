"""From one row to its items and events: every cell read strictly, and refused as file:row:column."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item, content_id
from align.feedback.exchange import values
from align.feedback.exchange.layouts import ABOUT, FIELDS, MADE_BY, SAID, SHOWN, UNORDERED
from align.feedback.exchange.tables import Row, short
from align.feedback.exchange.values import MISSING
from align.registry import suggest

DUPLICATES = {
    "refuse": "refuse the file",
    "first": "keep the first",
    "last": "keep the last",
    "all": "keep each as an answer of its own",
}
UNRANKED = "responses without a rank"
"""Reason of what is skipped that is no answer: responses of a row in which others are ranked."""

_MEND = "Correct it; `align feedback import --keep-going` takes the other rows"
_RATED = "; a column of ratings is read by --columns rating=label --scale 1-5, or whatever its scale is"
_SINGLE = ("rating", "label", "reaction", "text")
KINDS_OF = {"rating": "ordinal", "label": "binary", "reaction": "reaction", "text": "text"}
KINDS_OF |= {"preference": "pairwise", "ranks": "ranking"}


@dataclass(frozen=True)
class Reading:
    """How a file is to be read.

    Args:
        layout: one of `LAYOUTS`, or "auto": the first row decides.
        columns: names of the columns of a CSV file without a header, in order; "-" leaves one out.
        renamed: field -> column of the file; `data.question` reaches into objects, and `rating=ann1|ann2` reads one
            answer from each column, whose names become the annotators.
        key, annotator, source, media, scale: for rows that do not say.
        duplicates: of answers that contradict each other and have no time to tell which is newer.
        policies: words for `duplicates` that whoever asks takes, for the message about a contradiction.
        identical: "refuse" or "skip" a comparison of two identical responses.
        missing: "refuse", "skip" or "exposure" (shown and left unanswered) where there is no answer. A label or
            reaction that is missing is an exposure unless this says otherwise.
        best_is_high: ranks count upwards, the best last.
        salt: where given, annotators become hashes of it and their names.
        delimiter: of CSV.
    """

    layout: str = "auto"
    columns: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    key: str = "quality"
    annotator: str = ""
    source: str = "human"
    media: str = "text"
    scale: tuple[int, int] | None = None
    duplicates: str = "refuse"
    policies: Sequence[str] = tuple(DUPLICATES)
    identical: str = "refuse"
    missing: str = ""
    best_is_high: bool = False
    salt: str = ""
    delimiter: str = ""


def events_of(
    row: Row, how: Reading, skipped: Counter[str], ignored: set[str]
) -> tuple[list[Item], list[FeedbackEvent]]:
    """Return the items and events of a row in the vocabulary of `layouts`.

    Args:
        skipped: counts what the row does not say, by reason.
        ignored: collects columns that have no place.

    Raises:
        DataError: a field that cannot be read, as file:row:column.
    """
    items, ranked = _items(row, how, ignored)
    said = [name for name in SAID if name in row.fields]
    wrong = [name for name in said if name not in _SINGLE and not values.is_missing(row.fields[name])]
    if len(items) == 1 and wrong:
        raise row.wrong(
            wrong[0], "A comparison needs several responses", do="Give response_a and response_b, or responses"
        )
    about = _about(row, how)
    if len({item.id for item in items}) < len(items):
        if how.identical == "skip":
            skipped["identical responses"] += 1
            return [], []
        raise row.wrong(
            "responses" if "responses" in row.fields else "response_b", "Two of the compared responses are identical",
            do="Remove the row, or add --identical skip",
        )  # fmt: skip
    ids = tuple(item.id for item in items)
    shown = bool(row.fields.get(SHOWN)) or about.get("exposure") == "shown"
    answers = {name: _value(row, name, len(items), how, ranked) for name in said}
    given = {name: value for name, value in answers.items() if value is not MISSING}
    events = []
    for name, value in given.items():
        about_ids = ids
        if name == "ranks" and None in value:
            skipped[UNRANKED] += value.count(None)
            about_ids = tuple(i for i, rank in zip(ids, value, strict=True) if rank is not None)
            value = tuple(rank for rank in value if rank is not None)
        # Several answers in one row share its id and identifier, which are for one answer each.
        apart = {part: f"{about[part]}:{name}" for part in ("id", "identifier") if about[part] and len(given) > 1}
        events.append(_event(row, name, KINDS_OF[name], about_ids, value, {**about, **apart}, how))
    if not events:
        unsaid = next(iter(answers), "")
        events = _unanswered(row, unsaid, shown, ids, about, how, skipped)
    return items, events


def _unanswered(
    row: Row,
    name: str,
    shown: bool,
    ids: tuple[str, ...],
    about: Mapping[str, Any],
    how: Reading,
    skipped: Counter[str],
) -> list[FeedbackEvent]:
    """Return the exposure that a row without any answer stands for, or nothing where it is to be skipped."""
    if shown or how.missing == "exposure" or (not how.missing and name in ("label", "reaction")):
        kept = about if row.fields.get("exposure") else {**about, "id": "", "identifier": ""}
        return [_event(row, name or "exposure", "exposure", ids, None, {**kept, "exposure": "shown"}, how)]
    if not name:
        raise row.wrong("response", "A row says nothing about its response", do=f"It needs one of {', '.join(SAID)}")
    if how.missing != "skip":
        raise row.wrong(name, "There is no answer", do="Fill it in, or add --missing skip or exposure")
    skipped["no answer"] += 1
    return []


def _items(row: Row, how: Reading, ignored: set[str]) -> tuple[list[Item], list[int]]:
    """Return a row's items in their order, and for each the place it had in the row."""
    fields = row.fields
    extra = {k: v for k, v in fields.items() if k not in (*FIELDS, UNORDERED, SHOWN)}
    extra |= {name: fields[name] for name in MADE_BY if not values.is_missing(fields.get(name))}
    prompt, given = _read(row, "prompt", values.text_or_chat), _read(row, "input", values.text)
    if not prompt:
        raise row.wrong("prompt", "A prompt is empty", do="Write it, or remove the row")
    media = _read(row, "media", values.text) or how.media
    names, texts = _responses(row)
    items = []
    for name, raw in zip(names, texts, strict=True):
        response = _converted(row, name, values.text_or_chat, raw)
        kind = "chat" if isinstance(response, list) and media == "text" else media
        if raw is None or (isinstance(raw, float) and math.isnan(raw)) or (response == "" and kind != "text"):
            raise row.wrong(name, "A response is missing", do="Write it, or remove the row")
        metadata = {str(k): json_ready(v) for k, v in extra.items()} if len(names) == 1 else {}
        metadata |= _made_by(row, name)
        try:
            items.append(Item(prompt, response, given, kind, metadata))
        except DataError as error:
            raise row.wrong("media", error.what, do=error.do) from error
    if len(items) > 1:
        used = {f"{word}{name.removeprefix('response')}" for name in names for word in ("model", "policy")}
        ignored |= set(map(str, extra)) - (used & set(MADE_BY))
    order = list(range(len(items)))
    if fields.get(UNORDERED):
        order.sort(key=lambda i: items[i].id)
    return [items[i] for i in order], order


def _made_by(row: Row, name: str) -> dict[str, str]:
    """Return what a row says of the maker of the response in field `name`, as metadata of the item."""
    ending = name.removeprefix("response")
    found = {word: _read(row, f"{word}{ending}", values.text) for word in ("model", "policy")}
    return {word: value for word, value in found.items() if value.strip()} if name != "responses" else {}


def _responses(row: Row) -> tuple[list[str], Sequence[Any]]:
    """Return a row's responses and the field of each; where a table has columns for several kinds, those it fills."""
    fields = row.fields
    given = {name for name in ("response", "response_a", "response_b", "responses") if name in fields}
    filled = {name for name in given if not values.is_missing(fields[name])} or given
    if "responses" in filled:
        listed = fields["responses"]
        if not isinstance(listed, (list, tuple)) or len(listed) < 2:
            raise row.wrong("responses", "Responses are not a list of two or more", why=f"found {short(listed)}")
        return ["responses"] * len(listed), listed
    names = ["response_a", "response_b"] if {"response_a", "response_b"} & filled else ["response"]
    for name in names:
        if name not in fields:
            raise row.wrong(name, "A row has no such column", do=suggest(name, map(str, fields)))
    return names, [fields[name] for name in names]


def json_ready(value: Any) -> Any:
    """Return a cell as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _converted(row: Row, column: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except (ValueError, OverflowError) as error:
        do = _MEND + (_RATED if convert is values.binary else "")
        raise row.wrong(column, "A cell cannot be read", why=f"{error}, found {short(value)}", do=do) from error


def _read(row: Row, column: str, convert: Callable[[Any], Any]) -> Any:
    return _converted(row, column, convert, row.fields.get(column))


def _about(row: Row, how: Reading) -> dict[str, Any]:
    """Return the fields of an event that do not depend on what was said."""
    texts = {name: _read(row, name, values.text) for name in ("session", "policy", "reply", "tie_origin", "identifier")}
    annotator = _read(row, "annotator", values.text) or how.annotator
    about = {
        **texts, "annotator": content_id(how.salt, annotator)[:16] if how.salt and annotator else annotator,
        "key": _read(row, "key", values.text) or how.key, "source": _read(row, "source", values.text) or how.source,
        "ts": _read(row, "ts", values.milliseconds) or 0, "id": _read(row, "event_id", values.text),
    }  # fmt: skip
    for name in ("position", "latency_ms"):
        number = _read(row, name, values.whole)
        if number is not MISSING:
            if not 0 <= number < 2**62:
                raise row.wrong(name, "A number is below 0 or beyond bounds", why=f"found {number}")
            about[name] = number
    if not values.is_missing(row.fields.get("propensity")):
        about["propensity"] = _read(row, "propensity", values.number_of)
    if not values.is_missing(row.fields.get("exposure")):
        about["exposure"] = _read(row, "exposure", values.text).strip().lower()
    return about


def _value(row: Row, name: str, count: int, how: Reading, order: Sequence[int]) -> Any:
    value = row.fields[name]
    if name == "ranks":
        if values.is_missing(value):
            return MISSING
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise row.wrong(name, "Ranks are not one for every response", why=f"found {short(value)} for {count}")
        found = _converted(row, name, lambda v: values.ranks(v, best_is_high=how.best_is_high), value)
        return MISSING if all(rank is None for rank in found) else tuple(found[i] for i in order)
    convert = {
        "rating": values.whole, "label": values.binary, "reaction": values.reaction, "preference": values.preference,
    }.get(name, lambda v: MISSING if values.is_missing(v) else values.text(v))  # fmt: skip
    found = _converted(row, name, convert, value)
    if name == "preference" and found is not MISSING:
        if count != 2:
            raise row.wrong(name, "A preference is about two responses", why=f"there are {count}")
        if list(order) == [1, 0]:
            found = {"a": "b", "b": "a"}.get(found, found)
    return found


def _event(
    row: Row, name: str, kind: str, items: tuple[str, ...], value: Any, about: Mapping[str, Any], how: Reading
) -> FeedbackEvent:
    about = dict(about)
    if kind != "pairwise" or value != "tie":
        about.pop("tie_origin")
    scale = None
    if kind == "ordinal":
        scale = _read(row, "scale", parse_scale) or how.scale
        if scale is None:
            raise row.wrong(
                name,
                "A rating needs its scale",
                do="Import it with its scale, `align feedback import STORE FILE --scale 1-7`, or add a column scale",
            )
    try:
        event = FeedbackEvent(kind=kind, items=items, value=value, scale=scale, **about)
    except DataError as error:
        column = next((c for c in ABOUT if error.why.startswith(c)), name)
        raise row.wrong(column, "A row is no feedback", why=error.why, do=error.do or _MEND) from error
    if event.id:
        return event
    parts = [getattr(event, f.name) for f in dataclasses.fields(event) if f.name != "id"]
    return dataclasses.replace(event, id=content_id("import", *parts))


def parse_scale(value: Any) -> tuple[int, int] | None:
    """Return (lowest, highest) of "1-7", "-2..2" or [1, 7], None where there is none; else raise `ValueError`."""
    if values.is_missing(value):
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(-?\d{1,9})\s*(?:-|\.\.|,)\s*(-?\d{1,9})\s*", value, re.ASCII)
        value = match.groups() if match else None
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(map(values.is_missing, value)):
        raise ValueError("expected a scale such as 1-7")
    low, high = values.whole(value[0]), values.whole(value[1])
    if not low < high:
        raise ValueError("expected a scale such as 1-7, the lowest first")
    return low, high


def from_record(row: Row) -> tuple[list[Item], list[FeedbackEvent]]:
    """Return the items and the event of a row that `export --as events` wrote.

    Tables hold items and value as JSON text, in `items_json` and `value_json`; JSONL holds them as they are.
    """
    fields = dict(row.fields)
    for name in ("items", "value"):
        packed: Any = fields.get(f"{name}_json")
        if not values.is_missing(packed):
            try:
                fields[name] = json.loads(packed)
            except (TypeError, ValueError, RecursionError) as error:
                raise row.wrong(f"{name}_json", "A cell is not JSON", why=str(error)) from error
    listed = fields.get("items")
    if not isinstance(listed, list) or not all(isinstance(part, Mapping) for part in listed):
        raise row.wrong("items", "Items are not a list of objects", why=f"found {short(listed)}")
    items = []
    for part in listed:
        prompt, response = (_converted(row, "items", values.text_or_chat, part.get(n)) for n in ("prompt", "response"))
        extra = part.get("metadata") or {}
        if not isinstance(extra, Mapping):
            raise row.wrong("items", "An item's metadata is no object", why=f"found {short(extra)}")
        try:
            given = _converted(row, "items", values.text, part.get("input"))
            items.append(Item(prompt, response, given, part.get("media") or "text", json_ready(extra)))
        except (DataError, TypeError) as error:
            raise row.wrong("items", "An item cannot be read", why=str(error)) from error
    known = {f.name for f in dataclasses.fields(FeedbackEvent)} - {"items", "value", "scale"}
    about = {}
    for name in known & set(fields):
        value = fields[name]
        if not (values.is_missing(value) if name in _RECORD else value is None or value != value):
            about[name] = _converted(row, name, _RECORD.get(name, values.text), value)
    said = fields.get("value")
    said = tuple(said) if isinstance(said, list) else said
    scale = _read(row, "scale", parse_scale)
    try:
        event = FeedbackEvent(items=tuple(i.id for i in items), value=said, scale=scale, **about)
    except (DataError, TypeError) as error:
        why = error.why if isinstance(error, DataError) else str(error)
        column = next((c for c in ("items", *ABOUT) if why.startswith(c)), "value")
        raise row.wrong(column, "A row is no event", why=why) from error
    return items, [event]


_RECORD: dict[str, Callable[[Any], Any]] = {
    "ts": values.whole, "position": values.whole, "latency_ms": values.whole, "propensity": values.number_of,
    "tombstone": values.binary,
}  # fmt: skip


def column_of(event: FeedbackEvent) -> str:
    """Return the field that says what this event does."""
    return next((name for name, kind in KINDS_OF.items() if kind == event.kind), "value")
