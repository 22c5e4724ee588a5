"""From the fields of a form to events: what was answered on one screen, checked against what the task asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.server.assign import Shown
from align.feedback.tasks import TaskConfig

EXPOSURE_KEY = "shown"
LONGEST_TEXT = 20_000

Fields = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """What was answered on one screen.

    Args:
        values: value by key: a rating by dimension, "thumb", a choice or ranks under the one dimension.
        reactions: names of reactions.
        reason, correction: texts, "" where there is none.
    """

    values: dict[str, Any] = field(default_factory=dict)
    reactions: tuple[str, ...] = ()
    reason: str = ""
    correction: str = ""


def read_answer(config: TaskConfig, shown: Shown, fields: Fields) -> Answer:
    """Return the answer in the fields of a form.

    Raises:
        DataError: something is missing, or is not what the task offers; `what` is a sentence for the annotator.
    """
    readers = {"rating": _ratings, "pairwise": _choice, "ranking": _ranks, "thumbs": _thumb}
    values = readers[config.kind](config, shown, fields)
    reactions = tuple(name for name in config.reactions if name in fields.get("reaction", ()))
    if config.kind == "thumbs" and not values and not reactions:
        raise DataError("Choose a thumb" + (" or a reaction" if config.reactions else ""))
    reason = _text(fields, "reason", config.ask_reason, "Say why")
    correction = ""
    if correctable(config, shown):
        correction = _text(fields, "correction", config.ask_correction, "Write a better response")
        said = shown.unit.items[0].response
        correction = "" if isinstance(said, str) and correction.strip() == said.strip() else correction
    return Answer(values, reactions, reason, correction)


def correctable(config: TaskConfig, shown: Shown) -> bool:
    """Whether a better response is asked for: on a screen that shows one text."""
    return config.ask_correction != "no" and [item.media for item in shown.unit.items] == ["text"]


def shown_items(shown: Shown) -> list[Item]:
    """Return the items of a screen from the left."""
    return [shown.unit.items[i] for i in shown.order]


def screen_session(config: TaskConfig, unit_id: str) -> str:
    """Return the session of a screen's events: the task and the unit, so that one screen is one session."""
    return f"{config.name}:{unit_id}"


def exposure_event(config: TaskConfig, annotator: str, shown: Shown) -> FeedbackEvent:
    """Return the event that a screen was shown."""
    return FeedbackEvent("exposure", key=EXPOSURE_KEY, ts=shown.shown_ms, **_common(config, annotator, shown))


def answer_events(
    config: TaskConfig, annotator: str, shown: Shown, answer: Answer, latency_ms: int, now_ms: int
) -> list[FeedbackEvent]:
    """Return the events of an answer, one for each rating, reaction and text."""
    common = {**_common(config, annotator, shown), "latency_ms": latency_ms, "ts": now_ms}
    kind = {"rating": "ordinal", "pairwise": "pairwise", "ranking": "ranking", "thumbs": "binary"}[config.kind]
    events = []
    for key, value in answer.values.items():
        extra: dict[str, Any] = {"scale": config.scale} if kind == "ordinal" else {}
        if value == "tie" and kind == "pairwise":
            extra["tie_origin"] = "judged"
        events.append(FeedbackEvent(kind, value=value, key=key, **common, **extra))
    events += [FeedbackEvent("reaction", value=name, key=name, **common) for name in answer.reactions]
    for key in ("reason", "correction"):
        if text := getattr(answer, key):
            events.append(FeedbackEvent("text", value=text, key=key, **common))
    return events


def answer_of(config: TaskConfig, events: Sequence[FeedbackEvent]) -> Answer:
    """Return the answer that `answer_events` made these current events of."""
    values = {e.key: e.value for e in events if e.kind in ("ordinal", "pairwise", "ranking", "binary")}
    texts = {e.key: e.value for e in events if e.kind == "text"}
    reactions = tuple(e.key for e in events if e.kind == "reaction")
    return Answer(values, reactions, texts.get("reason", ""), texts.get("correction", ""))


def complete(config: TaskConfig, answer: Answer) -> bool:
    """Whether an answer says all that the task asks for, texts aside."""
    if config.kind == "rating":
        return all(dimension.name in answer.values for dimension in config.dimensions)
    return bool(answer.values or answer.reactions)


def _common(config: TaskConfig, annotator: str, shown: Shown) -> dict[str, Any]:
    items = shown_items(shown)
    policies = {str(item.metadata.get("policy") or "") for item in items}
    return {
        "items": tuple(item.id for item in items),
        "annotator": annotator,
        "session": screen_session(config, shown.unit.id),
        "exposure": "shown",
        "position": shown.place,
        "policy": policies.pop() if len(policies) == 1 else "",
    }


def _ratings(config: TaskConfig, shown: Shown, fields: Fields) -> dict[str, Any]:
    low, high = config.scale
    values = {}
    for i, dimension in enumerate(config.dimensions):
        text = _one(fields, f"d{i}")
        if not text:
            raise DataError(f"Rate {dimension.name}")
        number = _whole(text)
        if number is None or not low <= number <= high:
            raise DataError(f"Rate {dimension.name} from {low} to {high}")
        values[dimension.name] = number
    return values


def _choice(config: TaskConfig, shown: Shown, fields: Fields) -> dict[str, Any]:
    offered = ["a", "b"] + ["tie"] * config.tie + ["both_bad"] * config.both_bad
    choice = _one(fields, "choice")
    if choice not in offered:
        raise DataError("Choose one")
    return {config.dimensions[0].name: choice}


def _ranks(config: TaskConfig, shown: Shown, fields: Fields) -> dict[str, Any]:
    """Read one rank an item; gaps are closed, so that 1, 3, 3 is 1, 2, 2."""
    count = len(shown.order)
    ranks = [_whole(_one(fields, f"r{place}")) for place in range(count)]
    if None in ranks:
        raise DataError("Give every output a rank")
    if not all(1 <= rank <= count for rank in ranks if rank is not None):
        raise DataError(f"Ranks run from 1 to {count}")
    if not config.tie and len(set(ranks)) < count:
        raise DataError("No two outputs may share a rank")
    levels = sorted({rank for rank in ranks if rank is not None})
    return {config.dimensions[0].name: [levels.index(rank) + 1 for rank in ranks if rank is not None]}


def _thumb(config: TaskConfig, shown: Shown, fields: Fields) -> dict[str, Any]:
    thumb = _one(fields, "thumb")
    if thumb not in ("", "up", "down"):
        raise DataError("Choose a thumb")
    return {"thumb": thumb == "up"} if thumb else {}


def _text(fields: Fields, name: str, asked: str, wanted: str) -> str:
    if asked == "no":
        return ""
    text = _one(fields, name).replace("\r\n", "\n").strip()
    if len(text) > LONGEST_TEXT:
        raise DataError(f"A text may have {LONGEST_TEXT:,} characters, this one has {len(text):,}")
    if not text and asked == "required":
        raise DataError(wanted)
    return text


def _one(fields: Fields, name: str) -> str:
    values = fields.get(name, ())
    return values[0] if len(values) == 1 else ""


def _whole(text: str) -> int | None:
    return (
        int(text) if text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal() and len(text) < 8 else None
    )


def fields_of(config: TaskConfig, answer: Answer) -> dict[str, list[str]]:
    """Return the form fields that `read_answer` reads as this answer."""
    values, fields = answer.values, {}
    if config.kind == "rating":
        fields = {f"d{i}": [str(values[d.name])] for i, d in enumerate(config.dimensions) if d.name in values}
    elif config.kind == "thumbs":
        fields = {"thumb": ["up" if values["thumb"] else "down"]} if "thumb" in values else {}
    elif found := values.get(config.dimensions[0].name):
        fields = {"choice": [found]} if config.kind == "pairwise" else {f"r{i}": [str(r)] for i, r in enumerate(found)}
    fields |= {"reaction": list(answer.reactions)} if answer.reactions else {}
    return fields | {name: [text] for name in ("reason", "correction") if (text := getattr(answer, name))}
